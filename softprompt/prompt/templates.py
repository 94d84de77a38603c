"""The named prompt templates: one text per view."""

import re
from dataclasses import dataclass
from pathlib import Path

from softprompt.errors import InputError

VIEWS = ("front", "front_right", "right", "back", "left", "front_left")
"""FaceLift's view names, in its order: azimuths 0, 45, 90, 180, 270, 315 degrees."""


@dataclass(frozen=True)
class Template:
    """A text with {view}, and where it uses them {subject} and {angle}."""

    text: str
    view_spelling: str = "spaces"
    """How a view of two words is written: `underscores` (front_right) or `spaces` (front right)."""

    def texts(self, *, subject: str, angle: str, views: tuple[str, ...] = VIEWS) -> list[str]:
        """One text per view.

        Raises: InputError when the text has no {view}, or a field of another name.
        """
        if "{view}" not in self.text:
            raise InputError(f"template {self.text!r}: has no {{view}}, so all views would get the same prompt")
        spelled = [v.replace("_", " ") if self.view_spelling == "spaces" else v for v in views]
        try:
            return [self.text.format(view=view, subject=subject, angle=angle) for view in spelled]
        except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
            raise InputError(
                f"template {self.text!r}: cannot be filled in ({type(error).__name__}: {error}); its fields may be {{view}}, "
                f"{{subject}} and {{angle}}"
            ) from error


TEMPLATES = {
    "facelift": Template("a rendering image of 3D models, {view} view, color map.", "underscores"),
    "elevated": Template("a rendering image of 3D models, {view} view, color map, {angle}.", "underscores"),
    "realistic": Template("a photograph of a {subject}, {view} view, {angle}."),
    "hybrid": Template("a multi-view image of a {subject}, {view} view, elevated camera angle."),
    "simple": Template("a {subject}, {view} view."),
}
"""By name. `facelift` is FaceLift's own text, of which its clr_embeds.pt was made."""


def view_texts(template: str, *, subject: str = "mouse", angle: str = "from above at an angle") -> list[str]:
    """The texts of a named template, or of one's own (any text with {view}).

    subject, angle: fill {subject} and {angle} where the template has them.
    Returns: one text per view, in the order of VIEWS.
    """
    return TEMPLATES.get(template, Template(template)).texts(subject=subject, angle=angle)


def view_names(num_views: int) -> tuple[str, ...]:
    """FaceLift's names for six views, numbers otherwise."""
    return VIEWS if num_views == len(VIEWS) else tuple(f"view_{v}" for v in range(num_views))


PROMPT_SUFFIXES = (".pt", ".safetensors")
"""Of the prompt files that are read as they are."""


FOREIGN_SUFFIXES = (".npy", ".npz", ".pth", ".bin", ".ckpt")
"""Of prompt files as other programs write them; `python -m train.prompts convert` reads them."""


_FIELD = re.compile(r"\$\{(?!(?:view|subject|angle)\})\w+\}")


def is_prompt_file(spec: str) -> bool:
    """Whether what names a prompt is a file, neither a template nor a text with {view}. `${DATA}/x` has no field in it."""
    if Path(spec).suffix in (*PROMPT_SUFFIXES, *FOREIGN_SUFFIXES):
        return True
    return spec not in TEMPLATES and "{" not in _FIELD.sub("", spec)
