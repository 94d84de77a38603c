"""Diffusion-DPO, its curriculum and SPIN-Diffusion in the trainer: what is compared with what, resuming, kills, refusals."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from softprompt.data.batch import draw, seeded, view_order
from softprompt.errors import InputError, RunError
from softprompt.objectives.preference import dpo_loss, preference
from softprompt.objectives.rewards import REWARDS
from tests.models import perturb
from tests.runs import run_to_end, same, scene_of, series, weights
from train import callbacks
from train.batches import Wanted
from train.evaluation.evaluator import Evaluator
from train.loop import Run
from train.objectives.dpo import ListedDpo, OwnDpo
from train.objectives.own_samples import OwnSamples, Sampling, Snapshot, as_it_was, predict_as
from train.objectives.pairs import read_pairs
from train.objectives.preferences import Contest, contest_batch, sampled
from train.objectives.spin import Spin
from train.objectives.terms import Context, Shown
from train.options.config import Config
from train.options.preferences import DpoConfig, SpinConfig
from train.setup import Job, make_accelerator
from train.state.folder import list_checkpoints
from train.state.stop import StopSignal
from train.step import training_step

OWN = {"sample_steps": "1", "objects": "2", "held_out_objects": "1"}
DPO = {
    "dpo.weight": "1",
    "dpo.samples": "3",
    "dpo.chunks": "2",
    "dpo.guidance_scales": "[1, 2]",
    **{f"dpo.{name}": value for name, value in OWN.items()},
}
SPIN = {"spin.weight": "1", "spin.iterations": "2", **{f"spin.{name}": value for name, value in OWN.items()}}
MEASURED = {"dpo.weight": "0", "spin.weight": "0", "monitor.objectives": '["dpo", "spin"]'}
CHEAP = {
    "train.steps": "2",
    "kl.weight": "0",
    "monitor.guidance_scale": "1",
    "monitor.validate_every": "2",
    "monitor.preview_every": "2",
    "monitor.checkpoint_every": "1",
    "monitor.checkpoints_kept": "9",
    "export.report": "false",
}


@pytest.fixture(scope="module")
def small(small: Callable[..., Config]) -> Callable[..., Config]:
    """The smallest run with little else than training."""
    return lambda **options: small(**{**CHEAP, **options})


def true_views(evaluator: Evaluator, prompt: Tensor, pretrained: Tensor | None) -> Shown:
    """Replaces previews, which take most of a short run's time."""
    del prompt, pretrained
    truth, masks = (views[None] for views in evaluator.held_out.views(0, seeded("preview")))
    return Shown(truth[:, 0], truth, masks, truth, truth, tuple("abcdef"))


@pytest.fixture(scope="module", autouse=True)
def hurried() -> Iterator[None]:
    """Without previews and exports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "preview", true_views)
        patch.setattr(callbacks, "export", lambda run, folder: None)
        yield


def moved(job: Job) -> None:
    """Change all trained parameters at random."""
    perturb(job.adapted.all_trainable().values(), scale=0.05)


def term(job: Job) -> Any:
    (found,) = job.trainer.objectives.terms
    return found


@pytest.fixture(scope="module")
def kept_jobs(make_job: Callable[..., Job], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """For each objective, a job that has learned something, made its samples and then trained further."""
    jobs = {}
    for name, options in (("dpo", DPO), ("spin", SPIN)):
        jobs[name] = job = make_job(**options, **{"train.batch_size": 3, "loss.own_view": "false"})
        moved(job)
        term(job).begin(job.trainer.context, tmp_path_factory.mktemp(name), 1, 0.0, lambda: False)
        moved(job)
    return jobs


@pytest.fixture
def begun(kept_jobs: dict[str, Job]) -> Callable[[str], Job]:
    """`begun("dpo")`: one of these jobs with a new accelerator; a test may change its weights."""

    def get(name: str) -> Job:
        job = kept_jobs[name]
        context = replace(job.trainer.context, accelerator=make_accelerator(job.config))
        return replace(job, trainer=replace(job.trainer, context=context))

    return get


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The pairs of a list."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    """Write a list of pairs."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def pairs(mice: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of three pairs among the mice: true views win over those of another mouse."""
    names = sorted(p.name for p in (mice / "train").iterdir() if p.is_dir())
    rows = [
        {"input": f"train/{a}", "winner": f"train/{a}", "loser": f"train/{b}", "gap": gap}
        for a, b, gap in [(names[0], names[1], 0.5), (names[1], names[2], 2.0), (names[2], names[0], 1.0)]
    ]
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.parent.joinpath("train").symlink_to(mice / "train")
    return write_rows(path, *rows)


