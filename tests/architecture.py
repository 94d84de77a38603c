"""The structure of the code in numbers: `python -m tests.architecture`.

Imports are read from the source, those inside functions and of types alone included; `__init__.py` files are left out.
"""

import ast
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("softprompt", "train")
Graph = Mapping[str, frozenset[str]]
"""Each module's dotted name, and the modules of the project that it imports."""


def modules(*packages: str) -> dict[str, Path]:
    """Dotted name => file, without `__init__`."""
    files = [file for package in packages for file in sorted((ROOT / package).rglob("*.py")) if file.name != "__init__.py"]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}


@cache
def imports() -> Graph:
    """Which module imports which."""
    files = modules(*PACKAGES)
    return {name: frozenset(_imported(ast.parse(file.read_text()), files.keys()) - {name}) for name, file in files.items()}


def _imported(tree: ast.AST, known: Iterator[str]) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & set(known)


def circle(graph: Graph) -> list[str]:
    """Modules that import each other in a ring, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def longest_chain(graph: Graph) -> list[str]:
    """The longest path of imports, from the one that imports to the one that imports nothing. The graph has no circle."""
    longest: dict[str, list[str]] = {}
    for name in TopologicalSorter(graph).static_order():
        longest[name] = [name, *max((longest[other] for other in graph[name]), key=len, default=[])]
    return max(longest.values(), key=len)


def modules_in_folders() -> Counter[str]:
    """Folder => how many modules lie in it, without `__init__`."""
    return Counter(str(file.parent.relative_to(ROOT)) for file in modules(*PACKAGES).values())


def function_lengths() -> list[int]:
    """Lines of each function, from its `def` to its end."""
    trees = [ast.parse(file.read_text()) for file in modules(*PACKAGES).values()]
    functions = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return [node.end_lineno - node.lineno + 1 for node in functions if node.end_lineno is not None]


def lines(*packages: str) -> int:
    """Lines of Python, comments and blank ones included."""
    return sum(len(file.read_text().splitlines()) for package in packages for file in (ROOT / package).rglob("*.py"))


def words_of_docs() -> int:
    """Words of Markdown."""
    return sum(len(file.read_text().split()) for file in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def main() -> None:
    graph, lengths = imports(), function_lengths()
    ring = circle(graph)
    folder, width = modules_in_folders().most_common(1)[0]
    print(f"lines of source        {lines(*PACKAGES):,}")
    print(f"lines of tests         {lines('tests'):,}")
    print(f"widest folder          {width} ({folder})")
    print(f"circle of imports      {' -> '.join(ring) or 'none'}")
    print(f"longest chain          {'' if ring else f'{len(longest_chain(graph))}: ' + ' -> '.join(longest_chain(graph))}")
    print(
        f"functions              median {statistics.median(lengths):g} lines, p90 {statistics.quantiles(lengths, n=10)[-1]:g}"
    )
    print(f"longest file           {max((len(f.read_text().splitlines()), n) for n, f in modules(*PACKAGES).items())}")
    print(f"words of documentation {words_of_docs():,}")


if __name__ == "__main__":
    main()
