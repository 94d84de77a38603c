"""Writes prompt, LoRA and pipeline folder; each is read back and compared."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from softprompt.errors import InputError, RunError
from softprompt.files import folder_size, lack_of_space, new_folder
from softprompt.model.loading import load_unet, save_pipeline
from softprompt.model.pipeline import Pipeline, place
from softprompt.model.sampling import sample_views
from softprompt.prompt.embeddings import load_prompt, save_prompt
from softprompt.prompt.templates import view_texts
from train.options.config import Config
from train.options.groups import MICRO
from train.state.folder import Exported

BASE_LICENCE = "the terms of its weights hold for this file too (FaceLift's: Adobe Research License)"


def export(
    pipeline: Pipeline,
    prompt: Tensor,
    folder: Path,
    *,
    picture: Tensor,
    metadata: Mapping[str, Any],
    tolerance: float,
) -> Exported:
    """Write prompt and LoRA; verify; only then take the place of older ones.

    pipeline: its UNet carries the LoRA. prompt: E [V, T, D]. picture: [3, S, S] in [0, 1], sampled from to compare.
    tolerance: largest difference allowed, in pictures of range 0 to 1.
    Raises: RunError when a file read back gives other views; an earlier export is then left as it was.
    """
    new = folder.with_name(f".{folder.name}.partial-new")
    shutil.rmtree(new, ignore_errors=True)
    with new_folder(new) as partial:
        write_prompt_and_lora(pipeline, prompt, partial, metadata)
    try:
        read_back, rounding = verify(pipeline, prompt, new, picture=picture, tolerance=tolerance)
    except RunError as error:
        raise _kept_aside(folder, new, error) from error
    _replace(folder, new)
    shutil.rmtree(folder.with_name(f"{folder.name}.unverified"), ignore_errors=True)
    return Exported(folder, read_back, rounding)


def export_pipeline(pipeline: Pipeline, folder: Path, *, picture: Tensor, tolerance: float) -> float:
    """Add to an export a pipeline folder in FaceLift's layout with its LoRA merged, and verify it.

    Returns, raises: as `write_pipeline`; what was exported before stays.
    """
    new = folder / ".pipeckpts.partial-new"
    shutil.rmtree(new, ignore_errors=True)
    try:
        difference = write_pipeline(pipeline, folder, new, picture=picture, tolerance=tolerance)
    except RunError as error:
        raise _kept_aside(folder / "pipeckpts", new, error) from error
    new.replace(folder / "pipeckpts")
    shutil.rmtree(folder / "pipeckpts.unverified", ignore_errors=True)
    return difference


def describe(config: Config, *, position: float, step: int, last: Mapping[str, Any] | None) -> dict[str, Any]:
    """The description of an exported prompt: its origin. last: the newest evaluation, where there was one."""

    def texts(waypoint: str) -> list[str] | None:
        if waypoint.endswith((".pt", ".safetensors")):
            return None
        return view_texts(waypoint, subject=config.prompt.subject, angle=config.prompt.angle)

    return {
        "origin": "softprompt",
        "model": config.model,
        "unet": config.unet,
        "licence": "Apache-2.0" if config.model == MICRO else f"derived from {config.model}: {BASE_LICENCE}",
        "waypoints": [{"given": spec, "texts": texts(spec)} for spec in config.prompt.waypoints],
        "position": position,
        "carry": config.prompt.carry,
        "steps": step,
        "validation": {"loss": (last or {}).get("loss/validation"), "step": (last or {}).get("step")},
    }


def write_prompt_and_lora(pipeline: Pipeline, prompt: Tensor, folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write into an existing folder: the prompt as FaceLift loads it and in float32, and the LoRA, if any, for diffusers."""
    save_prompt(prompt, folder / "clr_embeds.safetensors", metadata=metadata)
    save_prompt(prompt, folder / "clr_embeds.pt", metadata=metadata)
    if has_lora(pipeline.unet):
        StableDiffusionPipeline.save_lora_weights(
            folder / "lora",
            unet_lora_layers=get_peft_model_state_dict(pipeline.unet),
            unet_lora_adapter_metadata=_adapter_metadata(pipeline),
        )


def verify(pipeline: Pipeline, prompt: Tensor, folder: Path, *, picture: Tensor, tolerance: float) -> tuple[float, float]:
    """Compare what `write_prompt_and_lora` wrote with the model in memory.

    Returns: `read_back` and `rounding` of Exported. Raises: RunError when the first is more than `tolerance`.
    """
    rounded = prompt.half().float()
    expected = views_of(pipeline, rounded, picture)
    rounding = difference(views_of(pipeline, prompt, picture), expected)
    stored = load_prompt(folder / "clr_embeds.pt", num_views=pipeline.num_views, width=pipeline.prompt_width)
    found = views_of(with_lora_of(pipeline, folder, pipeline.unet.dtype), stored, picture)
    return within(difference(found, expected), tolerance, "clr_embeds.pt and lora"), rounding


