"""The one typed configuration of the main job: frozen dataclasses, read from YAML and options by train.command_line.

The defaults are the embedded micro run (`configs/micro.yaml` writes them out); `configs/facelift_mouse.yaml` is the place to
start with real weights.
"""

import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import yaml

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

    def __post_init__(self) -> None:
        _require(len(self.waypoints) >= 1, "prompt.waypoints", self.waypoints, "at least one: the pretrained prompt")
        _require(self.learning_rate > 0, "prompt.learning_rate", self.learning_rate, "a positive number")
        _require(self.decay >= 0, "prompt.decay", self.decay, "zero or a positive number")
        _require(
            self.norm_band is None or 0 < self.norm_band <= 1, "prompt.norm_band", self.norm_band, "a share in (0, 1], or null"
        )


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """Where on the path the prompt is at which step."""

    unit: Literal["run", "step"] = "run"
    """Of `at`: `run` is fractions of the whole run (0 to 1), `step` is steps."""
    at: list[float] = field(default_factory=lambda: [0.0, 0.25])
    """When each position is reached, rising."""
    position: list[float] = field(default_factory=lambda: [0.0, 1.0])
    """Position s in [0, number of waypoints - 1] at each of these: 0 is the pretrained prompt, 1 the first target."""
    easing: Literal["linear", "cosine", "step"] = "linear"
    """Between them: linear, cosine (slow at both ends), or step (hold, then switch)."""

    def __post_init__(self) -> None:
        _require(
            len(self.at) == len(self.position) >= 1,
            "curriculum.at and curriculum.position",
            f"{len(self.at)} and {len(self.position)} values",
            "the same number, one or more",
        )
        rising = all(a < b for a, b in zip(self.at, self.at[1:], strict=False))
        _require(rising and self.at[0] >= 0, "curriculum.at", self.at, "values from 0 up, each larger than the one before")
        _require(
            self.unit == "step" or self.at[-1] <= 1, "curriculum.at", self.at, "fractions of the run, at most 1 (unit: run)"
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
    learning_rate: float = 1e-3
    """Of the LoRA, per step."""
    weight_decay: float = 0.0
    """AdamW's decay toward zero, of the LoRA only."""

    def __post_init__(self) -> None:
        _require(self.rank >= 0, "lora.rank", self.rank, "0 (none) or a positive number")
        _require(self.alpha > 0, "lora.alpha", self.alpha, "a positive number")
        _require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "a share in [0, 1)")
        _require(self.learning_rate > 0, "lora.learning_rate", self.learning_rate, "a positive number")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The denoising loss."""

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
        _require(self.snr_gamma > 0, "loss.snr_gamma", self.snr_gamma, "a positive number")
        _require(0 <= self.condition_drop_rate <= 1 / 3, "loss.condition_drop_rate", self.condition_drop_rate, "0 to 1/3")


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """The KL term that holds the model near the pretrained one (adapters off and prompt W_0)."""

    weight: float = 0.1
    """Of the term in the loss; 0 leaves it, and its forward pass, out."""
    weighting: Literal["posterior", "uniform"] = "posterior"
    """`posterior`: the exact Gaussian KL of a reverse step; `uniform`: plain squared difference, as DRaFT+."""
    clip: float = 1.0
    """Largest posterior weight; it is infinite at the last step."""
    every: int = 4
    """On every n-th step, with n times the weight: the same on average for less time."""

    def __post_init__(self) -> None:
        _require(self.weight >= 0, "kl.weight", self.weight, "zero or a positive number")
        _require(self.clip > 0, "kl.clip", self.clip, "a positive number")
        _require(self.every >= 1, "kl.every", self.every, "1 (each step) or more")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Pictures: six views an object."""

    train: str = MICRO
    """List file, folder of samples, or `micro` (the embedded world of mice)."""
    val: str | None = None
    """The same for validation; null holds out the last 5 % of `train` (1 to 24 objects)."""
    background: Literal["white", "black", "gray", "three_choices", "random"] = "white"
    """Behind the object, the same for its six views: a colour, one of the three, or any (then no picture can be encoded
    ahead, and a step takes several times as long)."""
    reference_view: Literal["random"] | int | list[int] = 0
    """Which view is the given picture: a number, a list to pick from, or `random` (any)."""

    def references(self, num_views: int) -> list[int]:
        """The views that may be given. Raises: InputError when one is not among the model's."""
        chosen = self.reference_view
        views = list(range(num_views)) if chosen == "random" else [chosen] if isinstance(chosen, int) else list(chosen)
        _require(
            bool(views) and all(isinstance(v, int) and 0 <= v < num_views for v in views),
            "data.reference_view",
            chosen,
            f"views from 0 to {num_views - 1}",
        )
        return [int(v) for v in views]


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
    ema_decay: float | None = None
    """Keep a moving average of prompt and LoRA, e.g. 0.999; previews, validation and export then use it. null: none."""
    gradient_checkpointing: bool = False
    """Less memory for a third more time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the frozen weights and the arithmetic (what trains is float32 always). auto: bf16 or fp16 on CUDA, fp32 on a CPU."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation"):
            _require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "1 or more")
        _require(self.warmup_steps >= 0, "train.warmup_steps", self.warmup_steps, "0 or more")
        _require(self.max_grad_norm > 0, "train.max_grad_norm", self.max_grad_norm, "a positive number")
        _require(
            self.ema_decay is None or 0 < self.ema_decay < 1, "train.ema_decay", self.ema_decay, "between 0 and 1, or null"
        )


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
    """Steps between preview grids; also at step 0 and at the end."""
    preview_objects: int = 3
    """Held-out objects in a grid."""
    preview_steps: int = 16
    """DDIM steps of a preview."""
    guidance_scale: float = 2.0
    """Of previews; 1 is none."""
    eta: float = 0.0
    """Of previews: 0 is deterministic DDIM, 1 as noisy as DDPM (FaceLift's inference)."""
    checkpoint_every: int = 50
    """Steps between checkpoints; also at the end and when interrupted."""
    checkpoints_kept: int = 3
    """Newest checkpoints kept."""

    def __post_init__(self) -> None:
        for f in fields(self):
            if f.name not in ("guidance_scale", "eta"):
                _require(getattr(self, f.name) >= 1, f"monitor.{f.name}", getattr(self, f.name), "1 or more")
        _require(0 <= self.eta <= 1, "monitor.eta", self.eta, "0 to 1")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What the run leaves behind, besides the prompt and the LoRA."""

    pipeline: bool = True
    """At the end, a whole FaceLift pipeline folder with the LoRA merged (as large as the model)."""
    tolerance: float = 1e-4
    """Largest difference allowed, in pictures of range 0 to 1, between the model in memory and each export read back."""

    def __post_init__(self) -> None:
        _require(self.tolerance > 0, "export.tolerance", self.tolerance, "a positive number")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Adapt FaceLift's six-view diffusion model by learning its prompt, jointly with LoRA."""

    model: str = MICRO
    """FaceLift pipeline folder (pipeckpts), or `micro`."""
    output: str | None = None
    """Run folder, new or empty; null takes the next free runs/NAME-NNN."""
    prompt: PromptConfig = field(default_factory=PromptConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    def __post_init__(self) -> None:
        last = len(self.prompt.waypoints) - 1
        _require(
            all(0 <= s <= last for s in self.curriculum.position),
            "curriculum.position",
            self.curriculum.position,
            f"0 to {last}, since prompt.waypoints has {last + 1}",
        )
        if self.prompt.learn and self.prompt.carry == "fade":
            _require(
                last == 0 or max(self.curriculum.position) < last,
                "curriculum.position",
                max(self.curriculum.position),
                f"less than {last} (e.g. {0.8 * last:g}) with prompt.carry: fade, since there the prompt's gradient is zero; "
                f"or use prompt.carry: keep",
            )
        _require(
            self.prompt.learn or self.lora.rank > 0,
            "lora.rank",
            0,
            "1 or more where prompt.learn is false: nothing would train",
        )


def _require(holds: bool, name: str, found: Any, expected: str) -> None:
    if not holds:
        raise InputError(f"{name}: is {found}; expected {expected}")


class _Dumper(yaml.SafeDumper):
    """Quotes a text that the options' reader would take for a number: `1e-4` is one to it, and none to YAML."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="'" if re.fullmatch(r"[-+]?[\d._]+([eE][-+]?\d+)?", text) else None
    ),
)


def to_yaml(config: Config) -> str:
    """The configuration as YAML that `--config` takes back."""
    return yaml.dump(asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
