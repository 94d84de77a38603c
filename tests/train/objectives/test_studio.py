"""DomainStudio in the trainer: what is compared with what, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from softprompt.errors import InputError
from softprompt.model.sampling import decode_latents
from softprompt.objectives.domain_studio import detail_loss, high_frequency, pair_loss
from tests.runs import scene_of
from train.objectives.held_out import evaluate_on_held_out, held_out_batches
from train.objectives.studio import Studio
from train.objectives.terms import StepBatch
from train.options.command_line import parse
from train.options.config import Config, to_yaml
from train.options.objectives import StudioConfig
from train.state.run import Job
from train.step import denoising_and_kl, training_step


def predicted(job: Job) -> StepBatch:
    """The first batch, with the predictions of both models."""
    scene = scene_of(job)
    denoising_and_kl(job.trainer, scene, with_kl=False)
    return scene


def test_the_same_view_of_the_objects_or_the_views_of_each_object_are_compared(make_job: Callable[..., Job]) -> None:
    job = make_job(**{"train.batch_size": 3})
    with torch.no_grad():
        job.adapted.prompt.learned.add_(torch.randn(job.adapted.prompt.start.shape))
    scene = predicted(job)
    assert scene.prediction is not None
    ours, source = scene.clean(scene.prediction), scene.clean(scene.reference)
    sets = {
        "objects": [(ours[:, v], source[:, v]) for v in range(6)],
        "views": [(ours[b], source[b]) for b in range(3)],
    }
    for over, compared in sets.items():
        term = Studio(StudioConfig(weight=1.0, over=over, pairs=2.0, detail_pairs=3.0, detail=0.5))
        (found,) = term.losses(scene)
        pairs = sum(pair_loss(a, b) for a, b in compared) / len(compared)
        detail_pairs = sum(pair_loss(high_frequency(a), high_frequency(b)) for a, b in compared) / len(compared)
        detail = detail_loss(ours, scene.batch.latents)
        torch.testing.assert_close(found, 2 * pairs + 3 * detail_pairs + 0.5 * detail)
        torch.testing.assert_close(scene.series["studio_pairs"], pairs.detach())


def test_the_same_view_is_compared_where_each_object_was_given_another(make_job: Callable[..., Job]) -> None:
    job = make_job(**{"train.batch_size": 3, "data.reference_view": "random", "train.seed": 3})
    scene = predicted(job)
    order = scene.batch.order
    assert len({tuple(row) for row in order.tolist()}) > 1
    term = Studio(StudioConfig(weight=1.0, over="objects"))
    sets = term._items(scene, scene.batch.latents)
    for view in range(6):
        for b in range(3):
            assert torch.equal(sets[view, b], scene.batch.latents[b, order[b].tolist().index(view)])


def test_decoded_pictures_are_compared_where_asked_for(make_job: Callable[..., Job]) -> None:
    job = make_job()
    scene = predicted(job)
    assert scene.prediction is not None
    (found,) = Studio(StudioConfig(weight=1.0, over="views", space="pictures", pairs=0, detail_pairs=0, detail=1)).losses(scene)
    pictures = [decode_latents(job.pipeline, z) for z in (scene.clean(scene.prediction), scene.batch.latents)]
    torch.testing.assert_close(found, detail_loss(*pictures))
    found.backward()
    assert job.adapted.prompt.learned.grad is not None and job.adapted.prompt.learned.grad.any()


def test_at_the_start_the_pairs_are_the_untouched_models(make_job: Callable[..., Job]) -> None:
    job = make_job(**{"studio.weight": 1, "train.batch_size": 3})
    assert "WARNING    no objective/held_out_studio_objects is logged: there are 2 held-out objects" in "".join(job.notes)
    result = training_step(job.trainer, 0)
    assert result.objectives["studio_pairs"] == pytest.approx(0, abs=1e-9)
    assert result.objectives["studio_detail"] > 0


def test_held_out_objects_are_looked_at_in_the_same_way_every_time(make_job: Callable[..., Job]) -> None:
    job = make_job(**{"monitor.validation_timesteps": 2, "train.seed": 1})
    timesteps = [scene.batch.timesteps.tolist() for scene in held_out_batches(job.trainer.context, 0.0)]
    assert timesteps == [[250, 250], [750, 750]]
    term = Studio(StudioConfig(over="views"))
    with torch.no_grad():
        ours = evaluate_on_held_out(term, job.trainer.context, 0.0)
        other = make_job(**{"monitor.validation_timesteps": 2, "train.batch_size": 2})
        theirs = evaluate_on_held_out(term, other.trainer.context, 0.0)
    assert ours == theirs and set(ours) == {"studio", "studio_pairs", "studio_detail_pairs", "studio_detail"}


def test_too_few_items_are_refused(small: Callable[..., Config], make_job: Callable[..., Job]) -> None:
    with pytest.raises(InputError, match=r"train\.batch_size: is 1; expected 3 or more with studio\.over: objects"):
        small(**{"studio.weight": 1})
    with pytest.raises(InputError, match=r"studio\.over: is objects; there are 2 to train on .*needs 3 or more different ones"):
        make_job(**{"studio.weight": 1, "train.batch_size": 3, "data.limit": 2})
    with pytest.raises(InputError, match=r"monitor\.objectives: has studio, and there are 2 held-out objects"):
        make_job(**{"monitor.objectives": "[studio]"})


def test_a_resumed_run_may_not_share_out_its_pairs_otherwise(tmp_path: Path) -> None:
    kept = ["--studio.weight=1", "--train.batch_size=4"]
    (tmp_path / "config.yaml").write_text(to_yaml(parse(kept).config))
    again = ["--resume", str(tmp_path)]
    with pytest.raises(InputError, match=r"train\.batch_size: is 8; the run has 4"):
        parse([*again, "--train.batch_size=8"])
    (tmp_path / "config.yaml").write_text(to_yaml(parse([*kept, "--studio.over=views"]).config))
    assert parse([*again, "--train.batch_size=8"]).config.train.batch_size == 8