# ---------------------------------------------------------------------------------------------- what is compared with what


def test_all_sides_of_a_contest_share_their_condition_timestep_and_noise(begun):
    job = begun("dpo")
    encoded = [job.train.get(index, seeded("colour")) for index in range(2)]
    own = [torch.randn(6, *job.pipeline.latent_shape, generator=seeded(index)) for index in range(2)]
    contests = [Contest(e, r, ((e.mean, e.std), sampled(z))) for e, r, z in zip(encoded, (4, 0), own, strict=True)]
    draws = [
        draw(seeded(i), encoded=e, num_timesteps=1000, references=[r], drop_rate=1 / 3)
        for i, (e, r) in enumerate(zip(encoded, (4, 0), strict=True))
    ]
    batch = contest_batch(job.pipeline, contests, draws)
    for name in ("noise", "given", "labels", "timesteps", "order"):
        winners, losers = getattr(batch, name).chunk(2)
        assert torch.equal(winners, losers), name
    assert batch.order[0].tolist() == [4, 5, 0, 1, 2, 3]
    scale = job.pipeline.vae.config.scaling_factor
    for index, (e, d, z) in enumerate(zip(encoded, draws, own, strict=True)):
        order = view_order(d.reference, 6)
        torch.testing.assert_close(batch.latents[index], (e.mean + e.std * d.target_noise)[order] * scale)
        torch.testing.assert_close(batch.latents[2 + index], z[order] * scale)
        given = e.mean[d.reference] * scale * d.keep_latents
        assert torch.equal(batch.given[index], given.expand(6, -1, -1, -1))


@pytest.mark.parametrize("name", ["dpo", "spin"])
def test_the_loss_of_a_step_is_that_of_the_formula_on_predictions_made_one_by_one(begun, name):
    job = begun(name)
    found, scene = term(job), scene_of(job, step=1)
    with torch.no_grad():
        loss = sum(float(part) for part in found.losses(scene))
    adapted, scheduler = job.adapted, job.pipeline.scheduler
    expected, preferred = [], []
    for place, index in scene.places:
        contest, d = found._turn(scene, place, index)
        errors = {}
        for side in (0, 1):
            one = contest_batch(job.pipeline, [Contest(contest.encoded, contest.reference, (contest.sides[side],))], [d])
            abar = float(scheduler.alphas_cumprod[d.timestep])
            noisy = abar**0.5 * one.latents + (1 - abar) ** 0.5 * one.noise
            inputs = (noisy, one.given, one.timesteps, one.labels, one.order)
            with torch.no_grad():
                policy = adapted(*inputs, 0.0)
                other = adapted.reference(*inputs) if name == "dpo" else predict_as(adapted, found.iterate, *inputs)
            for model, velocity in (("policy", policy), ("other", other)):
                noise = abar**0.5 * velocity + (1 - abar) ** 0.5 * noisy  # eps of v
                errors[model, side] = (noise - one.noise)[:, 1:].double().square().mean()  # without the reference's own view
        four = [errors[model, side].reshape(1) for model in ("policy", "other") for side in (0, 1)]
        expected.append(float(dpo_loss(*four, beta=2000.0)))
        preferred.append(float(preference(*four)))
    assert loss == pytest.approx(sum(expected) / 3, rel=1e-3)
    assert float(scene.series[f"{name}_accuracy"]) == pytest.approx(sum(p > 0 for p in preferred) / 3)


