"""Pages as a reader sees them: in a headless Chromium, as wide as a desk's screen and a telephone's, without a network.

A test of a page asks for the fixture `check_page` (tests/train/conftest.py). To look at pages by eye:
`python -m tests.browser PAGE...` checks each and writes PAGE-desk.png and PAGE-phone.png beside it.

Chromium is spoken to in the DevTools protocol over a pipe, so nothing but Chromium itself need be installed.
"""

import base64
import fcntl
import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = "needs chromium, to open a page as a reader does"
WIDTHS = {"desk": (1280, 900), "phone": (390, 844)}
"""Width and height of the window, in CSS pixels."""
SMALLEST_TEXT = 8
"""Height of letters in CSS pixels, below which nobody reads them."""
TIMEOUT = 60

LOOK = """(async () => {
  const pictures = [...document.images];
  pictures.forEach(picture => picture.loading = "eager");
  const drawn = await Promise.allSettled(pictures.map(picture => picture.decode()));
  const scale = ({a, b, c, d}) => Math.sqrt(Math.abs(a * d - b * c));
  const sizes = [...document.querySelectorAll("svg text")].filter(text => text.checkVisibility())
    .map(text => parseFloat(getComputedStyle(text).fontSize) * scale(text.getScreenCTM()));
  return {
    pictures: pictures.length,
    broken: pictures.filter((_, i) => drawn[i].status != "fulfilled").map(picture => picture.alt || picture.src.slice(0, 60)),
    figures: [...document.querySelectorAll("svg")].filter(svg => svg.getBoundingClientRect().width > 50).length,
    width: document.documentElement.scrollWidth,
    smallest_text: sizes.length ? Math.min(...sizes) : null,
  };
})()"""


@dataclass(frozen=True)
class Seen:
    """A page in a window."""

    pictures: int
    broken: list[str]
    """Pictures that are not drawn, by their alternative text."""
    figures: int
    """Drawings (SVG) that are wider than 50 pixels."""
    width: int
    """Of all there is, in CSS pixels; more than the window's scrolls sideways."""
    smallest_text: float | None
    """Of the drawings' letters, in CSS pixels."""
    complaints: list[str]
    """Errors and warnings in the console, exceptions, what could not be loaded."""
    requests: list[str]
    """Addresses that were asked for, but for the page's own and for data in it."""


