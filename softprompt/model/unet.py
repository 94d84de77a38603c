"""FaceLift's UNet on stock parts: `diffusers.UNet2DConditionModel` with one attention processor of ours.

FaceLift's fork of the UNet has the stock parameters, name for name; it differs in what self-attention attends to, and in
the names of its blocks (`...MV2D`). Here that is an attention processor and a renaming, so LoRA, checkpointing and every
later improvement of diffusers work unchanged, and weights go both ways.
"""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from einops import rearrange, repeat
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor

from softprompt.errors import InputError
from softprompt.files import new_folder, read_json, write_json
from softprompt.model.weights import DIFFUSERS, how_they_fit, read_weights, why_not

UNET_CLASSES = ("UNetMV2DConditionModel", "UNet2DConditionModel")
"""In a config.json: FaceLift's, and the stock one."""

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
"""What FaceLift adds to the stock configuration, with the values it ships. They hold only where a folder has none of
these keys (base Stable Diffusion); a folder's own flags always decide."""

_UNKNOWN_TO_FACELIFT = ("dropout", "attention_type", "reverse_transformer_layers_per_block")
"""Stock options that the fork's constructor, that of an older UNet, does not take."""
_UNSUPPORTED = {"cd_attention_last": False, "cd_attention_mid": False, "addition_downsample": False, "selfattn_block": "custom"}


class MultiViewAttnProcessor:
    """Self-attention over the views of an object, as FaceLift's `attn1` does it.

    kind: what the keys and values of view v are: `sparse` those of [view 0 ; view v], `full` those of all views, `single`
    its own alone. Hidden states are [N, tokens, channels], N = (B V) with the view fastest.
    Source: FaceLift, mvdiffusion/models/transformer_mv2d_image.py (the custom self-attention block).
    """

    def __init__(self, num_views: int, kind: Literal["sparse", "full", "single"]) -> None:
        self.num_views = num_views
        self.kind = kind

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        prompt_of: Tensor | None = None,
    ) -> Tensor:
        del prompt_of  # of cross-attention; diffusers hands it to both
        if hidden_states.shape[0] % self.num_views:
            raise ValueError(
                f"a batch of {hidden_states.shape[0]} pictures is no multiple of the model's {self.num_views} views"
            )
        views = self.num_views
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        if self.kind == "sparse":
            key, value = (_prepend_first_view(x, views) for x in (key, value))  # N (2 t) c
        elif self.kind == "full":
            query, key, value = (rearrange(x, "(b v) t c -> b (v t) c", v=views) for x in (query, key, value))
        query, key, value = (rearrange(x, "n t (h d) -> n h t d", h=attn.heads) for x in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value)
        out = rearrange(out, "n h t d -> n t (h d)")
        if self.kind == "full":
            out = rearrange(out, "b (v t) c -> (b v) t c", v=views)
        return attn.to_out[1](attn.to_out[0](out))


def _prepend_first_view(x: Tensor, num_views: int) -> Tensor:
    """[N, t, c] => [N, 2 t, c]: the tokens of the object's view 0, then the view's own."""
    first = repeat(rearrange(x, "(b v) t c -> b v t c", v=num_views)[:, 0], "b t c -> (b v) t c", v=num_views)
    return torch.cat([first, x], dim=1)


class SharedPromptAttnProcessor(AttnProcessor2_0):
    """Cross-attention in which a prompt is projected to keys and values once, however many pictures it is the prompt of.

    prompt_of: [N] which of the given prompts each picture has; None: as many prompts as pictures, as in diffusers.
    Six prompts of 77 tokens serve every object of a batch: without this their projections, and those projections' gradients,
    would be computed anew for each object.
    """

    watcher: Callable[[Attention, Tensor, Tensor], None] | None = None
    """Is shown each layer's queries and keys (see softprompt.model.attention); None: nobody looks."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        prompt_of: Tensor | None = None,
    ) -> Tensor:
        if prompt_of is None:
            out: Tensor = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
            return out
        query, key, value = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        # Not key[prompt_of]: the gradient of that is added up by threads in any order, so no two runs would be equal.
        key, value = (x.index_select(0, prompt_of) for x in (key, value))
        query, key, value = (rearrange(x, "n t (h d) -> n h t d", h=attn.heads) for x in (query, key, value))
        if self.watcher is not None:
            self.watcher(attn, query, key)
        out = rearrange(F.scaled_dot_product_attention(query, key, value), "n h t d -> n t (h d)")
        return attn.to_out[1](attn.to_out[0](out))


def attention_kind(config: Mapping[str, Any]) -> Literal["sparse", "full", "single"]:
    """Which multi-view attention a UNet's configuration asks for."""
    if not config["multiview_attention"]:
        return "single"
    return "sparse" if config["sparse_mv_attention"] else "full"


