"""A reward by its name, or `module:function`."""

from pathlib import Path

from transformers import CLIPVisionModelWithProjection

from softprompt.errors import InputError
from softprompt.objectives.rewards import REWARDS, Reward, clip_similarity
from softprompt.pipeline import Pipeline
from train.objectives.functions import load_function


def load_reward(name: str, encoder: str | None, pipeline: Pipeline, group: str) -> Reward:
    """The reward that the options GROUP.reward and GROUP.encoder name. Raises: InputError where it cannot be loaded."""
    if name == "clip":
        assert encoder is not None, "checked when the configuration is read"
        return _clip(Path(encoder), pipeline, f"{group}.encoder")
    return REWARDS.get(name) or load_function(name, f"{group}.reward")


def _clip(folder: Path, pipeline: Pipeline, option: str) -> Reward:
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{option}: {folder} holds no config.json; expected the folder of a CLIP vision model with its projection, e.g. "
            f"PIPECKPTS/image_encoder"
        )
    try:
        encoder = CLIPVisionModelWithProjection.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # which one depends on what is wrong in which file
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{option}: {folder} cannot be loaded as a CLIP vision model ({problem[:300]})") from error
    encoder = encoder.requires_grad_(False).eval().to(pipeline.device)
    return clip_similarity(encoder, int(encoder.config.image_size))
