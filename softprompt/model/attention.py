"""Attention of the UNet: over the views of an object, and over shared prompts, with maps of the latter on demand."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from einops import rearrange, repeat
from torch import Tensor

AttentionKind = Literal["sparse", "full", "single"]
Watcher = Callable[[Attention, Tensor, Tensor], None]
"""Receives a layer with its queries and keys, [N, heads, t, d]."""


class MultiViewAttnProcessor:
    """Self-attention over the views of an object, as FaceLift's `attn1` does it.

    kind: the keys and values of view v: `sparse` those of [view 0 ; view v], `full` those of all views, `single` its own
    alone. Hidden states are [N, tokens, channels], N = (B V) with the view fastest.
    Source: FaceLift, mvdiffusion/models/transformer_mv2d_image.py (the custom self-attention block).
    """

    def __init__(self, num_views: int, kind: AttentionKind) -> None:
        self.num_views = num_views
        self.kind = kind

    def __call__(self, attn: Attention, hidden_states: Tensor, prompt_of: Tensor | None = None, **unused: Any) -> Tensor:
        del prompt_of  # for cross-attention; diffusers passes it to both
        views = self.num_views
        if self.kind != "single" and hidden_states.shape[0] % views:
            raise ValueError(f"a batch of {hidden_states.shape[0]} pictures is no multiple of the model's {views} views")
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        if self.kind == "sparse":
            key, value = (_prepend_first_view(x, views) for x in (key, value))  # N (2 t) c
        elif self.kind == "full":
            query, key, value = (rearrange(x, "(b v) t c -> b (v t) c", v=views) for x in (query, key, value))
        out = _attend(attn, query, key, value)
        return rearrange(out, "b (v t) c -> (b v) t c", v=views) if self.kind == "full" else out


class SharedPromptAttnProcessor:
    """Cross-attention in which a prompt is projected to keys and values once, however many pictures share it.

    prompt_of: [N], index of each picture's prompt; None: as many prompts as pictures, as in diffusers.
    Six prompts of 77 tokens serve every object of a batch: otherwise their projections, and the gradients of those, would be
    computed again for each object.
    """

    watcher: Watcher | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        prompt_of: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        query, key, value = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        if prompt_of is not None:
            # Not key[prompt_of]: threads add up the gradient of that in any order, so no two runs would be equal.
            key, value = (x.index_select(0, prompt_of) for x in (key, value))
        return _attend(attn, query, key, value, self.watcher)


def _attend(attn: Attention, query: Tensor, key: Tensor, value: Tensor, watcher: Watcher | None = None) -> Tensor:
    """Attention of each head, and the output layer. query, key, value: [N, t, C]. Returns: [N, t of the query, C]."""
    query, key, value = (rearrange(x, "n t (h d) -> n h t d", h=attn.heads) for x in (query, key, value))
    if watcher is not None:
        watcher(attn, query, key)
    out = rearrange(F.scaled_dot_product_attention(query, key, value), "n h t d -> n t (h d)")
    return attn.to_out[1](attn.to_out[0](out))


def _prepend_first_view(x: Tensor, num_views: int) -> Tensor:
    """[N, t, c] => [N, 2 t, c]: the tokens of the object's view 0, then the view's own."""
    first = repeat(rearrange(x, "(b v) t c -> b v t c", v=num_views)[:, 0], "b t c -> (b v) t c", v=num_views)
    return torch.cat([first, x], dim=1)


class AttentionMaps:
    """Cross-attention of one pass: how much each pixel attends to each group of tokens.

    groups: [K, T], 1 where a token belongs to a group. side: of the maps; layers of other resolutions are ignored.
    """

    def __init__(self, groups: Tensor, side: int) -> None:
        self.groups = groups
        self.side = side
        self._layers: dict[Attention, Tensor] = {}

    def __call__(self, attn: Attention, query: Tensor, key: Tensor) -> None:
        """Record a layer. query: [N, heads, pixels, d]; key: [N, heads, T, d].

        The first of several passes counts. Later ones with a gradient are those of gradient checkpointing, which computes a
        layer again in the backward pass, and must find the same operations.
        """
        known = attn in self._layers
        if query.shape[2] != self.side**2 or (known and not torch.is_grad_enabled()):
            return
        with torch.autocast(query.device.type, enabled=False):
            scores = query.float() @ key.float().transpose(-1, -2) * query.shape[-1] ** -0.5
            found = scores.softmax(dim=-1) @ self.groups.to(scores).T
        if not known:
            self._layers[attn] = rearrange(found, "n h (y x) k -> k n h y x", x=self.side)

    def mean(self) -> Tensor:
        """[K, N, heads, side, side]: the share of its attention that each head gives to each group; mean over layers."""
        return torch.stack(list(self._layers.values())).mean(dim=0)


@contextmanager
def watch_attention(unet: UNet2DConditionModel, maps: AttentionMaps) -> Iterator[AttentionMaps]:
    """Record every cross-attention layer in `maps` inside the block, gradients included. The UNet's output stays the same."""
    processors = {p for p in unet.attn_processors.values() if isinstance(p, SharedPromptAttnProcessor)}
    for processor in processors:
        processor.watcher = maps
    try:
        yield maps
    finally:
        for processor in processors:
            processor.watcher = None


def attention_sides(unet: UNet2DConditionModel) -> list[int]:
    """Sides of the cross-attention maps of the down and up blocks, the finest first; the middle block is left out."""
    side = int(unet.config["sample_size"])
    return [side >> level for level, kind in enumerate(unet.config["down_block_types"]) if "CrossAttn" in kind]
