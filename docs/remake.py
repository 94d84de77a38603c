"""Generate parts of docs/: `python docs/remake.py options`, `python docs/remake.py tutorial`.

options    the lists of docs/options.md, from the options' own help texts
tutorial   run docs/tutorial.md block by block in a new folder, and put the output and pictures into it
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompt.files import new_file

DOCS = Path(__file__).parent
LISTS = re.compile(r"(?<=<!-- options -->\n).*?(?=<!-- end of options -->)", re.DOTALL)
FENCE = re.compile(r"^```(?P<kind>\w*)(?P<info>[^\n]*)\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE)
PICTURE = re.compile(r"<!-- made: (?P<made>\S+) -->\n!\[[^\]]*\]\((?P<shown>[^)]+)\)")


def option_lists() -> str:
    """A list for each group of options: name and default as in YAML, and the help text."""
    from train.cli import option_kinds
    from train.options.command_line import make_parser
    from train.options.config import Config

    meanings = {action.dest: " ".join((action.help or "").split()) for action in make_parser()._actions}
    lists: dict[str, list[str]] = {}
    for name in option_kinds(Config):
        group, _, last = name.rpartition(".")
        values = _group(Config(), group)
        default = json.dumps(getattr(values, last)).replace('"', "")
        head = [f"## `{group}`\n\n{' '.join((values.__doc__ or '').split())}\n"] if group else []
        lists.setdefault(group, head).append(f"- `{name}: {default}`  {meanings[name]}")
    return "\n" + "\n\n".join("\n".join(items) for items in lists.values()) + "\n\n"


def _group(values: Any, name: str) -> Any:
    for part in filter(None, name.split(".")):
        values = getattr(values, part)
    return values


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    kind: str
    """Language: bash, python, text or another."""
    info: str
    """The rest of the fence's first line."""
    body: str


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    return [Block(m["kind"], m["info"].strip(), m["body"]) for m in FENCE.finditer(page)]


def filled_in(page: str, run: Callable[[Block], str]) -> str:
    """Run the bash and python blocks of a page in order, and replace the text block after each by what it printed.

    A text block with `lines=WORD,WORD` shows only the lines that begin with one of these words, and "..." for what is left out.
    """
    printed: str | None = None

    def replaced(match: re.Match[str]) -> str:
        nonlocal printed
        block = Block(match["kind"], match["info"].strip(), match["body"])
        if block.kind in ("bash", "python"):
            printed = run(block)
            return match.group(0)
        if block.kind != "text" or printed is None:
            return match.group(0)
        body, printed = _shortened(printed, block.info), None
        return f"```text{match['info']}\n{body.strip(chr(10))}\n```"

    return FENCE.sub(replaced, page)


def _shortened(printed: str, info: str) -> str:
    if not info.startswith("lines="):
        return printed
    wanted = info.removeprefix("lines=").split(",")
    words = [(line.split() or [""])[0] for line in printed.splitlines()]
    if missing := set(wanted) - set(words):
        raise SystemExit(f"no line begins with {', '.join(sorted(missing))}; expected by `{info}`; printed was:\n{printed}")
    kept = [line if word in wanted else "..." for line, word in zip(printed.splitlines(), words, strict=True)]
    return "\n".join(line for i, line in enumerate(kept) if line != "..." or kept[max(i - 1, 0)] != "..." or i == 0)


def run_apart(block: Block, folder: Path) -> str:
    """Run a block in a process of its own, as a reader does. Returns: its standard output, which has no progress bars."""
    argv = ["bash", "-euo", "pipefail", "-c"] if block.kind == "bash" else [sys.executable, "-c"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    print(block.body, end="", flush=True)
    done = subprocess.run([*argv, block.body], cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def pictures(page: str) -> Iterator[tuple[str, str]]:
    """For each picture that a block makes: the path where it is made, and the path that the page shows."""
    yield from ((match["made"], match["shown"]) for match in PICTURE.finditer(page))


def main() -> None:
    """Generate one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("options", "tutorial"))
    what = parser.parse_args().what
    path = DOCS / f"{what}.md"
    page = path.read_text(encoding="utf-8")
    if what == "options":
        made = LISTS.sub(lambda _: option_lists(), page)
    else:
        with tempfile.TemporaryDirectory(prefix="softprompt-tutorial-") as name:
            made = filled_in(page, lambda block: run_apart(block, Path(name)))
            for source, shown in pictures(page):
                (DOCS / shown).parent.mkdir(exist_ok=True)
                shutil.copyfile(Path(name) / source, DOCS / shown)
    with new_file(path) as partial:
        partial.write_text(made, encoding="utf-8")
    print(f"made       {path}")


if __name__ == "__main__":
    main()
