"""Paths as users write them: `~` and variables filled in, and where a relative one was looked for."""

import os
import re
from pathlib import Path

from softprompt.errors import InputError
from softprompt.prompt.templates import TEMPLATES

PROMPT_SUFFIXES = (".pt", ".safetensors")
"""Of the prompt files that are read as they are."""
FOREIGN_SUFFIXES = (".npy", ".npz", ".pth", ".bin", ".ckpt")
"""Of prompt files as other programs write them; `python -m train.prompts convert` reads them."""
_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})")
_FIELD = re.compile(r"\$\{(?!(?:view|subject|angle)\})\w+\}")


def expanded(path: str, *, option: str) -> str:
    """A path with `~`, `~user`, `$NAME` and `${NAME}` filled in, as a shell does it.

    option: that gives it, for the error. A name with a `~` or `$` that cannot be filled in stays as it is where it is there.
    Raises: InputError naming a variable that is not set, or a user that there is not.
    """
    unset = [name for match in _VARIABLE.finditer(path) if (name := match[1] or match[2]) not in os.environ]
    filled = os.path.expandvars(os.path.expanduser(path))
    if not (unset or filled.startswith("~")) or os.path.lexists(path):
        return path if unset else filled
    if unset:
        raise InputError(
            f"{option}: is {path}; the environment variable {unset[0]} is not set; expected one that is, or the path written "
            f"out; likely it was set without `export`, or in another shell"
        )
    user = filled.partition(os.sep)[0]
    raise InputError(
        f"{option}: is {path}; this machine has no user {user[1:]!r} with a home folder; expected ~ for your own, ./{user} for "
        f"a folder of that name, or the path written out"
    )


def is_prompt_file(spec: str) -> bool:
    """Whether what names a prompt is a file, neither a template nor a text with {view}. `${DATA}/x` has no field in it."""
    if Path(spec).suffix in (*PROMPT_SUFFIXES, *FOREIGN_SUFFIXES):
        return True
    return spec not in TEMPLATES and "{" not in _FIELD.sub("", spec)


def no_folder(path: str | Path) -> str:
    """What an error that a folder lacks something ends with: where there is no such folder at all; else nothing."""
    return "" if Path(path).is_dir() else f"; there is no such folder{base_of(path)}"


def base_of(path: str | Path) -> str:
    """What follows "no such file" in an error: of a relative path, the folder it was looked for in; else nothing."""
    return "" if Path(path).is_absolute() else f" in the working directory {Path.cwd()}"
