"""Similarity of a prompt's views, and which tokens name the view: from the embeddings alone."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CARRIES = 0.5
"""Share of the largest difference above which a token counts as different."""
ALIKE = 0.8
"""Cosine between neighbours from which on the tokens at a view's end are padding; that of words is below 0.5."""


def prompt_cosines(prompt: Tensor) -> Tensor:
    """Cosine between the prompts of every two views, all tokens of a view as one vector.

    prompt: [V, T, D]. Returns: float32 [V, V] in [-1, 1], without gradient.
    """
    unit = F.normalize(prompt.detach().double().flatten(1), dim=-1)
    return (unit @ unit.T).clamp(-1, 1).float()


def mean_pairwise_cosine(prompt: Tensor) -> float:
    """Mean of `prompt_cosines` over every two different views; 1 when all views have one prompt. prompt: [V, T, D]."""
    first, second = torch.triu_indices(len(prompt), len(prompt), offset=1)
    return float(prompt_cosines(prompt)[first, second].mean())


def closest_pair(prompt: Tensor, names: Sequence[str]) -> tuple[str, str, float]:
    """The two views whose prompts are most alike, and their cosine. prompt: [V, T, D]. names: one a view."""
    first, second = torch.triu_indices(len(prompt), len(prompt), offset=1)
    cosines = prompt_cosines(prompt)[first, second]
    best = int(cosines.argmax())
    return names[int(first[best])], names[int(second[best])], float(cosines[best])


def telling_tokens(prompt: Tensor) -> Tensor:
    """Distance of each token from that of the most similar view.

    Compared with that view alone: in texts with longer view names all later words are shifted, so against all views every
    token would differ and none would name the view.
    prompt: [V, T, D]. Returns: [T], relative to the token's norm, mean over views.
    Source: ours.
    """
    nearest = prompt_cosines(prompt).fill_diagonal_(-2).argmax(dim=1)
    norms = prompt.norm(dim=-1)
    return ((prompt - prompt[nearest]).norm(dim=-1) / norms.clamp(min=torch.finfo(norms.dtype).tiny)).mean(dim=0)


def largest(values: Tensor) -> list[int]:
    """Indices of the values, [T], that are more than CARRIES times the largest."""
    return [t for t, value in enumerate(values.tolist()) if value > CARRIES * float(values.max())]


def words_before_padding(prompt: Tensor) -> list[int] | None:
    """Number of tokens of each view before the run of nearly equal ones at its end, the padding.

    prompt: [V, T, D]. Returns: one number a view; None where a view has no such run over half its tokens.
    Source: ours. On FaceLift's prompts it equals its tokenizer's count.
    """
    neighbours = F.cosine_similarity(prompt[:, :-1], prompt[:, 1:], dim=-1)  # V T-1
    found = [max((t + 1 for t, cosine in enumerate(view.tolist()) if cosine < ALIKE), default=0) for view in neighbours]
    return None if any(2 * count > prompt.shape[1] for count in found) else found


def view_and_other_words(prompt: Tensor) -> tuple[list[int], list[int]]:
    """Indices of the tokens that name the view, and of the other words.

    The start token, which gathers the attention that nothing else gets, and the padding are in neither. Where no padding is
    found, all other tokens are words.
    prompt: [V, T, D]. Returns: two disjoint lists; the second may be empty.
    Source: ours.
    """
    view = [t for t in largest(telling_tokens(prompt)) if t > 0]
    counted = words_before_padding(prompt)
    words = prompt.shape[1] if counted is None else min(counted)
    return view, [t for t in range(1, words) if t not in view]
