"""The options of `python -m train.micro`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompt.errors import InputError
from softprompt.micro import MICRO_MODEL

TEXT_EVERY = 8
"""Steps of the prior between those of the text encoder."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Build the embedded micro pipeline, a small FaceLift, from nothing."""

    output: Path = MICRO_MODEL
    """Pipeline folder to write."""
    overwrite: bool = False
    """Replace that folder if it exists."""
    grid: Path | None = None
    """Picture to write at the end: held-out heads, input | six true views | six sampled views."""
    report_only: bool = False
    """Build nothing: report on, and with --grid draw, the existing folder."""
    state: Path | None = None
    """File to continue from, saved along the way and removed at the end; null is .NAME.state.pt beside the output."""
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
        checks = {name: (getattr(self, name) >= 1, "1 or more") for name in ("objects", "evaluated")}
        checks |= {f"{phase}_steps": (self.steps(phase) >= 1, "1 or more") for phase in ("vae", "prior", "heads", "decoder")}
        checks["batch_size"] = self.batch_size > 0 and self.batch_size % 4 == 0, "a multiple of 4"
        checks["save_every"] = self.save_every > 0 and self.save_every % TEXT_EVERY == 0, f"a multiple of {TEXT_EVERY}"
        checks["learning_rate"] = self.learning_rate > 0, "a positive number"
        for name, (holds, expected) in checks.items():
            if not holds:
                raise InputError(f"{name}: is {getattr(self, name)}; expected {expected}")

    @property
    def state_file(self) -> Path:
        """The file that the state is saved to."""
        return self.state or self.output.with_name(f".{self.output.name}.state.pt")

    def steps(self, phase: str) -> int:
        """Steps of a phase."""
        return int(getattr(self, f"{phase}_steps"))

    def fingerprint(self, phases: Sequence[str]) -> dict[str, Any]:
        """Settings that a state file of these phases must agree with."""
        names = ["seed", "objects", "learning_rate", *(f"{phase}_steps" for phase in phases)]
        return {name: getattr(self, name) for name in [*names, *(["batch_size"] if len(phases) > 1 else [])]}
