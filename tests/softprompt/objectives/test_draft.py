"""DRaFT+'s formulas against slow, obvious ones in float64."""

import math

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from softprompt.data.batch import seeded
from softprompt.objectives import draft

SCHEDULE = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod
T = torch.tensor([1, 501])


def tensors(*shape: int, count: int) -> list[Tensor]:
    return list(torch.randn(count, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


def kl(noisy: Tensor, ours: Tensor, pretrained: Tensor, prediction_type: str = "v_prediction") -> Tensor:
    return draft.trajectory_kl(noisy, ours, pretrained, SCHEDULE.to(noisy), T, prediction_type)


def slow_epsilon(z: Tensor, v: Tensor, t: int) -> Tensor:
    return math.sqrt(SCHEDULE[t]) * v + math.sqrt(1 - SCHEDULE[t]) * z


def test_the_kl_of_a_step_is_the_mean_squared_difference_of_epsilon() -> None:
    noisy, ours, pretrained = tensors(2, 3, 4, 2, 2, count=3)
    of_v = [slow_epsilon(noisy[b], ours[b], t) - slow_epsilon(noisy[b], pretrained[b], t) for b, t in enumerate(T.tolist())]
    found = kl(noisy.float(), ours.float(), pretrained.float())
    assert found.tolist() == pytest.approx([float((e**2).mean()) for e in of_v], rel=1e-5)
    plain = kl(noisy, ours, pretrained, "epsilon")
    assert plain.tolist() == pytest.approx([float(((ours[b] - pretrained[b]) ** 2).mean()) for b in range(2)])


def test_the_gradients_of_the_kl_and_the_loss_are_those_of_finite_differences() -> None:
    noisy, ours, pretrained = (x.requires_grad_() for x in tensors(2, 2, 2, 2, 2, count=3))
    assert torch.autograd.gradcheck(lambda v: kl(noisy.detach(), v, pretrained.detach()), (ours,))
    rewards, kls = (x.requires_grad_() for x in (torch.randn(2).double(), torch.rand(3, 2).double()))
    assert torch.autograd.gradcheck(lambda r, k: draft.draft_loss(r, k, 0.3), (rewards, kls))


def test_the_kl_s_reference_is_held_fixed_as_a_whole() -> None:
    noisy, ours, pretrained = (x.requires_grad_() for x in tensors(2, 2, 2, 2, 2, count=3))
    kl(noisy, ours, pretrained).sum().backward()
    assert noisy.grad is not None and pretrained.grad is None
    for b, t in enumerate(T.tolist()):
        eps, eps_0 = (slow_epsilon(noisy[b], v[b], t).detach() for v in (ours, pretrained))
        expected = 2 * math.sqrt(1 - SCHEDULE[t]) * (eps - eps_0) / eps.numel()  # d eps / d z = s, and sg[eps_0] has none
        torch.testing.assert_close(noisy.grad[b], expected, rtol=1e-5, atol=1e-8)


def test_the_loss_is_minus_the_mean_reward_plus_the_weighted_mean_kl() -> None:
    rewards, kls = [1.0, 3.0], [[0.5, 0.25], [1.0, 0.25], [2.0, 1.5]]
    expected = -sum(rewards) / 2 + 0.1 * sum(sum(step) / 2 for step in kls) / 3
    assert float(draft.draft_loss(torch.tensor(rewards), torch.tensor(kls), 0.1)) == pytest.approx(expected, rel=1e-6)


def test_renoised_latents_have_the_levels_mean_and_deviation_and_no_gradient_into_the_draft() -> None:
    clean, noise = tensors(1, 2, 2, 2, 2, count=2)
    clean.requires_grad_()
    found = draft.renoised(clean, noise, torch.tensor(0.81).double())
    assert torch.allclose(found, 0.9 * clean + math.sqrt(0.19) * noise) and not found.requires_grad


def test_as_many_steps_have_a_gradient_as_alignprop_draws() -> None:
    assert [draft.steps_with_gradient(10, k) for k in (1, 3, 10)] == [1, 3, 10]
    drawn = [draft.steps_with_gradient(50, 1, seeded("steps", i)) for i in range(2000)]
    expected = [50 - min(max(int(42 + 5 * float(torch.randn((), generator=seeded("steps", i)))), 1), 49) for i in range(2000)]
    assert drawn == expected and min(drawn) >= 1
    assert sum(drawn) / 2000 == pytest.approx(8.5, abs=0.4) and max(drawn) > 15
    assert {draft.steps_with_gradient(n, 1, seeded(i)) for n in (1, 2) for i in range(20)} == {1}
