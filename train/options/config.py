"""The one typed configuration of the main job, read by train.options.command_line; its groups are in train.options.groups
and train.options.objectives."""

import re
from dataclasses import asdict, dataclass, field
from typing import Any

import yaml

from train.options.checks import Checked, require
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
)
from train.options.objectives import OBJECTIVES, CustomConfig, DraftConfig, SeparateConfig, StudioConfig
from train.options.preferences import DpoConfig, SpinConfig


@dataclass(frozen=True, kw_only=True)
class Config(Checked):
    """Adapt FaceLift's six-view diffusion model by learning its prompt, jointly with LoRA."""

    model: str = MICRO
    """FaceLift pipeline folder (pipeckpts), or `micro`."""
    unet: str | None = None
    """UNet folder that replaces the UNet of `model`, as in a checkpoint of FaceLift's trainer (checkpoint-2000/unet); null: the
    UNet of `model`."""
    init_from: str | None = None
    """Export of an earlier run (RUN/export) to start from: its prompt and LoRA, with step 0 and a new optimizer; null: the
    pretrained model. To continue a run, use --resume."""
    output: str | None = None
    """Run folder, new or empty; null: the next free runs/NAME-NNN."""
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
        super().__post_init__()
        last = len(self.prompt.waypoints) - 1
        self._check(
            "curriculum.position",
            all(0 <= s <= last for s in self.curriculum.position),
            f"0 to {last}, since prompt.waypoints has {last + 1}",
        )
        self._check_objectives()
        if self.prompt.learn and self.prompt.carry == "fade":
            require(
                last == 0 or max(self.curriculum.position) < last,
                "curriculum.position",
                max(self.curriculum.position),
                f"less than {last} (e.g. {0.8 * last:g}) with prompt.carry: fade, since there the prompt's gradient is zero; "
                f"or use prompt.carry: keep",
            )
        self._check(
            "lora.rank", self.prompt.learn or self.lora.rank > 0, "1 or more where prompt.learn is false: nothing would train"
        )
        self._check(
            "kl.weight",
            self.curriculum.pacing != "kl_budget" or self.kl.weight > 0,
            "a positive number with curriculum.pacing: kl_budget, which needs the KL",
        )
        self._check(
            "data.original",
            self.kl.domain == "new" or self.kl.weight == 0 or self.data.original_or_micro is not None,
            f"objects of the original domain, as a list or folder, with kl.domain: {self.kl.domain}; without such objects use "
            f"kl.domain: new",
        )
        self._check(
            "data.micro_first", self.data.micro_first == 0 or self.data.train == MICRO, "0 with other samples than micro"
        )
        self._check_times()

    def _check(self, name: str, holds: bool, expected: str) -> None:
        group, _, option = name.partition(".")
        require(holds, name, getattr(getattr(self, group), option), expected)

    def _check_objectives(self) -> None:
        steps, spin = self.train.steps, self.spin
        known = set(self.monitor.objectives) <= set(OBJECTIVES)
        self._check("monitor.objectives", known, f"some of {', '.join(OBJECTIVES)}")
        if self.loss.weight == 0:
            trained = [name for name in OBJECTIVES if getattr(self, name).weight > 0]
            self._check(
                "loss.weight",
                len(trained) > 0,
                f"a positive number, or a weight for one of the objectives ({', '.join(OBJECTIVES)}): nothing would train",
            )
            alone = "with loss.weight 0 and no other objective: nothing would train in the steps"
            self._check("draft.every", trained != ["draft"] or self.draft.every == 1, f"1 {alone} between")
            self._check("spin.start", trained != ["spin"] or self.step_of(spin.start) == 0, f"0 {alone} before")
        self._check(
            "custom.function",
            not self.uses("custom") or self.custom.function is not None,
            "module:function, e.g. my_losses:smooth, where the objective is trained or measured",
        )
        self._check(
            "train.batch_size",
            not self.studio.compares_objects or self.train.batch_size >= 3,
            "3 or more with studio.over: objects, since pairwise similarity needs three items; or studio.over: views",
        )
        self._check(
            "train.compile",
            not (self.uses("separate") and self.train.compile),
            "false with the objective separate: compiled blocks return no attention maps",
        )
        if self.uses("dpo"):
            self._check("dpo.chunks", self.dpo.chunks <= steps, f"{steps} at most: a stage takes at least one of train.steps")
        self._check_time("spin.start", spin.start)
        less = spin.start < (1 if self.curriculum.unit == "run" else steps)
        self._check("spin.start", less, f"a time before the end of the run (train.steps: {steps}; curriculum.unit)")
        if self.uses("spin"):
            left = steps - self.step_of(spin.start)
            self._check(
                "spin.start", left > 0, f"a time that leaves steps of train.steps, {steps}, for {spin.iterations} iterations"
            )
            self._check("spin.iterations", spin.iterations <= left, f"{left} at most: each iteration takes at least one step")

    def _check_time(self, name: str, time: float | None) -> None:
        """A time in `curriculum.unit`."""
        if time is None:
            return
        if self.curriculum.unit == "run":
            self._check(name, time <= 1, "a fraction of the run, at most 1 (curriculum.unit: run)")
        else:
            self._check(name, time == int(time), "a whole number of steps (curriculum.unit: step)")

    def _check_times(self) -> None:
        """Each group trains at some step, and at every step one of them does."""
        for group in ("prompt", "lora"):
            for name in ("train_from", "train_until"):
                self._check_time(f"{group}.{name}", getattr(getattr(self, group), name))
        whole = self.curriculum.unit == "run" or all(at == int(at) for at in self.curriculum.at)
        self._check("curriculum.at", whole, "whole numbers of steps (curriculum.unit: step)")
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

    def step_of(self, when: float) -> int:
        """A time in `curriculum.unit` as a step."""
        return round(when * (self.train.steps if self.curriculum.unit == "run" else 1))

    def uses(self, objective: str) -> bool:
        """Whether an objective is trained or measured."""
        return getattr(self, objective).weight > 0 or objective in self.monitor.objectives

    def window(self, group: str) -> tuple[int, int]:
        """(first, end): the steps [first, end) in which a group, prompt or lora, trains."""
        settings = self.prompt if group == "prompt" else self.lora
        until = settings.train_until
        end = self.train.steps if until is None else min(self.train.steps, self.step_of(until))
        return self.step_of(settings.train_from), end


class _Dumper(yaml.SafeDumper):
    """Quotes a text that the options' parser would read as a number: `1e-4` is one there, but not in YAML."""


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
