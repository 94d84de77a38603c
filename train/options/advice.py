"""Warnings about a configuration that does something its author may not have meant."""

from dataclasses import asdict

from train.options.config import Config
from train.options.groups import MICRO
from train.options.objectives import OBJECTIVES

HEAVY = 30
"""Ratio of a preference's pull to the denoising loss's from which on a warning is given."""


def advice(config: Config) -> list[str]:
    """The warnings, as notes for the user."""
    found = [*_advice_on_schedules(config), *_advice_on_objectives(config)]
    if config.model != MICRO:
        micro = Config()
        values = {
            "train.steps": (config.train.steps, micro.train.steps),
            "lora.learning_rate": (config.lora.learning_rate, micro.lora.learning_rate),
            "prompt.learning_rate": (config.prompt.learning_rate, micro.prompt.learning_rate),
        }
        if unchanged := [f"{name} {mine:g}" for name, (mine, default) in values.items() if mine == default]:
            found.append(
                f"{', '.join(unchanged)}: tuned for the micro model; configs/facelift_mouse.yaml has values for real weights"
            )
        if config.data.train == MICRO:
            found.append("data.train is the embedded toy world; give --data.train for pictures of your own")
    return [f"WARNING    {one}" for one in found]


def _advice_on_schedules(config: Config) -> list[str]:
    found, curriculum, steps = [], config.curriculum, config.train.steps
    for group, trains in (("prompt", config.prompt.learn), ("LoRA", config.lora.rank > 0)):
        first, end = config.window(group.lower())
        if trains and config.train.warmup_steps >= end - first:
            found.append(
                f"train.warmup_steps {config.train.warmup_steps}: the learning rate of the {group}, which trains for "
                f"{end - first} steps, does not reach its full value"
            )
    for name, least in least_steps(config).items():
        if least > steps:
            found.append(
                f"the curriculum of the {name} takes {least} steps or more; the run has {steps} and ends before it is "
                f"complete. Lower its patience, or set its max_stage_steps"
            )
    if curriculum.pacing == "plateau" and curriculum.watch == "train" and curriculum.smoothing == 0:
        found.append("curriculum.watch train with curriculum.smoothing 0: the loss of one batch is mostly noise; try 0.9")
    if curriculum.pacing == "step" and curriculum.unit == "step" and curriculum.at[-1] > steps:
        found.append(
            f"the curriculum reaches its end at step {curriculum.at[-1]:g}; the run has {steps} steps and stops before"
        )
    return found


def _advice_on_objectives(config: Config) -> list[str]:
    found, default = [], Config()
    for group in (name for name in OBJECTIVES if not config.uses(name)):
        values, defaults = asdict(getattr(config, group)), asdict(getattr(default, group))
        if changed := [f"{group}.{name}" for name, value in values.items() if value != defaults[name]]:
            found.append(f"{', '.join(changed)}: has no effect, since {group}.weight is 0 and the objective is left out")
    for group, settings in (("dpo", config.dpo), ("spin", config.spin)):
        if (pull := settings.weight * settings.beta / 4) > HEAVY * max(1.0, config.loss.weight):
            found.append(
                f"{group}.weight {settings.weight:g}: a pair pulls {pull:.0f} times as hard as the denoising loss (weight x "
                f"beta / 4); begin with {4 / settings.beta:g}, 4 / {group}.beta"
            )
    return found


def least_steps(config: Config) -> dict[str, int]:
    """Least number of steps of each curriculum that waits for a plateau, if nothing ever improves."""
    curriculum, timesteps = config.curriculum, config.timesteps
    found = {}
    if timesteps.clusters > 1:
        stage = min(timesteps.patience + 2, timesteps.max_stage_steps or config.train.steps + 1)  # the first value is the best
        found["timesteps"] = (timesteps.clusters - 1) * stage
    if curriculum.pacing == "plateau":
        interval = 1 if curriculum.watch == "train" else config.monitor.validate_every
        stage = (curriculum.patience + 2) * interval + curriculum.glide_steps
        found["prompt"] = (len(curriculum.position) - 1) * min(stage, curriculum.max_stage_steps or stage)
    return found
