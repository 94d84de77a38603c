"""A LoRA in the formats of other programs, each read back with that program's reader, or with diffusers'."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils.state_dict_utils import StateDictType, convert_state_dict_to_kohya
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from softprompt.model.loading import load_unet
from softprompt.model.pipeline import Pipeline, place
from train.export.write import difference, views_of, within

ADAPTER = "default"


@dataclass(frozen=True)
class Format:
    """A format: how a LoRA is written, and read onto a UNet without one."""

    path: str
    """Its path in an export."""
    write: Callable[[UNet2DConditionModel, Path], None]
    read: Callable[[UNet2DConditionModel, Path], UNet2DConditionModel]
    """Returns: the UNet with the LoRA; the given UNet changes too."""


def write_peft(unet: UNet2DConditionModel, folder: Path) -> None:
    """adapter_model.safetensors and adapter_config.json, as `PeftModel.from_pretrained` takes them."""
    folder.mkdir()
    weights = {f"base_model.model.{name}": _plain(weight) for name, weight in get_peft_model_state_dict(unet).items()}
    save_file(weights, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config = copy.copy(unet.peft_config[ADAPTER])
    config.target_modules = sorted(config.target_modules)  # a set, whose order differs by process
    config.inference_mode = True
    config.save_pretrained(folder)


def read_peft(unet: UNet2DConditionModel, folder: Path) -> UNet2DConditionModel:
    """Put the LoRA on a UNet with peft."""
    return PeftModel.from_pretrained(unet, folder).base_model.model.eval()


def write_kohya(unet: UNet2DConditionModel, file: Path) -> None:
    """lora_unet_... with lora_down, lora_up and alpha of each layer, as kohya's scripts, ComfyUI and A1111 read it."""
    ours = {f"unet.{name}": _plain(weight) for name, weight in get_peft_model_state_dict(unet).items()}
    weights = convert_state_dict_to_kohya(ours, original_type=StateDictType.PEFT)
    layers = {name: module for name, module in unet.named_modules() if isinstance(module, LoraLayer)}
    # The converter writes the rank as alpha, whatever alpha is.
    alphas = {f"lora_unet_{name.replace('.', '_')}.alpha": float(m.lora_alpha[ADAPTER]) for name, m in layers.items()}
    assert alphas.keys() == {name for name in weights if name.endswith(".alpha")}, "each layer has its alpha"
    weights |= {name: torch.tensor(alpha) for name, alpha in alphas.items()}
    config = unet.peft_config[ADAPTER]
    about = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.r),
        "ss_network_alpha": str(float(config.lora_alpha)),
        "ss_v2": str(unet.config["cross_attention_dim"] == 1024),  # A1111 lists a LoRA by this version of SD
    }
    save_file(weights, file, metadata=about)


def read_kohya(unet: UNet2DConditionModel, file: Path) -> UNet2DConditionModel:
    """Put the LoRA on a UNet with diffusers."""
    weights, alphas = StableDiffusionPipeline.lora_state_dict(
        file.parent, weight_name=file.name, unet_config=unet.config, local_files_only=True
    )
    StableDiffusionPipeline.load_lora_into_unet(weights, network_alphas=alphas, unet=unet, adapter_name=ADAPTER)
    return unet.eval()


def _plain(weight: Tensor) -> Tensor:
    return weight.detach().cpu().contiguous()


FORMATS = {
    "peft": Format("lora_peft", write_peft, read_peft),
    "kohya": Format("lora_kohya.safetensors", write_kohya, read_kohya),
}
"""Formats besides that of diffusers, which is always written and which every reader here takes."""


def verify_lora(pipeline: Pipeline, prompt: Tensor, folder: Path, form: Format, *, picture: Tensor, tolerance: float) -> float:
    """Compare a LoRA in `folder`, put on a fresh UNet, with the one in memory. prompt: [V, T, D]. picture: [3, S, S].

    Returns: the largest difference of views. Raises: RunError when that is more than `tolerance`.
    """
    fresh = place(load_unet(pipeline.unet_folder, dtype=pipeline.unet.dtype), pipeline.device)
    found = views_of(replace(pipeline, unet=form.read(fresh, folder / form.path)), prompt, picture)
    return within(difference(found, views_of(pipeline, prompt, picture)), tolerance, form.path)
