"""The options of `python -m train.micro`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from softprompt.errors import InputError
from softprompt.micro import MICRO_MODEL


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Build the embedded micro pipeline, a small FaceLift, from nothing."""

    TEXT_EVERY: ClassVar[int] = 8
    """Steps of the prior between those of the text encoder."""

    output: Path = MICRO_MODEL
    """Pipeline folder to write."""
    overwrite: bool = False
    """Replace that folder if it exists."""
    grid: Path | None = None
    """Picture to write at the end: held-out heads, given | six true views | six sampled views."""
    report_only: bool = False
    """Build nothing: say, and with --grid draw, what the folder that is there can do."""
    state: Path | None = None
    """File to go on from, saved along the way and removed at the end; null is .NAME.state.pt beside the output."""
    seed: int = 0
    """Seed of all weights and noise."""
    objects: int = 500
    """Training objects of each domain."""
    batch_size: int = 4
    """Objects of six pictures a step, a multiple of the prior's four domains."""
    vae_steps: int = 5500
    """Steps of the VAE, four pictures each."""
    prior_steps: int = 1800
    """Steps of the prior over all domains."""
    heads_steps: int = 2400
    """Steps on heads alone."""
    decoder_steps: int = 4000
    """Further steps of the VAE's decoder alone, four pictures each."""
    learning_rate: float = 1e-3
    """AdamW's highest; it rises over a twentieth of each phase and falls along a cosine."""
    save_every: int = 200
    """Steps between saves of the state, a multiple of 8."""
    evaluated: int = 16
    """Held-out objects in the evaluation."""

    def __post_init__(self) -> None:
        for name in ("objects", "vae_steps", "prior_steps", "heads_steps", "decoder_steps", "evaluated"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        _require(self.batch_size > 0 and self.batch_size % 4 == 0, "batch_size", self.batch_size, "a multiple of 4")
        _require(
            self.save_every > 0 and self.save_every % self.TEXT_EVERY == 0,
            "save_every",
            self.save_every,
            f"a multiple of {self.TEXT_EVERY}",
        )
        _require(self.learning_rate > 0, "learning_rate", self.learning_rate, "a positive number")

    @property
    def state_file(self) -> Path:
        """Where the state is."""
        return self.state or self.output.with_name(f".{self.output.name}.state.pt")

    def fingerprint(self, phases: Sequence[str]) -> dict[str, Any]:
        """Settings that a state file of these phases must agree with."""
        steps = [f"{phase}_steps" for phase in phases]
        names = ["seed", "objects", "learning_rate", *steps, *(["batch_size"] if len(phases) > 1 else [])]
        return {name: getattr(self, name) for name in names}


def _require(holds: bool, name: str, found: Any, expected: str) -> None:
    if not holds:
        raise InputError(f"{name}: is {found}; expected {expected}")