def write_pipeline(pipeline: Pipeline, folder: Path, new: Path, *, picture: Tensor, tolerance: float) -> float:
    """Write a pipeline folder `new` of the pretrained model with the LoRA of the export `folder` merged, and verify it.

    Merged in float32 from the weights on disk: in half precision most of a LoRA would be rounded away.
    Returns: the largest difference of its views to those of UNet and LoRA apart, under the prompt in `folder`.
    Raises: RunError when that is more than `tolerance`; `new` is there then.
    """
    prompt = load_prompt(folder / "clr_embeds.pt", num_views=pipeline.num_views, width=pipeline.prompt_width)
    with full_float32():
        fresh = with_lora_of(pipeline, folder, torch.float32)
        expected = views_of(fresh, prompt, picture)
        save_pipeline(fresh, new, merge_lora=True)
        fresh.unet.to("cpu")  # room for the next: two float32 UNets beside the trained one are more than a small GPU holds
        merged = replace(fresh, unet=place(load_unet(new / "unet"), pipeline.device))
        found = difference(views_of(merged, prompt, picture), expected)
    return within(found, tolerance, "pipeckpts")


@contextmanager
def full_float32() -> Iterator[None]:
    """Convolutions on CUDA round float32 to TF32 by default, which is far coarser than any tolerance here."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def has_lora(unet: UNet2DConditionModel) -> bool:
    """Whether a UNet carries a LoRA."""
    return bool(getattr(unet, "peft_config", None))


def views_of(pipeline: Pipeline, prompt: Tensor, picture: Tensor) -> Tensor:
    """[1, V, 3, S, S] in [0, 1], to compare. Two deterministic steps are enough to show a difference; guidance would run the
    same weights twice."""
    training = pipeline.unet.training
    pipeline.unet.eval()
    # What is read back is not compiled, and compiled blocks round otherwise: in half precision by far more than any tolerance.
    compiled = any(getattr(module, "_compiled_call_impl", None) for module in pipeline.unet.modules())
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        views = sample_views(pipeline, prompt, picture, steps=2, guidance_scale=1.0, eta=0.0)
    pipeline.unet.train(training)
    return views


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference."""
    return float((a - b).abs().max())


def within(found: float, tolerance: float, what: str) -> float:
    """Raises: RunError that `what` differs by more than it may; returns the difference otherwise."""
    if not found <= tolerance:  # NaN is not within anything
        raise RunError(
            f"export: {what} read back differs from the model in memory by {found:.2g} (of 1), more than export.tolerance "
            f"{tolerance:.2g}"
        )
    return found


def check_free_space(folder: Path, needed: int) -> None:
    """Raises: InputError when a run of `needed` bytes, those already in `folder` included, does not fit on its disk."""
    more = max(0, needed - folder_size(folder))
    if (disk := lack_of_space(folder, more)) is not None:
        raise InputError(
            f"output: {disk}; the run needs about {more / 1e9:.1f} GB more (checkpoints, exports); make room, put a new run on "
            f"another disk, or --export.pipeline false"
        )


def _kept_aside(folder: Path, new: Path, error: RunError) -> RunError:
    unverified = folder.with_name(f"{folder.name}.unverified")
    shutil.rmtree(unverified, ignore_errors=True)
    new.rename(unverified)
    return RunError(f"{error}. It is kept as {unverified} for inspection; the checkpoints hold the model")


def _adapter_metadata(pipeline: Pipeline) -> dict[str, Any]:
    metadata: dict[str, Any] = pipeline.unet.peft_config["default"].to_dict()
    return metadata | {"target_modules": sorted(metadata["target_modules"])}  # a set, whose order differs by process


def _replace(folder: Path, new: Path) -> None:
    """Move the new export into `folder` in place of an earlier one; all else there (best/) stays."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("lora", "pipeckpts"):  # also where the new export has none: it would not belong to the new prompt
        shutil.rmtree(folder / name, ignore_errors=True)
    for path in sorted(new.iterdir()):
        path.replace(folder / path.name)
    new.rmdir()


def with_lora_of(pipeline: Pipeline, folder: Path, dtype: torch.dtype) -> Pipeline:
    """The pretrained pipeline as the disk has it, with the LoRA of an export (`folder`), where it has one, beside frozen parts
    that are shared. dtype: of the UNet; the LoRA is float32."""
    unet = place(load_unet(pipeline.unet_folder, dtype=dtype), pipeline.device)
    if (folder / "lora").is_dir():
        unet.load_lora_adapter(folder / "lora", prefix="unet", weight_name=LORA_WEIGHTS, adapter_name="default")
        for name, parameter in unet.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.float()
        # Again, since the first time its float32 was rounded to the precision of the UNet.
        weights = load_file(folder / "lora" / LORA_WEIGHTS)
        set_peft_model_state_dict(unet, {name.removeprefix("unet."): weight for name, weight in weights.items()})
        unet.requires_grad_(False).eval()
    return replace(pipeline, unet=unet)


LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
