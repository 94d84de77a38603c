"""Templates, and the HTML pages of commands: each page fills in train/page.html.jinja with the template in its own folder.

A page names the command that made it, so that it replaces an earlier one of the same command and no other file.
"""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from softprompt.errors import InputError
from softprompt.files import new_file

TEMPLATE = "report.html.jinja"


def made_by(command: str) -> str:
    """The mark of a command's pages."""
    return f"softprompt train.{command}"


def refuse_other_page(path: Path, command: str) -> None:
    """Raises: InputError where `path` is a folder, or a file other than an earlier page of this command."""
    if path.is_dir():
        raise InputError(f"--output {path}: is a folder; expected the name of a page, e.g. {command}.html")
    if path.is_file() and made_by(command) not in path.read_text(encoding="utf-8", errors="replace")[:1000]:
        raise InputError(f"--output {path}: is no earlier page of this command; choose another name, or move it away first")


def write_page(path: Path, command: str, context: Mapping[str, Any]) -> None:
    """Write a command's page, whole or not at all.

    context: the names that its template uses; `command`, the line that makes the page again, among them.
    """
    date = f"{datetime.now().astimezone():%-d %B %Y, %H:%M %Z}"
    page = render(f"{command}/{TEMPLATE}", {"made_by": made_by(command), "date": date, **context})
    with new_file(path) as partial:
        partial.write_text(page, encoding="utf-8")


def render(template: str, context: Mapping[str, Any], *, escape: bool = True) -> str:
    """Fill in a template in train/. A name that `context` lacks is an error. escape: every text in HTML, except Markup."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("train", ""), autoescape=escape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(context)
