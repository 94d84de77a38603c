"""Which options are paths, in all commands, and the one place where `~` and variables in them are filled in.

An option has one meaning in all commands: `output` is a path in each. Values such as `micro` or `own` hold no `~` and no `$`.
"""

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from softprompt.files import expanded
from softprompt.prompt.templates import is_prompt_file

PATHS = frozenset(
    {
        "base",
        "cameras",
        "config",
        "data.cache",
        "data.original",
        "data.train",
        "data.val",
        "dpo.encoder",
        "dpo.held_out_pairs",
        "dpo.pairs",
        "draft.encoder",
        "export",
        "file",
        "folder",
        "given",
        "grid",
        "incident",
        "init_from",
        "into",
        "model",
        "output",
        "picture",
        "pictures",
        "reference",
        "resume",
        "run",
        "source",
        "state",
        "undo",
        "unet",
        "write_pipeline",
    }
)
"""Options and arguments whose value is a path, or a list of paths."""
PROMPTS = frozenset({"pretrained", "prompt", "prompt.waypoints", "prompts"})
"""Those whose value is a prompt, or a list of them: a file, a template's name, or a text with {view}."""
PHRASES = frozenset({"phrases"})
"""Those whose value is a text, or a text file (.txt)."""


def expand_values(given: argparse.Namespace) -> None:
    """Fill in `~` and variables in all of a command's options that are paths. Raises: InputError naming the option."""
    values = given.items() if isinstance(given, Namespace) else vars(given).items()
    for name, value in list(values):
        new = _expand(name, value)
        if new != value:
            if isinstance(given, Namespace):
                given[name] = new
            else:
                setattr(given, name, new)


def expand_given(argv: Sequence[str], names: Collection[str]) -> list[str]:
    """The same for some options of a command line that is not yet read. Raises: InputError naming the option."""
    found = list(argv)
    for index, argument in enumerate(argv):
        option, equals, value = argument.partition("=")
        if not option.startswith("--") or option[2:] not in names:
            continue
        if equals:
            found[index] = f"{option}={expanded(value, option=option)}"
        elif index + 1 < len(argv):
            found[index + 1] = expanded(argv[index + 1], option=option)
    return found


def _expand(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_expand(name, one) for one in value]
    if isinstance(value, Path) and (name in PATHS or name in PROMPTS):
        return Path(expanded(str(value), option=name))
    if not isinstance(value, str):
        return value
    is_path = name in PATHS or (name in PROMPTS and is_prompt_file(value)) or (name in PHRASES and value.endswith(".txt"))
    return expanded(value, option=name) if is_path else value
