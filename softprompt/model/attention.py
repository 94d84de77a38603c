"""Where the UNet looks for the words of its prompt: maps of its cross-attention, computed only while somebody asks for
them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from einops import rearrange
from torch import Tensor

from softprompt.model.unet import SharedPromptAttnProcessor


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
