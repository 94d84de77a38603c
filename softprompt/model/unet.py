"""Building and saving FaceLift's UNet: `diffusers.UNet2DConditionModel` with our attention processors.

FaceLift's fork of the UNet has the stock parameters, name for name; it differs in its self-attention and in the names of its
blocks (`...MV2D`). Here that is an attention processor and a renaming, so LoRA, checkpointing and every later improvement of
diffusers work unchanged, and weights go both ways.
"""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import diffusers
from diffusers import UNet2DConditionModel
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor

from softprompt.errors import InputError
from softprompt.files import new_folder, write_json
from softprompt.model.attention import AttentionKind, MultiViewAttnProcessor, SharedPromptAttnProcessor

UNET_CLASSES = ("UNetMV2DConditionModel", "UNet2DConditionModel")
"""Class names in a config.json: FaceLift's, and the stock one."""
FACELIFT_DEFAULTS: dict[str, Any] = {
    "num_views": 6,
    "multiview_attention": True,
    "sparse_mv_attention": True,
    "cd_attention_last": False,
    "cd_attention_mid": False,
    "selfattn_block": "custom",
    "addition_downsample": False,
    "addition_channels": [1280, 1280, 1280],
}
"""FaceLift's additions to the stock configuration, with the values it ships: used where a folder has no such key (base Stable
Diffusion); a folder's own flags always decide."""
_UNKNOWN_TO_FACELIFT = ("dropout", "attention_type", "reverse_transformer_layers_per_block")
"""Stock options that the fork's constructor, that of an older UNet, does not take."""
_FIXED = ("cd_attention_last", "cd_attention_mid", "addition_downsample", "selfattn_block")
"""Flags that must have the value that FaceLift ships."""


def build_unet(config: Mapping[str, Any], *, origin: str = "configuration") -> UNet2DConditionModel:
    """Build a UNet with multi-view attention and random weights.

    config: the content of a `unet/config.json`, FaceLift's or a stock one. origin: named in errors.
    Raises: InputError for flags that are not supported, or a configuration of which no UNet can be built.
    """
    extras = FACELIFT_DEFAULTS | {k: v for k, v in config.items() if k in FACELIFT_DEFAULTS}
    for flag in _FIXED:
        if extras[flag] != FACELIFT_DEFAULTS[flag]:
            raise InputError(
                f"{origin}: {flag} is {extras[flag]!r}; only {FACELIFT_DEFAULTS[flag]!r} (what FaceLift ships) is supported, "
                f"since these layers are not in the stock UNet"
            )
    known = inspect.signature(UNet2DConditionModel.__init__).parameters
    stock = {k: _rename_blocks(v, "MV2D", "2D") for k, v in config.items() if k in known}
    try:
        unet = UNet2DConditionModel(**stock)
    except Exception as error:  # which one depends on the value that is wrong
        problem = " ".join(f"{type(error).__name__} {error}".split())
        raise InputError(f"{origin}: no UNet can be built from it ({problem[:400]})") from error
    unet.register_to_config(**extras)
    kind: AttentionKind = "single"
    if extras["multiview_attention"]:
        kind = "sparse" if extras["sparse_mv_attention"] else "full"
    own, cross = MultiViewAttnProcessor(extras["num_views"], kind), SharedPromptAttnProcessor()
    unet.set_attn_processor({name: own if ".attn1." in name else cross for name in unet.attn_processors})
    return unet


def _rename_blocks(value: Any, old: str, new: str) -> Any:
    """Block types with cross-attention from one layout's names to the other's; any other value unchanged."""
    if isinstance(value, str):
        return value.replace(old, new) if "CrossAttn" in value else value
    if isinstance(value, list | tuple):
        return [_rename_blocks(v, old, new) for v in value]
    return value


def save_unet(
    unet: UNet2DConditionModel,
    folder: str | Path,
    *,
    layout: Literal["facelift", "stock"] = "facelift",
    merge_lora: bool = False,
) -> None:
    """Write a `unet` folder that FaceLift's class (`facelift`) or diffusers' (`stock`) reads.

    merge_lora: add the active LoRA to the weights; otherwise the weights without it are written. `unet` is not changed.
    Raises: InputError when `folder` exists and is not empty.
    """
    config = {k: v for k, v in unet.config.items() if not k.startswith("_")}
    if layout == "facelift":
        config = {k: _rename_blocks(v, "2D", "MV2D") for k, v in config.items() if k not in _UNKNOWN_TO_FACELIFT}
    config["_class_name"] = "UNetMV2DConditionModel" if layout == "facelift" else "UNet2DConditionModel"
    config["_diffusers_version"] = diffusers.__version__
    with new_folder(folder) as partial:
        save_file(_base_state(unet, merge_lora=merge_lora), partial / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        write_json(partial / "config.json", dict(sorted(config.items())))


def _base_state(unet: UNet2DConditionModel, *, merge_lora: bool) -> dict[str, Tensor]:
    """The UNet's weights on the CPU under their stock names: without the LoRA layers, or with the active ones added in."""
    # Not fuse_lora, which would need a float32 copy of the whole UNet on its device.
    deltas: dict[str, Tensor] = {}
    if merge_lora:
        for name, module in unet.named_modules():
            if isinstance(module, LoraLayer):
                deltas[f"{name}.weight"] = sum(module.get_delta_weight(a) for a in module.active_adapters)
    state = {}
    for name, weight in unet.state_dict().items():
        if ".lora_" in name:
            continue
        name = name.replace(".base_layer.", ".")
        if name in deltas:
            weight = (weight.float() + deltas[name].float()).to(weight.dtype)
        state[name] = weight.contiguous().cpu()
    return state
