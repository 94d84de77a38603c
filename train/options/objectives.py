"""The groups of options of the objectives beside the denoising loss, one each.

Each has a `weight`, 0 by default: then it is left out and costs nothing. Two objectives are combined by giving both a weight.
"""

from dataclasses import dataclass
from typing import Literal

from train.options.checks import BETWEEN, FROM_0, FROM_1, FROM_2, FUNCTION, REWARD, Checked, option, require


@dataclass(frozen=True, kw_only=True)
class DraftConfig(Checked, group="draft"):
    """DRaFT+: a reward for views that are sampled during training, with its gradient through the last sampling steps."""

    weight: float = option(0.0, FROM_0)
    """Weight of the term in the loss; 0 leaves it out. The reward `psnr` is about 2: start with 0.1 to 0.3."""
    reward: str = option("psnr", REWARD)
    """Reward of the sampled views, compared with the true ones: psnr, ssim, silhouette, consistency, sharpness, clip, or
    `module:function` (views, truth, masks => a number per object; see softprompt.objectives.rewards)."""
    encoder: str | None = None
    """Folder of the CLIP vision model for the reward `clip`, e.g. PIPECKPTS/image_encoder."""
    steps: int = option(10, FROM_1)
    """DDIM steps of the sampled views (eta 0)."""
    guidance_scale: float = option(2.0, FROM_1)
    """Guidance scale of the sampled views; 1: no guidance."""
    backward_steps: int = 1
    """K: number of last sampling steps that the gradient passes through. Each step adds the time of one backward pass, but no
    memory."""
    truncation: Literal["last", "random"] = "last"
    """`last`: always K steps; `random`: a random number as in AlignProp, a sixth of the steps on average."""
    renoise: int = option(0, FROM_0)
    """n of DRaFT-LV: the last step alone, from n noise samples of its level; 0 disables it."""
    kl: float = option(0.1, FROM_0)
    """Weight, within the term, of the KL to the pretrained model on the steps that the gradient passes through."""
    every: int = option(1, FROM_1)
    """Compute the term in every n-th step, with n times the weight: the same on average in less time."""
    guard: float | None = option(0.5, BETWEEN)
    """Stop the run when the edges, colours or foreground of the sampled views (averaged over the last few samplings) fall below
    this share of their first value, or rise above its inverse: the reward is exploited. null: never stop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        expected = "the folder of a CLIP vision model with draft.reward: clip, e.g. PIPECKPTS/image_encoder; none is downloaded"
        self.require("encoder", self.reward != "clip" or self.encoder is not None, expected)
        self.require("backward_steps", 1 <= self.backward_steps <= self.steps, f"1 to draft.steps, {self.steps}")
        self.require(
            "renoise",
            self.renoise == 0 or (self.backward_steps == 1 and self.truncation == "last"),
            "0 with draft.backward_steps above 1 or draft.truncation random: DRaFT-LV goes through the last step alone",
        )


@dataclass(frozen=True, kw_only=True)
class StudioConfig(Checked, group="studio"):
    """DomainStudio: differences between objects, or views, are kept as in the pretrained model; for few objects."""

    weight: float = option(0.0, FROM_0)
    """Weight of the term in the loss; 0 leaves it out. 1 keeps the proportions of the three weights below."""
    over: Literal["objects", "views"] = "objects"
    """What is compared: `objects`, the same view of the objects of a batch (3 or more); `views`, the views of each object."""
    space: Literal["latents", "pictures"] = "latents"
    """Space in which clean predictions are compared: latents, or decoded pictures as in the paper (adds the decoder's forward
    and backward pass)."""
    pairs: float = option(30.0, FROM_0)
    """Weight, within the term, of the pairwise similarities; large, because they differ by only 1e-6 on latents."""
    detail_pairs: float = option(1.0, FROM_0)
    """Weight of the pairwise similarities of high frequencies (Haar). The paper's three weights are 100, 100, 0.1, and 4, 4, 1
    without conditioning."""
    detail: float = option(0.1, FROM_0)
    """Weight of the squared error of high frequencies against the true views."""

    def __post_init__(self) -> None:
        super().__post_init__()
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
class SeparateConfig(Checked, group="separate"):
    """Separate-and-Enhance: tokens that name the view, and other tokens, are attended to in different regions."""

    weight: float = option(0.0, FROM_0)
    """Weight of the term in the loss; 0 leaves it out. Start with 0.02."""
    presence: float = option(0.5, FROM_0)
    """Weight, within the term, of the missing attention of the less attended of the two."""
    side: int | None = option(None, FROM_2)
    """Side of the attention maps, one of those in the UNet's down blocks; null: the coarsest (16 of FaceLift's 64, 32, 16)."""


@dataclass(frozen=True, kw_only=True)
class CustomConfig(Checked, group="custom"):
    """Your own objective."""

    weight: float = option(0.0, FROM_0)
    """Weight of the term in the loss; 0 leaves it out."""
    function: str | None = option(None, FUNCTION)
    """`module:function`, on the Python path or in the current folder; it takes a softprompt.objectives.seen.Seen and returns a
    scalar tensor."""


OBJECTIVES = ("draft", "dpo", "spin", "studio", "separate", "custom")
"""Their groups' names."""
