"""The groups of options of the objectives beside the plain denoising loss, one each.

Each has a `weight`, 0 by default: then it is left out and costs nothing. Two objectives are combined by giving both a weight.
"""

import re
from dataclasses import dataclass
from typing import Literal

from train.options.groups import require

REWARD_NAMES = ("psnr", "ssim", "silhouette", "consistency", "sharpness", "clip")
"""What `draft.reward` may be by name; see softprompt.objectives.rewards."""


@dataclass(frozen=True, kw_only=True)
class DraftConfig:
    """DRaFT+: a reward for views that are sampled while training, with its gradient through the last sampling steps."""

    weight: float = 0.0
    """Of the term in the loss; 0 leaves it out. The reward `psnr` is about 2: begin with 0.1 to 0.3."""
    reward: str = "psnr"
    """What the sampled views are judged by, against the true ones: psnr, ssim, silhouette, consistency, sharpness, clip, or
    `module:function` (views, truth, masks => a number an object; see softprompt.objectives.rewards)."""
    encoder: str | None = None
    """Folder of the CLIP vision model that the reward `clip` needs, e.g. PIPECKPTS/image_encoder."""
    steps: int = 10
    """DDIM steps of a draft, without noise (eta 0)."""
    guidance_scale: float = 2.0
    """Of a draft; 1 is none."""
    backward_steps: int = 1
    """K: how many of the last steps the gradient goes through. Each more takes as long again on the way back, and no more
    memory."""
    truncation: Literal["last", "random"] = "last"
    """`last`: K steps always; `random`: as many as AlignProp draws, a sixth of the steps on average."""
    renoise: int = 0
    """n: DRaFT-LV: the last step alone, from n noises of its level; 0 leaves that out."""
    kl: float = 0.1
    """Weight of the KL to the untouched model on the steps that the gradient goes through, within the term."""
    every: int = 1
    """On every n-th step, with n times the weight: the same on average for less time."""
    guard: float | None = 0.5
    """Stop the run where the edges, colours or object of the drafted views fall below this share of what they were at first,
    or rise above its inverse (an average over the last few drafts): the reward is gamed. null: go on."""

    def __post_init__(self) -> None:
        require(self.weight >= 0, "draft.weight", self.weight, "zero or a positive number")
        named = self.reward in REWARD_NAMES or ":" in self.reward
        require(named, "draft.reward", self.reward, f"{', '.join(REWARD_NAMES)}, or module:function")
        require_function("draft.reward", None if self.reward in REWARD_NAMES else self.reward)
        require(
            self.reward != "clip" or self.encoder is not None,
            "draft.encoder",
            "null",
            "the folder of a CLIP vision model with draft.reward: clip, e.g. PIPECKPTS/image_encoder; none is downloaded",
        )
        require(self.steps >= 1, "draft.steps", self.steps, "1 or more")
        require(self.guidance_scale >= 1, "draft.guidance_scale", self.guidance_scale, "1 (none) or more")
        fits = 1 <= self.backward_steps <= self.steps
        require(fits, "draft.backward_steps", self.backward_steps, f"1 to draft.steps, {self.steps}")
        require(self.renoise >= 0, "draft.renoise", self.renoise, "0 or more")
        require(
            self.renoise == 0 or (self.backward_steps == 1 and self.truncation == "last"),
            "draft.renoise",
            self.renoise,
            "0 with draft.backward_steps above 1 or draft.truncation random: DRaFT-LV goes through the last step alone",
        )
        require(self.kl >= 0, "draft.kl", self.kl, "zero or a positive number")
        require(self.every >= 1, "draft.every", self.every, "1 (each step) or more")
        require(self.guard is None or 0 < self.guard < 1, "draft.guard", self.guard, "a share between 0 and 1, or null")


@dataclass(frozen=True, kw_only=True)
class StudioConfig:
    """DomainStudio: how objects, or views, differ from each other stays as the untouched model has it; for few objects."""

    weight: float = 0.0
    """Of the term in the loss; 0 leaves it out. 1 has the proportions of the three weights below."""
    over: Literal["objects", "views"] = "objects"
    """What is compared: the same view of the objects of a batch (3 or more), or the views of each object."""
    space: Literal["latents", "pictures"] = "latents"
    """Of the clean prediction: as it is, or decoded, as the paper has it (the decoder's pass, there and back, comes on
    top)."""
    pairs: float = 30.0
    """Weight of the pairwise similarities within the term. They differ by 1e-6 on latents: hence so much."""
    detail_pairs: float = 1.0
    """Weight of those of the high frequencies (Haar). The paper's three are 100, 100, 0.1, and 4, 4, 1 unconditionally."""
    detail: float = 0.1
    """Weight of the squared error of the high frequencies against the true views."""

    def __post_init__(self) -> None:
        for name in ("weight", "pairs", "detail_pairs", "detail"):
            require(getattr(self, name) >= 0, f"studio.{name}", getattr(self, name), "zero or a positive number")
        require(
            max(self.pairs, self.detail_pairs, self.detail) > 0,
            "studio.pairs, detail_pairs and detail",
            "all 0",
            "a weight for one of them; studio.weight 0 leaves the objective out",
        )

    @property
    def compares_objects(self) -> bool:
        """Whether a step depends on which objects are in a batch together."""
        return self.weight > 0 and self.over == "objects"


@dataclass(frozen=True, kw_only=True)
class SeparateConfig:
    """Separate-and-Enhance: the tokens that say which view it is, and the other words, are attended to in different places."""

    weight: float = 0.0
    """Of the term in the loss; 0 leaves it out. Begin with 0.02."""
    presence: float = 0.5
    """Weight, within the term, of what the weaker of the two lacks."""
    side: int | None = None
    """Of the attention maps, one that the UNet has on its way down; null: the coarsest (16 of FaceLift's 64, 32 and 16)."""

    def __post_init__(self) -> None:
        for name in ("weight", "presence"):
            require(getattr(self, name) >= 0, f"separate.{name}", getattr(self, name), "zero or a positive number")
        require(self.side is None or self.side >= 2, "separate.side", self.side, "2 or more, or null")


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


OBJECTIVES = ("draft", "dpo", "spin", "studio", "separate", "custom")
"""Their groups' names."""


def require_function(name: str, spec: str | None) -> None:
    """Raises: InputError for what cannot be `module:function`."""
    fits = spec is None or re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", spec) is not None
    require(fits, name, spec, "module:function, e.g. my_losses:smooth")
