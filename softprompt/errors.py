"""Errors and warnings for the user, in one line each."""

from pathlib import Path


class InputError(ValueError):
    """A file, folder or option that cannot be used.

    The message is one line: the file or field, what was found, what was expected and the likely cause. Commands print it
    without a traceback and exit with code 2; anything else that is raised is a defect of ours and keeps its traceback.
    """


class RunError(RuntimeError):
    """A run that cannot go on although its input was right: numbers that diverged, memory that ran out.

    The message says at which step, what is left and what to change. Commands print it and exit with code 1.
    """


class InputWarning(UserWarning):
    """Input that can be used, but not as it was likely meant. Commands print its one line and hide what libraries warn of."""


def no_folder(path: str | Path) -> str:
    """What an error that a folder lacks something ends with: where there is no such folder at all; else nothing."""
    return "" if Path(path).is_dir() else f"; there is no such folder{base_of(path)}"


def base_of(path: str | Path) -> str:
    """Addition to "no such file" in an error: the folder a relative path was searched in; empty for others."""
    return "" if Path(path).is_absolute() else f" in the working directory {Path.cwd()}"
