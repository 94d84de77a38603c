"""The curricula of a run against tables written out, and the same path whether a run is interrupted or not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt.prompt.curriculum import Stage
from softprompt.prompt.pacing import Curriculum, CurriculumState
from tests.runs import run_to_end, series
from train.build import make_curriculum
from train.options.config import Config
from train.state.stop import StopSignal

STAGES = {
    "curriculum.pacing": "plateau",
    "prompt.waypoints": "[facelift, hybrid, realistic]",
    "curriculum.position": "[0, 1, 2]",
    "curriculum.patience": "0",
}


@pytest.fixture
def schedule(small: Callable[..., Config]) -> Callable[..., Curriculum]:
    """Curricula of a run with these options, on a noise schedule of 1000 timesteps."""
    return lambda **options: make_curriculum(small(**options), torch.linspace(0.99, 0.01, 1000))


def test_a_plateau_of_the_validation_moves_the_prompt_on(schedule: Callable[..., Curriculum]) -> None:
    asked = schedule(**STAGES, **{"curriculum.watch": "validation", "curriculum.min_gain": "0"})
    pace, positions = asked.start(), []
    for step, loss in enumerate([3.0, 2.0, 2.0, 2.0, 1.0, 1.5, 1.5], start=1):
        pace = asked.after_step(pace, step, denoising=9.0, kl=None)
        pace = asked.after_validation(pace, step, loss)
        positions.append(asked.position(pace, step))
    assert positions == [0, 0, 1, 1, 1, 2, 2]


def test_a_plateau_of_the_training_loss_does_not_look_at_the_validation(schedule: Callable[..., Curriculum]) -> None:
    asked = schedule(**STAGES, **{"curriculum.watch": "train"})
    pace = asked.after_validation(asked.after_validation(asked.start(), 1, 5.0), 2, 5.0)
    assert pace == asked.start()
    for step in (1, 2):
        pace = asked.after_step(pace, step, denoising=5.0, kl=None)
    assert pace.stage.number == 1


def test_losses_on_the_way_to_a_stage_do_not_count(schedule: Callable[..., Curriculum]) -> None:
    asked = schedule(**STAGES, **{"curriculum.watch": "train", "curriculum.glide_steps": 3})
    pace, numbers, positions = asked.start(), [], []
    for step in range(1, 10):
        pace = asked.after_step(pace, step, denoising=5.0, kl=None)
        numbers.append(pace.stage.number)
        positions.append(asked.position(pace, step))
    assert numbers == [0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert positions == pytest.approx([0, 0, 1 / 3, 2 / 3, 1, 1, 4 / 3, 5 / 3, 2])


def test_a_kl_budget_moves_the_prompt_at_every_step_by_what_was_last_measured(schedule: Callable[..., Curriculum]) -> None:
    asked = schedule(**{"curriculum.pacing": "kl_budget", "curriculum.kl_budget": 0.1, "curriculum.fastest": 0.25})
    pace, positions = asked.start(), []
    for step, kl in enumerate([0.0, None, 0.05, 0.2, None, 0.0, 0.0], start=1):
        pace = asked.after_step(pace, step, denoising=9.0, kl=kl)
        positions.append(asked.position(pace, step))
    assert positions == pytest.approx([0.25, 0.5, 0.625, 0.625, 0.625, 0.875, 1.0])


def test_the_kl_weight_is_adapted_only_where_a_target_is_given_and_the_kl_was_measured(
    schedule: Callable[..., Curriculum],
) -> None:
    fixed, adapted = (schedule(**{"kl.weight": 0.5, "kl.rate": 1.0, "kl.target": target}) for target in ("null", "0.1"))
    pace, weights = adapted.start(), []
    for kl in (0.2, None, 0.05):
        pace = adapted.after_step(pace, 1, denoising=9.0, kl=kl)
        weights.append(pace.kl_weight)
    assert weights == pytest.approx([0.6, 0.6, 0.48])
    assert fixed.after_step(fixed.start(), 1, denoising=9.0, kl=0.2).kl_weight == 0.5


def test_the_timestep_curriculum_goes_from_high_noise_down(schedule: Callable[..., Curriculum]) -> None:
    asked = schedule(
        **{"timesteps.clusters": 4, "timesteps.edges": "uniform", "timesteps.patience": 1, "timesteps.smoothing": 0}
    )
    pace, lowest = asked.start(), []
    for step in range(1, 10):
        lowest.append(asked.lowest_timestep(pace))
        pace = asked.after_step(pace, step, denoising=1.0, kl=None)
    assert lowest == [750, 750, 750, 500, 500, 500, 250, 250, 250]
    assert schedule().lowest_timestep(schedule().start()) == 0


def test_the_state_comes_back_from_json_as_it_was(schedule: Callable[..., Curriculum]) -> None:
    asked = schedule(**STAGES, **{"timesteps.clusters": 4})
    pace = asked.after_validation(asked.after_step(asked.start(), 1, denoising=0.1, kl=0.3), 1, 0.123456789012345)
    assert pace != asked.start()
    assert CurriculumState.from_json(json.loads(json.dumps(pace.to_json()))) == pace


def test_what_a_curriculum_has_not_come_to_is_said(schedule: Callable[..., Curriculum]) -> None:
    plain, plateau, steps = schedule(), schedule(**STAGES), schedule(**{"timesteps.clusters": 4})
    assert "came to position 0 of 2: pacing plateau" in plateau.unfinished(plateau.start(), 4)[0]
    assert "came to stage 1 of 4: the less noisy timesteps were never trained" in steps.unfinished(steps.start(), 4)[0]
    arrived = CurriculumState(kl_weight=1.0, stage=Stage(number=2), timesteps=Stage(number=3))
    assert plateau.unfinished(arrived, 4) == steps.unfinished(arrived, 4) == plain.unfinished(plain.start(), 4) == []


@pytest.mark.usefixtures("without_exports")
@pytest.mark.parametrize(
    ("moving", "options"),
    [
        (
            "curriculum/position",
            {**STAGES, "curriculum.watch": "train", "curriculum.glide_steps": 2, "curriculum.min_gain": 0.5},
        ),
        ("curriculum/position", {**STAGES, "curriculum.patience": 9, "curriculum.max_stage_steps": 3}),
        (
            "curriculum/position",
            {
                "curriculum.pacing": "kl_budget",
                "curriculum.kl_budget": 1.0,
                "curriculum.fastest": 0.12,
                "curriculum.smoothing": 0.5,
            },
        ),
        ("curriculum/lowest_timestep", {"timesteps.clusters": 5, "timesteps.patience": 0, "timesteps.max_stage_steps": 2}),
        (
            "kl/weight",
            {"kl.target": 1e-5, "kl.rate": 1.0, "kl.domain": "both", "data.original": "VAL", "prompt.separation": 1.0},
        ),
        ("gradient/norm_lora", {"prompt.train_until": 0.5, "lora.train_from": 0.5}),
    ],
    ids=["plateau of the training loss", "plateau of the validation", "kl budget", "timesteps", "kl target, replay", "pivotal"],
)
def test_a_run_stopped_in_the_middle_and_resumed_takes_the_same_path(
    small: Callable[..., Config],
    tmp_path: Path,
    stop_after: Callable[[int], StopSignal],
    moving: str,
    options: dict[str, Any],
) -> None:
    config = small(**{"train.steps": 8, "kl.every": 1, "monitor.validate_every": 4, "monitor.checkpoint_every": 8, **options})
    run_to_end(config, tmp_path / "whole")
    run_to_end(config, tmp_path / "parts", stop=stop_after(5))
    run_to_end(config, tmp_path / "parts", resume=True)
    whole = series(tmp_path / "whole")
    assert series(tmp_path / "parts") == whole
    path = [line[moving] for line in whole if moving in line]
    assert len(set(path[:5])) > 1 and len(set(path[4:])) > 1, "it moves before the stop, and after it"
