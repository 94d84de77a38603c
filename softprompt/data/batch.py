"""One training batch: everything that is drawn at random, and the tensors that the UNet sees."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from einops import repeat
from torch import Tensor

from softprompt.data.samples import view_order
from softprompt.model.conditioning import EncodedViews, class_labels, keep_conditions
from softprompt.model.pipeline import Pipeline


@dataclass(frozen=True)
class Draw:
    """What one object's turn in training is, all of it drawn from that object's own generator, on the CPU."""

    timestep: int
    """Shared by the object's views (FaceLift)."""
    reference: int
    """Which of its views is the given picture; it becomes view 0 of the sequence."""
    keep_label: bool
    """False: class labels dropped."""
    keep_latents: bool
    """False: the input's latents dropped."""
    target_noise: Tensor
    """[V, C, H, W] for the VAE posterior's sample."""
    noise: Tensor
    """[V, C, H, W] for the diffusion."""
    label_noise: Tensor
    """[V, E] for the class labels."""


@dataclass(frozen=True)
class Batch:
    """B objects as the UNet sees them; slot 0 of each is its reference view."""

    latents: Tensor
    """[B, V, C, H, W] of the true views, scaled."""
    noise: Tensor
    """[B, V, C, H, W]."""
    given: Tensor
    """[B, V, C, H, W] latents of the given picture, scaled, the same for all views; zero where dropped."""
    labels: Tensor
    """[B, V, 2E] class labels; zero where dropped."""
    timesteps: Tensor
    """[B]."""
    order: Tensor
    """[B, V] which view, and so which prompt, is in each slot."""

    def only(self, index: int) -> "Batch":
        """One of its objects, as a batch of one."""
        return Batch(**{field.name: getattr(self, field.name)[index : index + 1] for field in fields(self)})


def seed_of(*key: int | str) -> int:
    """A seed made of all of `key`, e.g. (seed, step, position): nothing to store, nothing to restore."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seeded(*key: int | str) -> torch.Generator:
    """A CPU generator with that seed."""
    return torch.Generator().manual_seed(seed_of(*key))


def spread_timesteps(count: int, num_timesteps: int) -> list[int]:
    """The middles of `count` equal parts of the schedule: where held-out objects are looked at."""
    return [int((k + 0.5) / count * num_timesteps) for k in range(count)]


def draw(
    generator: torch.Generator,
    *,
    encoded: EncodedViews,
    num_timesteps: int,
    references: Sequence[int] = (0,),
    drop_rate: float = 0.0,
    lowest: int = 0,
    timestep: int | None = None,
) -> Draw:
    """Draw one object's randomness, always in the same order.

    num_timesteps: of the noise schedule. references: one is picked. drop_rate: r of `keep_conditions`.
    lowest: the least noisy timestep that is drawn. timestep: fixed instead of drawn (validation).
    """
    drawn = int(torch.randint(lowest, num_timesteps, (), generator=generator))
    reference = references[int(torch.randint(len(references), (), generator=generator))]
    keep_label, keep_latents = keep_conditions(torch.rand((), generator=generator), drop_rate)
    return Draw(
        timestep=drawn if timestep is None else timestep,
        reference=reference,
        keep_label=bool(keep_label),
        keep_latents=bool(keep_latents),
        target_noise=torch.randn(encoded.mean.shape, generator=generator),
        noise=torch.randn(encoded.mean.shape, generator=generator),
        label_noise=torch.randn(encoded.embeds.shape, generator=generator),
    )


@torch.no_grad()
def make_batch(pipeline: Pipeline, objects: Sequence[EncodedViews], draws: Sequence[Draw]) -> Batch:
    """Put objects and their draws together, on the pipeline's device.

    With a reference other than view 0 the views, and their prompts with them, are rotated so that it comes first: FaceLift's
    attention takes view 0 as the reference.
    """
    device = pipeline.device
    scale = pipeline.vae.config.scaling_factor
    num_views = len(objects[0].mean)
    orders = [view_order(d.reference, num_views) for d in draws]
    latents = [(o.mean + o.std * d.target_noise)[order] for o, d, order in zip(objects, draws, orders, strict=True)]
    given = [o.mean[d.reference] * d.keep_latents for o, d in zip(objects, draws, strict=True)]
    embeds = torch.stack([o.embeds[d.reference] for o, d in zip(objects, draws, strict=True)]).to(device)
    labels = class_labels(
        pipeline,
        repeat(embeds, "b e -> (b v) e", v=num_views),
        torch.cat([d.label_noise for d in draws]).to(device),
    ).unflatten(0, (len(objects), num_views))
    keep_label = torch.tensor([d.keep_label for d in draws], device=device)
    return Batch(
        latents=torch.stack(latents).to(device) * scale,
        noise=torch.stack([d.noise for d in draws]).to(device),
        given=repeat(torch.stack(given).to(device) * scale, "b c h w -> b v c h w", v=num_views),
        labels=labels * keep_label[:, None, None],
        timesteps=torch.tensor([d.timestep for d in draws], device=device),
        order=torch.stack(orders).to(device),
    )
