"""A view prompt => what there is to say of it in numbers: norms, cosines, the tokens that carry the view, how far it moved."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from softprompt.prompt.similarity import closest_pair, largest, prompt_cosines, telling_tokens

ANOTHER_ENCODER = 0.5
"""Distance between two prompts' start tokens, of their norm, from which on they are likely of two text encoders."""


@dataclass(frozen=True)
class Measures:
    """Of one prompt."""

    norms: Tensor
    """[V, T]."""
    cosines: Tensor
    """[V, V], of whole views, each flattened."""
    closest: tuple[str, str, float]
    """The two views most alike, and their cosine."""
    telling: Tensor
    """[T]: distance to the view each view is most like, of its norm; mean over views."""
    spread: Tensor
    """[T]: root mean square distance to the mean over views, of the root mean square norm."""
    rounding: tuple[float, float]
    """What float16 changes in a number: at most, on average."""

    @property
    def carriers(self) -> list[int]:
        """Tokens that tell a view from the one it is most like."""
        return largest(self.telling)

    @property
    def spread_over(self) -> list[int]:
        """Tokens that differ over all views: more of them, where longer names move the words after them to later places."""
        return largest(self.spread)

    @property
    def shared(self) -> int:
        """How many tokens at the start are the same in every view."""
        return int((self.spread > 0).int().argmax()) if bool((self.spread > 0).any()) else len(self.spread)


@dataclass(frozen=True)
class Drift:
    """From a reference to a prompt of the same shape."""

    change: Tensor
    """[V, T]: length of each token's change, of the reference's norm there."""
    by_view: Tensor
    """[V]: the same of whole views."""
    cosines: Tensor
    """[V]: between a view and the reference's."""
    in_words: float | None
    """Share of the squared change that is in the reference's words, start and end token with them; None: not known, or none."""
    rounded_away: float | None
    """What float16 changes, of the change: root mean squares; None where nothing has changed."""

    @property
    def by_token(self) -> Tensor:
        """[T]: mean of `change` over views."""
        return self.change.mean(dim=0)


def measure(prompt: Tensor, names: Sequence[str]) -> Measures:
    """prompt: [V, T, D], V at least 2. names: one a view."""
    prompt = prompt.float()
    norms = prompt.norm(dim=-1)
    cosines = prompt_cosines(prompt)
    rounding = (prompt.half().float() - prompt).abs()
    return Measures(
        norms=norms,
        cosines=cosines,
        closest=closest_pair(prompt, names),
        telling=telling_tokens(prompt),
        spread=spread_over_views(prompt),
        rounding=(float(rounding.max()), float(rounding.mean())),
    )


def spread_over_views(prompt: Tensor) -> Tensor:
    """Root mean square distance of each token to its mean over views. prompt: [V, T, D]. Returns: [T], of the tokens' norm."""
    distance = (prompt - prompt[:1] - (prompt - prompt[:1]).mean(dim=0)).norm(dim=-1)  # zero exactly where all are equal
    return (distance.square().mean(dim=0) / _divisor(prompt.norm(dim=-1).square().mean(dim=0))).sqrt()


def drift(prompt: Tensor, reference: Tensor, words: Sequence[int] | None) -> Drift:
    """prompt, reference: [V, T, D]. words: how many tokens of each view of the reference are not padding; None: not known."""
    change = (prompt - reference).double()
    squares = change.square().sum(dim=-1)  # V T
    total = float(squares.sum())
    in_words = None
    if words is not None and total > 0:
        in_words = float(sum(view[:count].sum() for view, count in zip(squares, words, strict=True))) / total
    rounding = (prompt.half().double() - prompt.double()).square().sum()
    return Drift(
        change=(change.norm(dim=-1) / _divisor(reference.double().norm(dim=-1))).float(),
        by_view=(change.flatten(1).norm(dim=1) / reference.double().flatten(1).norm(dim=1)).float(),
        cosines=F.cosine_similarity(prompt.double().flatten(1), reference.double().flatten(1)).float(),
        in_words=in_words,
        rounded_away=(float(rounding) / total) ** 0.5 if total > 0 else None,
    )


def nearest_phrases(prompt: Tensor, phrases: Tensor) -> Tensor:
    """How near each view is to each of some texts, once what those have in common, the padding above all, is taken off.

    prompt: [V, T, D]. phrases: [N, T, D], N at least 2. Returns: cosines [V, N].
    Source: ours.
    """
    common = phrases.double().mean(dim=0)
    views, texts = ((x.double() - common).flatten(1) for x in (prompt, phrases))
    return F.cosine_similarity(views[:, None], texts[None], dim=-1).float()


def start_distance(prompt: Tensor, reference: Tensor) -> float:
    """How far a prompt's first token is from that of another, of its norm, mean over views.

    A CLIP text encoder looks back only, so that its first token is the same whatever the text: encoders are told apart by it.
    Training moves it, as any other. prompt: [V, T, D]. reference: [V or 1, T, D].
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
