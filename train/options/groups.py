"""The groups of options of the main job: frozen dataclasses with a check beside each field; train.options.config joins them.

The defaults are the embedded micro run (`configs/micro.yaml` writes them out); `configs/facelift_mouse.yaml` is the place to
start with real weights.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from train.options.checks import (
    ABOVE_0,
    BELOW_1,
    BETWEEN,
    FROM_0,
    FROM_1,
    POSITIVE,
    UNIT,
    Check,
    Checked,
    option,
    require,
)

MICRO = "micro"
"""Names the embedded model, and the embedded world, where a path is expected."""


@dataclass(frozen=True, kw_only=True)
class PromptConfig(Checked, group="prompt"):
    """The learnable prompt and its path."""

    waypoints: list[str] = field(default_factory=lambda: ["facelift", "realistic"])
    """Prompts W_0 ... W_S on the path, the pretrained one first: each a prompt file (.pt, .safetensors), a template (facelift,
    elevated, current, realistic, hybrid, simple), or a text with {view}, {subject}, {angle}."""
    subject: str = "mouse"
    """Replaces {subject} in templates."""
    angle: str = "from above at an angle"
    """Replaces {angle} in templates: the camera's elevation in words (only `realistic` has it)."""
    matching: Literal["none", "per_view", "shared"] = "none"
    """Reorder each waypoint's tokens to be nearest to those of the waypoint before (the UNet ignores their order): `per_view`,
    one order for each view; `shared`, one order for all views; `none`, no reordering."""
    interpolation: Literal["lerp", "slerp"] = "lerp"
    """Interpolation between waypoints, for each token: `lerp`, a straight line; `slerp`, a rotation that keeps the norm."""
    carry: Literal["keep", "fade"] = "keep"
    """Share of the learned offset that is added along the path: `keep`, all of it; `fade`, less and less toward the last
    waypoint."""
    learn: bool = True
    """Train the prompt; false uses the path alone (template switching, fixed prompts)."""
    learning_rate: float = option(0.1, POSITIVE)
    """Learning rate of the prompt."""
    decay: float = option(0.0, FROM_0)
    """Decoupled weight decay of the prompt toward its start (not toward zero), per step and unit of learning rate."""
    norm_band: float | None = option(None, ABOVE_0)
    """Largest relative deviation of each token's norm from that of the path, e.g. 0.1; null: no limit."""
    separation: float = option(0.0, FROM_0)
    """Weight of a hinge loss that keeps the views' prompts at least as far apart as at the start, e.g. 1; 0 disables it."""
    train_from: float = option(0.0, FROM_0)
    """When training of the prompt starts, in `curriculum.unit`."""
    train_until: float | None = None
    """When training of the prompt stops, in `curriculum.unit`; null: at the end of the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_window(self)
        self.require("waypoints", len(self.waypoints) >= 1, "at least one: the pretrained prompt")
        frozen = not self.learn and self.separation > 0
        self.require("separation", not frozen, "0 where prompt.learn is false: a frozen prompt cannot be kept apart")


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig(Checked, group="curriculum"):
    """The prompt's position on its path, and when it moves on."""

    pacing: Literal["step", "plateau", "kl_budget"] = "step"
    """What moves the position: `step`, the schedule `at`; `plateau`, from one value of `position` to the next when a loss stops
    falling; `kl_budget`, from the first value of `position` to the last as fast as the KL to the pretrained model allows."""

    unit: Literal["run", "step"] = "run"
    """Unit of `at`, `train_from` and `train_until`: `run`, fractions of the whole run (0 to 1); `step`, steps."""
    at: list[float] = field(default_factory=lambda: [0.0, 0.25])
    """When each position is reached, in rising order; used where pacing is `step`."""
    position: list[float] = field(default_factory=lambda: [0.0, 1.0])
    """Positions s in [0, number of waypoints - 1], one per time in `at`: 0 is the pretrained prompt, 1 the next waypoint."""
    easing: Literal["linear", "cosine", "step"] = "linear"
    """Transition between positions: linear, cosine (slow at both ends), or step (hold, then switch)."""
    watch: Literal["validation", "train"] = "validation"
    """plateau: the loss that decides, at each validation or at each training step."""
    patience: int = option(2, FROM_0)
    """plateau: values in a row without an improvement that are tolerated before the position moves on."""
    min_gain: float = option(0.01, BELOW_1)
    """plateau: relative decrease of the loss that counts as an improvement."""
    smoothing: float = option(0.0, BELOW_1)
    """plateau, kl_budget: decay of the running mean of the loss or KL, e.g. 0.98 for a training loss."""
    max_stage_steps: int | None = None
    """plateau: steps after which the position moves on in any case; null: no limit."""
    glide_steps: int = option(0, FROM_0)
    """plateau: steps of the transition to the next position, with `easing`; 0: at once."""
    kl_budget: float = option(0.01, POSITIVE)
    """kl_budget: the KL at which the position stops moving, in nats per latent element."""
    fastest: float = option(0.05, POSITIVE)
    """kl_budget: largest change of position per step, where the KL is near 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            len(self.position) >= 1 and (self.pacing != "step" or len(self.at) == len(self.position)),
            "curriculum.at and curriculum.position",
            f"{len(self.at)} and {len(self.position)} values",
            "the same number, one or more",
        )
        self.require("at", len(self.at) >= 1, "one value or more")
        least = max(1, self.glide_steps)
        self.require(
            "max_stage_steps",
            self.max_stage_steps is None or self.max_stage_steps >= least,
            "at least 1 and at least curriculum.glide_steps, or null",
        )
        rising = self.pacing != "kl_budget" or all(a <= b for a, b in pairwise(self.position))
        self.require("position", rising, "rising values with pacing: kl_budget")
        rising = self.at[0] >= 0 and all(a < b for a, b in pairwise(self.at))
        self.require("at", rising, "values from 0 up, each larger than the one before")
        self.require("at", self.unit == "step" or self.at[-1] <= 1, "fractions of the run, at most 1 (unit: run)")


@dataclass(frozen=True, kw_only=True)
class TimestepsConfig(Checked, group="timesteps"):
    """Timestep curriculum: from high noise down, one more cluster of timesteps in each stage."""

    clusters: int = option(1, FROM_1)
    """Number of clusters; 1: all timesteps from the start."""
    edges: Literal["uniform", "log_snr"] = "log_snr"
    """Boundaries of the clusters: `uniform`, equally many timesteps each; `log_snr`, equal intervals of log SNR."""
    patience: int = option(200, FROM_0)
    """Steps in a row without a lower training loss that are tolerated before the next cluster is added."""
    smoothing: float = option(0.99, BELOW_1)
    """Decay of the running mean of the training loss."""
    max_stage_steps: int | None = option(None, FROM_1)
    """Steps after which the next cluster is added in any case; null: no limit."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Checked, group="lora"):
    """Low-rank adapters (LoRA) on the UNet."""

    rank: int = option(8, FROM_0)
    """Rank of the adapters; 0 trains the prompt alone."""
    alpha: float = option(8.0, POSITIVE)
    """Scale: the adapters' output is multiplied by alpha / rank."""
    dropout: float = option(0.0, BELOW_1)
    """Dropout rate of the adapters' input in training."""
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    """Layers that get an adapter, by the end of their names."""
    learning_rate: float = option(3e-3, POSITIVE)
    """Learning rate of the LoRA."""
    weight_decay: float = 0.0
    """Weight decay of the LoRA (AdamW, toward zero)."""
    train_from: float = option(0.0, FROM_0)
    """When training of the LoRA starts, in `curriculum.unit`."""
    train_until: float | None = None
    """When training of the LoRA stops, in `curriculum.unit`; null: at the end of the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_window(self)


@dataclass(frozen=True, kw_only=True)
class LossConfig(Checked, group="loss"):
    """The denoising loss."""

    weight: float = option(1.0, FROM_0)
    """Weight of the denoising loss; 0 leaves it out, with its forward pass where no other loss term needs that."""
    snr_weighting: Literal["facelift", "v", "none"] = "v"
    """min-SNR weighting: `v`, min(snr, g) / (snr + 1), right for v-prediction; `facelift`, min(snr, g) / snr, as in FaceLift
    (right for epsilon-prediction); `none`."""
    snr_gamma: float = option(5.0, POSITIVE)
    """g in the min-SNR weighting."""
    condition_drop_rate: float = option(0.05, Check(lambda value: 0 <= value <= 1 / 3, "0 to 1/3"))
    """Rate r of classifier-free guidance training, as in FaceLift: class labels are dropped with probability 2r, the latents of
    the input picture with 2r, both with r."""
    own_view: bool = True
    """Include the reference view, which is a copy of the input picture, in the loss."""


@dataclass(frozen=True, kw_only=True)
class KLConfig(Checked, group="kl"):
    """The KL term that keeps the model near the pretrained one (adapters off and prompt W_0)."""

    weight: float = option(0.03, FROM_0)
    """Weight of the KL term, or its first value with kl.target; 0 leaves the term and its forward pass out."""
    target: float | None = option(None, POSITIVE)
    """Adapt the weight so that the KL stays near this value, in nats per latent element; null: a fixed weight."""
    rate: float = option(0.1, ABOVE_0)
    """How fast the weight adapts: each measurement changes it by at most a fifth of this share."""
    domain: Literal["new", "original", "both"] = "original"
    """Objects on which the KL is computed: `new`, the training objects; `original`, those of data.original (where the model
    forgets); `both`, half each."""
    weighting: Literal["posterior", "uniform"] = "uniform"
    """`posterior`, the exact Gaussian KL of a reverse step; `uniform`, the plain squared difference, as in DRaFT+."""
    clip: float = option(1.0, POSITIVE)
    """Largest posterior weight; without a limit it is infinite at the last step."""
    every: int = option(4, FROM_1)
    """Compute the term in every n-th step, with n times the weight: the same on average in less time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("weight", self.target is None or self.weight > 0, "a positive number where kl.target is given")


