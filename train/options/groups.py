"""The groups of options of the main job: frozen dataclasses, each checked by itself; train.options.config joins them.

The defaults are the embedded micro run (`configs/micro.yaml` writes them out); `configs/facelift_mouse.yaml` is the place to
start with real weights.
"""

from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, Literal

from softprompt.errors import InputError

MICRO = "micro"
"""Names the embedded model, and the embedded world, where a path is expected."""


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """The learnable prompt and the path it is carried along."""

    waypoints: list[str] = field(default_factory=lambda: ["facelift", "realistic"])
    """Prompts W_0 ... W_S, the pretrained one first: each a prompt file (.pt, .safetensors), a template (facelift, elevated,
    realistic, hybrid, simple), or a text with {view}, {subject}, {angle}."""
    subject: str = "mouse"
    """Fills {subject} in templates."""
    angle: str = "from above at an angle"
    """Fills {angle} in templates: where the camera stands (`hybrid` has words of its own for it)."""
    matching: Literal["none", "per_view", "shared"] = "none"
    """Reorder each waypoint's tokens to lie nearest to the one before (the UNet does not see their order): an order for each
    view, the same for all views, or as they come."""
    interpolation: Literal["lerp", "slerp"] = "lerp"
    """Between waypoints, per token: a straight line, or a turn that keeps the norm."""
    carry: Literal["keep", "fade"] = "keep"
    """How much of what was learned is carried along the path: keep all, or fade it out as the last waypoint nears."""
    learn: bool = True
    """False freezes the prompt: it is the path alone (template switching, fixed prompts)."""
    learning_rate: float = 0.1
    """Of the prompt, per step."""
    decay: float = 0.0
    """Decoupled decay of the prompt toward its start (never toward zero), per step and unit of learning rate."""
    norm_band: float | None = None
    """Keep each token's norm within this share of the path's norm there, e.g. 0.1; null leaves it free."""
    separation: float = 0.0
    """Weight of a hinge that keeps the views' prompts at least as far apart as at the start, e.g. 1; 0 leaves it out."""
    train_from: float = 0.0
    """When it begins to train, in `curriculum.unit`."""
    train_until: float | None = None
    """When it stops, in `curriculum.unit`; null: at the end."""

    def __post_init__(self) -> None:
        require(len(self.waypoints) >= 1, "prompt.waypoints", self.waypoints, "at least one: the pretrained prompt")
        require(self.learning_rate > 0, "prompt.learning_rate", self.learning_rate, "a positive number")
        require(self.decay >= 0, "prompt.decay", self.decay, "zero or a positive number")
        require(self.separation >= 0, "prompt.separation", self.separation, "zero or a positive number")
        require(
            self.learn or self.separation == 0,
            "prompt.separation",
            self.separation,
            "0 where prompt.learn is false: a frozen prompt cannot be kept apart",
        )
        _require_window(self, "prompt")
        require(
            self.norm_band is None or 0 < self.norm_band <= 1, "prompt.norm_band", self.norm_band, "a share in (0, 1], or null"
        )


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """Where on the path the prompt is, and when it moves on."""

    pacing: Literal["step", "plateau", "kl_budget"] = "step"
    """What moves it: `step`, the points below; `plateau`, from each of `position` to the next when a loss stops falling;
    `kl_budget`, from the first of `position` to the last as fast as the KL to the pretrained model allows."""

    unit: Literal["run", "step"] = "run"
    """Of `at`, and of `train_from` and `train_until`: `run` is fractions of the whole run (0 to 1), `step` is steps."""
    at: list[float] = field(default_factory=lambda: [0.0, 0.25])
    """When each position is reached, rising; read where pacing is `step`."""
    position: list[float] = field(default_factory=lambda: [0.0, 1.0])
    """Position s in [0, number of waypoints - 1] at each of these: 0 is the pretrained prompt, 1 the first target."""
    easing: Literal["linear", "cosine", "step"] = "linear"
    """Between them: linear, cosine (slow at both ends), or step (hold, then switch)."""
    watch: Literal["validation", "train"] = "validation"
    """plateau: the loss that is watched, at each validation or at each step."""
    patience: int = 2
    """plateau: values in a row that may pass without an improvement; one more, and it moves on."""
    min_gain: float = 0.01
    """plateau: share by which the loss must fall to be an improvement."""
    smoothing: float = 0.0
    """plateau, kl_budget: share of its running mean that a value leaves in place, e.g. 0.98 for a training loss."""
    max_stage_steps: int | None = None
    """plateau: steps after which it moves on in any case; null: none."""
    glide_steps: int = 0
    """plateau: steps in which it then goes to the next position, with `easing`; 0: at once."""
    kl_budget: float = 0.01
    """kl_budget: the KL at which it stands still, in nats per latent element."""
    fastest: float = 0.05
    """kl_budget: positions a step that it moves at most, where the KL is near 0."""

    def __post_init__(self) -> None:
        require(
            len(self.position) >= 1 and (self.pacing != "step" or len(self.at) == len(self.position)),
            "curriculum.at and curriculum.position",
            f"{len(self.at)} and {len(self.position)} values",
            "the same number, one or more",
        )
        require(len(self.at) >= 1, "curriculum.at", self.at, "one value or more")
        require(self.patience >= 0, "curriculum.patience", self.patience, "0 or more")
        require(0 <= self.min_gain < 1, "curriculum.min_gain", self.min_gain, "a share in [0, 1)")
        require(0 <= self.smoothing < 1, "curriculum.smoothing", self.smoothing, "a share in [0, 1)")
        require(self.glide_steps >= 0, "curriculum.glide_steps", self.glide_steps, "0 or more")
        require(
            self.max_stage_steps is None or self.max_stage_steps >= max(1, self.glide_steps),
            "curriculum.max_stage_steps",
            self.max_stage_steps,
            "at least 1 and at least curriculum.glide_steps, or null",
        )
        require(self.kl_budget > 0, "curriculum.kl_budget", self.kl_budget, "a positive number")
        require(self.fastest > 0, "curriculum.fastest", self.fastest, "a positive number")
        require(
            self.pacing != "kl_budget" or all(a <= b for a, b in pairwise(self.position)),
            "curriculum.position",
            self.position,
            "rising values with pacing: kl_budget",
        )
        rising = all(a < b for a, b in pairwise(self.at))
        require(rising and self.at[0] >= 0, "curriculum.at", self.at, "values from 0 up, each larger than the one before")
        require(
            self.unit == "step" or self.at[-1] <= 1, "curriculum.at", self.at, "fractions of the run, at most 1 (unit: run)"
        )


