"""Pages as a reader sees them: in a headless Chromium, as wide as a desk's screen and a telephone's, without a network.

A test of a page asks for the fixture `check_page` (tests/train/conftest.py). To look at pages by eye:
`python -m tests.browser PAGE...` checks each and writes PAGE-desk.png and PAGE-phone.png beside it.

Playwright controls the Chromium that is installed on the machine; it downloads no browser of its own.
"""

import re
import shutil
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from playwright.sync_api import sync_playwright

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = "needs chromium, to open a page as a reader does"
WIDTHS = {"desk": (1280, 900), "phone": (390, 844)}
"""Width and height of the window, in CSS pixels."""
SMALLEST_TEXT = 8
"""Height of the smallest readable letters, in CSS pixels."""
TIMEOUT = 60_000
"""For one step of opening a page, in milliseconds."""

LOOK = """async () => {
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
}"""


@dataclass(frozen=True)
class Seen:
    """Observations of a page in a window."""

    pictures: int
    broken: list[str]
    """Alternative texts of the pictures that are not drawn."""
    figures: int
    """Drawings (SVG) that are wider than 50 pixels."""
    width: int
    """Width of the content in CSS pixels; if it exceeds the window's, the page scrolls sideways."""
    smallest_text: float | None
    """Height of the smallest letters in drawings, in CSS pixels."""
    complaints: list[str]
    """Errors and warnings in the console, exceptions, failed requests."""
    requests: list[str]
    """Addresses that the page requested, other than its own and data URLs."""


class Browser:
    """One Chromium, which opens pages one after the other. `with Browser() as browser`."""

    def __enter__(self) -> "Browser":
        assert PROGRAM is not None, MISSING
        self.playwright = sync_playwright().start()
        no_network = "--host-resolver-rules=MAP * ~NOTFOUND"  # no name and no number leads anywhere
        self.chromium = self.playwright.chromium.launch(executable_path=PROGRAM, args=["--no-sandbox", no_network])
        return self

    def __exit__(self, *_: object) -> None:
        self.chromium.close()
        self.playwright.stop()

    def open(self, page: Path, window: str, *, picture: Path | None = None) -> Seen:
        """Open a page from the disk, wait until all in it is drawn, and look.

        window: one of WIDTHS. picture: PNG to write of the whole page.
        """
        width, height = WIDTHS[window]
        is_phone = window == "phone"
        complaints: list[str] = []
        requests: list[str] = []
        with self.chromium.new_context(
            viewport={"width": width, "height": height}, device_scale_factor=1 + is_phone, is_mobile=is_phone
        ) as context:
            tab = context.new_page()
            tab.set_default_timeout(TIMEOUT)
            tab.on(
                "console", lambda said: complaints.append(said.text) if said.type in ("error", "assert", "warning") else None
            )
            tab.on("pageerror", lambda error: complaints.append(str(error)))
            tab.on("request", lambda request: requests.append(request.url))
            address = page.absolute().as_uri()
            tab.goto(address)
            looked = tab.evaluate(LOOK)
            if picture is not None:
                tab.screenshot(path=picture, full_page=True)
        requests = [url for url in requests if url != address and not url.startswith("data:")]
        return Seen(**looked, complaints=complaints, requests=requests)


class _Addresses(HTMLParser):
    """Collects the addresses in a page that a browser would fetch, at once or on interaction."""

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
    """Addresses that a page fetches from elsewhere; links to follow do not count."""
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