def _are_views(chosen: Any) -> bool:
    views = chosen if isinstance(chosen, list) else [chosen]
    return len(views) > 0 and all(view == "random" or int(view) >= 0 for view in views)


VIEWS = Check(_are_views, "a view, counted from 0, a list of views, or random")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Checked, group="data"):
    """Objects: six pictures each."""

    train: str = MICRO
    """Training objects: list file, folder of samples, or `micro` (the embedded world of mice)."""
    val: str | None = None
    """Validation objects: list file or folder of samples; null holds out the last 5 % of `train` (1 to 24 objects)."""
    limit: int | None = option(None, FROM_1)
    """Number of training objects to use, the first ones; null: all of them (40 of the embedded mice)."""
    micro_first: int = option(0, FROM_0)
    """The embedded world's first mouse: another number gives other mice to train on, and others held out."""
    original: str | None = None
    """Objects of the original domain, as `train`: the loss on them shows what the model forgets, and the KL term can use
    them. null: none (the embedded heads where `train` is the embedded world)."""
    background: Literal["white", "black", "gray", "three_choices", "random"] = "white"
    """Background of an object's six pictures: one colour, one of the three at random, or any colour (`random`: pictures cannot
    be encoded ahead, and a step takes several times as long)."""
    cache: str | None = "cache"
    """Folder of encoded pictures, shared by all runs: each picture is encoded once, by its content; null: in memory, anew in
    each run. The embedded world is always in memory."""
    on_bad_sample: Literal["refuse", "skip"] = "refuse"
    """If a sample cannot be used: `refuse` stops before training; `skip` leaves it out and names it in
    RUN/skipped_samples.txt."""
    bad_share: float = option(0.05, BELOW_1)
    """With `skip`, the largest share of the samples that may be left out."""
    reference_view: Literal["random"] | int | list[int] = option(0, VIEWS)  # noqa: RUF009
    """View that is the input picture: a number, a list to draw from, or `random` (any)."""

    def references(self, num_views: int) -> list[int]:
        """The views that may be the input picture. Raises: InputError when one is not among the model's."""
        chosen = self.reference_view
        views = list(range(num_views)) if chosen == "random" else [chosen] if isinstance(chosen, int) else list(chosen)
        fits = all(isinstance(v, int) and v < num_views for v in views)
        self.require("reference_view", fits, f"views from 0 to {num_views - 1}")
        return [int(v) for v in views]

    @property
    def first_reference(self) -> int:
        """The input picture's view in validation and previews, which use one alone."""
        chosen = self.reference_view
        return 0 if chosen == "random" else chosen if isinstance(chosen, int) else chosen[0]

    @property
    def still_background(self) -> str:
        """The background of held-out objects: always the same, so that validations can be compared."""
        return self.background if self.background in ("white", "black", "gray") else "white"

    @property
    def original_or_micro(self) -> str | None:
        """Where objects of the original domain come from; None: nowhere."""
        return self.original or (MICRO if self.train == MICRO else None)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Checked, group="train"):
    """Training."""

    steps: int = option(150, FROM_1)
    """Number of optimizer steps."""
    batch_size: int = option(4, FROM_1)
    """Objects (of six pictures) per batch and process."""
    accumulation: int = option(1, FROM_1)
    """Batches whose gradients are accumulated in a step."""
    seed: int = 0
    """Seed of everything random: order, noise, timesteps, the LoRA's initial weights."""
    warmup_steps: int = option(10, FROM_0)
    """Steps in which the learning rates rise from 0."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Schedule of the learning rates after the warm-up: constant, or down to 0 at the end of the run."""
    max_grad_norm: float = option(1.0, POSITIVE)
    """Gradient clipping: largest norm of the gradient of the prompt, and of the LoRA."""
    max_skipped: int = option(20, FROM_1)
    """Steps in a row that may be skipped because of numbers that are not finite; a skipped step changes nothing."""
    ema_decay: float | None = option(None, BETWEEN)
    """Decay of an exponential moving average of prompt and LoRA, e.g. 0.999, which previews, validation and export then use;
    null: no average."""
    gradient_checkpointing: Literal["auto", "always", "never"] = "auto"
    """Recompute activations in the backward pass: less memory, a third more time. `auto`: from the first step that runs out of
    memory (with one process; with several, choose `always`)."""
    compile: bool = False
    """Compile the UNet's transformer blocks with torch.compile: faster steps on a GPU after minutes of compiling."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; `auto`: CUDA if available."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the frozen weights and of the computation (trained parameters are always float32). `auto`: bf16 or fp16 on
    CUDA, fp32 on a CPU."""


