"""A reward by its name, or `module:function`."""

from pathlib import Path

from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from softprompt.errors import InputError
from softprompt.objectives.rewards import REWARDS, Reward, clip_similarity
from softprompt.pipeline import Pipeline, load_frozen
from train.objectives.functions import call, load_function


def load_reward(name: str, encoder: str | None, pipeline: Pipeline, group: str) -> Reward:
    """The reward that the options GROUP.reward and GROUP.encoder name. Raises: InputError where it cannot be loaded."""
    if name == "clip":
        assert encoder is not None, "checked when the configuration is read"
        return _clip(Path(encoder), pipeline, f"{group}.encoder")
    return REWARDS.get(name) or _own(name, f"{group}.reward")


def _own(spec: str, option: str) -> Reward:
    """A user's function; where it fails, the error says so."""
    function = load_function(spec, option)

    def reward(views: Tensor, truth: Tensor, masks: Tensor) -> Tensor:
        found: Tensor = call(function, views, truth, masks, spec=spec, option=option)
        return found

    return reward


def _clip(folder: Path, pipeline: Pipeline, option: str) -> Reward:
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{option}: {folder} holds no config.json; expected the folder of a CLIP vision model with its projection, e.g. "
            f"PIPECKPTS/image_encoder"
        )
    try:
        encoder = load_frozen(CLIPVisionModelWithProjection, folder, left_over=True).to(pipeline.device)
    except InputError as error:
        raise InputError(f"{option}: {error}") from error
    return clip_similarity(encoder, int(encoder.config.image_size))
