"""A reward by its name, or `module:function`."""

from pathlib import Path

from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from softprompt.errors import InputError, no_folder
from softprompt.model.loading import load_frozen
from softprompt.model.pipeline import Pipeline
from softprompt.objectives.rewards import REWARDS, Reward, clip_similarity
from train.objectives.functions import call, load_function


def load_reward(name: str, encoder: str | None, pipeline: Pipeline, group: str) -> Reward:
    """The reward that the options GROUP.reward and GROUP.encoder name. Raises: InputError where it cannot be loaded; the reward
    itself, where it cannot judge."""
    option = f"{group}.reward"
    if ":" in name:
        function = load_function(name, option)
        return lambda *given: call(function, *given, spec=name, option=option)
    known = REWARDS[name] if encoder is None or name != "clip" else _clip(Path(encoder), pipeline, f"{group}.encoder")

    def reward(views: Tensor, truth: Tensor, masks: Tensor) -> Tensor:
        try:
            return known(views, truth, masks)
        except ValueError as error:
            raise InputError(f"{option}: {name}: {error}") from error

    return reward


def _clip(folder: Path, pipeline: Pipeline, option: str) -> Reward:
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{option}: {folder} holds no config.json; expected the folder of a CLIP vision model with its projection, e.g. "
            f"PIPECKPTS/image_encoder{no_folder(folder)}"
        )
    try:
        encoder = load_frozen(CLIPVisionModelWithProjection, folder, left_over=True).to(pipeline.device)
    except InputError as error:
        raise InputError(f"{option}: {error}") from error
    return clip_similarity(encoder, int(encoder.config.image_size))