class Browser:
    """One Chromium, which opens pages one after the other. `with Browser() as browser`."""

    def __enter__(self) -> "Browser":
        assert PROGRAM is not None, MISSING
        self.profile = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        self.errors = Path(self.profile.name, "stderr").open("w+")
        commands, self.commands = os.pipe()
        self.answers, answers = os.pipe()
        # Chromium reads 3 and writes 4; moved up, neither is in the way of the other.
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (commands, answers)]
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            "--remote-debugging-pipe",
            "--host-resolver-rules=MAP * ~NOTFOUND",  # no name and no number leads anywhere
            "--disable-background-networking",
            f"--user-data-dir={self.profile.name}",
        ]
        script = f'exec "$@" 3<&{theirs[0]} 4>&{theirs[1]} {theirs[0]}<&- {theirs[1]}>&-'
        self.process = subprocess.Popen(
            ["bash", "-c", script, "bash", PROGRAM, *flags],
            pass_fds=theirs,
            stdin=subprocess.DEVNULL,
            stdout=self.errors,
            stderr=self.errors,
        )
        for end in (commands, answers, *theirs):
            os.close(end)
        self.said, self.count = b"", 0
        self.session: str | None = None
        """Of the tab that is spoken to; None: the browser itself."""
        self.events: list[dict[str, Any]] = []
        """Of the tab, since it was opened."""
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.commands)  # at the end of its commands it ends
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.answers)
        self.errors.close()
        self.profile.cleanup()

    def ask(self, method: str, **parameters: object) -> dict[str, Any]:
        """The result of a method of the DevTools protocol."""
        self.count += 1
        command = {"id": self.count, "method": method, "params": parameters}
        command |= {"sessionId": self.session} if self.session is not None else {}
        os.write(self.commands, json.dumps(command).encode() + b"\0")
        while (answer := self._next(method)).get("id") != self.count:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer["result"]
        return result

    def _next(self, awaited: str) -> dict[str, Any]:
        deadline = time.monotonic() + TIMEOUT
        while b"\0" not in self.said:
            ready, _, _ = select.select([self.answers], [], [], max(0, deadline - time.monotonic()))
            more = os.read(self.answers, 1 << 20) if ready else b""
            if not more:
                self.errors.seek(0)
                raise AssertionError(f"chromium did not answer {awaited}; it said: {self.errors.read()[-2000:]}")
            self.said += more
        message, _, self.said = self.said.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    def open(self, page: Path, window: str, *, picture: Path | None = None, dark: bool = False) -> Seen:
        """Open a page from the disk, wait until all in it is drawn, and look.

        window: one of WIDTHS. picture: PNG to write of the whole page. dark: as for a reader who prefers it so.
        """
        width, height = WIDTHS[window]
        is_phone = window == "phone"
        tab = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session, self.events = self.ask("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"], []
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.ask(f"{domain}.enable")
        self.ask("Page.setLifecycleEventsEnabled", enabled=True)
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1 + is_phone, mobile=is_phone
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        navigated = self.ask("Page.navigate", url=page.absolute().as_uri())
        assert "errorText" not in navigated, f"{page}: {navigated['errorText']}"
        loaded = {"name": "load", "loaderId": navigated["loaderId"]}
        while not any(loaded.items() <= event.get("params", {}).items() for event in self.events):
            self.events.append(self._next("that the page is loaded"))
        looked = self.ask("Runtime.evaluate", expression=LOOK, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in looked, looked["exceptionDetails"]
        if picture is not None:
            taken = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
            picture.write_bytes(base64.b64decode(taken["data"]))
        self.session = None
        self.ask("Target.closeTarget", targetId=tab)
        return Seen(**looked["result"]["value"], complaints=self._complaints(), requests=self._requests(page))

    def _complaints(self) -> list[str]:
        found = []
        for event in self.events:
            of = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                found.append(of["exceptionDetails"].get("exception", {}).get("description", of["exceptionDetails"]["text"]))
            elif event.get("method") == "Runtime.consoleAPICalled" and of["type"] in ("error", "assert", "warning"):
                found.append(" ".join(str(one.get("value", one.get("description"))) for one in of["args"]))
            elif event.get("method") == "Log.entryAdded" and of["entry"]["level"] in ("error", "warning"):
                found.append(of["entry"]["text"])
        return found

    def _requests(self, page: Path) -> list[str]:
        asked = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [url for url in asked if url != page.absolute().as_uri() and not url.startswith("data:")]


class _Addresses(HTMLParser):
    """What of a page's text a browser would fetch, now or when something is opened or pointed at."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.is_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.is_style = tag == "style"
        for name, value in attrs:
            fetched = name in ("src", "srcset", "poster", "data", "background", "action", "formaction", "xlink:href")
            if (fetched or (name == "href" and tag != "a")) and value:
                self._keep(value)
            if name == "style" and value:
                self.handle_style(value)
            if (name, value) == ("http-equiv", "refresh"):
                self.found.append("<meta http-equiv=refresh>")

    def handle_data(self, data: str) -> None:
        if self.is_style:
            self.handle_style(data)

    def handle_style(self, text: str) -> None:
        for address in re.findall(r"""url\(\s*["']?([^"')]*)|@import\s*["']([^"']*)""", text):
            self._keep("".join(address))

    def _keep(self, address: str) -> None:
        if not address.startswith(("data:", "#")):
            self.found.append(address)


def addresses(html: str) -> list[str]:
    """Addresses in a page that are not in the page itself; links to follow are none."""
    parser = _Addresses()
    parser.feed(html)
    return parser.found


def check(browser: Browser, page: Path, *, pictures: bool = False) -> Seen:
    """Assert what holds for each of our pages: it needs nothing but itself, the browser complains of nothing, every picture
    is drawn, it does not scroll sideways, and what is written in its drawings can be read; at both widths.

    pictures: whether to write PAGE-desk.png and PAGE-phone.png. Returns: what was seen on the desk.
    """
    found = addresses(page.read_text(encoding="utf-8"))
    assert not found, f"{page.name} is not self-contained, it names {found[:5]}"
    seen = {}
    for window, (width, _) in WIDTHS.items():
        one = browser.open(page, window, picture=page.with_name(f"{page.stem}-{window}.png") if pictures else None)
        where = f"{page.name} ({window})"
        assert not one.requests, f"{where} asks for {one.requests}"
        assert not one.complaints, f"{where}: the console says {one.complaints}"
        assert not one.broken, f"{where}: pictures that are not drawn: {one.broken}"
        assert one.width <= width, f"{where} is {one.width} pixels wide and scrolls sideways"
        letters = one.smallest_text
        assert letters is None or letters >= SMALLEST_TEXT, f"{where}: letters of {letters:.1f} pixels in a drawing"
        seen[window] = one
    assert seen["desk"].pictures == seen["phone"].pictures and seen["desk"].figures == seen["phone"].figures
    return seen["desk"]


if __name__ == "__main__":
    with Browser() as opened:
        for given in map(Path, sys.argv[1:]):
            print(given, check(opened, given, pictures=True))