def test_dpo_is_held_to_the_untouched_model_and_spin_to_its_last_iterate(begun):
    job = begun("dpo")
    batch = job.trainer.batches.take(Wanted(0, 0, lowest=500)).only(0)
    inputs = (batch.noise, batch.given, batch.timesteps, batch.labels, batch.order)
    with torch.no_grad():
        moved(job)
        assert not torch.equal(job.adapted(*inputs, 0.0), job.adapted.reference(*inputs))
        assert torch.equal(term(job).regularised_toward(job.trainer.context)(*inputs), job.adapted.reference(*inputs))
        job = begun("spin")
        term(job).iterate = Snapshot.take(job.adapted, 1, 0.0)
        before = job.adapted(*inputs, 0.0)
        moved(job)
        assert not torch.equal(job.adapted(*inputs, 0.0), before)
        assert torch.equal(term(job).regularised_toward(job.trainer.context)(*inputs), before)


def test_the_model_is_itself_again_after_it_was_what_it_was(make_job):
    job = make_job(**{"lora.dropout": 0.5})
    moved(job)
    snapshot = Snapshot.take(job.adapted, 3, 0.0)
    moved(job)
    now = weights(job)
    with pytest.raises(ZeroDivisionError), as_it_was(job.adapted, snapshot):
        assert not job.adapted.training, "nothing is dropped out"
        assert all(torch.equal(job.adapted.get_parameter(name), weight) for name, weight in snapshot.lora.items())
        1 / 0  # noqa: B018
    assert same(weights(job), now) and job.adapted.training
    kept = Snapshot.from_state(snapshot.state())
    assert kept.key == snapshot.key != Snapshot.take(job.adapted, 3, 0.0).key


# --------------------------------------------------------------------------------------------------- resuming, and kills


STATE = {"lora.dropout": "0.1", "train.ema_decay": "0.5", "train.schedule": "constant"}
"""Options that add state to restore."""


