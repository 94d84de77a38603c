"""The learnable prompt: E(s) = path(s) + carry(s) * (P - W_0)."""

from typing import Literal

import torch
from torch import Tensor, nn

from softprompt.prompt.path import Interpolation, point_on_path

Carry = Literal["keep", "fade"]


class SoftPrompt(nn.Module):
    """Six learnable text embeddings on a path from FaceLift's prompt to a realistic one.

    waypoints: [S + 1, V, T, D]: W_0 is the pretrained prompt, W_S the last target.
    carry: the share of the learned offset, P - W_0, that is added to the path: `keep` all of it; `fade` 1 - s/S, so that with
    one target E = (1 - s) P + s W_1.
    P starts at W_0 and is always float32. Source: ours.
    """

    waypoints: Tensor

    def __init__(self, waypoints: Tensor, *, carry: Carry = "keep", interpolation: Interpolation = "lerp") -> None:
        super().__init__()
        if waypoints.ndim != 4:
            raise ValueError(f"waypoints are {list(waypoints.shape)}; expected [S + 1, V, T, D]")
        # Saved with P: a resumed run keeps its path even if a prompt file has changed since.
        self.register_buffer("waypoints", waypoints.detach().float().clone())
        self.learned = nn.Parameter(self.waypoints[0].clone())
        self.carry = carry
        self.interpolation = interpolation

    @property
    def start(self) -> Tensor:
        """W_0 [V, T, D]: the prompt of the pretrained model."""
        return self.waypoints[0]

    @property
    def last_position(self) -> int:
        """S."""
        return len(self.waypoints) - 1

    def path(self, position: float) -> Tensor:
        """path(s) [V, T, D]. position: s in [0, S]."""
        return point_on_path(self.waypoints, position, self.interpolation)

    def share(self, position: float) -> float:
        """carry(s): the share of the learned offset that is added to the path, in [0, 1]."""
        return 1.0 if self.carry == "keep" or self.last_position == 0 else 1 - position / self.last_position

    def forward(self, position: float = 0.0) -> Tensor:
        """E(s) [V, T, D], float32. position: s in [0, S]."""
        assert self.learned.dtype == torch.float32, "the prompt is trained in float32: float16 rounds its updates away"
        return self.path(position) + self.share(position) * (self.learned - self.start)

    @torch.no_grad()
    def begin_at(self, effective: Tensor, position: float) -> None:
        """Set P so that E(position) is `effective`, [V, T, D]. Raises: ValueError where carry(position) is 0."""
        if self.share(position) == 0:
            raise ValueError(f"at position {position:g} nothing of P is in E")
        path = self.path(position)
        self.learned.copy_(self.start + (effective.to(path) - path) / self.share(position))

    @torch.no_grad()
    def decay_toward_start(self, rate: float) -> None:
        """P <- P - rate (P - W_0), after an optimizer step; rate is learning rate times decay, as AdamW's.

        AdamW's own decay would pull the prompt toward zero instead.
        """
        self.learned.lerp_(self.start, rate)

    @torch.no_grad()
    def clamp_norms(self, band: float, position: float = 0.0) -> None:
        """Bring each token of E(s) back into (1 +- band) times the path's norm there, its direction kept.

        band: share in (0, 1].
        """
        if self.share(position) == 0:
            return  # E does not depend on P
        effective = self(position)
        norm = effective.norm(dim=-1, keepdim=True)
        target = self.path(position).norm(dim=-1, keepdim=True)
        factor = norm.clamp(target * (1 - band), target * (1 + band)) / norm.clamp(min=1e-12)
        self.learned.add_(effective * (factor - 1) / self.share(position))
