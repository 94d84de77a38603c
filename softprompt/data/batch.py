"""One training batch: everything that is drawn at random, and the tensors that the UNet sees."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class EncodedViews:
    """One object's pictures after the frozen encoders, on the CPU, float32."""

    mean: Tensor
    """[V, C, H, W] mean of the VAE's posterior, unscaled."""
    std: Tensor
    """[V, C, H, W] standard deviation of the VAE's posterior, unscaled."""
    embeds: Tensor
    """[V, E] CLIP image embeddings."""


class Objects(Protocol):
    """A set of objects, their views encoded; see softprompt.data.cache.EncodedObjects."""

    background: str

    def __len__(self) -> int: ...

    @property
    def names(self) -> Sequence[str]:
        """Names of the samples."""

    def get(self, index: int, generator: torch.Generator) -> EncodedViews:
        """Encoded views of an object, on a background drawn from `generator`."""

    def views(self, index: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Pictures [V, 3, S, S] and masks [V, 1, S, S] of an object, on such a background."""

    def pictures(self, index: int, generator: torch.Generator) -> Tensor:
        """The pictures alone."""

    def masks(self, index: int) -> Tensor:
        """The masks alone."""


@dataclass(frozen=True)
class Draw:
    """Everything random about one object in a training batch, drawn from that object's own generator, on the CPU."""

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
    """The middles of `count` equal parts of the schedule: where held-out objects are evaluated."""
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


def keep_conditions(p: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """Condition dropout, per object: which conditions stay.

    p: [B] uniform in [0, 1). rate: r in [0, 1/3].
    Returns: (keep_labels, keep_latents), [B] booleans: class labels are dropped where p < 2r, the input's latents where
    r <= p < 3r. The prompt is never dropped.
    Source: FaceLift, train_diffusion.py (`drop_as_a_whole`, r = 0.05).
    """
    return ~(p < 2 * rate), ~((p >= rate) & (p < 3 * rate))


def view_order(reference: int, num_views: int) -> Tensor:
    """The views in order from a reference on, wrapping around: int64 [V] with r, r + 1, ..., V - 1, 0, ..., r - 1."""
    assert 0 <= reference < num_views, f"reference view {reference} of {num_views} views"
    return (torch.arange(num_views) + reference) % num_views


def rotate_views(x: Tensor, reference: int) -> Tensor:
    """Roll the view axis so that the reference view comes first: [V, ...] => [V, ...]."""
    return x[view_order(reference, len(x)).to(x.device)]