@dataclass(frozen=True, kw_only=True)
class MonitorConfig(Checked, group="monitor"):
    """Logging, validation, previews and checkpoints."""

    log_every: int = option(5, FROM_1)
    """Steps between points in metrics.jsonl and TensorBoard."""
    validate_every: int = option(50, FROM_1)
    """Steps between validations; also at step 0 and at the end."""
    validation_timesteps: int = option(4, FROM_1)
    """Number of fixed timesteps at which each held-out object is evaluated, spread evenly over the noise schedule."""
    preview_every: int = option(75, FROM_1)
    """Steps between previews, with losses on data.original; also at step 0 and at the end."""
    preview_objects: int = option(3, FROM_1)
    """Held-out objects in a preview."""
    preview_steps: int = option(16, FROM_1)
    """DDIM steps of a preview."""
    guidance_scale: float = 2.0
    """Guidance scale of previews; 1: no guidance."""
    eta: float = option(0.0, UNIT)
    """DDIM eta of previews: 0 is deterministic, 1 as noisy as DDPM (FaceLift's inference)."""
    objectives: list[str] = field(default_factory=list)
    """Objectives with weight 0 that are also measured on held-out objects at each preview, e.g. [custom]; those with a weight
    always are."""
    checkpoint_every: int = option(50, FROM_1)
    """Steps between checkpoints; also at the end and on interruption."""
    checkpoints_kept: int = option(3, FROM_1)
    """Number of checkpoints that are kept, the newest ones."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Checked, group="export"):
    """Outputs at the end of the run, besides the prompt and the LoRA."""

    pipeline: bool = True
    """Write a complete FaceLift pipeline folder with the LoRA merged (as large as the model)."""
    tolerance: float = option(1e-4, POSITIVE)
    """Largest difference, for pictures of range 0 to 1, between the model in memory and each export read back."""
    report: bool = True
    """Write RUN/report.html; for a finished run with an ablation: prompt alone, LoRA alone, both."""


def _require_window(settings: PromptConfig | LoraConfig) -> None:
    later = settings.train_until is None or settings.train_until > settings.train_from
    settings.require("train_until", later, f"more than {settings.group}.train_from, {settings.train_from:g}, or null")
