"""Cosines between views, and the tokens that name the view: in FaceLift's own prompts and in made ones."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from softprompt.prompt.embeddings import load_prompt
from softprompt.prompt.similarity import (
    closest_pair,
    largest,
    mean_pairwise_cosine,
    prompt_cosines,
    telling_tokens,
    view_and_other_words,
)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_prompt_cosines_match_a_loop() -> None:
    prompt = noise(6, 5, 8).requires_grad_()
    cosines = prompt_cosines(prompt)
    assert cosines.shape == (6, 6) and cosines.dtype == torch.float32 and not cosines.requires_grad
    flat = prompt.detach().flatten(1)
    expected = [[float(a @ b / (a.norm() * b.norm())) for b in flat] for a in flat]
    torch.testing.assert_close(cosines, torch.tensor(expected))
    pairs = [expected[i][j] for i, j in itertools.permutations(range(6), 2)]
    assert mean_pairwise_cosine(prompt) == pytest.approx(sum(pairs) / 30, abs=1e-5)


def test_closest_pair_names_the_two_views_most_alike() -> None:
    prompt = noise(4, 5, 8)
    prompt[1] = 2 * prompt[3] + 0.01 * prompt[0]
    first, second, cosine = closest_pair(prompt, ("front", "right", "back", "left"))
    assert (first, second) == ("right", "left")
    assert cosine == pytest.approx(1, abs=1e-3) and cosine < 1


def test_one_prompt_for_all_views_has_cosine_one() -> None:
    prompt = noise(1, 5, 8).expand(6, -1, -1).half()
    assert mean_pairwise_cosine(prompt) == pytest.approx(1)
    assert closest_pair(prompt, [*"abcdef"]) == ("a", "b", pytest.approx(1))


def made(alike: float = 0.0) -> Tensor:
    """[6, 77, 16]: a start token, three words, two tokens of the view, two words, then padding."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randn(8, 16, generator=generator)
    padding = torch.randn(1, 16, generator=generator) + 0.05 * torch.randn(69, 16, generator=generator)
    prompt = torch.cat([words, padding]).expand(6, 77, 16).clone()
    prompt[:, 4:6] = alike * prompt[:, 4:6] + (1 - alike) * torch.randn(6, 2, 16, generator=generator)
    return prompt


def test_the_tokens_of_the_view_and_the_other_words_are_found() -> None:
    assert view_and_other_words(made()) == ([4, 5], [1, 2, 3, 6, 7])
    assert view_and_other_words(made(alike=1.0)) == ([], [1, 2, 3, 4, 5, 6, 7]), "all views have one prompt"


def test_without_padding_all_other_tokens_are_words() -> None:
    prompt = noise(6, 12, 16)
    prompt[:, :9] = prompt[0, :9].clone()
    assert view_and_other_words(prompt) == ([9, 10, 11], [1, 2, 3, 4, 5, 6, 7, 8])


def test_in_facelifts_prompts_the_view_is_in_its_three_tokens(facelift: Path) -> None:
    prompt = load_prompt(facelift / "clr_embeds.pt")
    assert largest(telling_tokens(prompt)) == [9, 10, 11]
    assert view_and_other_words(prompt) == ([9, 10, 11], [1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 14, 15])
