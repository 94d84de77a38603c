"""The one typed configuration of the main job, read by train.options.command_line; its groups are in train.options.groups
and train.options.objectives."""

import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any

import yaml

from train.options.groups import (
    MICRO,
    CurriculumConfig,
    DataConfig,
    ExportConfig,
    KLConfig,
    LoraConfig,
    LossConfig,
    MonitorConfig,
    PromptConfig,
    TimestepsConfig,
    TrainConfig,
    require,
)
from train.options.objectives import OBJECTIVES, CustomConfig, DraftConfig, SeparateConfig, StudioConfig
from train.options.preferences import DpoConfig, SpinConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """Adapt FaceLift's six-view diffusion model by learning its prompt, jointly with LoRA."""

    model: str = MICRO
    """FaceLift pipeline folder (pipeckpts), or `micro`."""
    unet: str | None = None
    """Folder of the UNet to use instead of that in `model`, as a checkpoint of FaceLift's own trainer holds it
    (checkpoint-2000/unet); null: that in `model`."""
    init_from: str | None = None
    """Start from what an earlier run exported (RUN/export): its prompt and LoRA, but step 0 and a new optimizer; null: from the
    pretrained model. To go on with a run, use --resume."""
    output: str | None = None
    """Run folder, new or empty; null takes the next free runs/NAME-NNN."""
    prompt: PromptConfig = field(default_factory=PromptConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    timesteps: TimestepsConfig = field(default_factory=TimestepsConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    draft: DraftConfig = field(default_factory=DraftConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    spin: SpinConfig = field(default_factory=SpinConfig)
    studio: StudioConfig = field(default_factory=StudioConfig)
    separate: SeparateConfig = field(default_factory=SeparateConfig)
    custom: CustomConfig = field(default_factory=CustomConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    def __post_init__(self) -> None:
        for name, value in option_values(self).items():
            numbers = [n for n in (value if isinstance(value, list) else [value]) if isinstance(n, float)]
            require(all(map(math.isfinite, numbers)), name, value, "a number that has an end")
        last = len(self.prompt.waypoints) - 1
        require(
            all(0 <= s <= last for s in self.curriculum.position),
            "curriculum.position",
            self.curriculum.position,
            f"0 to {last}, since prompt.waypoints has {last + 1}",
        )
        if self.prompt.learn and self.prompt.carry == "fade":
            require(
                last == 0 or max(self.curriculum.position) < last,
                "curriculum.position",
                max(self.curriculum.position),
                f"less than {last} (e.g. {0.8 * last:g}) with prompt.carry: fade, since there the prompt's gradient is zero; "
                f"or use prompt.carry: keep",
            )
        require(
            self.prompt.learn or self.lora.rank > 0,
            "lora.rank",
            0,
            "1 or more where prompt.learn is false: nothing would train",
        )
        self._check_objectives()
        self._check_curriculum()
        self._check_windows()

    def _check_objectives(self) -> None:
        require(
            self.loss.weight > 0 or any(getattr(self, name).weight > 0 for name in OBJECTIVES),
            "loss.weight",
            0,
            f"a positive number, or a weight for one of the objectives ({', '.join(OBJECTIVES)}): nothing would be trained on",
        )
        objectives = [name for name in OBJECTIVES if getattr(self, name).weight > 0]
        require(
            self.loss.weight > 0 or objectives != ["draft"] or self.draft.every == 1,
            "draft.every",
            self.draft.every,
            "1 with loss.weight 0 and no other objective: nothing would be trained on in the steps between",
        )
        require(
            self.loss.weight > 0 or objectives != ["spin"] or self.step_of(self.spin.start) == 0,
            "spin.start",
            self.spin.start,
            "0 with loss.weight 0 and no other objective: nothing would be trained on before",
        )
        known = set(self.monitor.objectives) <= set(OBJECTIVES)
        require(known, "monitor.objectives", self.monitor.objectives, f"some of {', '.join(OBJECTIVES)}")
        require(
            not self.uses("custom") or self.custom.function is not None,
            "custom.function",
            "null",
            "module:function, e.g. my_losses:smooth, where the objective is trained or measured",
        )
        require(
            not self.studio.compares_objects or self.train.batch_size >= 3,
            "train.batch_size",
            self.train.batch_size,
            "3 or more with studio.over: objects, since pairwise similarity needs three items; or studio.over: views",
        )
        require(
            not (self.uses("separate") and self.train.compile),
            "train.compile",
            "true",
            "false with separate: what is compiled gives out no attention maps",
        )
        self._check_start("spin.start", self.spin.start)
        left, rounds = self.train.steps - self.step_of(self.spin.start), self.spin.iterations
        require(
            left > 0 or not self.uses("spin"),
            "spin.start",
            self.spin.start,
            f"a time that leaves steps of train.steps, {self.train.steps}, for {rounds} iterations",
        )
        require(
            not self.uses("dpo") or self.dpo.chunks <= self.train.steps,
            "dpo.chunks",
            self.dpo.chunks,
            f"{self.train.steps} at most: a stage takes a step at least (train.steps)",
        )
        fits = not self.uses("spin") or rounds <= left
        require(fits, "spin.iterations", rounds, f"{left} at most: an iteration takes a step at least")

    def _check_start(self, name: str, start: float) -> None:
        """A time within the run."""
        if self.curriculum.unit == "run":
            require(start < 1, name, start, "a fraction of the run, less than 1 (curriculum.unit: run)")
        else:
            whole = start == int(start) and start < self.train.steps
            require(whole, name, start, f"a whole number of steps, less than train.steps, {self.train.steps}")

    def step_of(self, when: float) -> int:
        """The step that a time in `curriculum.unit` is."""
        return round(when * (self.train.steps if self.curriculum.unit == "run" else 1))

    def uses(self, objective: str) -> bool:
        """Whether an objective is trained or measured."""
        return getattr(self, objective).weight > 0 or objective in self.monitor.objectives

    def _check_curriculum(self) -> None:
        require(
            self.curriculum.pacing != "kl_budget" or self.kl.weight > 0,
            "kl.weight",
            self.kl.weight,
            "a positive number with curriculum.pacing: kl_budget, which needs the KL measured",
        )
        require(
            self.kl.domain == "new" or self.kl.weight == 0 or self.data.original_or_micro is not None,
            "data.original",
            "null",
            f"objects of the pretrained model's domain, as a list or folder, with kl.domain: {self.kl.domain}; if there are "
            f"none, kl.domain: new",
        )

    def _check_windows(self) -> None:
        """Each group trains at some step, and at every step one of them does."""
        for group, settings in (("prompt", self.prompt), ("lora", self.lora)):
            for name in ("train_from", "train_until"):
                value = getattr(settings, name)
                if self.curriculum.unit == "run":
                    fits, expected = value is None or value <= 1, "a fraction of the run, at most 1 (curriculum.unit: run)"
                else:
                    fits, expected = value is None or value == int(value), "a whole number of steps (curriculum.unit: step)"
                require(fits, f"{group}.{name}", value, expected)
        if self.curriculum.unit == "step":
            whole = all(at == int(at) for at in self.curriculum.at)
            require(whole, "curriculum.at", self.curriculum.at, "whole numbers of steps (curriculum.unit: step)")
        trained = {"prompt": self.prompt.learn, "lora": self.lora.rank > 0}
        windows = {name: self.window(name) for name, trains in trained.items() if trains}
        for name, (first, end) in windows.items():
            some = first < min(end, self.train.steps)
            require(some, f"{name}.train_from and train_until", "no step of the run", "some of its steps")
        idle = 0
        for first, end in sorted(windows.values()):
            idle = max(idle, end) if first <= idle else idle
        require(
            idle >= self.train.steps,
            "train_from and train_until",
            f"such that nothing trains at step {idle}",
            "prompt or lora to train at each step",
        )

    def window(self, group: str) -> tuple[int, int]:
        """(first, end): the steps [first, end) in which a group, prompt or lora, trains."""
        settings = self.prompt if group == "prompt" else self.lora
        until = settings.train_until
        end = self.train.steps if until is None else min(self.train.steps, self.step_of(until))
        return self.step_of(settings.train_from), end


class _Dumper(yaml.SafeDumper):
    """Quotes a text that the options' reader would take for a number: `1e-4` is one to it, and none to YAML."""


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    number = re.fullmatch(r"[-+]?[\d._]+([eE][-+]?\d+)?", text)
    # Unicode's own ends of line would come back as spaces.
    style = '"' if re.search("[\x85\u2028\u2029]", text) else "'" if number else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _quoted)


def to_yaml(config: Config) -> str:
    """The configuration as YAML that `--config` takes back."""
    return yaml.dump(asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def option_values(config: Config) -> dict[str, Any]:
    """Every option's value under its dotted name, as on the command line."""
    found: dict[str, Any] = {}

    def collect(values: dict[str, Any], prefix: str) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                collect(value, f"{prefix}{name}.")
            else:
                found[prefix + name] = value

    collect(asdict(config), "")
    return found