@dataclass(frozen=True, kw_only=True)
class TimestepsConfig:
    """Timestep curriculum: from high noise down, one more cluster of timesteps in each stage."""

    clusters: int = 1
    """How many; 1 trains all timesteps from the start."""
    edges: Literal["uniform", "log_snr"] = "log_snr"
    """Of the clusters: equally many timesteps each, or equal steps of log SNR."""
    patience: int = 200
    """Steps in a row that may pass without a lower training loss; one more, and the next cluster joins."""
    smoothing: float = 0.99
    """Share of its running mean that a step's loss leaves in place."""
    max_stage_steps: int | None = None
    """Steps after which the next cluster joins in any case; null: none."""

    def __post_init__(self) -> None:
        require(self.clusters >= 1, "timesteps.clusters", self.clusters, "1 (no curriculum) or more")
        require(self.patience >= 0, "timesteps.patience", self.patience, "0 or more")
        require(0 <= self.smoothing < 1, "timesteps.smoothing", self.smoothing, "a share in [0, 1)")
        require(
            self.max_stage_steps is None or self.max_stage_steps >= 1,
            "timesteps.max_stage_steps",
            self.max_stage_steps,
            "1 or more, or null",
        )


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on the UNet."""

    rank: int = 8
    """Rank; 0 trains the prompt alone."""
    alpha: float = 8.0
    """Scale: the adapter's output is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Share of its input that is dropped in training."""
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    """Endings of the names of the layers that get one."""
    learning_rate: float = 3e-3
    """Of the LoRA, per step."""
    weight_decay: float = 0.0
    """AdamW's decay toward zero, of the LoRA only."""
    train_from: float = 0.0
    """When it begins to train, in `curriculum.unit`."""
    train_until: float | None = None
    """When it stops, in `curriculum.unit`; null: at the end."""

    def __post_init__(self) -> None:
        _require_window(self, "lora")
        require(self.rank >= 0, "lora.rank", self.rank, "0 (none) or a positive number")
        require(self.alpha > 0, "lora.alpha", self.alpha, "a positive number")
        require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "a share in [0, 1)")
        require(self.learning_rate > 0, "lora.learning_rate", self.learning_rate, "a positive number")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The denoising loss."""

    weight: float = 1.0
    """Of the denoising loss beside other objectives; 0 leaves it out, and its forward pass where nothing else needs it."""
    snr_weighting: Literal["facelift", "v", "none"] = "v"
    """min-SNR weight: `v` min(snr, g) / (snr + 1), right for v-prediction; `facelift` min(snr, g) / snr, as FaceLift trains
    (and right for epsilon-prediction); `none`."""
    snr_gamma: float = 5.0
    """g above."""
    condition_drop_rate: float = 0.05
    """r: class labels are dropped with probability 2r, the input's latents with 2r, both with r; as FaceLift."""
    own_view: bool = True
    """False leaves the reference's own view, a mere copy of the input, out of the loss."""

    def __post_init__(self) -> None:
        require(self.weight >= 0, "loss.weight", self.weight, "zero or a positive number")
        require(self.snr_gamma > 0, "loss.snr_gamma", self.snr_gamma, "a positive number")
        require(0 <= self.condition_drop_rate <= 1 / 3, "loss.condition_drop_rate", self.condition_drop_rate, "0 to 1/3")


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """The KL term that holds the model near the pretrained one (adapters off and prompt W_0)."""

    weight: float = 0.03
    """Of the term in the loss, or its first value where there is a target; 0 leaves it, and its forward pass, out."""
    target: float | None = None
    """Adapt the weight so that the KL stays near this, in nats per latent element; null: a fixed weight."""
    rate: float = 0.1
    """How fast the weight adapts: by a fifth of this share at most at each measurement."""
    domain: Literal["new", "original", "both"] = "original"
    """Where it is measured and held: on the training objects, on those of data.original (where forgetting happens), or on
    both, half each."""
    weighting: Literal["posterior", "uniform"] = "uniform"
    """`posterior`: the exact Gaussian KL of a reverse step; `uniform`: plain squared difference, as DRaFT+."""
    clip: float = 1.0
    """Largest posterior weight; it is infinite at the last step."""
    every: int = 4
    """On every n-th step, with n times the weight: the same on average for less time."""

    def __post_init__(self) -> None:
        require(self.weight >= 0, "kl.weight", self.weight, "zero or a positive number")
        require(self.clip > 0, "kl.clip", self.clip, "a positive number")
        require(self.target is None or self.target > 0, "kl.target", self.target, "a positive number, or null")
        require(self.target is None or self.weight > 0, "kl.weight", self.weight, "a positive number where kl.target is given")
        require(0 < self.rate <= 1, "kl.rate", self.rate, "a share in (0, 1]")
        require(self.every >= 1, "kl.every", self.every, "1 (each step) or more")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Pictures: six views an object."""

    train: str = MICRO
    """List file, folder of samples, or `micro` (the embedded world of mice)."""
    val: str | None = None
    """The same for validation; null holds out the last 5 % of `train` (1 to 24 objects)."""
    limit: int | None = None
    """Train on the first so many objects only; null: all of them (40 of the embedded mice)."""
    original: str | None = None
    """Objects of the domain the model was pretrained on, as `train`: the loss on them shows what is forgotten, and the KL term
    can be held on them. null: none (the embedded heads, where `train` is the embedded world)."""
    background: Literal["white", "black", "gray", "three_choices", "random"] = "white"
    """Behind the object, the same for its six views: a colour, one of the three, or any (then no picture can be encoded
    ahead, and a step takes several times as long)."""
    cache: str | None = "cache"
    """Folder of encoded pictures, for all runs: each is encoded once, by what is in its file; null: in memory, each run anew.
    The embedded world always is in memory."""
    on_bad_sample: Literal["refuse", "skip"] = "refuse"
    """A sample that cannot be used: `refuse` stops before training; `skip` leaves it out, named in RUN/skipped_samples.txt."""
    bad_share: float = 0.05
    """With `skip`, the largest share of the samples that may be left out."""
    reference_view: Literal["random"] | int | list[int] = 0
    """Which view is the given picture: a number, a list to pick from, or `random` (any)."""

    def references(self, num_views: int) -> list[int]:
        """The views that may be given. Raises: InputError when one is not among the model's."""
        chosen = self.reference_view
        views = list(range(num_views)) if chosen == "random" else [chosen] if isinstance(chosen, int) else list(chosen)
        expected = f"views from 0 to {num_views - 1}"
        require(all(isinstance(v, int) and v < num_views for v in views), "data.reference_view", chosen, expected)
        return [int(v) for v in views]

    def __post_init__(self) -> None:
        require(0 <= self.bad_share < 1, "data.bad_share", self.bad_share, "a share in [0, 1)")
        require(self.limit is None or self.limit >= 1, "data.limit", self.limit, "1 or more, or null")
        given = self.reference_view if isinstance(self.reference_view, list) else [self.reference_view]
        require(
            len(given) > 0 and all(view == "random" or int(view) >= 0 for view in given),
            "data.reference_view",
            self.reference_view,
            "a view, counted from 0, a list of views, or random",
        )

    @property
    def first_reference(self) -> int:
        """The view that is given where one alone is: in validation and previews."""
        chosen = self.reference_view
        return 0 if chosen == "random" else chosen if isinstance(chosen, int) else chosen[0]

    @property
    def still_background(self) -> str:
        """The background of held-out objects: always the same one, so that validation is."""
        return self.background if self.background in ("white", "black", "gray") else "white"

    @property
    def original_or_micro(self) -> str | None:
        """Where objects of the pretrained model's domain come from; None: nowhere."""
        return self.original or (MICRO if self.train == MICRO else None)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run."""

    steps: int = 150
    """Optimizer steps."""
    batch_size: int = 4
    """Objects (of six pictures) a process takes at once."""
    accumulation: int = 1
    """Batches a step gathers gradients from."""
    seed: int = 0
    """Of everything random: order, noise, timesteps, LoRA's start."""
    warmup_steps: int = 10
    """Steps in which the learning rates rise from 0."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Of the learning rates after that: held, or down to 0 at the end."""
    max_grad_norm: float = 1.0
    """Each group's gradient is scaled down to this norm."""
    max_skipped: int = 20
    """Steps in a row that may be skipped since their numbers are not finite; one that is skipped changes nothing."""
    ema_decay: float | None = None
    """Keep a moving average of prompt and LoRA, e.g. 0.999; previews, validation and export then use it. null: none."""
    gradient_checkpointing: Literal["auto", "always", "never"] = "auto"
    """Less memory for a third more time. auto: once a step has run out of memory, from that step on (one process alone; with
    several, say always)."""
    compile: bool = False
    """torch.compile for the UNet's transformer blocks: faster steps on a GPU after minutes of compiling."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the frozen weights and the arithmetic (what trains is float32 always). auto: bf16 or fp16 on CUDA, fp32 on a CPU."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation"):
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "1 or more")
        require(self.warmup_steps >= 0, "train.warmup_steps", self.warmup_steps, "0 or more")
        require(self.max_skipped >= 1, "train.max_skipped", self.max_skipped, "1 or more")
        require(self.max_grad_norm > 0, "train.max_grad_norm", self.max_grad_norm, "a positive number")
        require(self.ema_decay is None or 0 < self.ema_decay < 1, "train.ema_decay", self.ema_decay, "between 0 and 1, or null")


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """What is looked at, and how often."""

    log_every: int = 5
    """Steps between points in metrics.jsonl and TensorBoard."""
    validate_every: int = 50
    """Steps between validations; also at step 0 and at the end."""
    validation_timesteps: int = 4
    """Fixed timesteps at which each held-out object is looked at, spread evenly over the schedule."""
    preview_every: int = 75
    """Steps between preview grids, and losses on data.original; also at step 0 and at the end."""
    preview_objects: int = 3
    """Held-out objects in a grid."""
    preview_steps: int = 16
    """DDIM steps of a preview."""
    guidance_scale: float = 2.0
    """Of previews; 1 is none."""
    eta: float = 0.0
    """Of previews: 0 is deterministic DDIM, 1 as noisy as DDPM (FaceLift's inference)."""
    objectives: list[str] = field(default_factory=list)
    """Objectives that are measured on held-out objects with each preview although their weight is 0, e.g. [custom]; those with
    a weight always are."""
    checkpoint_every: int = 50
    """Steps between checkpoints; also at the end and when interrupted."""
    checkpoints_kept: int = 3
    """Newest checkpoints kept."""

    def __post_init__(self) -> None:
        for f in fields(self):
            if f.name not in ("guidance_scale", "eta", "objectives"):
                require(getattr(self, f.name) >= 1, f"monitor.{f.name}", getattr(self, f.name), "1 or more")
        require(0 <= self.eta <= 1, "monitor.eta", self.eta, "0 to 1")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What the run leaves behind, besides the prompt and the LoRA."""

    pipeline: bool = True
    """At the end, a whole FaceLift pipeline folder with the LoRA merged (as large as the model)."""
    tolerance: float = 1e-4
    """Largest difference allowed, in pictures of range 0 to 1, between the model in memory and each export read back."""
    report: bool = True
    """At the end, RUN/report.html, with an ablation where the run is finished: what prompt and LoRA do each alone."""

    def __post_init__(self) -> None:
        require(self.tolerance > 0, "export.tolerance", self.tolerance, "a positive number")


def require(holds: bool, name: str, found: Any, expected: str) -> None:
    """Raises: InputError that `name` is `found` where `expected` was, unless it holds."""
    if not holds:
        raise InputError(f"{name}: is {found}; expected {expected}")


def _require_window(settings: PromptConfig | LoraConfig, name: str) -> None:
    begin, end = settings.train_from, settings.train_until
    require(begin >= 0, f"{name}.train_from", begin, "0 or more")
    require(end is None or end > begin, f"{name}.train_until", end, f"more than {name}.train_from, {begin:g}, or null")
