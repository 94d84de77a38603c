"""What a run is for: prompt, LoRA and pipeline folder, each read back and compared before it is called done."""

import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from softprompt.embeddings import load_prompt, save_prompt
from softprompt.errors import InputError, RunError
from softprompt.files import new_folder
from softprompt.model import AdaptedModel
from softprompt.pipeline import Pipeline, save_pipeline
from softprompt.sampling import sample_views
from softprompt.unet import load_unet, place

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
FACELIFT_PROMPT = "mvdiffusion/data/fixed_prompt_embeds_6view/clr_embeds.pt"
"""Where FaceLift's training and inference look for the prompt; the path is written into its code."""
FACELIFT_MODEL = "checkpoints/mvdiffusion/pipeckpts"
"""Where FaceLift's inference looks for the pipeline folder."""


@dataclass(frozen=True)
class Exported:
    """What was written, and how near it is to the model in memory; differences are the largest in pictures of range 0 to 1."""

    folder: Path
    read_back: float
    """Views of the files read back in a fresh model, against the model in memory under the same rounded prompt."""
    rounding: float
    """What rounding the prompt to float16 itself changes."""


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
        save_prompt(prompt, partial / "clr_embeds.safetensors", metadata=metadata)
        save_prompt(prompt, partial / "clr_embeds.pt", metadata=metadata)
        if _has_lora(pipeline):
            StableDiffusionPipeline.save_lora_weights(
                partial / "lora",
                unet_lora_layers=get_peft_model_state_dict(pipeline.unet),
                unet_lora_adapter_metadata=_adapter_metadata(pipeline),
            )
    try:
        read_back, rounding = _verify(pipeline, prompt, new, picture, tolerance)
    except RunError as error:
        raise _kept_aside(folder, new, error) from error
    _replace(folder, new)
    shutil.rmtree(folder.with_name(f"{folder.name}.unverified"), ignore_errors=True)
    return Exported(folder, read_back, rounding)


def export_pipeline(pipeline: Pipeline, folder: Path, *, picture: Tensor, tolerance: float) -> float:
    """Add to an export a pipeline folder in FaceLift's layout with its LoRA merged, and verify it.

    The prompt and LoRA are read from `folder`; merged in float32 from the weights on disk: in half precision most of a LoRA
    would be rounded away.
    Returns: the largest difference of its views to those of UNet and LoRA apart.
    Raises: RunError when that is more than `tolerance`; what was exported before stays.
    """
    new = folder / ".pipeckpts.partial-new"
    shutil.rmtree(new, ignore_errors=True)
    prompt = load_prompt(folder / "clr_embeds.pt", num_views=pipeline.num_views, width=pipeline.prompt_width)
    with _full_float32():
        fresh = with_lora_of(pipeline, folder, torch.float32)
        expected = _views(fresh, prompt, picture)
        save_pipeline(fresh, new, merge_lora=True)
        fresh.unet.to("cpu")  # room for the next: two float32 UNets beside the trained one are more than a small GPU holds
        merged = replace(fresh, unet=place(load_unet(new / "unet"), pipeline.device))
        difference = _difference(_views(merged, prompt, picture), expected)
    try:
        _within(difference, tolerance, "pipeckpts")
    except RunError as error:
        raise _kept_aside(folder / "pipeckpts", new, error) from error
    new.replace(folder / "pipeckpts")
    shutil.rmtree(folder / "pipeckpts.unverified", ignore_errors=True)
    return difference


def exported_prompt(folder: Path, *, option: str) -> Path:
    """The prompt in an export, float32 where it has that. option: that named the folder.

    Raises: InputError when there is none.
    """
    for name in ("clr_embeds.safetensors", "clr_embeds.pt"):
        if (folder / name).is_file():
            return folder / name
    inside = f"; did you mean {folder / 'export'}?" if (folder / "export").is_dir() else ""
    raise InputError(f"{option}: {folder} holds no clr_embeds.safetensors or .pt; expected a run's export folder{inside}")


def start_from(folder: Path, adapted: AdaptedModel, position: float) -> None:
    """Put an export's prompt and LoRA into a fresh model. position: s at which E is to be that prompt.

    Raises: InputError when the folder is no export, or its LoRA is another kind than the configuration's.
    """
    prompt = adapted.prompt
    file = exported_prompt(folder, option="init_from")
    views, _, width = prompt.start.shape
    if prompt.share(position) == 0:
        raise InputError(f"init_from: with prompt.carry fade nothing learned is in the prompt at position {position:g}")
    prompt.begin_at(load_prompt(file, num_views=views, width=width), position)
    file = folder / "lora" / LORA_WEIGHTS
    has_lora = bool(getattr(adapted.unet, "peft_config", None))
    if file.is_file() != has_lora:
        found, asked = ("a LoRA", "0") if file.is_file() else ("no LoRA", "more than 0")
        raise InputError(f"init_from: {folder} holds {found}; lora.rank is {asked}. Prompt and LoRA belong together")
    if not has_lora:
        return
    try:
        weights = {name.removeprefix("unet."): weight for name, weight in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{file}: cannot be read ({' '.join(str(error).split())}); expected a LoRA as a run exports it"
        ) from error
    ours = get_peft_model_state_dict(adapted.unet)
    differing = sorted(weights.keys() ^ ours.keys()) or [n for n, w in weights.items() if w.shape != ours[n].shape]
    if differing:
        raise InputError(
            f"init_from: {file} is not this configuration's LoRA ({len(differing)} of its tensors differ, e.g. "
            f"{differing[0]}); likely lora.rank or lora.targets is another"
        )
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise InputError(f"init_from: {file} holds NaN or infinite values; it comes from a run that diverged, or is damaged")
    set_peft_model_state_dict(adapted.unet, weights)


