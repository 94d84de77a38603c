"""Objectives beside the denoising loss, in the trainer: what they move, what they cost where they are off, and resuming."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from softprompt.errors import InputError, RunError
from softprompt.model.adapted import AdaptedModel
from softprompt.objectives.seen import Seen
from tests.runs import run_to_end, same, series, weights
from train.objectives.functions import call, load_function
from train.options.config import to_yaml
from train.softprompt import main
from train.state.run import Job
from train.step import training_step

CUSTOM = {"custom.weight": "0.5", "custom.function": f"{__name__}:smooth"}
DRAFT = {"draft.weight": "0.5", "draft.reward": "ssim", "draft.steps": "2"}
STUDIO = {"studio.weight": "0.5", "studio.over": "views"}
SEPARATE = {"separate.weight": "0.5"}
OBJECTIVES: dict[str, Mapping[str, str]] = {"draft": DRAFT, "studio": STUDIO, "separate": SEPARATE, "custom": CUSTOM}
"""The options of the smallest run with each objective."""
ALL = {option: value for options in OBJECTIVES.values() for option, value in options.items()}


def smooth(seen: Seen) -> Tensor:
    """A custom objective: neighbouring latents should be alike."""
    return (seen.clean.diff(dim=-1)).square().mean()


def nothing(seen: Seen) -> Tensor:
    """A custom objective that is not a number."""
    return seen.clean.mean() * float("nan")


def gradients(job: Job, step: int = 0) -> dict[str, Tensor]:
    """The gradients of one step, before clipping."""
    found: dict[str, Tensor] = {}
    for name, parameter in job.adapted.all_trainable().items():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: found.update({name: p.grad.clone()}))
    training_step(job.trainer, step)
    return found


# ------------------------------------------------------------------------------------------------------- each of them


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_alone_takes_steps_that_move_only_prompt_and_lora(make_job, name):
    job = make_job(**OBJECTIVES[name], **{"loss.weight": 0, "kl.weight": 0})
    before, frozen = weights(job), job.adapted.frozen_sums()
    results = [training_step(job.trainer, step) for step in range(2)]
    assert job.adapted.frozen_sums() == frozen
    moved = {name.partition(".")[0] for name, tensor in weights(job).items() if not torch.equal(tensor, before[name])}
    assert moved == {"prompt", "unet"}
    assert all(name in r.objectives and not r.skipped and r.not_finite is None for r in results)


@pytest.mark.usefixtures("without_exports")
def test_an_interrupted_run_with_every_objective_equals_one_that_was_not(small, tmp_path, stop_after):
    rare = {"train.steps": 2, "monitor.validate_every": 2, "monitor.preview_every": 2}
    config = small(**ALL, **rare, **{"lora.dropout": 0.1})
    whole = run_to_end(config, tmp_path / "whole")
    assert run_to_end(config, tmp_path / "parts", stop=stop_after(1)).step == 1
    resumed = run_to_end(config, tmp_path / "parts", resume=True)
    assert series(tmp_path / "parts") == series(tmp_path / "whole")
    written = {name for line in series(tmp_path / "whole") for name in line}
    assert {f"objective/{name}" for name in OBJECTIVES} <= written
    assert same(weights(resumed.job), weights(whole.job))
    assert same(resumed.job.trainer.objectives.state(), whole.job.trainer.objectives.state())


# --------------------------------------------------------------------------------------------------- weights, combinations


def test_an_objective_without_a_weight_changes_nothing(make_job):
    plain, off = make_job(), make_job(**ALL | {f"{name}.weight": 0 for name in OBJECTIVES})
    assert not off.trainer.objectives.terms
    results = [[training_step(job.trainer, step) for step in range(2)] for job in (plain, off)]
    assert results[0] == results[1] and not results[0][0].objectives
    assert same(weights(off), weights(plain))


def test_the_gradients_of_a_combination_are_the_sum_of_each_alone(make_job):
    alone = {"kl.weight": 0, "train.max_grad_norm": 1e9}
    both = gradients(make_job(**CUSTOM, **alone))
    plain = gradients(make_job(**alone))
    custom = gradients(make_job(**CUSTOM, **alone, **{"loss.weight": 0}))
    for name, gradient in both.items():
        torch.testing.assert_close(gradient, plain[name] + custom[name], rtol=1e-3, atol=1e-6)


def test_without_a_plain_loss_its_forward_pass_is_left_out(make_job, monkeypatch):
    passes: list[int] = []
    forward = AdaptedModel.forward
    monkeypatch.setattr(AdaptedModel, "forward", lambda self, *inputs: passes.append(1) or forward(self, *inputs))
    job = make_job(**CUSTOM, **{"loss.weight": 0, "kl.every": 2})
    job.trainer.objectives.terms[0].due = lambda step: False  # type: ignore[method-assign]
    assert training_step(job.trainer, 0).denoising is not None, "the KL needs the pass"
    assert len(passes) == 1
    result = training_step(job.trainer, 1)
    assert len(passes) == 1 and result.denoising is None and result.kl is None and not result.objectives


def test_the_untouched_model_is_asked_once_a_batch(make_job, monkeypatch):
    asked: list[int] = []
    reference = AdaptedModel.reference
    monkeypatch.setattr(AdaptedModel, "reference", lambda self, *inputs: asked.append(1) or reference(self, *inputs))
    job = make_job(**CUSTOM, **{"kl.every": 1})
    job.trainer.objectives.terms[0].function = lambda seen: (
        (seen.prediction - seen.untouched()).square().mean() + seen.untouched().mean()
    )
    training_step(job.trainer, 0)
    assert len(asked) == 1


def test_an_objective_that_is_not_finite_is_named_and_moves_nothing(make_job):
    job = make_job(**CUSTOM)
    job.trainer.objectives.terms[0].function = lambda seen: seen.clean.mean() * float("nan")
    before = weights(job)
    result = training_step(job.trainer, 0)
    assert result.skipped and result.not_finite is not None and "custom nan" in result.not_finite
    assert same(weights(job), before)


@pytest.mark.usefixtures("without_exports")
def test_a_run_that_one_objective_stops_says_which(small, tmp_path):
    config = small(**{**CUSTOM, "custom.function": f"{__name__}:nothing", "train.max_skipped": 2, "train.steps": 5})
    with pytest.raises(RunError, match=r"not finite in 2 steps in a row .* Likely custom itself is not finite"):
        run_to_end(config, tmp_path / "run")


def test_a_dry_run_does_not_call_what_is_not_finite_working(small, tmp_path, capsys):
    config = small(**{**CUSTOM, "custom.function": f"{__name__}:nothing"})
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert main(["--config", str(tmp_path / "config.yaml"), f"--output={tmp_path / 'run'}", "--dry-run"]) == 1
    said = capsys.readouterr()
    assert "error: dry run: not finite, and nothing would be trained" in said.err and "works" not in said.out


# ------------------------------------------------------------------------------------------------------- one's own


def test_a_function_of_ones_own_is_found_in_the_current_folder(make_job, tmp_path, monkeypatch):
    (tmp_path / "own_losses.py").write_text("def pull(seen):\n    return (seen.prompt - seen.start).square().mean()\n")
    monkeypatch.chdir(tmp_path)
    job = make_job(**{"custom.weight": 1, "custom.function": "own_losses:pull"})
    assert training_step(job.trainer, 0).objectives == {"custom": 0}, "nothing has moved before the first step"
    assert training_step(job.trainer, 1).objectives["custom"] > 0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            "no_such_module:pull",
            r"custom\.function: is no_such_module:pull; there is no module no_such_module \(on the Python path",
        ),
        (f"{__name__}:smoothe", r"module .*test_objectives has no function smoothe; it has .*smooth"),
        (f"{__name__}:OBJECTIVES", r"has a dict, no function, OBJECTIVES"),
        ("broken:pull", r"module broken cannot be imported \(ValueError: not today\)"),
        ("needs:pull", r"there is no module nowhere \(which needs imports\)"),
    ],
)
def test_a_function_that_is_not_there_is_refused(make_job, tmp_path, monkeypatch, function, message):
    (tmp_path / "broken.py").write_text("raise ValueError('not today')\n")
    (tmp_path / "needs.py").write_text("import nowhere\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        make_job(**{"custom.weight": 1, "custom.function": function})


def test_a_function_that_gives_no_scalar_is_refused(make_job):
    job = make_job(**CUSTOM)
    wrong: list[tuple[Any, str]] = [(torch.ones(2), r"\[2\]"), (torch.ones(1), r"\[1\]"), (1.0, "float")]
    for value, found in wrong:
        job.trainer.objectives.terms[0].function = lambda seen, value=value: value
        with pytest.raises(InputError, match=rf"test_objectives:smooth returned {found}; expected a scalar tensor"):
            training_step(job.trainer, 0)


def test_a_function_without_a_gradient_or_that_fails_is_refused_by_its_line(make_job):
    job = make_job(**CUSTOM)
    term = job.trainer.objectives.terms[0]
    term.function = lambda seen: seen.clean.detach().square().mean()
    with pytest.raises(InputError, match=r"custom\.function: .*:smooth has no gradient; expected one through seen\.prediction"):
        training_step(job.trainer, 0)
    term.function = lambda seen: seen.clean @ torch.ones(3)
    with pytest.raises(InputError, match=r"custom\.function: .*smooth failed at test_objectives\.py:\d+ \(RuntimeError: size"):
        training_step(job.trainer, 0)


def test_out_of_memory_in_a_function_of_ones_own_is_the_trainers_to_handle():
    def large(seen: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        call(large, None, spec="own:large", option="custom.function")


def test_the_functions_in_the_documents_are_objectives_and_rewards(make_job, tmp_path, monkeypatch):
    page = (Path(__file__).parents[3] / "docs" / "objectives.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"```python\n# (\w+)\.py.*?\n(.*?)```", page, re.DOTALL))
    assert blocks.keys() >= {"my_losses", "my_rewards"}
    for name, code in blocks.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    job = make_job(**{"custom.weight": 1, "custom.function": "my_losses:smooth"})
    assert training_step(job.trainer, 0).objectives["custom"] > 0
    job.trainer.objectives.terms[0].function = load_function("my_losses:near", "custom.function")
    assert training_step(job.trainer, 1).objectives["custom"] > 0
    views, truth, masks = (
        torch.rand(2, 6, 3, 16, 16, requires_grad=True),
        torch.rand(2, 6, 3, 16, 16),
        torch.zeros(2, 6, 1, 16, 16),
    )
    found = load_function("my_rewards:both", "draft.reward")(views, truth, masks)
    assert found.shape == (2,) and found.requires_grad
