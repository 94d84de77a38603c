"""The command line of every command: two parsers, paths with `~` and variables, errors in one line, and the end of `main`.

Nothing here imports torch, so that `--help` is quick.
"""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from softprompt.errors import InputError, RunError
from softprompt.files import expanded
from softprompt.prompt.templates import is_prompt_file

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
"""Exit codes, beside 0."""


# ------------------------------------------------------------------------------------------------------------ end of main


def run_command(command: Callable[[], int], *, interrupted: str) -> int:
    """Run a command, with errors in one line.

    interrupted: printed after Ctrl-C. Returns: the command's exit code, or 2 for bad input, 1 for a failed run, 130 for Ctrl-C.
    """
    calm_environment()
    try:
        return command()
    except (InputError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT if isinstance(error, InputError) else FAILED
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        return INTERRUPTED


def calm_environment() -> None:
    """Settings that the large libraries read when they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it gives advice while it is imported
    if "OMP_WAIT_POLICY" not in os.environ:
        # Threads that wait by spinning make a step ten times as long where another process uses the same cores.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


# ---------------------------------------------------------------------------------------------------------------- parsers


class Parser(ArgumentParser):
    """A command whose options are the fields of dataclasses (`add_class_arguments`)."""

    def __init__(self, *args: Any, **named: Any) -> None:
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
        super().__init__(*args, **{"allow_abbrev": False, **named})
        self.kinds: dict[str, str] = {}
        """Each option of the dataclasses => its values in words."""
        self.reading: str | None = None
        """The file of options that is being read."""

    def add_class_arguments(self, theclass: type, *args: Any, **named: Any) -> list[str]:
        if is_dataclass(theclass):
            self.kinds |= option_kinds(theclass)
        return super().add_class_arguments(theclass, *args, **named)

    def parse_args(self, args: Sequence[str] | None = None, *others: Any, **named: Any) -> Namespace:  # type: ignore[override]
        """Parse, fill in `~` and variables in paths. Ends the program with code 2 for options that cannot be used."""
        given = list(sys.argv[1:] if args is None else args)
        for before, word in pairwise(["", *given]):
            option, equals, value = word.partition("=") if word.startswith("--") else (before, "=", word)
            if option == word and word != "--" and word.rstrip("+") not in self._option_string_actions:
                self.error(unknown(word, self._option_string_actions))
            if equals and option.startswith("--") and option.rstrip("+") not in self._option_string_actions:
                self.error(unknown(option, self._option_string_actions))
            if equals and re.search(r"(^|[\s,:\[{])!!\w", value):  # the YAML reader breaks at some tags, e.g. !!timestamp
                self.error(f"{option.lstrip('-')}: is {value}; expected a value without YAML tags (!!)")
        return _with_paths(self, super().parse_args(given, *others, **named))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        del ex
        message = " ".join(message.split())
        found = re.match(r'Parser key "([\w.]+)": (?:.*(?:Got|Given) value: ?(.*))?', message)
        name, value = found.groups() if found else ("", None)
        inside = [kind for kind in self.kinds if kind.startswith(f"{name}.")]
        if name and inside and value is None:
            likely = f"{name}.weight" if f"{name}.weight" in inside else inside[0]
            message = f"{name}: is a group of options; give one of them, e.g. --{likely}"
        elif name in self.kinds and value is not None:
            message = f"{name}: is {value or 'empty'}; expected {self.kinds[name]}"
        _refuse(f"{self.reading}: {message}" if self.reading else message)


class PlainParser(argparse.ArgumentParser):
    """A command with positional arguments and few options."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), **named: Any) -> None:
        if examples:
            named["formatter_class"] = argparse.RawDescriptionHelpFormatter
        super().__init__(*args, **{"allow_abbrev": False, **named})
        if examples:
            self.epilog = "examples:\n" + "\n".join(f"  {self.prog} {example}" for example in examples)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, fill in `~` and variables in paths; `parse_args` calls this too."""
        given, others = super().parse_known_args(args, namespace)
        return _with_paths(self, given), others

    def error(self, message: str) -> NoReturn:
        option = message.removeprefix("unrecognized arguments: ")
        if option != message and option.startswith("-"):
            message = unknown(option.split()[0].partition("=")[0], self._option_string_actions)
        _refuse(" ".join(message.split()))


def unknown(option: str, known: Iterable[str]) -> str:
    """The error of an unknown option, with the nearest one."""
    names = [name.lstrip("-") for name in known if name.startswith("--")]
    return f"unknown option {option.lstrip('-')!r}{suggestion(option.lstrip('-'), names)}"


def suggestion(wanted: str, known: Sequence[str]) -> str:
    """'; did you mean ...?' if a known name is near, by its whole or its last part; else a hint at --help."""
    last = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}
    near = difflib.get_close_matches(wanted, known, n=1) or [
        last[m] for m in difflib.get_close_matches(wanted.rsplit(".", 1)[-1], list(last), n=1)
    ]
    return f"; did you mean {near[0]!r}?" if near else "; --help lists the options"


def option_kinds(cls: type, prefix: str = "") -> dict[str, str]:
    """The dotted name of each option of a dataclass => its values in words."""
    found: dict[str, str] = {}
    kinds = get_type_hints(cls)
    for f in fields(cls):
        kind, name = kinds[f.name], prefix + f.name
        is_group = isinstance(kind, type) and is_dataclass(kind)
        found |= option_kinds(kind, f"{name}.") if is_group else {name: _in_words(kind)}
    return found


def _in_words(kind: Any) -> str:
    """`Literal["random"] | int` => "random or a whole number"."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_in_words(part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    if get_origin(kind) is list:
        return "a list such as " + ("[a, b]" if get_args(kind)[0] is str else "[0, 1]")
    words = {type(None): "null", bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}
    return words.get(kind, str(kind))


def _refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(BAD_INPUT)


# ------------------------------------------------------------------------------------------------------------------ paths

PATHS = frozenset(
    "base cameras config data.cache data.original data.train data.val dpo.encoder dpo.held_out_pairs dpo.pairs draft.encoder "
    "export file folder given grid incident init_from into model output picture pictures reference resume run source state "
    "undo unet write_pipeline".split()
)
"""Options and arguments of all commands whose value is a path, or a list of paths; a name means the same in each command."""
PROMPTS = frozenset({"also", "pretrained", "prompt", "prompt.waypoints", "prompts"})
"""Those whose value is a prompt, or a list of prompts: a file, a template's name, or a text with {view}."""
PHRASES = frozenset({"phrases"})
"""Those whose value is a text, or a text file (.txt)."""


def expand_given(argv: Sequence[str], names: Collection[str]) -> list[str]:
    """A command line, before it is parsed, with `~` and variables filled in for some options. Raises: InputError."""
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


def _with_paths(parser: Parser | PlainParser, given: Any) -> Any:
    """Parsed options with `~` and variables filled in; values such as `micro` or `own` have none."""
    items = given.items() if isinstance(given, Namespace) else vars(given).items()
    try:
        new = {name: _expand(name, value) for name, value in items}
    except InputError as error:
        parser.error(str(error))
    for name, value in new.items():
        if isinstance(given, Namespace):
            given[name] = value
        else:
            setattr(given, name, value)
    return given


def _expand(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_expand(name, one) for one in value]
    if isinstance(value, Path) and name in PATHS | PROMPTS:
        return Path(expanded(str(value), option=name))
    if not isinstance(value, str):
        return value
    is_path = name in PATHS or (name in PHRASES and value.endswith(".txt"))
    return expanded(value, option=name) if is_path or (name in PROMPTS and is_prompt_file(value)) else value
