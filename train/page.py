"""HTML pages of commands, from the template beside each."""

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

TEMPLATE = "report.html.jinja"


def render(package: str, context: Mapping[str, Any]) -> str:
    """A package's template filled in. Every text is escaped, but for what is Markup; a name that is not in `context` is an
    error."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string((files(package) / TEMPLATE).read_text(encoding="utf-8")).render(context)
