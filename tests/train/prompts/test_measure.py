"""The measurements, against slow loops."""

import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from softprompt.prompt.embeddings import load_prompt
from softprompt.prompt.similarity import words_before_padding
from tests.train.prompts.conftest import random_prompt
from train.prompts.measure import drift, in_ranges, measure, nearest_phrases


def test_measures_are_those_of_slow_loops() -> None:
    prompt = random_prompt(views=4)
    prompt[:, :5] = prompt[0, :5]
    m = measure(prompt, "abcd")
    x = prompt.double().numpy()
    flat = [view.ravel() for view in x]
    cosine = {
        (i, j): flat[i] @ flat[j] / math.sqrt(flat[i] @ flat[i] * (flat[j] @ flat[j])) for i, j in combinations(range(4), 2)
    }
    for (i, j), value in cosine.items():
        assert float(m.cosines[i, j]) == float(m.cosines[j, i]) == pytest.approx(value, abs=1e-6)
    best = max(cosine, key=lambda pair: cosine[pair])
    assert m.closest[:2] == ("abcd"[best[0]], "abcd"[best[1]])
    for t in range(77):
        mean = sum(x[v, t] for v in range(4)) / 4
        spread = sum(np.sum((x[v, t] - mean) ** 2) for v in range(4)) / sum(np.sum(x[v, t] ** 2) for v in range(4))
        telling = 0.0
        for v in range(4):
            near = max((w for w in range(4) if w != v), key=lambda w: cosine[min(v, w), max(v, w)])
            telling += float(np.linalg.norm(x[v, t] - x[near, t]) / np.linalg.norm(x[v, t])) / 4
        assert float(m.spread[t]) == pytest.approx(math.sqrt(spread), abs=1e-6)
        assert float(m.telling[t]) == pytest.approx(telling, abs=1e-5)
        assert float(m.norms[2, t]) == pytest.approx(float(np.linalg.norm(x[2, t])), abs=1e-5)
    assert m.shared == 5
    assert m.rounding[0] == float(np.abs(x - x.astype(np.float16)).max())


def test_drift_is_that_of_slow_loops() -> None:
    reference, change = random_prompt(views=3), 0.1 * random_prompt(views=3, seed=1)
    d = drift(reference + change, reference, words=[10, 10, 12])
    x, r = (reference + change).double().numpy(), reference.double().numpy()
    squares = [[float(np.sum((x[v, t] - r[v, t]) ** 2)) for t in range(77)] for v in range(3)]
    words = sum(sum(squares[v][:count]) for v, count in enumerate((10, 10, 12)))
    assert d.share_in_words == pytest.approx(words / sum(map(sum, squares)), rel=1e-6)
    for v in range(3):
        assert float(d.by_view[v]) == pytest.approx(math.sqrt(sum(squares[v]) / np.sum(r[v] ** 2)), rel=1e-5)
    for t in range(77):
        each = [math.sqrt(squares[v][t] / np.sum(r[v, t] ** 2)) for v in range(3)]
        assert float(d.by_token[t]) == pytest.approx(sum(each) / 3, rel=1e-5)
    rounding = np.sum((x - (reference + change).half().double().numpy()) ** 2)
    assert d.rounded_away == pytest.approx(math.sqrt(rounding / sum(map(sum, squares))), rel=1e-3)
    none = drift(reference, reference, words=None)
    assert none.share_in_words is none.rounded_away is None and not none.change.any()


def test_planted_tokens_are_found_to_carry_the_view() -> None:
    prompt = random_prompt(views=1).repeat(5, 1, 1)
    prompt += 0.01 * random_prompt(views=5, seed=1)
    prompt[:, [20, 21, 40]] = random_prompt(views=5, seed=2)[:, [20, 21, 40]]
    assert measure(prompt, "abcde").carriers == [20, 21, 40]
    assert in_ranges([20, 21, 40]) == "20-21, 40" and in_ranges(range(9)) == "0-8" and in_ranges([]) == ""


def test_longer_view_names_do_not_make_later_words_carry_the_view() -> None:
    """In two of four views a word more shifts all later words."""
    words = random_prompt(views=1, seed=3)[0]
    short, long = words.clone(), torch.cat([words[:10], words[60:61], words[10:-1]])
    prompt = torch.stack([short, short, long, long])
    prompt[1, 9], prompt[3, 10] = words[70], words[71]
    m = measure(prompt, "abcd")
    assert m.carriers == [9, 10] and len(m.spread_over) > 30


def test_the_padding_of_facelift_s_prompts_begins_after_its_texts(facelift: Path) -> None:
    prompt = load_prompt(facelift / "clr_embeds.pt")
    # start, "a rendering image of 3 d models , front view , color map .", end; two words more in front_right and front_left
    assert words_before_padding(prompt) == [16, 18, 16, 16, 16, 18]
    assert words_before_padding(random_prompt()) is None


def test_nearness_to_phrases_leaves_out_what_they_have_in_common() -> None:
    phrases = torch.tensor([[[10.0, 1.0, 0.0]], [[10.0, -1.0, 0.0]], [[10.0, 0.0, 1.0]], [[10.0, 0.0, -1.0]]])
    cosines = nearest_phrases(torch.tensor([[[11.0, 3.0, 0.0]], [[9.0, 0.0, -2.0]]]), phrases)
    centred = torch.tensor([[1.0, 3.0, 0.0], [-1.0, 0.0, -2.0]])
    slow = [[float(v @ (p[0] - torch.tensor([10.0, 0, 0]))) / float(v.norm()) for p in phrases] for v in centred]
    assert cosines.tolist() == [pytest.approx(row, abs=1e-6) for row in slow]
