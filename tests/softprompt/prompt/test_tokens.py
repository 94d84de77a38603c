"""Which tokens say the view: found in FaceLift's own prompts and in made ones."""

from pathlib import Path

import torch

from softprompt.prompt.embeddings import load_prompt
from softprompt.prompt.similarity import largest, telling_tokens, view_and_other_words


def made(alike: float = 0.0) -> torch.Tensor:
    """[6, 77, 16]: a start token, three words, two tokens of the view, two words, then padding."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randn(8, 16, generator=generator)
    padding = torch.randn(1, 16, generator=generator) + 0.05 * torch.randn(69, 16, generator=generator)
    prompt = torch.cat([words, padding]).expand(6, 77, 16).clone()
    prompt[:, 4:6] = alike * prompt[:, 4:6] + (1 - alike) * torch.randn(6, 2, 16, generator=generator)
    return prompt


def test_the_views_words_and_the_others_are_told_apart() -> None:
    assert view_and_other_words(made()) == ([4, 5], [1, 2, 3, 6, 7])


def test_prompts_that_are_all_alike_have_no_tokens_of_their_views() -> None:
    view, others = view_and_other_words(made(alike=1.0))
    assert view == [] and others == [1, 2, 3, 4, 5, 6, 7]


def test_without_padding_all_other_tokens_are_words() -> None:
    prompt = torch.randn(6, 12, 16, generator=torch.Generator().manual_seed(0))
    prompt[:, :9] = prompt[0, :9].clone()
    assert view_and_other_words(prompt) == ([9, 10, 11], [1, 2, 3, 4, 5, 6, 7, 8])


def test_in_facelifts_prompts_the_view_is_in_the_tokens_that_design_names(facelift: Path) -> None:
    prompt = load_prompt(facelift / "clr_embeds.pt").float()
    assert largest(telling_tokens(prompt)) == [9, 10, 11]
    assert view_and_other_words(prompt) == ([9, 10, 11], [1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 14, 15])
