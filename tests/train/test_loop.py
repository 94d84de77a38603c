"""The training loop: exact resuming, the same numbers from any source and any split of the batch, and what it refuses."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from softprompt.data.batch import seeded
from softprompt.data.samples import write_source
from softprompt.errors import InputError, RunError
from softprompt.micro.world import MicroWorld
from softprompt.model.adapted import AdaptedModel
from softprompt.prompt.soft_prompt import point_on_path
from tests.models import PICTURE
from tests.runs import run_to_end, same, series, weights
from train import callbacks, loop
from train.batches import object_at
from train.evaluation.evaluator import Evaluator
from train.export import write
from train.loop import train
from train.options.command_line import parse
from train.options.config import Config
from train.setup import prepare
from train.state.folder import list_checkpoints
from train.state.stop import StopSignal
from train.step import training_step

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def small(small_config: Callable[..., Config], mice: Path) -> Callable[..., Config]:
    """`small("--train.steps=2", ...)`: the smallest run on a few mice."""
    return lambda *options: small_config(mice, **dict(option.removeprefix("--").split("=", 1) for option in options))


# ------------------------------------------------------------------------------------------------------------ resuming


def test_a_run_stopped_and_resumed_equals_one_that_was_not(small, tmp_path, stop_after):
    config = small("--train.ema_decay=0.9", "--lora.dropout=0.1", "--kl.every=2", "--train.steps=6")
    whole = run_to_end(config, tmp_path / "whole")
    stopped = run_to_end(config, tmp_path / "parts", stop=stop_after(3))
    assert stopped.step == 3
    resumed = run_to_end(config, tmp_path / "parts", resume=True)
    assert resumed.step == whole.step == 6
    assert series(tmp_path / "parts") == series(tmp_path / "whole")
    assert same(weights(resumed.job), weights(whole.job))
    exports = [torch.load(tmp_path / r / "export" / "clr_embeds.pt", weights_only=True) for r in ("parts", "whole")]
    assert torch.equal(*exports)
    assert resumed.best == whole.best and resumed.first == whole.first


def test_a_finished_run_resumed_only_exports_again(small, tmp_path):
    config = small()
    before = run_to_end(config, tmp_path / "run")
    lines = series(tmp_path / "run")
    after = run_to_end(config, tmp_path / "run", resume=True)
    assert after.step == before.step and after.last == before.last and series(tmp_path / "run") == lines
    assert after.exported is not None and after.exported.read_back <= config.export.tolerance


@pytest.mark.usefixtures("without_exports")
def test_more_steps_can_be_asked_for_when_a_run_is_resumed(small, tmp_path):
    run_to_end(small(), tmp_path / "run")
    longer = run_to_end(small("--train.steps=6"), tmp_path / "run", resume=True)
    assert longer.step == 6 and longer.last is not None and longer.last["step"] == 6


@pytest.mark.usefixtures("without_exports")
def test_the_newest_checkpoints_and_that_of_the_best_validation_are_kept(small, tmp_path):
    run = run_to_end(small("--monitor.checkpoint_every=1", "--monitor.checkpoints_kept=1"), tmp_path / "run")
    assert run.best is not None and run.best["step"] > 0
    best = f"step-{run.best['step']:06.0f}"
    assert [c.name for c in list_checkpoints(tmp_path / "run")] == sorted({best, "step-000004"})


# ------------------------------------------------------------------------------------------------------- same numbers


@pytest.mark.usefixtures("without_exports")
@pytest.mark.slow
def test_the_micro_world_as_png_folders_gives_the_same_losses(small, tmp_path, monkeypatch):
    monkeypatch.setattr("train.setup.MICRO_HELD_OUT_OBJECTS", 4)
    size, counts = PICTURE, {"train": (0, 8), "val": (10_000, 4)}
    lists = {name: write_source(MicroWorld("mice", *c, size=size), tmp_path / name) for name, c in counts.items()}
    options = [
        "--data.background=three_choices",
        f"--data.original={lists['val']}",
        "--data.limit=8",
        "--train.steps=3",
        "--monitor.validate_every=3",
        "--kl.domain=original",
    ]
    world = ["--data.train=micro", "--data.val=micro"]
    run_to_end(small(*world, *options), tmp_path / "world")
    run_to_end(small(f"--data.train={lists['train']}", f"--data.val={lists['val']}", *options), tmp_path / "folders")
    assert series(tmp_path / "folders") == series(tmp_path / "world")


def test_accumulated_batches_equal_one_large_batch(small, mice):
    results = []
    shared = ["--kl.every=1", "--kl.domain=both", f"--data.original={mice / 'val'}", "--prompt.separation=1"]
    for options in (["--train.batch_size=4"], ["--train.batch_size=2", "--train.accumulation=2"]):
        job = prepare(small(*shared, *options))
        steps = [training_step(job.trainer, step) for step in range(3)]
        results.append((steps, weights(job)))
    (large, large_weights), (small, small_weights) = results
    for a, b in zip(large, small, strict=True):
        assert b.denoising == pytest.approx(a.denoising, rel=1e-5) and b.kl == pytest.approx(a.kl, rel=1e-3, abs=1e-9)
    for name, tensor in large_weights.items():
        assert torch.allclose(tensor, small_weights[name], atol=1e-3), name


@pytest.mark.usefixtures("without_exports")
def test_a_step_that_runs_out_of_memory_is_done_again_with_less(small, tmp_path, monkeypatch, capsys):
    forward = AdaptedModel.forward

    def needs_checkpointing_at_step_2(self, *inputs):
        if inputs[-1] > 0.5 and not self.unet.is_gradient_checkpointing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *inputs)

    monkeypatch.setattr(AdaptedModel, "forward", needs_checkpointing_at_step_2)
    halfway = ["--curriculum.at=[0, 1]", "--monitor.validate_every=4"]
    run_to_end(small(*halfway), tmp_path / "short_of_memory")
    assert capsys.readouterr().err.count("out of GPU memory; repeated with gradient checkpointing") == 1
    monkeypatch.undo()
    run_to_end(small(*halfway), tmp_path / "enough")
    for ours, theirs in zip(series(tmp_path / "short_of_memory"), series(tmp_path / "enough"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)
    monkeypatch.setattr(AdaptedModel, "forward", needs_checkpointing_at_step_2)
    with pytest.raises(torch.OutOfMemoryError):
        run_to_end(small(*halfway, "--train.gradient_checkpointing=never"), tmp_path / "never")


def test_runs_on_several_threads_are_equal_bit_for_bit(small):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runs = []
        for _ in range(3):
            job = prepare(small("--train.batch_size=4"))
            runs.append(([training_step(job.trainer, step).denoising for step in range(4)], weights(job)))
    finally:
        torch.set_num_threads(threads)
    assert all(same(run, runs[0]) for run in runs)


def test_every_object_comes_once_an_epoch_in_an_order_of_the_seed():
    epochs = [[object_at(place, 7, 0) for place in range(start, start + 7)] for start in (0, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert epochs[0] != [object_at(place, 7, 1) for place in range(7)]


# -------------------------------------------------------------------------------------------------------- what it does


def test_the_kl_is_measured_on_every_nth_step_with_its_weight_scaled(small):
    job = prepare(small("--kl.every=2"))
    results = [training_step(job.trainer, step) for step in range(4)]
    assert [r.kl is None for r in results] == [False, True, False, True]
    assert results[0].kl == 0, "nothing has moved before the first step"
    assert results[2].kl is not None and results[2].kl > 0


def test_the_kl_holds_the_model_near_the_pretrained_one(small):
    def kl_at_the_end(weight: float) -> float:
        job = prepare(small(f"--kl.weight={weight}", "--kl.every=1", "--kl.weighting=uniform", "--train.batch_size=2"))
        kl = [training_step(job.trainer, step).kl for step in range(12)][-1]
        assert kl is not None
        return kl

    assert kl_at_the_end(100.0) < 0.5 * kl_at_the_end(1e-9)


@pytest.mark.usefixtures("without_exports")
def test_a_frozen_prompt_stays_on_its_path(small, tmp_path):
    config = small("--prompt.learn=false", "--curriculum.easing=step", "--curriculum.at=[0, 0.5]")
    run = run_to_end(config, tmp_path / "run")
    prompt = run.job.adapted.prompt
    assert list(run.job.adapted.trainable()) == ["lora"]
    assert torch.equal(prompt(run.position), prompt.waypoints[1])
    positions = [line["curriculum/position"] for line in series(tmp_path / "run") if "curriculum/position" in line]
    assert positions == [0, 1, 1, 1]
    curriculum = run.job.trainer.curriculum
    assert [curriculum.position(curriculum.start(), step) for step in (1, 2)] == [0, 1]


def test_the_prompt_alone_trains_where_the_lora_has_rank_0(small, tmp_path):
    run = run_to_end(small("--lora.rank=0"), tmp_path / "run")
    assert list(run.job.adapted.trainable()) == ["prompt"]
    assert not (tmp_path / "run" / "export" / "lora").exists()


def test_the_norm_band_holds_after_every_step(small):
    job = prepare(small("--prompt.norm_band=0.01", "--prompt.learning_rate=1.0"))
    for step in range(2):
        training_step(job.trainer, step)
    prompt, position = job.adapted.prompt, job.trainer.curriculum.position(job.trainer.curriculum.start(), 1)
    path = point_on_path(prompt.waypoints, position)
    assert position > 0 and not torch.equal(path, prompt.start)
    share = prompt(position).norm(dim=-1) / path.norm(dim=-1)
    assert share.min() >= 0.99 - 1e-5 and share.max() <= 1.01 + 1e-5
    assert not torch.equal(prompt.learned, prompt.start)


def test_the_decay_pulls_the_prompt_toward_its_start_not_toward_zero(small):
    def drift(decay: float) -> float:
        job = prepare(small(f"--prompt.decay={decay}", "--prompt.learning_rate=0.5"))
        for step in range(3):
            training_step(job.trainer, step)
        return float((job.adapted.prompt.learned - job.adapted.prompt.start).norm())

    assert 0 < drift(1.0) < 0.8 * drift(0.0)


def test_a_half_precision_run_trains_in_float32_and_reads_back_exactly(small, tmp_path):
    run = run_to_end(small("--train.precision=bf16", "--export.pipeline=true", "--lora.learning_rate=0.01"), tmp_path / "run")
    assert run.job.pipeline.unet.conv_in.weight.dtype == torch.bfloat16
    assert {p.dtype for group in run.job.adapted.trainable().values() for p in group.values()} == {torch.float32}
    assert run.exported is not None and run.exported.read_back <= 1e-4
    lora = load_file(tmp_path / "run" / "export" / "lora" / "pytorch_lora_weights.safetensors")
    assert {weight.dtype for weight in lora.values()} == {torch.float32}


@pytest.mark.parametrize("reference", ["random", "[1,4]", "3"])
def test_other_reference_views_train_and_preview(small, tmp_path, reference):
    run = run_to_end(small(f"--data.reference_view={reference}", "--loss.own_view=false", "--train.steps=2"), tmp_path / "r")
    assert run.step == 2 and (tmp_path / "r" / "previews" / "held_out-step-000002.png").is_file()


def test_the_run_folder_is_what_the_readme_says(small, tmp_path):
    run = run_to_end(small("--model=micro", "--export.pipeline=true"), tmp_path / "run")
    made = {p.relative_to(tmp_path / "run").as_posix() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    for expected in (
        "metrics.jsonl",
        "previews/held_out-step-000000.png",
        "previews/held_out-step-000004.png",
        "checkpoints/step-000004/state.pt",
        "export/clr_embeds.pt",
        "export/clr_embeds.json",
        "export/clr_embeds.safetensors",
        "export/lora/pytorch_lora_weights.safetensors",
        "export/pipeckpts/unet/config.json",
    ):
        assert expected in made
    assert any(name.startswith("tensorboard/events") for name in made)
    assert not [name for name in made if re.search(r"partial|\.new", name)]
    assert run.merged is not None and run.merged <= 1e-4
    described = json.loads((tmp_path / "run" / "export" / "clr_embeds.json").read_text())
    assert described["licence"] == "Apache-2.0", "the embedded model is not derived from FaceLift's weights"
    assert described["waypoints"][1]["texts"][0] == "a photograph of a mouse, front view, from above at an angle."


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_a_scaler_that_leaves_out_every_step_ends_the_run(small, tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", property(lambda self: True))
    with pytest.raises(RunError, match=r"step 2: not finite in 3 steps in a row.*gradients overflowed in fp16.*fp16 overflows"):
        run_to_end(small("--train.ema_decay=0.5", "--train.max_skipped=3"), tmp_path / "run")


@pytest.mark.usefixtures("without_exports")
def test_a_step_is_in_a_checkpoint_before_it_is_evaluated(small, tmp_path, monkeypatch):
    config = small("--train.steps=6", "--curriculum.at=[0, 1]")
    whole = run_to_end(config, tmp_path / "whole")
    evaluate = Evaluator.validation

    def fails_at_step_4(evaluator: Evaluator, position: float, **options: bool) -> dict[str, float]:
        curriculum = whole.job.trainer.curriculum
        if position == curriculum.position(curriculum.start(), 4):
            raise torch.OutOfMemoryError("no memory")
        return evaluate(evaluator, position, **options)

    monkeypatch.setattr(Evaluator, "validation", fails_at_step_4)
    with pytest.raises(torch.OutOfMemoryError):
        run_to_end(config, tmp_path / "parts")
    assert list_checkpoints(tmp_path / "parts")[-1].name == "step-000004"
    monkeypatch.setattr(Evaluator, "validation", evaluate)
    resumed = run_to_end(config, tmp_path / "parts", resume=True)
    assert series(tmp_path / "parts") == series(tmp_path / "whole")
    assert resumed.best == whole.best


def test_a_best_export_that_fails_does_not_end_the_run(small, tmp_path, monkeypatch, capsys):
    def fails_in_best(pipeline, prompt, folder, *, export=write.export, **options):
        if folder.name == "best":
            raise RunError("read back differs")
        return export(pipeline, prompt, folder, **options)

    monkeypatch.setattr(write, "export", fails_in_best)
    run = run_to_end(small("--lora.learning_rate=0.01", "--monitor.validate_every=1"), tmp_path / "run")
    assert run.step == 4 and (tmp_path / "run" / "export" / "clr_embeds.pt").is_file()
    assert run.best is not None and run.best["step"] == 0, "what is not exported is not called the best"
    assert "WARNING: read back differs" in capsys.readouterr().err


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_numbers_that_are_not_finite_do_not_reach_the_weights(small, broken):
    job = prepare(small())
    before = weights(job)
    prompt = job.adapted.prompt
    if broken == "loss":
        job.adapted.unet.conv_out.bias.data.fill_(float("nan"))
    else:
        prompt.learned.register_hook(lambda gradient: gradient * float("inf"))
    result = training_step(job.trainer, 0)
    assert result.skipped and result.not_finite is not None and result.not_finite.startswith("denoising loss ")
    assert same(weights(job), before)


# ---------------------------------------------------------------------------------------------------- signs, and collapse


@pytest.mark.usefixtures("without_exports")
def test_a_learning_rate_too_low_to_move_anything_is_named(small, tmp_path, capsys):
    run = run_to_end(small("--lora.learning_rate=1e-12"), tmp_path / "run")
    assert "lora_stands_still" in run.diagnostics and "prompt_stands_still" not in run.diagnostics
    assert "WARNING step 2: lora_stands_still" in capsys.readouterr().err
    assert [line["watch/lora_stands_still"] for line in series(tmp_path / "run") if "watch/lora_stands_still" in line] == [
        0,
        1,
        1,
    ]


@pytest.mark.usefixtures("without_exports")
def test_a_prompt_that_does_nothing_is_named_and_one_that_learns_is_not(small, tmp_path):
    idle = run_to_end(small("--prompt.learning_rate=1e-7"), tmp_path / "idle")
    assert "prompt_without_effect" in idle.diagnostics
    learning = run_to_end(small(), tmp_path / "learning")
    assert "prompt_without_effect" not in learning.diagnostics
    assert series(tmp_path / "learning")[-1]["prompt_effect/of_learned"] > 0.01


@pytest.mark.usefixtures("without_exports")
def test_training_that_makes_it_worse_is_named(small, tmp_path, capsys):
    options = ["--model=micro", "--lora.learning_rate=0.5", "--train.schedule=constant", "--monitor.validate_every=1"]
    run = run_to_end(small(*options), tmp_path / "run")
    assert "worse_than_start" in run.diagnostics and run.worse == 4
    assert "WARNING step 3: worse_than_start: the last 3 validations were worse" in capsys.readouterr().err


def test_a_frozen_weight_that_moves_stops_the_run(small, tmp_path, monkeypatch):
    def training_step_that_moves_it(trainer, step, state, *, training_step=loop.training_step):
        if step == 1:
            trainer.context.pipeline.unet.conv_in.weight.data[0, 0, 0, 0] += 1e-3
        return training_step(trainer, step, state)

    monkeypatch.setattr(loop, "training_step", training_step_that_moves_it)
    with pytest.raises(RunError, match=r"step 2: 1 frozen tensors changed since the start, e\.g\. unet\.conv_in\.weight"):
        run_to_end(small(), tmp_path / "run")


@pytest.mark.usefixtures("without_exports")
def test_a_checkpoint_that_is_asked_for_is_saved_and_the_run_goes_on(small, tmp_path):
    stop = StopSignal()
    stop.save = True
    run = run_to_end(small("--monitor.checkpoint_every=4", "--monitor.checkpoints_kept=9"), tmp_path / "run", stop=stop)
    assert run.step == 4
    assert [c.name for c in list_checkpoints(tmp_path / "run")] == ["step-000001", "step-000004"]


# -------------------------------------------------------------------------------------------------------- another start


def test_a_run_starts_from_what_another_exported_at_step_0(small, tmp_path):
    first = run_to_end(small("--lora.learning_rate=0.01"), tmp_path / "first")
    export = tmp_path / "first" / "export"
    job = prepare(small(f"--init_from={export}", "--curriculum.at=[0]", "--curriculum.position=[1]"))
    assert torch.allclose(job.adapted.prompt(1.0), first.job.adapted.prompt(1.0), atol=1e-6)
    lora = first.job.adapted.trainable()["lora"]
    assert all(torch.equal(p, lora[name]) for name, p in job.adapted.trainable()["lora"].items())
    run = train(job, tmp_path / "second", state=None, stop=StopSignal())
    assert run.first is not None and first.last is not None
    assert run.first["loss/validation"] == pytest.approx(first.last["loss/validation"], rel=1e-5)
    assert run.shown.pretrained is not None and torch.equal(run.shown.pretrained, first.shown.pretrained)


@pytest.mark.parametrize(
    ("options", "where", "message"),
    [
        ([], "run", r"init_from: .*run holds no clr_embeds.*did you mean .*run/export\?"),
        ([], "nowhere", r"init_from: .*nowhere holds no clr_embeds\.safetensors"),
        (["--lora.rank=0"], "run/export", r"init_from: .* holds a LoRA; lora\.rank is 0"),
        (["--lora.rank=3"], "run/export", r"is not this configuration's LoRA: .*lora\.rank"),
    ],
)
def test_what_a_run_cannot_start_from_is_refused(small, exported_run, options, where, message):
    with pytest.raises(InputError, match=message):
        prepare(small(f"--init_from={exported_run / where}", *options))


@pytest.fixture(scope="module")
def exported_run(small_config, mice, tmp_path_factory):
    """A folder with a finished run in `run`."""
    folder = tmp_path_factory.mktemp("exported")
    run_to_end(small_config(mice, **{"train.steps": 1}), folder / "run")
    return folder


# ---------------------------------------------------------------------------------------------------------- bad samples


@pytest.fixture
def spoilt(mice, tmp_path):
    """The mice, one picture of the second cut short."""
    shutil.copytree(mice, tmp_path / "mice")
    picture = sorted((tmp_path / "mice" / "train").glob("*/cam_002.png"))[1]
    picture.write_bytes(picture.read_bytes()[:100])
    return tmp_path / "mice"


@pytest.mark.parametrize("cache", ["null", "cache"])
def test_a_bad_sample_is_left_out_by_name_where_that_is_asked_for(small, spoilt, tmp_path, cache):
    options = [f"--data.train={spoilt / 'train'}", f"--data.cache={cache if cache == 'null' else tmp_path / cache}"]
    with pytest.raises(InputError, match=r"cam_002\.png: cannot be decoded"):
        prepare(small(*options))
    asked = small(*options, "--data.on_bad_sample=skip", "--data.bad_share=0.25")
    run = run_to_end(asked, tmp_path / "run")
    names = [f.name for f in sorted((spoilt / "train").iterdir()) if f.is_dir()]
    assert run.job.train.names == [names[0], *names[2:]]
    (line,) = (tmp_path / "run" / "skipped_samples.txt").read_text().splitlines()
    assert line.startswith(f"{names[1]}: ") and "cam_002.png: cannot be decoded" in line
    assert any("1 samples cannot be used and are left out" in note for note in run.job.notes)
    views = [run.job.train.get(i, seeded("x")).mean for i in range(3)]
    whole = prepare(small(f"--data.train={spoilt / 'train' / names[2]}", "--data.cache=null")).train.get(0, seeded("x")).mean
    assert torch.equal(views[1], whole), "each name goes with its own pictures"


def test_too_many_bad_samples_stop_the_run(small, spoilt):
    with pytest.raises(InputError, match=r"data\.on_bad_sample: 1 of 4 samples cannot be used, more than data\.bad_share"):
        prepare(small(f"--data.train={spoilt / 'train'}", "--data.on_bad_sample=skip", "--data.cache=null"))


@pytest.mark.usefixtures("without_exports")
def test_a_sign_of_collapse_is_said_once_and_when_it_is_gone(small, tmp_path, monkeypatch, capsys):
    found = iter([{"views_alike": "too early"}, {"views_alike": "they collapse"}, {"views_alike": "still"}, {}])
    monkeypatch.setattr(callbacks, "collapse_signs", lambda series, start: next(found))
    run_to_end(small("--monitor.preview_every=1", "--train.steps=3"), tmp_path / "run")
    said = capsys.readouterr().err
    assert said.count("they collapse") == 1 and "too early" not in said and "still" not in said
    assert "WARNING step 1: views_alike: they collapse" in said and "step 3: views_alike: cleared" in said
    watched = [(line["step"], line["watch/views_alike"]) for line in series(tmp_path / "run") if "watch/views_alike" in line]
    assert watched == [(0, 1), (1, 1), (2, 1), (3, 0)]


@pytest.mark.slow
@pytest.mark.usefixtures("without_exports")
def test_the_configuration_that_collapses_is_caught(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("train.setup.MICRO_HELD_OUT_OBJECTS", 4)
    monkeypatch.setattr("train.setup.ORIGINAL_HELD_OUT_OBJECTS", 2)
    options = [
        f"--config={REPOSITORY / 'configs' / 'collapse.yaml'}",
        "--train.steps=30",
        "--monitor.preview_every=30",
        "--monitor.validate_every=30",
    ]
    options += ["--monitor.preview_steps=8", "--monitor.validation_timesteps=1"]
    options += ["--export.pipeline=false", "--export.report=false"]
    run_to_end(parse(options).config, tmp_path / "run")
    at_end = series(tmp_path / "run")[-1]
    assert at_end["watch/copies_input"] == 1
    assert "WARNING step 30: copies_input" in capsys.readouterr().err
