"""Where the UNet looks for the words of its prompt: maps of its cross-attention, computed only while somebody asks for
them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from einops import rearrange, repeat
from torch import Tensor


class AttentionMaps:
    """Cross-attention of one pass: how much each place attends to each group of tokens.

    groups: [K, T], 1 where a token belongs to a group. side: of the maps; layers of other resolutions are passed over.
    """

    def __init__(self, groups: Tensor, side: int) -> None:
        self.groups = groups
        self.side = side
        self._layers: dict[Attention, Tensor] = {}

    def __call__(self, attn: Attention, query: Tensor, key: Tensor) -> None:
        """Take in a layer. query: [N, heads, places, d]; key: [N, heads, T, d].

        Of several passes the first counts. Later ones with a gradient are those of gradient checkpointing, which computes a
        layer anew on the way back, and must find the same operations.
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
    """Inside the block, its gradients included, `maps` takes in every cross-attention layer. What the UNet computes stays the
    same, and outside the block nothing is computed for it."""
    processors = {p for p in unet.attn_processors.values() if isinstance(p, SharedPromptAttnProcessor)}
    for processor in processors:
        processor.watcher = maps
    try:
        yield maps
    finally:
        for processor in processors:
            processor.watcher = None


def attention_sides(unet: UNet2DConditionModel) -> list[int]:
    """Sides of the maps of the cross-attention on the way down and up, the finest first; the middle block is left out."""
    side = int(unet.config["sample_size"])
    return [side >> level for level, kind in enumerate(unet.config["down_block_types"]) if "CrossAttn" in kind]


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
