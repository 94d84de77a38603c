"""Names of prompts: a template, a text with {view}, or a file. Nothing large is imported, so options can be checked quickly."""

import re
from dataclasses import dataclass
from pathlib import Path

from softprompt.errors import InputError

VIEWS = ("front", "front_right", "right", "back", "left", "front_left")
"""FaceLift's view names, in its order: azimuths 0, 45, 90, 180, 270, 315 degrees."""
PROMPT_SUFFIXES = (".pt", ".safetensors")
"""Suffixes of prompt files that are read as they are."""
FOREIGN_SUFFIXES = (".npy", ".npz", ".pth", ".bin", ".ckpt")
"""Suffixes of other programs' prompt files; `python -m train.prompts convert` reads them."""
_FIELD = re.compile(r"\$\{(?!(?:view|subject|angle)\})\w+\}")
"""A variable in a path, not a field of a template."""


@dataclass(frozen=True)
class Template:
    """A text with {view}, and optionally {subject} and {angle}."""

    text: str
    joined: str = " "
    """What joins the words of a view: front_right, front-right or front right."""
    prefix: str = ""
    """What the name of each view begins with."""

    def texts(self, *, subject: str, angle: str, views: tuple[str, ...] = VIEWS) -> list[str]:
        """One text per view.

        Raises: InputError when the text has no {view}, or a field of another name.
        """
        if "{view}" not in self.text:
            raise InputError(f"template {self.text!r}: has no {{view}}, so all views would get the same prompt")
        spelled = [self.prefix + view.replace("_", self.joined) for view in views]
        try:
            return [self.text.format(view=view, subject=subject, angle=angle) for view in spelled]
        except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
            raise InputError(
                f"template {self.text!r}: cannot be filled in ({type(error).__name__}: {error}); its fields may be {{view}}, "
                f"{{subject}} and {{angle}}"
            ) from error


TEMPLATES = {
    "facelift": Template("a rendering image of 3D models, {view} view, color map.", "_"),
    "elevated": Template("a rendering image of 3D models, {view} view, from above at an angle, color map.", "_"),
    "current": Template("a rendering image of a 3D model, {view} view, from above at an angle, color map.", "-", "top-"),
    "realistic": Template("a photograph of a {subject}, {view} view, {angle}.", "-"),
    "hybrid": Template("a multi-view image of a {subject}, {view} view, elevated camera angle.", "-"),
    "simple": Template("a {subject}, {view} view, top-down angle.", "-"),
}
"""Templates by name. `facelift` is FaceLift's own text, of which its clr_embeds.pt was made."""


def view_texts(template: str, *, subject: str = "mouse", angle: str = "from above at an angle") -> list[str]:
    """Texts of a named template, or of any text with {view}: one per view, in the order of VIEWS.

    subject, angle: fill {subject} and {angle} where the template has them.
    Raises: InputError as `Template.texts`.
    """
    return TEMPLATES.get(template, Template(template)).texts(subject=subject, angle=angle)


def view_names(num_views: int) -> tuple[str, ...]:
    """FaceLift's names for six views, numbers otherwise."""
    return VIEWS if num_views == len(VIEWS) else tuple(f"view_{v}" for v in range(num_views))


def is_prompt_file(spec: str) -> bool:
    """Whether the name of a prompt is a file, neither a template nor a text with {view}. `${DATA}/x` has no field in it."""
    if Path(spec).suffix in (*PROMPT_SUFFIXES, *FOREIGN_SUFFIXES):
        return True
    return spec not in TEMPLATES and "{" not in _FIELD.sub("", spec)
