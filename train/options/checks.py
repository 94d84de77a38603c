"""Checks of single options, each written once beside its field. They hold however a dataclass is made: parsed or in Python."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple, TypeVar, get_args

from softprompt.errors import InputError

T = TypeVar("T")


class Check(NamedTuple):
    """Which values an option may have; null is allowed where the option's type allows it."""

    holds: Callable[[Any], bool]
    expected: str


POSITIVE = Check(lambda value: value > 0, "a positive number")
FROM_0 = Check(lambda value: value >= 0, "0 or more")
FROM_1 = Check(lambda value: value >= 1, "1 or more")
FROM_2 = Check(lambda value: value >= 2, "2 or more")
BELOW_1 = Check(lambda value: 0 <= value < 1, "a share in [0, 1)")
ABOVE_0 = Check(lambda value: 0 < value <= 1, "a share in (0, 1]")
BETWEEN = Check(lambda value: 0 < value < 1, "between 0 and 1")
UNIT = Check(lambda value: 0 <= value <= 1, "0 to 1")

REWARD_NAMES = ("psnr", "ssim", "silhouette", "consistency", "sharpness", "clip")
"""What `draft.reward` may be by name; see softprompt.objectives.rewards."""


def is_function(spec: str) -> bool:
    """Whether a text is `module:function`."""
    return re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", spec) is not None


REWARD = Check(
    lambda spec: spec in REWARD_NAMES or is_function(spec),
    f"{', '.join(REWARD_NAMES)}, or module:function, e.g. my_rewards:smooth",
)
FUNCTION = Check(is_function, "module:function, e.g. my_losses:smooth")


def option(default: T, check: Check) -> T:
    """A dataclass field with a default and a check."""
    return field(default=default, metadata={"check": check})


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Base of groups of options: `class LoraConfig(Checked, group="lora")`. Raises: InputError for a value that cannot be."""

    group: ClassVar[str] = ""

    def __init_subclass__(cls, group: str = "", **others: Any) -> None:
        super().__init_subclass__(**others)
        cls.group = group

    def __post_init__(self) -> None:
        for f in fields(self):
            value, check = getattr(self, f.name), f.metadata.get("check")
            numbers = [n for n in (value if isinstance(value, list) else [value]) if isinstance(n, float)]
            self.require(f.name, all(map(math.isfinite, numbers)), "a finite number")
            if check is not None and value is not None:
                self.require(f.name, check.holds(value), check.expected + ", or null" * (type(None) in get_args(f.type)))

    def require(self, name: str, holds: bool, expected: str) -> None:
        """Raises: InputError that the option `name` of this group is not what is expected, unless it holds."""
        require(holds, f"{self.group}.{name}" if self.group else name, getattr(self, name), expected)


def require(holds: bool, name: str, found: Any, expected: str) -> None:
    """Raises: InputError that `name` is `found` where `expected` was, unless it holds."""
    if not holds:
        shown = "null" if found is None else str(found).lower() if isinstance(found, bool) else found
        raise InputError(f"{name}: is {shown}; expected {expected}")
