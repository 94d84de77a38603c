"""The options of `python -m train.micro`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompt.micro import MICRO_MODEL
from train.options.checks import FROM_1, POSITIVE, Check, Checked, option

TEXT_EVERY = 8
"""Steps of the prior between those of the text encoder."""


def _multiple(of: int) -> Check:
    return Check(lambda value: value > 0 and value % of == 0, f"a multiple of {of}")


@dataclass(frozen=True, kw_only=True)
class Settings(Checked):
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
    objects: int = option(500, FROM_1)
    """Training objects of each domain."""
    batch_size: int = option(4, _multiple(4))
    """Objects of six pictures a step, a multiple of the prior's four domains."""
    vae_steps: int = option(5500, FROM_1)
    """Steps of the VAE, four pictures each."""
    prior_steps: int = option(1800, FROM_1)
    """Steps of the prior over all domains."""
    heads_steps: int = option(2400, FROM_1)
    """Steps on heads alone."""
    decoder_steps: int = option(4000, FROM_1)
    """Further steps of the VAE's decoder alone, four pictures each."""
    learning_rate: float = option(1e-3, POSITIVE)
    """AdamW's highest; it rises over a twentieth of each phase and falls along a cosine."""
    save_every: int = option(200, _multiple(TEXT_EVERY))
    """Steps between saves of the state, a multiple of 8."""
    evaluated: int = option(16, FROM_1)
    """Held-out objects in the evaluation."""

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
