"""The groups of options of the objectives beside the plain denoising loss, one each; train.config joins them to the others.

Each has a `weight`, 0 by default: then it is left out and costs nothing. Two objectives are combined by giving both a weight.
"""

import re
from dataclasses import dataclass

from train.options import require


@dataclass(frozen=True, kw_only=True)
class CustomConfig:
    """An objective of one's own."""

    weight: float = 0.0
    """Of the term in the loss; 0 leaves it out."""
    function: str | None = None
    """`module:function`, on the Python path or in the current folder; it is given a softprompt.objectives.seen.Seen and
    returns a scalar tensor."""

    def __post_init__(self) -> None:
        require(self.weight >= 0, "custom.weight", self.weight, "zero or a positive number")
        require_function("custom.function", self.function)


OBJECTIVES = ("custom",)
"""Their groups' names."""


def require_function(name: str, spec: str | None) -> None:
    """Raises: InputError for what cannot be `module:function`."""
    fits = spec is None or re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", spec) is not None
    require(fits, name, spec, "module:function, e.g. my_losses:smooth")
