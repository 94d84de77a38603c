"""The one formula: E(s) = path(s) + carry(s) (P - W_0)."""

import pytest
import torch
from torch import Tensor

from softprompt.prompt.soft_prompt import SoftPrompt, point_on_path


def waypoints(count: int = 2) -> Tensor:
    return torch.randn(count, 6, 7, 8, generator=torch.Generator().manual_seed(0))


def trained(count: int = 2, **options: str) -> SoftPrompt:
    """A prompt that has moved away from its start."""
    prompt = SoftPrompt(waypoints(count), **options)
    prompt.learned.data += torch.randn(prompt.learned.shape, generator=torch.Generator().manual_seed(1))
    return prompt


@pytest.mark.parametrize("carry", ["keep", "fade"])
@pytest.mark.parametrize("interpolation", ["lerp", "slerp"])
def test_an_untrained_prompt_is_the_path_itself(carry: str, interpolation: str) -> None:
    w = waypoints(3)
    prompt = SoftPrompt(w, carry=carry, interpolation=interpolation)
    assert torch.equal(prompt(0.0), w[0]) and torch.equal(prompt.start, w[0])
    assert prompt.last_position == 2
    for position in (0.4, 1.0, 1.7, 2.0):
        assert torch.equal(prompt(position), point_on_path(w, position, interpolation))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8, 1.0])
def test_one_target_gives_the_formula_written_out(alpha: float) -> None:
    start, target = waypoints()
    fade, keep = trained(carry="fade"), trained(carry="keep")
    torch.testing.assert_close(fade(alpha), (1 - alpha) * fade.learned + alpha * target)
    torch.testing.assert_close(keep(alpha), keep.learned + alpha * (target - start))


@pytest.mark.parametrize("interpolation", ["lerp", "slerp"])
@pytest.mark.parametrize("position", [0.0, 0.5, 1.0, 1.6, 2.5, 3.0])
def test_several_waypoints_share_one_formula(position: float, interpolation: str) -> None:
    for carry, share in [("keep", 1.0), ("fade", 1 - position / 3)]:
        prompt = trained(4, carry=carry, interpolation=interpolation)
        expected = point_on_path(waypoints(4), position, interpolation) + share * (prompt.learned - waypoints(4)[0])
        torch.testing.assert_close(prompt(position), expected)


@pytest.mark.parametrize("carry", ["keep", "fade"])
def test_with_one_waypoint_e_is_p(carry: str) -> None:
    prompt = trained(1, carry=carry)
    torch.testing.assert_close(prompt(0.0), prompt.learned)


@pytest.mark.parametrize(("carry", "scale"), [("keep", [1.0, 1.0, 1.0]), ("fade", [1.0, 0.25, 0.0])])
def test_the_gradient_is_scaled_by_what_is_carried(carry: str, scale: list[float]) -> None:
    for position, expected in zip([0.0, 1.5, 2.0], scale, strict=True):
        prompt = trained(3, carry=carry)
        prompt(position).sum().backward()
        torch.testing.assert_close(prompt.learned.grad, torch.full_like(prompt.learned, expected))


def test_only_p_is_trained_and_the_path_is_saved_with_it() -> None:
    prompt = SoftPrompt(waypoints())
    assert [name for name, _ in prompt.named_parameters()] == ["learned"]
    assert set(prompt.state_dict()) == {"learned", "waypoints"}


def test_training_leaves_the_start_and_the_caller_s_tensor_alone() -> None:
    given = waypoints()
    prompt = SoftPrompt(given)
    prompt.learned.data += 1
    assert torch.equal(prompt.start, waypoints()[0]) and torch.equal(given, waypoints())
    given += 1
    assert torch.equal(prompt.start, waypoints()[0])


def test_everything_is_float32_whatever_the_waypoints_are() -> None:
    prompt = SoftPrompt(waypoints().half())
    assert prompt.learned.dtype == prompt.waypoints.dtype == prompt(0.5).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert prompt(0.5).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_prompt_cast_to_half_precision_is_an_error(dtype: torch.dtype) -> None:
    with pytest.raises(AssertionError, match=r"the prompt is trained in float32"):
        SoftPrompt(waypoints()).to(dtype)(0.0)


def test_waypoints_of_another_rank_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"waypoints are \[6, 7, 8\]; expected \[S \+ 1, V, T, D\]"):
        SoftPrompt(waypoints()[0])


def test_decay_goes_toward_the_start_and_not_toward_zero() -> None:
    prompt = trained()
    before, start = prompt.learned.detach().clone(), waypoints()[0]
    prompt.decay_toward_start(0.1)
    torch.testing.assert_close(prompt.learned.detach(), before - 0.1 * (before - start))
    for _ in range(300):
        prompt.decay_toward_start(0.1)
    torch.testing.assert_close(prompt.learned.detach(), start)


@pytest.mark.parametrize(("carry", "position"), [("keep", 0.0), ("keep", 0.5), ("keep", 1.0), ("fade", 0.5)])
@pytest.mark.parametrize("interpolation", ["lerp", "slerp"])
def test_norms_of_what_the_unet_sees_are_kept_in_their_band_and_directions_are_kept(
    carry: str, position: float, interpolation: str
) -> None:
    prompt = SoftPrompt(waypoints(), carry=carry, interpolation=interpolation)
    path, share = point_on_path(waypoints(), position, interpolation), 1.0 if carry == "keep" else 0.5
    factors = torch.tensor([0.1, 0.89, 0.95, 1.0, 1.05, 1.11, 7.0])  # one a token
    # Not along the path's own direction: it is turned, so that direction and norm are tested separately.
    turned = path + 0.5 * path.norm(dim=-1, keepdim=True) * torch.nn.functional.normalize(path.roll(1, dims=-1), dim=-1)
    wanted = turned * (path.norm(dim=-1) / turned.norm(dim=-1) * factors)[..., None]
    prompt.learned.data += (wanted - path) / share
    torch.testing.assert_close(prompt(position).detach(), wanted)
    prompt.clamp_norms(0.1, position)
    after = prompt(position).detach()
    expected = torch.tensor([0.9, 0.9, 0.95, 1.0, 1.05, 1.1, 1.1])
    torch.testing.assert_close(after.norm(dim=-1) / path.norm(dim=-1), expected.expand(6, -1))
    cosine = torch.nn.functional.cosine_similarity(after, wanted, dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    torch.testing.assert_close(after[:, 2:5], wanted[:, 2:5])
    again = prompt.learned.detach().clone()
    prompt.clamp_norms(0.1, position)
    torch.testing.assert_close(prompt.learned.detach(), again)


@pytest.mark.parametrize(("carry", "position"), [("keep", 0.0), ("keep", 0.5), ("keep", 1.0), ("fade", 0.0), ("fade", 0.5)])
def test_norms_of_an_untrained_prompt_are_not_changed_along_the_path(carry: str, position: float) -> None:
    prompt = SoftPrompt(waypoints(), carry=carry)
    prompt.clamp_norms(0.01, position)
    torch.testing.assert_close(prompt.learned.detach(), waypoints()[0], atol=1e-6, rtol=0)
