"""YAML files of options, read carefully."""

from pathlib import Path
from typing import Any

import yaml

from softprompt.errors import InputError

_MOST_VALUES, _DEEPEST, _LONGEST = 10_000, 20, 3500
"""Limits of a YAML file: values, depth, characters of a value. The largest comparison has a few hundred values, 4 deep."""


def read_yaml(path: Path) -> Any:
    """The content of a YAML file. Raises: InputError when it is no YAML, has a name twice, or is far too large or deep."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_CarefulLoader)
    except Exception as error:  # which one depends on the tag whose value is wrong, e.g. a day that there is not
        problem = " ".join(f"{'' if isinstance(error, yaml.YAMLError) else type(error).__name__} {error}".split())
        raise InputError(f"{path}: is no YAML ({problem[:300]})") from error


class _CarefulLoader(yaml.SafeLoader):
    """Refuses duplicate names (YAML itself would silently keep the last), and aliases that expand to millions of values, or to
    values inside themselves."""

    def get_single_node(self) -> Any:
        document = super().get_single_node()
        waiting, count = [(document, 0)], 0
        while waiting:
            node, depth = waiting.pop()
            count += 1
            if count > _MOST_VALUES or depth > _DEEPEST:
                raise yaml.MarkedYAMLError(None, None, f"more than {_MOST_VALUES} values, or {_DEEPEST} inside each other")
            if isinstance(node, yaml.ScalarNode) and len(node.value) > _LONGEST:
                raise yaml.MarkedYAMLError(None, None, f"a value of {len(node.value)} characters", node.start_mark)
            inside = node.value if isinstance(node, yaml.CollectionNode) else []
            waiting += [(part, depth + 1) for parts in inside for part in (parts if isinstance(parts, tuple) else (parts,))]
        return document

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{name!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)
