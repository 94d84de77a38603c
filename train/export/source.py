"""The source of an export: a checkpoint of a run, as the run itself would export it, or an earlier export."""

from pathlib import Path
from types import NoneType

import torch
from diffusers.training_utils import EMAModel

from softprompt.errors import InputError
from softprompt.model.loading import load_pipeline
from softprompt.model.pipeline import Pipeline
from softprompt.prompt.embeddings import load_prompt
from softprompt.prompt.pacing import CurriculumState
from train.build import build_adapted, make_curriculum, pipeline_folder
from train.export.read import Source, is_run, open_lora, refuse_another_unet, start_from
from train.export.write import describe
from train.options.command_line import parse
from train.state.checkpoint import DamagedError, read_state, restore_trained, verify
from train.state.folder import DESCRIPTION, checkpoint_folder, exported_prompt, list_checkpoints, read_description, step_of

_DESCRIBED: dict[str, type | tuple[type, ...]] = {
    "origin": str,
    "model": str,
    "unet": (str, NoneType),
    "licence": str,
    "waypoints": list,
    "position": (int, float),
    "carry": str,
    "steps": int,
    "validation": dict,
}
"""The fields that `train.export.write.describe` writes, with their types."""


def open_run(run: Path, which: str, *, model: str | None, unet: str | None = None, device: torch.device) -> Source:
    """A checkpoint of a run: prompt and LoRA as the run would export them there, the moving average where it keeps one.

    which: `newest`, `best` (of the lowest validation loss) or a step. model, unet: folders of the pipeline and of the UNet used
    instead of its own; None: those of the run.
    Raises: InputError for a step without a checkpoint, a damaged checkpoint, or another model than the run's.
    """
    folder = find_checkpoint(run, which)
    try:
        state = read_state(folder)
    except DamagedError as error:
        raise _damaged(run, folder, error) from error
    moved = [f"--{name}={value}" for name, value in (("model", model), ("unet", unet)) if value is not None]
    trained_on = parse(["--config", str(run / "config.yaml")]).config.unet
    if unet is not None:
        refuse_another_unet(unet, trained_on, run)
    config = parse(["--config", str(run / "config.yaml"), *moved]).config
    pipeline = open_pipeline(config.model, config.unet, device)
    waypoints = state["waypoints"]  # as they were then, whatever the files or texts they came from are now
    if (views := waypoints.shape[1], width := waypoints.shape[3]) != (pipeline.num_views, pipeline.prompt_width):
        raise InputError(
            f"{pipeline.folder}: takes prompts of {pipeline.num_views} views, {pipeline.prompt_width} wide; the run's have "
            f"{views} and are {width} wide. Likely another model than the run's: give that with --model"
        )
    adapted = build_adapted(pipeline, waypoints, config.prompt, config.lora).eval()
    curriculum = make_curriculum(config, pipeline.scheduler.alphas_cumprod)
    if config.init_from is not None and not config.prompt.learn:  # the prompt it began with never changed, and is not saved
        start_from(Path(config.init_from), adapted, curriculum.position(curriculum.start(), 0))
    ema = None if state["ema"] is None else EMAModel(adapted.all_trainable().values())
    restore_trained(state, adapted=adapted, ema=ema, option=str(folder))
    if ema is not None:
        ema.copy_to(adapted.all_trainable().values())
    position = curriculum.position(CurriculumState.from_json(state["pace"]), state["step"])
    return Source(
        folder=folder,
        run=run,
        config=config,
        metadata=describe(config, position=position, step=state["step"], last=state["last"]),
        pipeline=pipeline,
        prompt=adapted.prompt(position).detach().cpu(),
        averaged=ema is not None,
    )


def find_checkpoint(run: Path, which: str) -> Path:
    """The checkpoint that `which` means; see `open_run`. Raises: InputError that lists the steps of the run's checkpoints."""
    checkpoints = list_checkpoints(run)
    if not checkpoints:
        raise InputError(f"{run / 'checkpoints'}: holds no checkpoint; the run stopped before its first one")
    steps = [step_of(folder) for folder in checkpoints]
    there = f"the run has checkpoints of step {', '.join(map(str, steps))}"
    if which == "newest":
        return checkpoints[-1]
    if which == "best":
        try:
            best = verify(checkpoints[-1])["best"]
        except DamagedError as error:
            raise _damaged(run, checkpoints[-1], error) from error
        step = 0 if best is None else int(best["step"])
        if step == 0:
            raise InputError(f"--step best: no step of {run} was better than the pretrained model; {there}")
    elif which.isdecimal():
        step = int(which)
    else:
        raise InputError(f"--step: is {which}; expected newest, best, or a step; {there}")
    if step not in steps:
        raise InputError(f"--step {which}: {run} holds no checkpoint of step {step}; {there}")
    return checkpoint_folder(run, step)


def _damaged(run: Path, folder: Path, error: DamagedError) -> InputError:
    others = [str(step_of(other)) for other in list_checkpoints(run) if other != folder]
    hint = f"; --step takes another: {', '.join(others)}" if others else "; there is no other"
    return InputError(f"{folder}: is damaged ({error}){hint}")


def open_export(folder: Path, *, model: str | None, unet: str | None = None, device: torch.device) -> Source:
    """An earlier export, unchanged.

    model, unet: pipeline folder, and that of the UNet instead of its own; None: those it was trained from.
    Raises: InputError when it is none, or does not belong to the model.
    """
    file = exported_prompt(folder, option="export")
    content = read_description(folder)
    metadata = {"unet": None} | {name: content[name] for name in content if name in _DESCRIBED}
    wrong = [name for name, kind in _DESCRIBED.items() if not isinstance(metadata.get(name), kind)]
    if not wrong and not all(isinstance(w, dict) and isinstance(w.get("given"), str) for w in metadata["waypoints"]):
        wrong = ["waypoints"]
    if wrong:
        raise InputError(
            f"{folder / DESCRIPTION}: {', '.join(wrong)}: missing, or of another type; expected the description that a "
            f"run writes beside its exported prompt; likely the file is of python -m train.prompts, or edited"
        )
    if unet is not None:
        refuse_another_unet(unet, metadata["unet"], folder)
    pipeline = open_pipeline(model or metadata["model"], unet or metadata["unet"], device)
    prompt = load_prompt(file, num_views=pipeline.num_views, width=pipeline.prompt_width)
    run = next((parent for parent in folder.absolute().parents[:2] if is_run(parent)), None)
    config = None if run is None else parse(["--config", str(run / "config.yaml")]).config
    return Source(folder, run, config, metadata, open_lora(pipeline, folder, torch.float32), prompt)


def open_pipeline(model: str, unet: str | None, device: torch.device) -> Pipeline:
    """A pipeline folder, or the embedded one, in float32. unet: folder of the UNet instead of its own."""
    return load_pipeline(pipeline_folder(model), unet=unet, dtype=torch.float32).to(device)
