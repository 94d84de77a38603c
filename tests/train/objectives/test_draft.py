"""DRaFT+ in the trainer: what is drafted, what its gradient is, and the guard of its reward."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from softprompt.data.batch import draw, seeded
from softprompt.errors import InputError, RunError
from softprompt.micro import MICRO_MODEL
from softprompt.model.sampling import sample_views
from softprompt.objectives import draft as formulas
from tests.runs import scene_of
from train.loop import train
from train.objectives import draft as draft_module
from train.objectives import functions as functions_module
from train.objectives.draft import Draft, Guard
from train.objectives.functions import load_reward
from train.objectives.terms import StepBatch
from train.options.config import Config
from train.options.objectives import DraftConfig
from train.setup import prepare
from train.state.folder import list_checkpoints
from train.state.run import Job
from train.state.stop import StopSignal
from train.step import training_step

DRAFT = {"draft.weight": 1, "draft.steps": 2, "loss.weight": 0, "kl.weight": 0}


def white(views: Tensor, truth: Tensor, masks: Tensor) -> Tensor:
    """A reward that is highest for a white picture."""
    del truth, masks
    return views.mean(dim=(1, 2, 3, 4))


def per_view(views: Tensor, truth: Tensor, masks: Tensor) -> Tensor:
    """A reward with a number per view instead of one per object."""
    del truth, masks
    return views.mean(dim=(2, 3, 4))


def without_gradient(views: Tensor, truth: Tensor, masks: Tensor) -> Tensor:
    """A reward without a gradient, like one computed with NumPy."""
    del truth, masks
    return views.detach().mean(dim=(1, 2, 3, 4))


@pytest.fixture
def make_job(make_job: Callable[..., Job]) -> Callable[..., Job]:
    """The smallest run of DRaFT+ alone, prepared."""
    return lambda **options: make_job(**{**DRAFT, **options})


def term(**settings: Any) -> Draft:
    """The objective itself; only the reward `clip` looks at the pipeline."""
    config = DraftConfig(**{"weight": 1.0, "steps": 2, **settings})
    return Draft(config, load_reward(config.reward, config.encoder, None, "draft"))


def gradient_of(objective: Draft, job: Job) -> Tensor:
    """The gradient of the prompt."""
    job.adapted.zero_grad()
    for part in objective.losses(scene_of(job)):
        part.backward()
    assert job.adapted.prompt.learned.grad is not None
    return job.adapted.prompt.learned.grad.clone()


# --------------------------------------------------------------------------------------------------------- what is drafted


def test_a_draft_is_what_the_sampler_makes_of_the_same_noise(make_job: Callable[..., Job]) -> None:
    job = make_job(**{"loss.condition_drop_rate": 0.33})
    # So that the sampler ends at the last clean estimate, too; with FaceLift's own schedule it keeps the noise of timestep 0.
    job.pipeline.scheduler = DDIMScheduler.from_config(job.pipeline.scheduler.config, set_alpha_to_one=True)
    scene, seed = scene_of(job, step=5), job.config.train.seed
    assert not scene.batch.labels.any(), "of this step's only object the condition is dropped"
    ((place, index),) = scene.places
    generator = seeded(seed, 5, place)
    label_noise = draw(generator, encoded=job.train.get(index, generator), num_timesteps=1000).label_noise
    start = torch.randn(scene.batch.noise.shape, generator=seeded(seed, "draft", 5, place))[0]
    given = scene.true_views[0][0, 0]
    for scale in (1.0, 2.5):
        ((views, kl),) = term(guidance_scale=scale, backward_steps=2)._drafts(scene, scene.undropped.only(0), place)
        sampling = {"steps": 2, "guidance_scale": scale, "eta": 0.0, "latents": start, "embed_noise": label_noise}
        expected = sample_views(job.pipeline, job.adapted.prompt.start, given, **sampling)
        torch.testing.assert_close(views.detach(), expected, atol=2e-4, rtol=0)
        assert kl.shape == (2, 1) and not kl.any(), "nothing has moved before the first step"


def test_true_views_are_the_batchs_pictures_in_its_order(make_job: Callable[..., Job]) -> None:
    job = make_job(**{"data.reference_view": 2, "train.batch_size": 2, "data.background": "three_choices"})
    scene = scene_of(job)
    pictures, masks = scene.true_views
    for b, (place, index) in enumerate(scene.places):
        expected = job.train.pictures(index, seeded(job.config.train.seed, 0, place))[[2, 3, 4, 5, 0, 1]]
        assert torch.equal(pictures[b], expected)
        assert torch.equal(masks[b], job.train.masks(index)[[2, 3, 4, 5, 0, 1]])


def test_the_drafts_do_not_depend_on_how_a_batch_is_split(make_job: Callable[..., Job]) -> None:
    splits = [{"train.batch_size": 2}, {"train.batch_size": 1, "train.accumulation": 2}]
    ours, theirs = (training_step(make_job(**split).trainer, 0).objectives for split in splits)
    assert ours["draft_reward"] == pytest.approx(theirs["draft_reward"], rel=1e-4)
    assert ours["draft"] == pytest.approx(theirs["draft"], rel=1e-4)


# ------------------------------------------------------------------------------------------------------------- gradients


def test_the_gradient_is_that_of_all_its_steps_and_raises_the_reward(
    make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job()
    objective = term(backward_steps=2, kl=0.0)
    gradient, of_one = gradient_of(objective, job), gradient_of(term(kl=0.0), job)
    assert of_one.any() and not torch.allclose(gradient, of_one, rtol=0.01)
    with torch.no_grad():
        before = sum(objective.losses(scene_of(job)))
        job.adapted.prompt.learned.sub_(0.5 * gradient / gradient.norm())
        assert sum(objective.losses(scene_of(job))) < before
        job.adapted.prompt.learned.copy_(job.adapted.prompt.start)
    monkeypatch.setattr(draft_module, "checkpoint", lambda function, z, use_reentrant: function(z))
    torch.testing.assert_close(gradient_of(objective, job), gradient, rtol=1e-3, atol=1e-8)


def test_the_last_clean_estimate_is_what_is_decoded_and_noised_anew(
    make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job()
    scene, decoded, noised = scene_of(job), [], []
    clean = [term()._ddim_step(scene, *start)[1] for start in last_steps(job, scene)]
    monkeypatch.setattr(draft_module, "decode_with_gradient", lambda _, z: decoded.append(z) or z)
    renoised = formulas.renoised
    monkeypatch.setattr(formulas, "renoised", lambda z, *rest: noised.append(z) or renoised(z, *rest))
    ((place, _),) = scene.places
    for settings in ({}, {"renoise": 1}):
        list(term(**settings)._drafts(scene, scene.undropped.only(0), place))
    torch.testing.assert_close(decoded[0], clean[0])
    torch.testing.assert_close(noised[0], clean[0])


def last_steps(job: Job, scene: StepBatch) -> list[tuple[Any, ...]]:
    """The inputs of the last step of a draft of two steps."""
    scheduler = DDIMScheduler.from_config(job.pipeline.scheduler.config)
    scheduler.set_timesteps(2)
    ((place, _),) = scene.places
    batch, (first, last) = scene.undropped.only(0), scheduler.timesteps
    z = torch.randn(batch.noise.shape, generator=seeded(job.config.train.seed, "draft", scene.step, place))
    return [(scheduler, batch, term()._ddim_step(scene, scheduler, batch, z, first)[0], last)]


def test_several_noises_of_the_last_step_are_averaged(make_job: Callable[..., Job]) -> None:
    job = make_job()
    scene, parts = scene_of(job), []
    for part in term(renoise=2, kl=0.0).losses(scene):
        parts.append(part.item())
        part.backward()
    assert len(parts) == 2 and parts[0] != parts[1] and job.adapted.prompt.learned.grad.any()
    assert sum(parts) == pytest.approx(-float(scene.series["draft_reward"]), rel=1e-5)


def test_every_nth_step_is_drafted_with_n_times_the_weight() -> None:
    objective = term(every=3, weight=0.5)
    assert [objective.due(step) for step in range(4)] == [True, False, False, True] and objective.weight == 1.5


# ------------------------------------------------------------------------------------------------------------------ guard


def test_a_reward_that_is_best_where_nothing_is_left_is_stopped(
    mice: Path, small_config: Callable[..., Config], tmp_path: Path
) -> None:
    options = {"draft.reward": f"{__name__}:white", "draft.backward_steps": 2, "draft.kl": 0, "draft.guard": 0.8}
    rates = {"lora.learning_rate": 0.02, "prompt.learning_rate": 0.5, "train.steps": 20, "monitor.validate_every": 20}
    config = small_config(
        mice, **{**DRAFT, **options, **rates, "monitor.preview_every": 20, "draft.steps": 3, "model": "micro"}
    )
    with pytest.raises(
        RunError, match=r"the reward is gamed: the (density of edges|entropy of colours|share of the object)"
    ) as e:
        train(prepare(config), tmp_path / "run", state=None, stop=StopSignal())
    assert re.search(r"draft\.reward .*:white is at 0\.9", str(e.value)) and list_checkpoints(tmp_path / "run")


def test_the_guard_stops_at_a_share_of_the_first_draft_and_forgives_one_outlier() -> None:
    guard = Guard(0.5)
    assert guard.inspect({"edges": 0.6}) is None
    assert guard.inspect({"edges": 0.01}) is None, "one draft is no trend"
    said = [guard.inspect({"edges": 0.01}) for _ in range(4)]
    assert said[0] is None and said[-1] is not None
    assert (
        "density of edges of the drafted views is 20% of that of the true ones (60% in the first draft; allowed 30% to 200%"
        in said[-1]
    )
    high = Guard(0.5)
    assert high.inspect({"colours": 1.0}) is None
    assert high.inspect({"colours": 2000.0}) is None, "one draft is no trend, however far off"
    assert high.inspect({"colours": 20.0}) is not None


def test_what_the_guard_has_seen_is_in_its_state() -> None:
    guard = Guard(0.5)
    for value in (0.9, 0.3, 0.3):
        guard.inspect({"edges": value})
    other = Guard(0.5, **guard.state())
    assert [guard.inspect({"edges": 0.2}) for _ in range(4)] == [other.inspect({"edges": 0.2}) for _ in range(4)]


# --------------------------------------------------------------------------------------------------- what is refused


def test_a_reward_that_cannot_be_used_is_refused(make_job: Callable[..., Job]) -> None:
    job = make_job()
    wrong = [
        (f"{__name__}:per_view", r"per_view returned \[1, 6\]; expected a tensor \[1\], a number an object"),
        (f"{__name__}:without_gradient", r"without_gradient has no gradient; expected one through the views"),
    ]
    for reward, message in wrong:
        with pytest.raises(InputError, match=message):
            list(term(reward=reward, steps=1).losses(scene_of(job)))
    truth, opaque = torch.rand(1, 6, 3, 16, 16), torch.ones(1, 6, 1, 16, 16)
    with pytest.raises(InputError, match=r"draft\.reward: silhouette: masks leave no background"):
        term(reward="silhouette").judge(truth, truth, opaque)


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("nowhere", r"draft\.encoder: nowhere holds no config\.json; expected the folder of a CLIP vision model"),
        (MICRO_MODEL / "vae", r"draft\.encoder: .*vae: "),
        (MICRO_MODEL / "text_encoder", r"draft\.encoder: .*text_encoder: .* 0 of \d+ fit, \d+ are missing"),
    ],
)
def test_an_encoder_that_is_none_is_refused(folder: Path, message: str) -> None:
    with pytest.raises(InputError, match=message):
        term(reward="clip", encoder=str(folder))


def half(views: Tensor, truth: Tensor, masks: Tensor) -> Tensor:
    """A reward that raises an error, like a network on another device."""
    del truth, masks
    return views.mean(dim=(1, 2, 3, 4)) @ torch.ones(7)


def ssim(views: Tensor, truth: Tensor, masks: Tensor) -> Tensor:
    """A user's reward with the name of a built-in one."""
    del truth, masks
    return 42 + 0 * views.mean(dim=(1, 2, 3, 4))