def build_unet(config: Mapping[str, Any], *, origin: str = "configuration") -> UNet2DConditionModel:
    """A UNet with multi-view attention and random weights.

    config: the content of a `unet/config.json`, FaceLift's or a stock one.
    origin: named in errors.
    Raises: InputError when the flags ask for what is not supported.
    """
    extras = FACELIFT_DEFAULTS | {k: v for k, v in config.items() if k in FACELIFT_DEFAULTS}
    for flag, supported in _UNSUPPORTED.items():
        if extras[flag] != supported:
            raise InputError(
                f"{origin}: {flag} is {extras[flag]!r}; only {supported!r} (what FaceLift ships) is supported, "
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
    processor = MultiViewAttnProcessor(extras["num_views"], attention_kind(extras))
    cross = SharedPromptAttnProcessor()
    unet.set_attn_processor({name: processor if ".attn1." in name else cross for name in unet.attn_processors})
    return unet


def _rename_blocks(value: Any, old: str, new: str) -> Any:
    """Names of the blocks that attend from one layout to the other; any other value as it is."""
    if isinstance(value, str):
        return value.replace(old, new) if "CrossAttn" in value else value
    if isinstance(value, list | tuple):
        return [_rename_blocks(v, old, new) for v in value]
    return value


def load_unet(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """Load a `unet` folder, FaceLift's (`UNetMV2DConditionModel`) or a stock one, every weight matched.

    The attention is what the folder's flags say. A base Stable Diffusion UNet (4 input channels, no such flags) is widened to
    8 input channels with zeros and given FaceLift's shipped flags, as FaceLift starts its own training.
    Returns: the UNet in evaluation mode, no parameter requiring a gradient.
    Raises: InputError naming the file: missing, no UNet, unsupported flags, weights that do not match.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json", what="a UNet's configuration (give the `unet` folder itself)")
    if config.get("_class_name") not in UNET_CLASSES:
        raise InputError(
            f"{folder / 'config.json'}: its _class_name is {config.get('_class_name')!r}; expected "
            f"UNetMV2DConditionModel (FaceLift) or UNet2DConditionModel (stock)"
        )
    weights = {name: weight.to(dtype) for name, weight in read_weights(folder, DIFFUSERS).items()}
    if config.get("in_channels") == 4 and "conv_in.weight" in weights:
        config["in_channels"] = 8
        weights["conv_in.weight"] = F.pad(weights["conv_in.weight"], (0, 0, 0, 0, 0, 4))  # new inputs start at zero
    with torch.device("meta"):  # the weights follow at once: do not spend a minute on random ones
        unet = build_unet(config, origin=str(folder / "config.json"))
    if misfit := how_they_fit(weights, unet.state_dict()):
        raise InputError(
            f"{folder}: weights and config.json do not belong together: {misfit}; {why_not(weights, unet.state_dict())}"
        )
    unet.load_state_dict(weights, strict=True, assign=True)
    return unet.requires_grad_(False).eval()


def place(unet: UNet2DConditionModel, device: torch.device | str) -> UNet2DConditionModel:
    """Move a UNet; on a GPU its weights are kept with channels last, which convolutions there take without a copy.

    What it computes stays the same. Returns: itself.
    """
    unet.to(device)
    if torch.device(device).type == "cuda":
        unet.to(memory_format=torch.channels_last)
    return unet


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
        save_file(base_state(unet, merge_lora=merge_lora), partial / f"{DIFFUSERS}.safetensors", metadata={"format": "pt"})
        write_json(partial / "config.json", dict(sorted(config.items())))


def base_state(unet: UNet2DConditionModel, *, merge_lora: bool) -> dict[str, Tensor]:
    """The UNet's weights under their stock names: without the LoRA layers, or with the active ones added in."""
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
