"""The learnable prompt on its path: E(s) = path(s) + carry(s) * (P - W_0), with waypoints W_0 ... W_S and s in [0, S]."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Carry = Literal["keep", "fade"]
Interpolation = Literal["lerp", "slerp"]
Matching = Literal["none", "per_view", "shared"]


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


def match_tokens(waypoints: Tensor, matching: Matching) -> Tensor:
    """Reorder each waypoint's tokens so that they lie nearest to those of the waypoint before, token by token.

    Cross-attention does not see the order of its tokens, so every waypoint keeps its meaning; between two of them each token
    then moves to its nearest one instead of to the one of the same index in another text.
    waypoints: [S + 1, V, T, D]. matching: `per_view`: an order for each view; `shared`: one order for all views; `none`.
    Returns: [S + 1, V, T, D], the first waypoint unchanged.
    Source: ours; least sum of squared distances, by scipy's Hungarian assignment.
    """
    if matching == "none":
        return waypoints
    from scipy.optimize import linear_sum_assignment  # a second to import, and absent on bare GPU nodes

    matched = [waypoints[0]]
    for waypoint in waypoints[1:]:
        costs = torch.cdist(matched[-1].double(), waypoint.double()).square()  # V T T
        if matching == "shared":
            costs = costs.sum(dim=0, keepdim=True).expand_as(costs)
        orders = [torch.from_numpy(linear_sum_assignment(cost.cpu().numpy())[1]) for cost in costs]
        matched.append(torch.stack([view[order] for view, order in zip(waypoint, orders, strict=True)]))
    return torch.stack(matched)


def point_on_path(waypoints: Tensor, position: float, interpolation: Interpolation = "lerp") -> Tensor:
    """path(s): from W_floor(s) toward the next waypoint.

    waypoints: [S + 1, V, T, D]. position: s in [0, S]; at a whole number it is that waypoint exactly.
    Returns: [V, T, D].
    Raises: ValueError for a position outside [0, S].
    Source: ours.
    """
    last = len(waypoints) - 1
    if not 0 <= position <= last:
        raise ValueError(f"position {position} is not on the path [0, {last}]")
    floor = int(position)
    fraction = position - floor
    if fraction == 0:
        return waypoints[floor]
    between = slerp if interpolation == "slerp" else torch.lerp
    return between(waypoints[floor], waypoints[floor + 1], fraction)


def slerp(start: Tensor, end: Tensor, fraction: float) -> Tensor:
    """Spherical interpolation per token (last axis); the norm goes linearly from one end's to the other's.

    A straight line between two tokens of equal norm passes nearer to the origin; this does not.
    Tokens of nearly one direction, where the two agree, and tokens of norm zero are interpolated linearly.
    Source: Shoemake, "Animating rotation with quaternion curves", 1985, applied to directions.
    """
    start_norm, end_norm = start.norm(dim=-1, keepdim=True), end.norm(dim=-1, keepdim=True)
    a, b = F.normalize(start, dim=-1), F.normalize(end, dim=-1)
    angle = (a * b).sum(-1, keepdim=True).clamp(-1, 1).acos()
    sine = angle.sin()
    direction = (((1 - fraction) * angle).sin() * a + (fraction * angle).sin() * b) / sine
    spherical = direction * torch.lerp(start_norm, end_norm, fraction)
    straight = (sine < 1e-4) | (start_norm == 0) | (end_norm == 0)
    return torch.where(straight, torch.lerp(start, end, fraction), spherical)
