"""Make again what is generated in docs/: `python docs/remake.py options`, `python docs/remake.py tutorial`.

options    the tables of docs/options.md, from the options' own words
tutorial   run docs/tutorial.md block by block in a new folder, and put its output and pictures into it
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
TABLES = re.compile(r"(?<=<!-- options -->\n).*?(?=<!-- end of options -->)", re.DOTALL)
FENCE = re.compile(r"^```(?P<kind>\w*)(?P<info>[^\n]*)\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE)
PICTURE = re.compile(r"<!-- made: (?P<made>\S+) -->\n!\[[^\]]*\]\((?P<shown>[^)]+)\)")


# --------------------------------------------------------------------------------------------------------------- options


def option_tables() -> str:
    """A table for each group of options: name, default, meaning, in the words of --help."""
    from train.cli import option_kinds
    from train.options.command_line import make_parser
    from train.options.config import Config

    meanings = {action.dest: " ".join((action.help or "").split()) for action in make_parser()._actions}
    tables: dict[str, list[str]] = {}
    for name in option_kinds(Config):
        group, _, last = name.rpartition(".")
        values = _group(Config(), group)
        default = json.dumps(getattr(values, last)).replace('"', "")
        head = f"## `{group}`\n\n{' '.join((values.__doc__ or '').split())}\n\n" if group else ""
        rows = tables.setdefault(group, [f"{head}| option | default | meaning |", "|---|---|---|"])
        rows.append(f"| `{name}` | `{default}` | {meanings[name]} |")
    return "\n" + "\n\n".join("\n".join(rows) for rows in tables.values()) + "\n\n"


def _group(values: Any, name: str) -> Any:
    for part in filter(None, name.split(".")):
        values = getattr(values, part)
    return values


# -------------------------------------------------------------------------------------------------------------- tutorial


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    kind: str
    """Its language: bash, python, text or another."""
    info: str
    """What stands behind the language."""
    body: str


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    return [Block(m["kind"], m["info"].strip(), m["body"]) for m in FENCE.finditer(page)]


def filled_in(page: str, run: Callable[[Block], str]) -> str:
    """A page whose bash and python blocks are run in order; the text block behind one becomes what it printed.

    A text block with `from=WORD` begins at the first line whose first word it is; what is left out before it is shown as "...".
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
    word = info.removeprefix("from=")
    if word == info:
        return printed
    lines = printed.splitlines()
    first = next((i for i, line in enumerate(lines) if line.split()[:1] == [word]), None)
    if first is None:
        raise SystemExit(f"no line's first word is {word!r} in what was printed:\n{printed}")
    return "\n".join(["..."] * (first > 0) + lines[first:])


def run_apart(block: Block, folder: Path) -> str:
    """Run a block as a reader does, in a process of its own. Returns: what it printed. Progress bars are not kept."""
    argv = ["bash", "-euo", "pipefail", "-c"] if block.kind == "bash" else [sys.executable, "-c"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    print(block.body, end="", flush=True)
    done = subprocess.run([*argv, block.body], cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def pictures(page: str) -> Iterator[tuple[str, str]]:
    """Of each picture that a block makes: where it is made, and where the page shows it from."""
    yield from ((match["made"], match["shown"]) for match in PICTURE.finditer(page))


# ------------------------------------------------------------------------------------------------------------------ both


def main() -> None:
    """Make one of them again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("options", "tutorial"))
    what = parser.parse_args().what
    path = DOCS / f"{what}.md"
    page = path.read_text(encoding="utf-8")
    if what == "options":
        made = TABLES.sub(lambda _: option_tables(), page)
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
