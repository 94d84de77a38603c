"""The adapted model (prompt + LoRA on the UNet), and the pretrained model inside it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from einops import rearrange, repeat
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from softprompt.errors import InputError
from softprompt.prompt.soft_prompt import SoftPrompt


class AdaptedModel(nn.Module):
    """UNet, LoRA and prompt as one module: trained, distributed over processes and saved as a whole."""

    def __init__(self, unet: UNet2DConditionModel, prompt: SoftPrompt) -> None:
        super().__init__()
        self.unet = unet
        self.prompt = prompt

    def forward(
        self, noisy: Tensor, given: Tensor, timesteps: Tensor, labels: Tensor, order: Tensor, position: float
    ) -> Tensor:
        """The adapted model's prediction under E(position).

        noisy, given: [B, V, C, H, W]. timesteps: [B]. labels: [B, V, 2E]. order: [B, V].
        Returns: [B, V, C, H, W].
        """
        return predict(self.unet, self.prompt(position), noisy, given, timesteps, labels, order)

    @torch.no_grad()
    def reference(self, noisy: Tensor, given: Tensor, timesteps: Tensor, labels: Tensor, order: Tensor) -> Tensor:
        """The pretrained model's prediction on the same input: adapters off AND the prompt W_0; no gradient."""
        with adapters_off(self.unet):
            return predict(self.unet, self.prompt.start, noisy, given, timesteps, labels, order)

    def trainable(self) -> dict[str, dict[str, nn.Parameter]]:
        """Parameters that require a gradient, by group (`prompt`, `lora`) and name; nothing else decides what trains."""
        groups: dict[str, dict[str, nn.Parameter]] = {"prompt": {}, "lora": {}}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups["prompt" if name.startswith("prompt.") else "lora"][name] = parameter
        return {group: parameters for group, parameters in groups.items() if parameters}

    def all_trainable(self) -> dict[str, nn.Parameter]:
        """Parameters that require a gradient, by name."""
        return {name: p for group in self.trainable().values() for name, p in group.items()}

    @torch.no_grad()
    def frozen_sums(self) -> dict[str, list[float]]:
        """Sum and norm of each tensor that does not train, to show whether one has changed."""
        frozen = {n: t for n, t in (*self.named_parameters(), *self.named_buffers()) if not t.requires_grad}
        sums = [torch.stack([t.sum(dtype=torch.float64), t.norm(dtype=torch.float64)]) for t in frozen.values()]
        return dict(zip(frozen, torch.stack(sums).tolist(), strict=True))


def predict(
    unet: UNet2DConditionModel, prompt: Tensor, noisy: Tensor, given: Tensor, timesteps: Tensor, labels: Tensor, order: Tensor
) -> Tensor:
    """One pass of the UNet over B objects of V views.

    prompt: [V, T, D], taken in each object's `order`; the other arguments as of `AdaptedModel.forward`.
    Returns: [B, V, C, H, W].
    """
    num_views = noisy.shape[1]
    sample = torch.cat([noisy, given], dim=2)
    out = unet(
        rearrange(sample, "b v c h w -> (b v) c h w").to(unet.dtype),
        repeat(timesteps, "b -> (b v)", v=num_views),
        encoder_hidden_states=prompt.to(unet.dtype),
        class_labels=rearrange(labels, "b v e -> (b v) e").to(unet.dtype),
        cross_attention_kwargs={"prompt_of": order.flatten()},
    ).sample
    return rearrange(out, "(b v) c h w -> b v c h w", v=num_views)


def add_lora(
    unet: UNet2DConditionModel, *, rank: int, alpha: float, dropout: float = 0.0, targets: list[str], seed: int = 0
) -> None:
    """Add a new LoRA to the UNet, float32 whatever the UNet's type; it changes nothing until it is trained.

    targets: endings of module names, e.g. to_q. seed: of its random matrices A.
    Raises: InputError when a target ends no module's name, or there is none.
    """
    layers = [name for name, _ in unet.named_modules()]
    unmatched = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in layers)]
    if unmatched or not targets:
        found = f"no layer of the UNet is called {' or '.join(unmatched)}" if unmatched else "is empty"
        raise InputError(f"lora.targets: {found}; expected names such as to_q, to_k, to_v, to_out.0")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets))
    cast_training_params(unet, dtype=torch.float32)


def compile_blocks(unet: UNet2DConditionModel, *, backend: str = "inductor") -> None:
    """Compile the UNet's transformer blocks, each when it is first used. Their results stay the same."""
    import torch._dynamo.config  # takes a second or more, and is seldom needed

    # A block is compiled for each of its shapes, with and without adapters and gradients: more often than torch's limit.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    unet.compile_repeated_blocks(backend=backend)


@contextmanager
def adapters_off(unet: UNet2DConditionModel) -> Iterator[None]:
    """Use the UNet without its LoRA, bit for bit, inside the block; blocks may be nested."""
    layers = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
    if not layers or layers[0].disable_adapters:
        yield
        return
    # peft freezes adapters that are switched off, and unfreezes all that it switches on.
    trained = {name for name, parameter in unet.named_parameters() if parameter.requires_grad}
    unet.disable_adapters()
    try:
        yield
    finally:
        unet.enable_adapters()
        for name, parameter in unet.named_parameters():
            if ".lora_" in name:
                parameter.requires_grad_(name in trained)
