"""The groups of options of the objectives that prefer one set of views to another."""

from dataclasses import dataclass, field
from typing import Literal

from train.options.groups import require
from train.options.objectives import REWARD_NAMES, require_function

OWN = "own"
"""Names the model's own samples where a list of pairs is expected."""


@dataclass(frozen=True, kw_only=True)
class DpoConfig:
    """Diffusion-DPO: of two sets of views of an object the better one is made likelier, the other less so, compared with the
    pretrained model. With `chunks` of 2 or more it is Curriculum DPO."""

    weight: float = 0.0
    """Of the term in the loss; 0 leaves it out. Begin with 4 / beta or less."""
    beta: float = 2000.0
    """How hard the model is held to the pretrained one; higher: harder, and a preference counts as won sooner."""
    pairs: str = OWN
    """Where pairs come from: `own`, the model's own samples of the training objects, ranked by `reward`; or a list of pairs on
    the disk (.jsonl or .csv with input, winner, loser and, for a curriculum, gap)."""
    held_out_pairs: str | None = None
    """With a list: another one, to measure on; null: none."""
    samples: int = 4
    """Own sample sets of each object, made before the first step; every two of them are a pair."""
    sample_steps: int = 8
    """DDIM steps of a set; eta is that of previews (monitor.eta)."""
    guidance_scales: list[float] = field(default_factory=lambda: [1.0, 2.0, 3.0, 4.0])
    """Guidance of an object's sets, in turn: what one model makes of one picture may hardly differ by its noise alone, and then
    pairs have nothing to teach."""
    objects: int | None = None
    """Make sets of the first so many training objects only; null: of all."""
    held_out_objects: int = 8
    """Held-out objects that sets are made of as well, to measure on."""
    reward: str = "psnr"
    """What ranks own sets against the true views, as `draft.reward`."""
    encoder: str | None = None
    """Folder of the CLIP vision model that the reward `clip` needs."""
    min_gap: float = 0.0
    """Pairs whose rewards, or whose gap in the list, are no further apart than this are near-ties and left out."""
    chunks: int = 1
    """Stages from easy pairs to hard ones, each with the ones before; 1: all pairs from the start."""
    difficulty: Literal["rank_gap", "reward_gap"] = "rank_gap"
    """What makes a pair of own sets easy: many ranks between the two, or a large difference of rewards. A list brings its own
    gaps."""
    chunk_by: Literal["equal_width", "equal_count"] = "equal_width"
    """How gaps of rewards, or of a list, are cut into chunks: equally wide ranges, or equally many pairs."""
    chunk_steps: int | None = None
    """Steps of a stage; null: equal shares of the run."""

    def __post_init__(self) -> None:
        _check(self, "dpo")
        require(self.pairs != "", "dpo.pairs", "empty", f"`{OWN}`, or a list of pairs (.jsonl or .csv)")
        require(
            self.held_out_pairs is None or self.pairs != OWN,
            "dpo.held_out_pairs",
            self.held_out_pairs,
            f"null where dpo.pairs is `{OWN}`: own samples of held-out objects are measured on then",
        )
        named = self.reward in REWARD_NAMES or ":" in self.reward
        require(named, "dpo.reward", self.reward, f"{', '.join(REWARD_NAMES)}, or module:function")
        require_function("dpo.reward", None if self.reward in REWARD_NAMES else self.reward)
        require(
            self.reward != "clip" or self.encoder is not None or self.pairs != OWN,
            "dpo.encoder",
            "null",
            "the folder of a CLIP vision model with dpo.reward: clip; none is downloaded",
        )
        require(self.samples >= 2, "dpo.samples", self.samples, "2 or more: a pair is made of two sets")
        fits = len(self.guidance_scales) > 0 and all(scale >= 1 for scale in self.guidance_scales)
        require(fits, "dpo.guidance_scales", self.guidance_scales, "one number of 1 or more, or several")
        require(self.min_gap >= 0, "dpo.min_gap", self.min_gap, "zero or a positive number")
        require(self.chunks >= 1, "dpo.chunks", self.chunks, "1 (no curriculum) or more")
        require(
            self.chunk_steps is None or self.chunk_steps >= 1, "dpo.chunk_steps", self.chunk_steps, "1 or more steps, or null"
        )
        require(
            self.pairs != OWN or self.difficulty != "rank_gap" or self.chunks < self.samples,
            "dpo.chunks",
            self.chunks,
            f"{self.samples - 1} at most: {self.samples} samples (dpo.samples) are {self.samples - 1} ranks apart at most, and "
            f"further chunks would be empty",
        )


@dataclass(frozen=True, kw_only=True)
class SpinConfig:
    """SPIN-Diffusion: the true views are preferred to those that the model's previous iterate made of the same picture."""

    weight: float = 0.0
    """Of the term in the loss; 0 leaves it out. Begin with 4 to 10 / beta."""
    beta: float = 2000.0
    """How hard the model is held to its previous iterate; higher: harder."""
    iterations: int = 3
    """How often, at equal distances, the model as it is becomes the iterate that it is held to, and makes samples anew."""
    start: float = 0.0
    """When the first begins, in `curriculum.unit`."""
    sample_steps: int = 8
    """DDIM steps of a sample; guidance and eta are those of previews (monitor.guidance_scale, monitor.eta)."""
    objects: int | None = None
    """Make samples of the first so many training objects only, and train on those; null: of all."""
    held_out_objects: int = 8
    """Held-out objects that samples are made of as well, once, to measure on."""

    def __post_init__(self) -> None:
        _check(self, "spin")
        require(self.start >= 0, "spin.start", self.start, "0 or more")
        require(self.iterations >= 1, "spin.iterations", self.iterations, "1 or more")


def _check(settings: DpoConfig | SpinConfig, name: str) -> None:
    """What both groups have."""
    require(settings.weight >= 0, f"{name}.weight", settings.weight, "zero or a positive number")
    require(settings.beta > 0, f"{name}.beta", settings.beta, "a positive number")
    for number in ("sample_steps", "held_out_objects"):
        require(getattr(settings, number) >= 1, f"{name}.{number}", getattr(settings, number), "1 or more")
    require(settings.objects is None or settings.objects >= 1, f"{name}.objects", settings.objects, "1 or more, or null")
