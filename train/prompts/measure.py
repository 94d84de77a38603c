"""Measurements of a view prompt: norms, cosines, the tokens that carry the view, and the change from another prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from softprompt.prompt.similarity import closest_pair, largest, prompt_cosines, telling_tokens

ANOTHER_ENCODER = 0.5
"""Distance between two prompts' start tokens, relative to their norm, from which they likely come from two text encoders."""


@dataclass(frozen=True)
class Measures:
    """Measurements of one prompt."""

    norms: Tensor
    """[V, T]."""
    cosines: Tensor
    """[V, V], between whole views, all tokens as one vector."""
    closest: tuple[str, str, float]
    """The two most similar views, and their cosine."""
    telling: Tensor
    """[T]: distance to the most similar view, relative to the norm; mean over views."""
    spread: Tensor
    """[T]: root mean square distance to the mean over views, relative to the root mean square norm."""
    rounding: tuple[float, float]
    """Change of a number by rounding to float16: largest and mean."""

    @property
    def carriers(self) -> list[int]:
        """Tokens that carry the view: those that differ most from the most similar view."""
        return largest(self.telling)

    @property
    def spread_over(self) -> list[int]:
        """Tokens that differ most over all views; more of them if longer view names shift the words after them."""
        return largest(self.spread)

    @property
    def shared(self) -> int:
        """Number of tokens at the start that are the same in every view."""
        return int((self.spread > 0).int().argmax()) if bool((self.spread > 0).any()) else len(self.spread)


@dataclass(frozen=True)
class Drift:
    """Change from a reference to a prompt of the same shape."""

    change: Tensor
    """[V, T]: length of each token's change, relative to the reference's norm."""
    by_view: Tensor
    """[V]: length of each view's change, relative to the reference's norm."""
    cosines: Tensor
    """[V]: between a view and the reference's."""
    share_in_words: float | None
    """Share of the squared change in the reference's words, with start and end token; None: not known, or no change."""
    rounded_away: float | None
    """Error of rounding to float16 relative to the change, root mean squares; None without a change."""

    @property
    def by_token(self) -> Tensor:
        """[T]: mean of `change` over views."""
        return self.change.mean(dim=0)


def measure(prompt: Tensor, names: Sequence[str]) -> Measures:
    """prompt: [V, T, D], V at least 2. names: one a view."""
    prompt = prompt.float()
    rounding = (prompt.half().float() - prompt).abs()
    return Measures(
        norms=prompt.norm(dim=-1),
        cosines=prompt_cosines(prompt),
        closest=closest_pair(prompt, names),
        telling=telling_tokens(prompt),
        spread=_spread_over_views(prompt),
        rounding=(float(rounding.max()), float(rounding.mean())),
    )


def _spread_over_views(prompt: Tensor) -> Tensor:
    distance = (prompt - prompt[:1] - (prompt - prompt[:1]).mean(dim=0)).norm(dim=-1)  # exactly zero if all are equal
    return (distance.square().mean(dim=0) / _divisor(prompt.norm(dim=-1).square().mean(dim=0))).sqrt()


def drift(prompt: Tensor, reference: Tensor, words: Sequence[int] | None) -> Drift:
    """prompt, reference: [V, T, D]. words: number of tokens of each reference view that are not padding; None: not known."""
    change = (prompt - reference).double()
    squares = change.square().sum(dim=-1)  # V T
    total = float(squares.sum())
    share_in_words = None
    if words is not None and total > 0:
        share_in_words = float(sum(view[:count].sum() for view, count in zip(squares, words, strict=True))) / total
    rounding = (prompt.half().double() - prompt.double()).square().sum()
    return Drift(
        change=(change.norm(dim=-1) / _divisor(reference.double().norm(dim=-1))).float(),
        by_view=(change.flatten(1).norm(dim=1) / reference.double().flatten(1).norm(dim=1)).float(),
        cosines=F.cosine_similarity(prompt.double().flatten(1), reference.double().flatten(1)).float(),
        share_in_words=share_in_words,
        rounded_away=(float(rounding) / total) ** 0.5 if total > 0 else None,
    )


def nearest_phrases(prompt: Tensor, phrases: Tensor) -> Tensor:
    """Similarity of each view to each of some texts, after subtracting their mean (above all the padding).

    prompt: [V, T, D]. phrases: [N, T, D], N at least 2. Returns: cosines [V, N].
    Source: ours.
    """
    common = phrases.double().mean(dim=0)
    views, texts = ((x.double() - common).flatten(1) for x in (prompt, phrases))
    return F.cosine_similarity(views[:, None], texts[None], dim=-1).float()


def start_distance(prompt: Tensor, reference: Tensor) -> float:
    """Distance between the start tokens of two prompts, relative to the reference's norm, mean over views.

    A CLIP text encoder is causal, so its start token is the same for every text and identifies the encoder. Training changes it
    like any other token.
    prompt: [V, T, D]. reference: [V or 1, T, D].
    Source: ours.
    """
    first, other = prompt[:, 0].double(), reference[:, 0].double()
    return float(((first - other).norm(dim=-1) / _divisor(other.norm(dim=-1))).mean())


def in_ranges(tokens: Sequence[int]) -> str:
    """[9, 10, 11, 15] => "9-11, 15"."""
    runs: list[list[int]] = []
    for token in tokens:
        if runs and token == runs[-1][1] + 1:
            runs[-1][1] = token
        else:
            runs.append([token, token])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _divisor(norms: Tensor) -> Tensor:
    return norms.clamp(min=torch.finfo(norms.dtype).tiny)