def test_where_a_reward_of_ones_own_fails_the_option_and_the_line_are_named(make_job: Callable[..., Job]) -> None:
    objective = term(reward=f"{__name__}:half", steps=1)
    with pytest.raises(InputError, match=r"draft\.reward: .*:half failed at test_draft\.py:\d+ \(RuntimeError: ") as raised:
        list(objective.losses(scene_of(make_job())))
    assert str(raised.value).count("draft.reward") == 1


def test_a_reward_of_ones_own_does_not_hide_one_of_ours(make_job: Callable[..., Job]) -> None:
    pictures, masks = torch.rand(1, 6, 3, 16, 16), torch.ones(1, 6, 1, 16, 16)
    shown = SimpleNamespace(now=pictures, truth=pictures, masks=masks)
    with torch.no_grad():  # as all measuring is
        found = term(reward=f"{__name__}:ssim").evaluate(make_job().trainer.context, 0.0, shown)
    assert found["held_out_reward_own_ssim"] == 42 and found["held_out_reward_ssim"] == pytest.approx(1)


def test_an_encoder_in_half_precision_judges_in_full(tmp_path: Path) -> None:
    folder = MICRO_MODEL / "image_encoder"
    CLIPVisionModelWithProjection.from_pretrained(folder).half().save_pretrained(tmp_path)
    pictures = torch.rand(2, 1, 6, 3, 32, 32)
    pipeline = SimpleNamespace(device=torch.device("cpu"))
    full, ours = (load_reward("clip", str(f), pipeline, "draft")(*pictures, None) for f in (folder, tmp_path))
    torch.testing.assert_close(ours, full, rtol=1e-3, atol=0)
    loaded = functions_module.load_frozen(CLIPVisionModelWithProjection, tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_clip_similarity_is_a_reward_with_the_models_own_encoder(make_job: Callable[..., Job]) -> None:
    job = make_job(**{"draft.reward": "clip", "draft.encoder": MICRO_MODEL / "image_encoder", "draft.steps": 1})
    result = training_step(job.trainer, 0)
    assert result.not_finite is None and -1 < result.objectives["draft_reward"] < 1 and result.grad_norms["prompt"] > 0