@pytest.fixture(scope="module")
def whole(small: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An uninterrupted run with both objectives."""
    return run_to_end(small(**DPO, **SPIN, **STATE), tmp_path_factory.mktemp("whole") / "run")


def test_a_stop_while_samples_are_made_between_two_steps_takes_no_further_step(small, tmp_path, monkeypatch):
    stop, make = StopSignal(), OwnSamples._make

    def stopped(self: OwnSamples, index: int) -> None:
        make(self, index)
        if self.folder.name == "spin-iterate-000001":
            stop.number = 2

    monkeypatch.setattr(OwnSamples, "_make", stopped)
    assert run_to_end(small(**DPO, **SPIN, **STATE), tmp_path / "run", stop=stop).step == 1


def test_a_run_stopped_and_killed_while_it_makes_samples_makes_what_is_missing_and_ends_the_same(
    small, tmp_path, monkeypatch, whole
):
    """Across a stage of the curriculum and an iteration of SPIN."""
    folder, config, stop, made = tmp_path / "run", small(**DPO, **SPIN, **STATE), StopSignal(), []
    make = OwnSamples._make

    def stopped(self: OwnSamples, index: int) -> None:
        make(self, index)
        made.append((self.folder.name, index))
        if self.folder.name == "dpo-own":
            stop.number = 2

    def killed(self: OwnSamples, index: int) -> None:
        if (self.folder.name, index) == ("spin-iterate-000001", 1):
            raise KeyboardInterrupt
        make(self, index)
        made.append((self.folder.name, index))

    monkeypatch.setattr(OwnSamples, "_make", stopped)
    assert run_to_end(config, folder, stop=stop).step == 0
    assert made == [("dpo-held-out", 0), ("dpo-own", 0), ("spin-held-out", 0)], "what is under way is finished, no more"
    monkeypatch.setattr(OwnSamples, "_make", killed)
    with pytest.raises(KeyboardInterrupt):
        run_to_end(config, folder, resume=True)
    assert list_checkpoints(folder)[-1].name == "step-000001", "saved before what takes long"
    monkeypatch.setattr(OwnSamples, "_make", make)
    resumed = run_to_end(config, folder, resume=True)
    assert made[3:] == [("dpo-own", 1), *((f"spin-iterate-{k:06d}", i) for k, i in ((0, 0), (0, 1), (1, 0)))], "nothing twice"
    assert series(folder) == series(whole.folder) and same(weights(resumed.job), weights(whole.job))
    assert [p.name for p in sorted((folder / "samples").iterdir())] == [
        "dpo-held-out",
        "dpo-own",
        "spin-held-out",
        "spin-iterate-000001",
    ]
    dpo, spin = resumed.job.trainer.objectives.terms
    assert dpo.stage(0) < dpo.stage(1)
    assert spin.boundaries == [0, 1] and spin.started_from.step == 0 and spin.iterate.step == 1


@pytest.mark.parametrize("name", ["dpo", "spin"])
def test_an_objective_begins_where_nothing_is_preferred_and_is_measured_from_then_on(whole, name):
    lines = series(whole.folder)
    losses = [line[k] for line in lines if (k := f"objective/{name}") in line]
    assert len(losses) == 2 and losses[0] == pytest.approx(math.log(2), abs=1e-6)
    if name == "spin":  # model and iterate are one again, but for LoRA's dropout
        assert losses[1] == pytest.approx(math.log(2), abs=0.05)
    margins = {line["step"]: line[k] for line in lines if (k := f"objective/held_out_{name}_margin") in line}
    assert list(margins) == [0, 2] and margins[0] == 0 != margins[2]
    wins = [line[k] for line in lines if (k := f"objective/held_out_{name}_win_rate") in line]
    assert wins[0] == 0.5, "the model as it was is no better than itself"


def test_spin_may_begin_later_and_its_iterations_share_what_is_left(small):
    spin = Spin(small(**SPIN, **{"spin.start": 0.5, "train.steps": 11}))
    assert spin.boundaries == [6, 8] and not spin.begins(5) and spin.begins(6) and not spin.due(5) and spin.due(6)


def test_samples_that_are_lost_later_are_made_again_as_they_were(begun):
    job = begun("dpo")
    own = term(job)._own
    before = [own.latents(index) for index in range(2)]
    rewards = [own.rewards(index) for index in range(2)]
    assert not torch.equal(before[0][0], before[0][1]) and len({*rewards[0], *rewards[1]}) == 6, "each from its own noise"
    shutil.rmtree(own.folder)
    moved(job)
    job.adapted.train()
    assert all(torch.equal(own.latents(index), kept) for index, kept in enumerate(before))
    assert [own.rewards(index) for index in range(2)] == rewards


def test_samples_do_not_depend_on_how_many_processes_make_them(begun, tmp_path):
    job = begun("spin")
    snapshot = Snapshot.take(job.adapted, 0, 0.0)

    def samples(folder: str, context: Context = job.trainer.context) -> OwnSamples:
        how = Sampling(steps=1, guidance_scales=(1.0,), eta=1.0, seed=0)
        rated = ("psnr", REWARDS["psnr"])
        return OwnSamples(context, job.train, 3, tmp_path / folder, snapshot, how, sets=1, references=[0, 3], reward=rated)

    alone = samples("alone")
    assert alone.fill(stopped=lambda: False, what="") and len(alone) == 3
    whole = []
    for process in (1, 0):
        fake = SimpleNamespace(process_index=process, num_processes=2, is_main_process=False, wait_for_everyone=lambda: None)
        context = replace(job.trainer.context, accelerator=fake)
        whole.append(samples("shared", context).fill(stopped=lambda: False, what=""))
    assert whole == [False, True]
    shared = samples("shared")
    assert all(torch.equal(alone.latents(i), shared.latents(i)) for i in range(3))
    assert {alone.given(i)[1] for i in range(3)} == {0, 3}, "any of the views that may be given"


# ------------------------------------------------------------------------------------------------------- pairs and stages


def test_pairs_of_own_samples_are_ranked_by_their_reward_and_open_from_easy_to_hard(begun):
    job = begun("dpo")
    found = term(job)
    assert isinstance(found, OwnDpo)
    for index, winner, loser in found._pairs:
        rewards = found._own.rewards(index)
        assert rewards[winner] > rewards[loser]
    gaps = []
    for index, winner, loser in found._pairs:
        order = sorted(range(3), key=lambda sample, index=index: -found._own.rewards(index)[sample])
        gaps.append(order.index(loser) - order.index(winner))
    assert sorted(gaps) == [1, 1, 1, 1, 2, 2]
    assert [sorted(gaps[pair] for pair in opened) for opened in found._open] == [[2, 2], [1, 1, 1, 1, 2, 2]]
    assert [found.stage(step) for step in (0, 1, 2, 9)] == [0, 1, 1, 1]
    for step, expected in ((0, {2}), (1, {1, 2})):
        scene = scene_of(job, step)
        drawn = [found.turn(scene, 0, seeded(place)).sides for place in range(12)]
        known = {(i, w, x): gap for (i, w, x), gap in zip(found._pairs, gaps, strict=True)}
        sets = {(i, m): found._own.latents(i)[m] for i in range(2) for m in range(3)}
        where = [[next(k for k, z in sets.items() if torch.equal(z, side[0])) for side in sides] for sides in drawn]
        assert {known[winner[0], winner[1], loser[1]] for winner, loser in where} == expected


def test_near_ties_are_left_out_and_nothing_but_ties_is_refused(begun, monkeypatch):
    found = term(begun("dpo"))
    pairs = found._pairs
    gaps = sorted(found._own.rewards(index)[winner] - found._own.rewards(index)[loser] for index, winner, loser in pairs)
    for min_gap, left in ((gaps[2], 3), (50, 0)):
        monkeypatch.setattr(found, "options", replace(found.options, min_gap=min_gap))
        if left:
            found._rank(found._own)
            assert len(found._pairs) == left
        else:
            with pytest.raises(RunError, match=r"dpo\.min_gap: is 50; no two own sample sets .* differ by .* at most"):
                found._rank(found._own)
    monkeypatch.undo()
    found._rank(found._own)
    assert found._pairs == pairs


def test_a_list_of_pairs_of_another_machine_finds_its_samples_beside_it(make_job, mice, pairs, tmp_path):
    shutil.copytree(mice / "train", tmp_path / "train")
    rows = rows_of(pairs)
    for row in rows:
        row |= {name: f"/elsewhere/train/{Path(row[name]).name}" for name in ("input", "winner", "loser")}
    job = make_job(**{"dpo.weight": 1, "dpo.pairs": write_rows(tmp_path / "pairs.jsonl", *rows)})
    assert any("absolute paths are another machine's" in note for note in job.notes)


def test_a_list_of_pairs_trains_and_is_measured(make_job, pairs):
    options = {
        "dpo.weight": 1,
        "dpo.pairs": pairs,
        "dpo.held_out_pairs": pairs,
        "dpo.chunks": 3,
        "dpo.chunk_by": "equal_count",
        "dpo.min_gap": 0.25,
        "train.steps": 3,
    }
    job = make_job(**options)
    found = term(job)
    assert isinstance(found, ListedDpo) and found._open == [[1], [1, 2], [0, 1, 2]] and not found.begins(0)
    result = training_step(job.trainer, 2)
    assert not result.skipped and result.objectives["dpo"] > 0
    with torch.no_grad():
        measured = found.evaluate(job.trainer.context, 0.0, None)
    assert set(measured) == {"held_out_dpo_accuracy", "held_out_dpo_margin"} and measured["held_out_dpo_margin"] != 0
    contest = found.contest(job.trainer.context, 1, seeded(0))
    loser = job.train.get(job.train.names.index(Path(rows_of(pairs)[1]["loser"]).name), seeded(0))
    assert torch.equal(contest.sides[1][0], loser.mean) and torch.equal(contest.encoded.mean, contest.sides[0][0])


def test_a_list_that_is_neither_trained_on_nor_measured_is_refused(make_job, pairs):
    with pytest.raises(InputError, match=r"monitor\.objectives: has dpo, and dpo\.pairs is a list; expected dpo\.held"):
        make_job(**{"dpo.pairs": pairs, "monitor.objectives": "[dpo]"})


def test_a_curriculum_that_the_run_is_too_short_for_is_said(make_job):
    stages = {**DPO, "dpo.chunks": 2, "train.steps": 4}
    said = [" ".join(make_job(**stages, **{"dpo.chunk_steps": steps}).notes) for steps in (4, 3, "null")]
    assert "WARNING    dpo.chunk_steps: is 4; the run's 4 steps come to stage 1 of 2" in said[0]
    assert not any("dpo.chunk_steps" in other for other in said[1:])


def test_a_run_does_not_go_on_with_other_pairs(make_job, tmp_path, pairs):
    first, *others = rows_of(pairs)
    path = write_rows(pairs.with_name("changed.jsonl"), first, *others)
    states = [term(make_job(**{"dpo.weight": 1, "dpo.pairs": p})) for p in (pairs, path)]
    states[1].load_state(states[0].state())
    write_rows(path, *others, first)
    changed = term(make_job(**{"dpo.weight": 1, "dpo.pairs": path}))
    with pytest.raises(InputError, match=r"dpo\.pairs: .*changed\.jsonl has other pairs than when the run began"):
        changed.load_state(states[0].state())


def test_a_table_of_pairs_is_read_as_a_list_is(pairs):
    rows = rows_of(pairs)
    table = pairs.with_suffix(".csv")
    table.write_text("\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]) + "\n")
    one, other = (read_pairs(path, size=64, num_views=6, option="dpo.pairs") for path in (pairs, table))
    assert one.pairs == other.pairs and one.samples.locations == other.samples.locations


# ------------------------------------------------------------------------------------------------------------ measuring


def test_what_is_only_measured_changes_nothing(make_job, tmp_path):
    measured, plain = make_job(**{**DPO, **SPIN, **MEASURED}), make_job()
    objectives, context = measured.trainer.objectives, measured.trainer.context
    assert len(objectives.begins(0)) == 2
    for one in objectives.begins(0):
        one.begin(context, tmp_path, 0, 0.0, lambda: False)
    results = [training_step(job.trainer, 0) for job in (measured, plain)]
    assert results[0] == results[1] and not results[0].objectives and same(weights(measured), weights(plain))
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["dpo-held-out", "spin-held-out"]
    found = objectives.evaluate(context, 0.0, None)
    names = [f"objective/held_out_{o}_{s}" for o in ("dpo", "spin") for s in ("accuracy", "margin", "reward", "win_rate")]
    assert sorted(found) == sorted(names) and not objectives.begins(1)
    assert same(weights(measured), weights(plain)), "what was sampled with other weights has put these back"


def test_a_dry_run_makes_no_samples(make_job, tmp_path):
    job = make_job(**DPO, **SPIN)
    said = [note for note in job.notes if note.startswith(("dpo ", "spin "))]
    assert said[0].startswith("dpo        own samples, 3 of each of 2 objects at step 0, and of 1 held out: 9 passes of")
    assert "in each of 2 rounds, the first at step 0" in said[1]
    assert all(one.rehearse(job.trainer.context) for one in job.trainer.objectives.terms)
    result = training_step(job.trainer, 0)
    assert result.objectives["dpo"] == result.objectives["spin"] == pytest.approx(math.log(2), rel=1e-6)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("group", "options", "message"),
    [
        (DpoConfig, {"chunks": 4, "samples": 4}, r"dpo\.chunks: is 4; expected 3 at most: 4 samples"),
        (DpoConfig, {"samples": 1}, r"dpo\.samples: is 1; expected 2 or more"),
        (
            DpoConfig,
            {"guidance_scales": [1.0, 0.5]},
            r"dpo\.guidance_scales: is \[1\.0, 0\.5\]; expected one number of 1 or more",
        ),
        (DpoConfig, {"guidance_scales": []}, r"dpo\.guidance_scales: is \[\]; expected one number"),
        (DpoConfig, {"beta": 0.0}, r"dpo\.beta: is 0\.0; expected a positive number"),
        (DpoConfig, {"reward": "beauty"}, r"dpo\.reward: is beauty; expected psnr, .*, or module:function"),
        (DpoConfig, {"reward": "clip"}, r"dpo\.encoder: is null; expected the folder of a CLIP vision model"),
        (
            DpoConfig,
            {"held_out_pairs": "a.jsonl"},
            r"dpo\.held_out_pairs: is a\.jsonl; expected null where dpo\.pairs is `own`",
        ),
        (SpinConfig, {"held_out_objects": 0}, r"spin\.held_out_objects: is 0; expected 1 or more"),
        (SpinConfig, {"iterations": 0}, r"spin\.iterations: is 0; expected 1 or more"),
    ],
)
def test_options_that_make_no_sense_are_refused(group, options, message):
    with pytest.raises(InputError, match=message):
        group(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spin.start": 1}, r"spin\.start: is 1\.0; expected a time before the end of the run"),
        ({"spin.iterations": 5}, r"spin\.iterations: is 5; expected 2 at most: each iteration takes at least one step"),
        ({"spin.start": 1.5, "curriculum.unit": "step", "curriculum.at": "[0, 2]"}, r"spin\.start: is 1\.5; .* whole number"),
    ],
)
def test_iterations_that_do_not_fit_the_run_are_refused(small, options, message):
    with pytest.raises(InputError, match=message):
        small(**{**SPIN, **options})


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"input": "a", "loser": "b"}], r"line 1: has no winner; .*: a pair that does not say which is better"),
        ([{"input": "a", "winner": "", "loser": "b"}], r"line 1: has no winner"),
        ([{"winner": "a", "loser": "b"}], r"line 1: has no input; expected input, winner, loser"),
        ([{"input": "a", "winner": "b", "loser": "./b"}], r"line 1: winner and loser are both b; expected two"),
        ([{"input": "a", "winner": 3, "loser": "b"}], r"line 1: winner: is 3; expected a sample folder"),
        ([{"input": "a", "winner": "b", "loser": "c", "better": 1}], r"line 1: has better; expected input, .* alone"),
        ([{"input": "a", "winner": "b", "loser": "c", "gap": -1}], r"line 1: gap: is -1; expected .* a positive number"),
        (
            ["GOOD", {"input": "FIRST", "winner": "FIRST", "loser": "nowhere"}],
            r"line 2: 'nowhere' \(No such file or directory\): no such sample folder",
        ),
        (
            [{"input": "/x/half", "winner": "/x/half", "loser": "/x/whole"}],
            r"pairs\.jsonl: none of its absolute paths is here, .*beside the list are 1 of its 2 folders",
        ),
        (["GOOD", {"input": "FIRST", "winner": "FIRST", "loser": "half"}], r"half: cam_003\.png, .* missing"),
        (['{"input": "a", "winner": "b", "winner": "c", "loser": "d"}'], r"line 1: is no JSON \(a name is given twice\)"),
        (["not JSON"], r"line 1: is no JSON \(.*\); expected one object a line"),
        (["[1]"], r"line 1: holds a JSON list; expected an object"),
        ([], r"pairs\.jsonl: lists no pair; expected lines with input, winner, loser"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused_by_its_line(tmp_path, mice, lines, message):
    first, second = sorted(p for p in (mice / "train").iterdir() if p.is_dir())[:2]
    good = {"input": str(first), "winner": str(first), "loser": str(second)}
    (tmp_path / "half").mkdir()
    for view in range(3):
        shutil.copy(first / f"cam_{view:03d}.png", tmp_path / "half")
    written = []
    for line in lines:
        row = good if line == "GOOD" else line
        if isinstance(row, dict):
            row = json.dumps({k: str(first) if v == "FIRST" else v for k, v in row.items()})
        written.append(row)
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(f"{line}\n" for line in written))
    with pytest.raises(InputError, match=rf"dpo\.pairs: .*{message}") as raised:
        read_pairs(path, size=64, num_views=6, option="dpo.pairs")
    assert str(raised.value).count(str(path)) == 1, "the list is named once"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("pairs.txt", "a,b", r"dpo\.pairs: is .*pairs\.txt; expected `own`, or a list of pairs: a \.jsonl or a \.csv file"),
        ("pairs.csv", "input,better,worse\na,b,c\n", r"its first line names input, better, worse; expected input, winner"),
        ("pairs.csv", "input,winner,loser\na,b,c,d,e\n", r"line 2: has 2 values more than the first line has names"),
        ("pairs.csv", "input, winner, loser\na, b, b\n", r"line 2: winner and loser are both b; expected two"),
        ("pairs.jsonl", None, r"pairs\.jsonl: no such file.*; expected a list of pairs"),
    ],
)
def test_a_file_that_is_no_list_of_pairs_is_refused(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_pairs(tmp_path / name, size=64, num_views=6, option="dpo.pairs")


def test_a_curriculum_over_a_list_needs_to_know_which_pairs_are_easy(make_job, tmp_path, pairs):
    rows = rows_of(pairs)
    del rows[1]["gap"]
    path = write_rows(pairs.with_name("two_gaps.jsonl"), *rows)
    with pytest.raises(InputError, match=r"dpo\.pairs: 1 of 3 pairs have no gap; expected one for each, since a curriculum"):
        make_job(**{"dpo.weight": 1, "dpo.pairs": path, "dpo.chunks": 2})
    with pytest.raises(InputError, match=r"dpo\.min_gap: is 9; no pair of .*pairs\.jsonl is further apart"):
        make_job(**{"dpo.weight": 1, "dpo.pairs": pairs, "dpo.min_gap": 9})


def test_more_chunks_than_different_gaps_are_refused(make_job, pairs):
    with pytest.raises(InputError, match=r"dpo\.chunks: is 4; the pairs of .* have 3 different gaps; expected as many"):
        make_job(**{"dpo.weight": 1, "dpo.pairs": pairs, "dpo.chunks": 4, "train.steps": 4})


def test_what_a_list_may_not_have_meant_is_said(make_job, pairs):
    first, second, _ = rows_of(pairs)
    opposite = first | {"winner": first["loser"], "loser": first["winner"]}
    path = write_rows(pairs.with_name("doubtful.jsonl"), first, first, opposite, second)
    notes = make_job(**{"dpo.weight": 1, "dpo.pairs": path, "dpo.held_out_pairs": pairs}).notes
    assert [note for note in notes if note.startswith("WARNING    dpo.pairs")] == [
        "WARNING    dpo.pairs: 1 of 4 are there more than once",
        "WARNING    dpo.pairs: 2 of 4 say the opposite of another",
        "WARNING    dpo.pairs: 2 of 4 are in dpo.held_out_pairs too, which then measures what was learned by heart",
    ]


def two(views: Tensor, truth: Tensor) -> Tensor:
    """A reward that takes too few arguments."""
    return (views - truth).mean(dim=(1, 2, 3, 4))


def nothing(views: Tensor, truth: Tensor, masks: Tensor) -> Tensor:
    """A reward that is not a number."""
    return math.nan * views.mean(dim=(1, 2, 3, 4))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (f"{__name__}:two", r"dpo\.reward: .*:two failed.*TypeError: two\(\) takes 2 positional arguments but 3 were given"),
        (f"{__name__}:nothing", r"dpo\.reward: .*:nothing of .*: is tensor\(\[nan\]\); expected one finite number"),
    ],
)
def test_a_reward_is_tried_before_sets_are_made(make_job, reward, message):
    with pytest.raises(InputError, match=message):
        make_job(**{**DPO, "dpo.reward": reward})


def test_what_is_likely_not_meant_is_said(make_job):
    notes = make_job(**{**DPO, "dpo.weight": 0, "spin.weight": 5, "spin.iterations": 1, "spin.objects": 1}).notes
    said = " ".join(notes)
    assert (
        "WARNING    dpo.samples, dpo.sample_steps, dpo.guidance_scales, dpo.objects, dpo.held_out_objects, dpo.chunks: has no"
        in said
    )
    assert "spin.weight 5: a pair pulls 2500 times as hard as the denoising loss (weight x beta / 4); begin with 0.002" in said


@pytest.mark.parametrize("option", ["draft.steps", "dpo.sample_steps", "spin.sample_steps"])
def test_more_sampling_steps_than_the_schedule_has_are_refused(make_job, option):
    objective = option.partition(".")[0]
    with pytest.raises(InputError, match=rf"{option}: is 1001; the model has 1000 timesteps, expected so many at most"):
        make_job(**{f"{objective}.weight": 1, "train.steps": 4, option: 1001})


def test_a_reward_that_gives_no_number_is_refused_in_words(begun, monkeypatch):
    own = term(begun("dpo"))._own
    wrong: list[tuple[Any, str]] = [
        (lambda v, t, m: v.mean(), r"is tensor\(0\.\d+\); expected one finite"),
        (lambda v, t, m: torch.full((1,), math.nan), r"is tensor\(\[nan\]\); expected"),
        (lambda v, t, m: torch.ones(2), r"is shape \[2\]"),
        (lambda v, t, m: [1.0], r"is \[1\.0\]"),
    ]
    for reward, message in wrong:
        monkeypatch.setattr(own, "_reward", reward)
        with pytest.raises(InputError, match=rf"dpo\.reward: psnr of .*: {message}"):
            own.draw(0, 0, own.snapshot.prompt)
