"""The options of `python -m train.micro`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompt.micro import MICRO_MODEL
from softprompt.micro.world import COMBINATIONS
from train.options.checks import FROM_1, POSITIVE, Check, Checked, option

PHASES = ("vae", "decoder", "clip", "prior", "heads")
"""In their order."""


_KNOWN = Check(lambda value: set(value) <= set(COMBINATIONS), f"some of {', '.join(COMBINATIONS)}")


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
    """Training objects of each domain of the VAE, and of the heads."""
    prior_objects: int = option(200, FROM_1)
    """Training objects of each domain of CLIP and the prior."""
    left_out: tuple[str, ...] = option((), _KNOWN)
    """Further domains that CLIP and the prior never see, e.g. mice_photo_above: their words are known but never together."""
    batch_size: int = option(4, FROM_1)
    """Objects of six pictures a step; the prior takes as many single pictures."""
    vae_steps: int = option(5500, FROM_1)
    """Steps of the VAE, four pictures each."""
    decoder_steps: int = option(4000, FROM_1)
    """Further steps of the VAE's decoder alone, four pictures each."""
    clip_steps: int = option(800, FROM_1)
    """Steps of text and image encoder, 64 pairs each."""
    prior_steps: int = option(3600, FROM_1)
    """Steps of the UNet on single pictures under their texts."""
    heads_steps: int = option(6000, FROM_1)
    """Steps of the UNet on six views of heads."""
    heads_rate: float = option(0.3, POSITIVE)
    """Learning rate of these steps, as a share of `learning_rate`: a higher one forgets the words that the prior learned."""
    learning_rate: float = option(1e-3, POSITIVE)
    """AdamW's highest; it rises over a twentieth of each phase and falls along a cosine."""
    save_every: int = option(200, FROM_1)
    """Steps between saves of the state."""
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
        if {"clip", "prior", "heads"} & set(phases):
            names += ["batch_size", "prior_objects", "left_out"]
        if "heads" in phases:
            names.append("heads_rate")
        return {name: getattr(self, name) for name in names}