@contextmanager
def _full_float32() -> Iterator[None]:
    """Convolutions on CUDA round float32 to TF32 by default, which is far coarser than any tolerance here."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _kept_aside(folder: Path, new: Path, error: RunError) -> RunError:
    unverified = folder.with_name(f"{folder.name}.unverified")
    shutil.rmtree(unverified, ignore_errors=True)
    new.rename(unverified)
    return RunError(f"{error}. It is kept as {unverified} to be looked at; the checkpoints hold the model")


def _adapter_metadata(pipeline: Pipeline) -> dict[str, Any]:
    metadata: dict[str, Any] = pipeline.unet.peft_config["default"].to_dict()
    return metadata | {"target_modules": sorted(metadata["target_modules"])}  # a set, whose order differs by process


def _has_lora(pipeline: Pipeline) -> bool:
    return bool(getattr(pipeline.unet, "peft_config", None))


def _views(pipeline: Pipeline, prompt: Tensor, picture: Tensor) -> Tensor:
    """Two deterministic steps are enough to show a difference."""
    training = pipeline.unet.training
    pipeline.unet.eval()
    # What is read back is not compiled, and compiled blocks round otherwise: in half precision by far more than any tolerance.
    compiled = any(getattr(module, "_compiled_call_impl", None) for module in pipeline.unet.modules())
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        views = sample_views(pipeline, prompt, picture, steps=2, guidance_scale=2.0, eta=0.0)
    pipeline.unet.train(training)
    return views


def with_lora_of(pipeline: Pipeline, folder: Path, dtype: torch.dtype) -> Pipeline:
    """The pretrained pipeline as the disk has it, with the LoRA of an export (`folder`), where it has one, beside frozen parts
    that are shared. dtype: of the UNet; the LoRA is float32."""
    unet = place(load_unet(pipeline.folder / "unet", dtype=dtype), pipeline.device)
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


def _verify(pipeline: Pipeline, prompt: Tensor, folder: Path, picture: Tensor, tolerance: float) -> tuple[float, float]:
    rounded = prompt.half().float()
    expected = _views(pipeline, rounded, picture)
    rounding = _difference(_views(pipeline, prompt, picture), expected)
    stored = load_prompt(folder / "clr_embeds.pt", num_views=pipeline.num_views, width=pipeline.prompt_width)
    found = _views(with_lora_of(pipeline, folder, pipeline.unet.dtype), stored, picture)
    return _within(_difference(found, expected), tolerance, "clr_embeds.pt and lora"), rounding


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def _within(difference: float, tolerance: float, what: str) -> float:
    if not difference <= tolerance:  # NaN is not within anything
        raise RunError(
            f"export: {what} read back differs from the model in memory by {difference:.2g} (of 1), more than export.tolerance "
            f"{tolerance:.2g}"
        )
    return difference


def _replace(folder: Path, new: Path) -> None:
    """Move what is new into `folder`; what an earlier export left there goes, all else (best/) stays."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("lora", "pipeckpts"):  # also where the new export has none: it would not belong to the new prompt
        shutil.rmtree(folder / name, ignore_errors=True)
    for path in sorted(new.iterdir()):
        path.replace(folder / path.name)
    new.rmdir()


def how_to_use(folder: Path) -> list[str]:
    """The exact commands that put an export to use, as lines; what FaceLift had is kept beside it as *.original."""
    prompt, model = f"FACELIFT/{FACELIFT_PROMPT}", f"FACELIFT/{FACELIFT_MODEL}"
    ours, pipeline = (shlex.quote(str(folder / name)) for name in ("clr_embeds.pt", "pipeckpts"))
    lines = [
        "use it in FaceLift (FACELIFT is its repository):",
        f"  [ -e {prompt}.original ] || mv {prompt} {prompt}.original; cp {ours} {prompt}",
    ]
    if (folder / "pipeckpts").is_dir():
        lines.append(f"  [ -e {model}.original ] || mv {model} {model}.original; cp -r {pipeline}/. {model}")
    if (folder / "lora").is_dir():
        lines.append("or the LoRA in diffusers:")
        lines.append(f'  unet.load_lora_adapter("{folder / "lora"}", prefix="unet", weight_name="{LORA_WEIGHTS}")')
    return lines


def check_free_space(folder: Path, needed: int) -> None:
    """Raises: InputError when the disk of `folder` has not room for a run of `needed` bytes, what it holds already included."""
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    free, more = shutil.disk_usage(existing).free, max(0, needed - there)
    if free < more:
        raise InputError(
            f"output: {existing} has {free / 1e9:.1f} GB free; the run needs about {more / 1e9:.1f} GB more (checkpoints, "
            f"exports); make room, put a new run on another disk, or --export.pipeline false"
        )
