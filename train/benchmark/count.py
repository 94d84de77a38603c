"""Cost of a step, counted, not measured: floating-point operations and bytes, at full size without a GPU."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from softprompt.micro.models import random_pipeline
from softprompt.model.adapted import AdaptedModel, add_lora
from softprompt.prompt.soft_prompt import SoftPrompt
from train.options.groups import LoraConfig


@dataclass(frozen=True)
class Parts:
    """Operations and bytes of the parts of a step, for one object of V views."""

    forward: float
    """FLOP of the UNet's forward pass; multiplications and additions each count."""
    backward_adapted: float
    """FLOP of its backward pass if prompt and LoRA train."""
    backward_lora: float
    """FLOP of its backward pass if only the LoRA trains."""
    backward_all: float
    """FLOP of its backward pass if every weight trains."""
    reference: float
    """FLOP of the pretrained model's forward pass."""
    vae: float
    """FLOP of encoding one picture."""
    clip: float
    """FLOP of embedding one picture."""
    decode: float
    """FLOP of decoding one picture."""
    backward_decode: float
    """FLOP of the backward pass through the decoder, to its latents."""
    activations: int
    """Bytes kept for the backward pass of prompt and LoRA."""
    activations_decode: int
    """Bytes kept for the backward pass through the decoder of one picture, in float32."""
    unet_parameters: int
    trained_parameters: int
    encoder_parameters: int
    """Parameters of VAE and image encoder."""


@dataclass(frozen=True)
class Arm:
    """Cost of a way of training, per object."""

    name: str
    flop: float
    state_bytes: int
    """Weights, gradients and Adam's moments."""
    activation_bytes: int | None
    """Kept for the backward pass; None where gradient checkpointing keeps little."""


def count_parts(size: str, *, views: int = 6, picture: int | None = None, rank: int = 16) -> Parts:
    """Run each part once on tensors that have shapes and no content. rank: of the LoRA."""
    dtype = torch.bfloat16
    pipeline = random_pipeline(size, device="meta", dtype=dtype, views=views, picture=picture)
    unet_parameters = sum(p.numel() for p in pipeline.unet.parameters())
    encoder_parameters = sum(p.numel() for m in (pipeline.vae, pipeline.image_encoder) for p in m.parameters())
    with torch.device("meta"):
        pixels = torch.empty(1, 3, pipeline.picture_size, pipeline.picture_size)
        embedded = torch.empty(1, 3, *(2 * [pipeline.image_encoder.config.image_size]))
        channels, height, width = pipeline.latent_shape
        latents = torch.empty(1, views, channels, height, width)
        labels = torch.empty(1, views, pipeline.unet.config["projection_class_embeddings_input_dim"])
        batch = latents, latents, torch.zeros(1), labels, torch.zeros(1, views, dtype=torch.long)
        prompt = SoftPrompt(torch.empty(1, views, 77, pipeline.prompt_width))
    vae = _flop(lambda: pipeline.vae.encode(pixels))
    clip = _flop(lambda: pipeline.image_encoder(embedded))

    def decode() -> Tensor:
        decoded: Tensor = pipeline.vae.decode(latents[0, :1].detach().requires_grad_()).sample
        return decoded

    decode_flop, backward_decode = _with_backward(decode)

    pipeline.unet.requires_grad_(True)
    everything = AdaptedModel(pipeline.unet, prompt.requires_grad_(False))
    _, backward_all = _with_backward(lambda: everything(*batch, 0.0))
    pipeline.unet.requires_grad_(False)

    add_lora(pipeline.unet, rank=rank, alpha=float(rank), targets=LoraConfig().targets)
    adapted = AdaptedModel(pipeline.unet, prompt).to("meta")
    _, backward_lora = _with_backward(lambda: adapted(*batch, 0.0))
    prompt.requires_grad_(True)
    activations = _kept(adapted, lambda: adapted(*batch, 0.0))
    forward, backward_adapted = _with_backward(lambda: adapted(*batch, 0.0))
    return Parts(
        forward=forward,
        backward_adapted=backward_adapted,
        backward_lora=backward_lora,
        backward_all=backward_all,
        reference=_flop(lambda: adapted.reference(*batch)),
        vae=vae,
        clip=clip,
        decode=decode_flop,
        backward_decode=backward_decode,
        activations=activations,
        activations_decode=_kept(pipeline.vae, decode),
        unet_parameters=unet_parameters,
        trained_parameters=sum(p.numel() for p in adapted.all_trainable().values()),
        encoder_parameters=encoder_parameters,
    )


