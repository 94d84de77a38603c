"""DomainStudio's losses against slow, obvious versions in float64, their gradients, and what they hold."""

import math

import pytest
import torch
from torch import Tensor

from softprompt.objectives.domain_studio import detail_loss, high_frequency, log_similarities, pair_loss


def items(count: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_probabilities(x: Tensor) -> list[list[float]]:
    """p[i][j], j over the others."""
    found = []
    for i, a in enumerate(x):
        weights = [math.exp((a * b).sum() / (a.norm() * b.norm())) for j, b in enumerate(x) if j != i]
        found.append([weight / sum(weights) for weight in weights])
    return found


def slow_haar(x: Tensor) -> Tensor:
    """The three detail bands of [..., H, W], each by its 2 x 2 kernel, summed."""
    low, high = torch.tensor([[1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64) / math.sqrt(2)
    kernel = torch.outer(low, high) + torch.outer(high, low) + torch.outer(high, high)
    blocks = x.unfold(-2, 2, 2).unfold(-2, 2, 2)  # ... H/2 W/2 2 2
    return (blocks * kernel).sum(dim=(-2, -1))


def test_the_similarities_are_the_softmax_over_the_others() -> None:
    x = items()
    found = log_similarities(x.float()).exp()
    assert found.shape == (4, 3) and found.tolist() == [pytest.approx(row, rel=1e-5) for row in slow_probabilities(x)]


def test_the_pair_loss_is_the_divergence_from_the_source() -> None:
    x, source = items(), items(seed=1)
    p, p0 = slow_probabilities(x), slow_probabilities(source)
    terms = [q * math.log(q / r) for ours, theirs in zip(p, p0, strict=True) for r, q in zip(ours, theirs, strict=True)]
    assert float(pair_loss(x, source)) == pytest.approx(sum(terms) / (4 * 3), rel=1e-9)
    assert float(pair_loss(x.float(), source.float())) == pytest.approx(sum(terms) / (4 * 3), abs=1e-5)
    assert float(pair_loss(x, x)) == pytest.approx(0, abs=1e-12)


def test_the_high_frequencies_are_the_haar_bands_of_each_channel_and_the_detail_loss_their_squared_difference() -> None:
    x, target = items(), items(seed=1)
    torch.testing.assert_close(high_frequency(x), slow_haar(x))
    assert not high_frequency(torch.ones(1, 1, 4, 4)).any(), "a flat picture has none"
    expected = float(((slow_haar(x) - slow_haar(target)) ** 2).mean())
    assert float(detail_loss(x.float(), target.float())) == pytest.approx(expected, rel=1e-5)


def test_the_gradients_are_those_of_finite_differences() -> None:
    x, source = items(3).requires_grad_(), items(3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pair_loss(x, source), (x,))
    assert torch.autograd.gradcheck(lambda x: pair_loss(high_frequency(x), high_frequency(source)), (x,))
    assert torch.autograd.gradcheck(lambda x: detail_loss(x, source.detach()), (x,))
    pair_loss(x, source).backward()
    assert x.grad is not None and source.grad is None, "the source is held fixed"


def test_two_items_are_refused() -> None:
    with pytest.raises(ValueError, match="2 items; pairwise similarity needs 3 or more"):
        pair_loss(items(2), items(2))


def test_items_that_come_to_look_alike_cost_something_and_are_driven_apart_again() -> None:
    source = items()
    x = (0.3 * source + 0.7 * source.mean(dim=0)).requires_grad_()
    optimizer = torch.optim.SGD([x], lr=50.0)
    before = pair_loss(x, source).item()
    for _ in range(30):
        optimizer.zero_grad()
        pair_loss(x, source).backward()
        optimizer.step()
    assert pair_loss(x, source).item() < 0.2 * before
