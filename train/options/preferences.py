"""The groups of options of the objectives that prefer one set of views to another."""

from dataclasses import dataclass, field
from typing import Literal

from train.options.checks import FROM_0, FROM_1, FROM_2, POSITIVE, REWARD, Check, Checked, option

OWN = "own"
"""Names the model's own samples where a list of pairs is expected."""


@dataclass(frozen=True, kw_only=True)
class DpoConfig(Checked, group="dpo"):
    """Diffusion-DPO: of two sets of views of an object, the better one becomes more likely and the other less likely, relative
    to the pretrained model. With `chunks` of 2 or more: Curriculum DPO."""

    weight: float = option(0.0, FROM_0)
    """Weight of the term in the loss; 0 leaves it out. Start with 4 / beta or less."""
    beta: float = option(2000.0, POSITIVE)
    """Strength of the regularisation toward the pretrained model; with higher values a preference saturates sooner."""
    pairs: str = option(OWN, Check(lambda pairs: pairs != "", f"`{OWN}`, or a list of pairs (.jsonl or .csv)"))
    """Source of pairs: `own`, the model's own samples of training objects, ranked by `reward`; or a list of pairs on disk
    (.jsonl or .csv with input, winner, loser and, for a curriculum, gap)."""
    held_out_pairs: str | None = None
    """Second list of pairs, for validation, where `pairs` is a list; null: none."""
    samples: int = option(4, FROM_2)
    """Sample sets per object, made before the first step; every two of them are a pair."""
    sample_steps: int = option(8, FROM_1)
    """DDIM steps of a sample set; eta is that of previews (monitor.eta)."""
    guidance_scales: list[float] = field(default_factory=lambda: [1.0, 2.0, 3.0, 4.0])
    """Guidance scales of an object's sets, in turn: sets that differ by their noise alone may be too similar to learn from."""
    objects: int | None = option(None, FROM_1)
    """Number of training objects to sample, the first ones; null: all."""
    held_out_objects: int = option(8, FROM_1)
    """Number of held-out objects to sample for validation."""
    reward: str = option("psnr", REWARD)
    """Reward that ranks the sample sets against the true views, as `draft.reward`."""
    encoder: str | None = None
    """Folder of the CLIP vision model for the reward `clip`."""
    min_gap: float = option(0.0, FROM_0)
    """Leave out near-ties: pairs whose difference of rewards, or gap in the list, is at most this."""
    chunks: int = option(1, FROM_1)
    """Stages from easy to hard pairs, each including those before; 1: all pairs from the start."""
    difficulty: Literal["rank_gap", "reward_gap"] = "rank_gap"
    """What makes a pair of sample sets easy: a large difference of ranks, or of rewards. A list has its own gaps."""
    chunk_by: Literal["equal_width", "equal_count"] = "equal_width"
    """How gaps of rewards, or of a list, are divided into chunks: ranges of equal width, or with equally many pairs."""
    chunk_steps: int | None = option(None, FROM_1)
    """Steps per stage; null: equal shares of the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            "held_out_pairs",
            self.held_out_pairs is None or self.pairs != OWN,
            f"null where dpo.pairs is `{OWN}`: validation then uses samples of held-out objects",
        )
        self.require(
            "encoder",
            self.reward != "clip" or self.encoder is not None or self.pairs != OWN,
            "the folder of a CLIP vision model with dpo.reward: clip; none is downloaded",
        )
        fits = len(self.guidance_scales) > 0 and all(scale >= 1 for scale in self.guidance_scales)
        self.require("guidance_scales", fits, "one number of 1 or more, or several")
        self.require(
            "chunks",
            self.pairs != OWN or self.difficulty != "rank_gap" or self.chunks < self.samples,
            f"{self.samples - 1} at most: {self.samples} samples (dpo.samples) are at most {self.samples - 1} ranks apart, and "
            f"further chunks would be empty",
        )


@dataclass(frozen=True, kw_only=True)
class SpinConfig(Checked, group="spin"):
    """SPIN-Diffusion: true views are preferred to those that the model's previous iterate sampled of the same picture."""

    weight: float = option(0.0, FROM_0)
    """Weight of the term in the loss; 0 leaves it out. Start with 4 to 10 / beta."""
    beta: float = option(2000.0, POSITIVE)
    """Strength of the regularisation toward the previous iterate."""
    iterations: int = option(3, FROM_1)
    """Number of iterations of equal length: each starts by storing the model as the new iterate and sampling from it."""
    start: float = option(0.0, FROM_0)
    """When the first iteration starts, in `curriculum.unit`."""
    sample_steps: int = option(8, FROM_1)
    """DDIM steps of a sample; guidance scale and eta are those of previews (monitor.guidance_scale, monitor.eta)."""
    objects: int | None = option(None, FROM_1)
    """Number of training objects to sample and train on, the first ones; null: all."""
    held_out_objects: int = option(8, FROM_1)
    """Number of held-out objects to sample, once, for validation."""
