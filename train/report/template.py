"""HTML pages of commands, from the template beside each; what they share is in parts.html.jinja."""

from collections.abc import Mapping
from typing import Any

TEMPLATE = "report.html.jinja"


def render(package: str, context: Mapping[str, Any]) -> str:
    """A package's template filled in. Every text is escaped, but for what is Markup; a name that is not in `context` is an
    error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("train", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(f"{package.removeprefix('train.')}/{TEMPLATE}").render(context)