def arms(parts: Parts, *, views: int = 6) -> list[Arm]:
    """The ways of training, each the sum of its parts, per object."""
    p = parts
    trained, ours = 4 * 4 * p.trained_parameters, 2 * p.unet_parameters  # fp32 weight, gradient, two moments; bf16 weights
    encoders = 4 * p.encoder_parameters
    plain = p.forward + p.backward_lora
    adapted = p.forward + p.backward_adapted
    return [
        Arm(
            "FaceLift: every weight, encoding live, checkpointing",
            2 * views * p.vae + views * p.clip + 2 * p.forward + p.backward_all,
            16 * p.unet_parameters + encoders,
            None,
        ),
        Arm("LoRA, encoding live", (views + 1) * p.vae + p.clip + plain, ours + trained + encoders, p.activations),
        Arm("LoRA, cached", plain, ours + trained, p.activations),
        Arm("ours, no KL", adapted, ours + trained, p.activations),
        Arm("ours, KL at each step", adapted + p.reference, ours + trained, p.activations),
        Arm("ours, KL at every 4th", adapted + p.reference / 4, ours + trained, p.activations),
        Arm(
            "ours, KL on the original domain at every 4th",
            adapted + (adapted + p.reference) / 4,
            ours + trained,
            p.activations,
        ),
    ]


def objective_arms(parts: Parts, *, views: int = 6, steps: int = 20, last: int = 1) -> list[Arm]:
    """Cost that the objectives add to a step, per object.

    steps: of a draft, with guidance. last: K, how many of them a gradient goes through. The encoders stay on the device with
    those that decode.
    """
    p = parts
    trained, ours, encoders = 4 * 4 * p.trained_parameters, 2 * p.unet_parameters, 4 * p.encoder_parameters
    guided = 2  # halves of the batch
    anew = 1 if last > 1 else 0  # passes that are recomputed in the backward pass
    sampled = guided * ((steps + anew * last) * p.forward + last * (p.backward_adapted + p.reference))
    decoded = views * (2 * p.decode + p.backward_decode)
    # The last pass's activations, or those of one computed anew, beside those of one picture's decoder.
    kept = guided * p.activations + p.activations_decode if last == 1 else max(guided * p.activations, p.activations_decode)
    return [
        Arm(f"DRaFT+, {steps} steps, K = {last}", sampled + decoded, ours + trained + encoders, kept),
        # Half a batch of pairs is at work at a time, but a pair at least: at batch 1 its two objects are.
        Arm(
            "Diffusion-DPO, or SPIN-Diffusion",
            2 * (p.forward + p.backward_adapted + p.reference),
            ours + trained,
            2 * p.activations,
        ),
        Arm("DomainStudio on latents", p.reference, ours + trained, p.activations),
        Arm(
            "DomainStudio on pictures",
            p.reference + views * (4 * p.decode + p.backward_decode),
            ours + trained + encoders,
            p.activations + p.activations_decode,
        ),
        Arm("Separate-and-Enhance", 0.0, ours + trained, p.activations),
    ]


def _flop(run: Callable[[], object]) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def _with_backward(run: Callable[[], Tensor]) -> tuple[float, float]:
    with FlopCounterMode(display=False) as counter:
        out = run()
        forward = counter.get_total_flops()
        out.float().square().mean().backward()
    return float(forward), float(counter.get_total_flops() - forward)


def _kept(model: nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once, without parameters; with flash attention."""
    own = {_storage(p) for p in model.parameters()} | {_storage(b) for b in model.buffers()}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []  # a storage that is freed would lend its address to the next

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            sizes[_storage(tensor)] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    def flash_attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        assert options.get("attn_mask") is None, "no part of the pipeline masks anything"
        out: Tensor = _KeptByFlashAttention.apply(query, key, value)
        return out

    flash = patch.object(F, "scaled_dot_product_attention", flash_attention)
    with flash, saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(sizes.values())


class _KeptByFlashAttention(torch.autograd.Function):
    """Keeps what flash attention keeps: its inputs, its output, and one number a query; never the attention weights."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out


def _storage(tensor: Tensor | nn.Parameter) -> int:
    return int(tensor.untyped_storage()._cdata)
