"""A view prompt => what there is to say of it in numbers: norms, cosines, the tokens that carry the view, how far it moved."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from softprompt.embeddings import closest_pair, prompt_cosines

CARRIES = 0.5
"""Tokens whose difference is more than this share of the largest are those that differ."""
ANOTHER_ENCODER = 0.5
"""Distance between two prompts' start tokens, of their norm, from which on they are likely of two text encoders."""
ALIKE = 0.8
"""Cosine between neighbours from which on the tokens at a view's end are taken for padding; words are below 0.5."""


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
        return _most(self.telling)

    @property
    def spread_over(self) -> list[int]:
        """Tokens that differ over all views: more of them, where longer names move the words after them to later places."""
        return _most(self.spread)

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


def telling_tokens(prompt: Tensor) -> Tensor:
    """How far each token is from that of the view which a view is most like.

    Compared with that one alone, and not with all: texts with longer names have all later words at other places, where every
    token differs and none says which view it is.
    prompt: [V, T, D]. Returns: [T], of the token's norm, mean over views.
    Source: ours.
    """
    nearest = prompt_cosines(prompt).fill_diagonal_(-2).argmax(dim=1)
    return ((prompt - prompt[nearest]).norm(dim=-1) / _divisor(prompt.norm(dim=-1))).mean(dim=0)


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


def start_distance(prompt: Tensor, reference: Tensor) -> float:
    """How far a prompt's first token is from that of another, of its norm, mean over views.

    A CLIP text encoder looks back only, so that its first token is the same whatever the text: encoders are told apart by it.
    Training moves it, as any other. prompt: [V, T, D]. reference: [V or 1, T, D].
    Source: ours.
    """
    first, other = prompt[:, 0].double(), reference[:, 0].double()
    return float(((first - other).norm(dim=-1) / _divisor(other.norm(dim=-1))).mean())


def words_before_padding(prompt: Tensor) -> list[int] | None:
    """How many tokens of each view come before the run of nearly equal ones at its end, as padding is.

    prompt: [V, T, D]. Returns: one number a view; None where some view has no such run over half its tokens.
    Source: ours. On FaceLift's prompts it finds what its tokenizer counts.
    """
    neighbours = F.cosine_similarity(prompt[:, :-1], prompt[:, 1:], dim=-1)  # V T-1
    found = [max((t + 1 for t, cosine in enumerate(view.tolist()) if cosine < ALIKE), default=0) for view in neighbours]
    return None if any(2 * count > prompt.shape[1] for count in found) else found


def in_ranges(tokens: Sequence[int]) -> str:
    """[9, 10, 11, 15] => "9-11, 15"."""
    runs: list[list[int]] = []
    for token in tokens:
        if runs and token == runs[-1][1] + 1:
            runs[-1][1] = token
        else:
            runs.append([token, token])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _most(values: Tensor) -> list[int]:
    return [t for t, value in enumerate(values.tolist()) if value > CARRIES * float(values.max())]


def _divisor(norms: Tensor) -> Tensor:
    return norms.clamp(min=torch.finfo(norms.dtype).tiny)
