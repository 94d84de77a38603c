"""Functions and rewards that options name: a built-in reward, or `module:function`."""

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from softprompt.errors import InputError, no_folder
from softprompt.model.loading import load_frozen
from softprompt.model.pipeline import Pipeline
from softprompt.objectives.rewards import REWARDS, Reward, clip_similarity


def load_function(spec: str, option: str) -> Callable[..., Any]:
    """Import a function from the Python path or from the current folder. option: named in errors.

    Raises: InputError when there is no such module, when it cannot be imported, or has no such function.
    """
    module_name, _, name = spec.partition(":")
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = f"there is no module {error.name}"
        own = f"{module_name}.".startswith(f"{error.name}.")
        place = f"on the Python path or in {here}" if own else f"which {module_name} imports"
        raise InputError(f"{option}: is {spec}; {missing} ({place})") from error
    except (Exception, SystemExit) as error:  # whatever the user's module raises while it is imported
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{option}: is {spec}; module {module_name} cannot be imported ({problem[:300]})") from error
    finally:
        if added:
            sys.path.remove(here)
    found = getattr(module, name, None)
    if not callable(found):
        functions = [n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__]
        what = "has no function" if found is None else f"has a {type(found).__name__}, no function,"
        raise InputError(f"{option}: is {spec}; module {module_name} {what} {name}; it has {', '.join(functions) or 'none'}")
    return found


def call(function: Callable[..., Any], *given: Any, spec: str, option: str) -> Any:
    """The value of a user's own function. Raises: InputError that names the option and the line where the function failed.

    What is out of memory stays that: the trainer does the step again.
    """
    try:
        return function(*given)
    except torch.OutOfMemoryError:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        frames = traceback.extract_tb(error.__traceback__)[1:]
        where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{option}: {spec} failed{where} ({problem[:300]})") from error


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
