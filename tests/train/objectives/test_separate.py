"""Separate-and-Enhance in the trainer: whose maps it reads, that it moves them, and what is refused."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from softprompt.errors import InputError
from softprompt.model.attention import AttentionMaps, SharedPromptAttnProcessor, watch_attention
from softprompt.objectives.separate import absence, overlap
from softprompt.prompt.embeddings import save_prompt
from train.batches import Wanted
from train.objectives.separate import groups_of
from train.options.config import Config
from train.state.run import Job
from train.step import training_step


@pytest.fixture(scope="module")
def small_config(small_config: Callable[..., Config]) -> Callable[..., Config]:
    """The smallest run of the embedded model: its cross-attention has maps of two sides."""
    return partial(small_config, model="micro")


def test_the_maps_are_those_of_the_plain_losss_pass(make_job: Callable[..., Job]) -> None:
    job = make_job(**{"separate.weight": 1, "separate.side": 16, "kl.every": 1, "train.gradient_checkpointing": "always"})
    batch, prompt = job.trainer.batches.make(Wanted(0, 0, lowest=0)), job.adapted.prompt
    noisy = job.pipeline.scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
    with torch.no_grad(), watch_attention(job.pipeline.unet, AttentionMaps(groups_of(prompt, 0.0), 16)) as maps:
        job.adapted(noisy, batch.given, batch.timesteps, batch.labels, batch.order, 0.0)
    found = training_step(job.trainer, 0).objectives
    assert found["separate_overlap"] == pytest.approx(float(overlap(*maps.mean()).mean()), rel=1e-4)
    assert found["separate_absence"] == pytest.approx(float(absence(maps.mean()).mean()), rel=1e-4)
    assert found["separate"] == pytest.approx(found["separate_overlap"] + 0.5 * found["separate_absence"], rel=1e-5)
    watchers = [p.watcher for p in job.pipeline.unet.attn_processors.values() if isinstance(p, SharedPromptAttnProcessor)]
    assert watchers and not any(watchers), "nobody looks between steps"


def test_the_objective_falls_where_it_is_trained(make_job: Callable[..., Job]) -> None:
    job = make_job(**{"separate.weight": 1, "loss.weight": 0, "kl.weight": 0, "curriculum.position": "[0, 0]"})
    found = [training_step(job.trainer, step).objectives["separate"] for step in range(4)]
    assert found[-1] < 0.9 * found[0]


def test_the_tokens_are_said_and_are_those_of_the_path(make_job: Callable[..., Job]) -> None:
    job = make_job(**{"monitor.objectives": "[separate]"})
    assert "separate   facelift: tokens 9, 10, 11, 12, 15, 16, 17 say which view it is" in job.notes
    with torch.no_grad():
        before = groups_of(job.adapted.prompt, 0.0)
        job.adapted.prompt.learned.add_(torch.randn(job.adapted.prompt.start.shape))
    assert torch.equal(groups_of(job.adapted.prompt, 0.0), before), "what is learned does not move them"
    assert not torch.equal(groups_of(job.adapted.prompt, 1.0), before)
    assert (before.sum(dim=0) <= 1).all() and before[0].sum() == 7


def test_what_cannot_be_separated_is_refused(
    small: Callable[..., Config], make_job: Callable[..., Job], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"separate\.side: is 12; the UNet's cross-attention has maps of side 16, 8"):
        make_job(**{"separate.weight": 1, "separate.side": 12})
    with pytest.raises(InputError, match=r"train\.compile: is true; expected false with the objective separate"):
        small(**{"separate.weight": 1, "train.compile": "true"})
    save_prompt(torch.randn(6, 77, 1024), tmp_path / "noise.pt")
    with pytest.raises(InputError, match=r"prompt .*noise\.pt has 76 tokens that tell its views apart and 0 other words"):
        make_job(**{"separate.weight": 1, "prompt.waypoints": f"[facelift, {tmp_path}/noise.pt]"})
