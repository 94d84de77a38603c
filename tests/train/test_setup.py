"""From a configuration to a job: what is decided, what is said of it, and what is refused before anything is written."""

import json
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from softprompt.data.cache import EncodedObjects
from softprompt.data.samples import write_source
from softprompt.errors import InputError
from softprompt.micro import MICRO_MODEL
from softprompt.micro.world import MicroWorld
from train import setup
from train.options.config import Config
from train.state.folder import next_run_folder
from train.state.run import Job

Make = Callable[..., Job]
Notes = Callable[..., str]


@pytest.fixture(scope="module")
def small_config(small_config: Callable[..., Config]) -> Callable[..., Config]:
    """The smallest run of the embedded model: its own settings are not warned of."""
    return partial(small_config, model="micro")


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """No picture is read or encoded, where it is only asked what is said."""
    monkeypatch.setattr(EncodedObjects, "fill", lambda self, **_: 0)


def micro_with(folder: Path, part: str, file: str, **changes: object) -> Path:
    """The micro model with one part's configuration changed; all else are links."""
    folder.mkdir()
    for entry in MICRO_MODEL.iterdir():
        if entry.name != part:
            (folder / entry.name).symlink_to(entry)
    (folder / part).mkdir()
    for entry in (MICRO_MODEL / part).iterdir():
        if entry.name != file:
            (folder / part / entry.name).symlink_to(entry)
    content = json.loads((MICRO_MODEL / part / file).read_text(encoding="utf-8"))
    (folder / part / file).write_text(json.dumps(content | changes), encoding="utf-8")
    return folder


@pytest.fixture
def notes(make_job: Make) -> Notes:
    """`notes(**options)`: what is said of a run with these options."""
    return lambda **options: "\n".join(make_job(**options).notes)


# -------------------------------------------------------------------------------------------------- device and precision


@pytest.mark.usefixtures("no_cuda", "unread")
@pytest.mark.parametrize(
    ("options", "precision"),
    [
        ({}, "fp32 (chosen from the machine)"),
        ({"train.device": "cpu", "train.precision": "fp32"}, "fp32 (as asked for)"),
        ({"train.device": "cpu", "train.precision": "bf16"}, "bf16 (as asked for)"),
    ],
)
def test_device_and_precision_are_named_with_their_reason(notes: Notes, options: dict[str, object], precision: str) -> None:
    said = notes(**options)
    assert "CPU, " in said and precision in said


# ------------------------------------------------------------------------------------------------------------- optimizer


@pytest.mark.usefixtures("unread")
def test_each_group_has_its_own_rate_and_the_prompt_no_decay(make_job: Make) -> None:
    rates = {"prompt.learning_rate": 0.03, "lora.learning_rate": 0.002, "lora.weight_decay": 0.25}
    job = make_job(**rates)
    groups = {g["name"]: g for g in job.trainer.optimizer.param_groups}
    assert {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()} == {"prompt": (0.03, 0.0), "lora": (0.002, 0.25)}
    assert [id(p) for p in groups["prompt"]["params"]] == [id(job.adapted.prompt.learned)]
    lora = {id(p) for name, p in job.pipeline.unet.named_parameters() if ".lora_" in name}
    assert lora and {id(p) for p in groups["lora"]["params"]} == lora


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(("option", "left"), [({"lora.rank": 0}, "prompt"), ({"prompt.learn": "false"}, "lora")])
def test_a_group_that_is_switched_off_is_not_optimised(make_job: Make, option: dict[str, object], left: str) -> None:
    job = make_job(**option)
    assert [g["name"] for g in job.trainer.optimizer.param_groups] == [left] == list(job.adapted.trainable())


@pytest.mark.usefixtures("unread")
def test_lora_starts_elsewhere_from_another_seed(make_job: Make) -> None:
    def start(seed: int) -> torch.Tensor:
        lora = make_job(**{"train.seed": seed}).adapted.trainable()["lora"]
        return torch.cat([p.detach().flatten() for p in lora.values()])

    assert not torch.equal(start(3), start(4))


# ------------------------------------------------------------------------------------------------------------------ data


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (40, 2), (600, 24)])
def test_without_a_list_the_last_5_percent_are_held_out(
    mice: Path, make_job: Make, monkeypatch: pytest.MonkeyPatch, count: int, held_out: int
) -> None:
    everything = MicroWorld("mice", 0, count)
    monkeypatch.setattr(setup, "open_source", lambda path, **_: everything)
    job = make_job(**{"data.val": "null"})
    assert [*job.train.names, *job.held_out.names] == everything.names
    assert len(job.held_out) == held_out
    said = "\n".join(job.notes)
    assert f"{count - held_out} objects to train on, {held_out} held out (the last of the list)" in said


@pytest.mark.usefixtures("unread")
def test_held_out_objects_are_those_given(mice: Path, make_job: Make) -> None:
    job = make_job()
    assert list(job.train.names) == [f"mice-{i:05d}" for i in range(4)]
    assert list(job.held_out.names) == ["mice-10000", "mice-10001"]
    assert "4 objects to train on, 2 held out" in (said := "\n".join(job.notes)) and "WARNING" not in said


@pytest.mark.usefixtures("unread")
def test_a_single_object_that_is_trained_and_validated_on_is_warned_of(mice: Path, make_job: Make) -> None:
    only = mice / "train" / "mice-00002"
    job = make_job(**{"data.train": only, "data.val": "null"})
    assert list(job.train.names) == list(job.held_out.names) == ["mice-00002"]
    assert "WARNING: the only object is both trained on and validated on" in "\n".join(job.notes)


@pytest.mark.usefixtures("unread")
def test_objects_in_both_lists_are_warned_of(mice: Path, notes: Notes) -> None:
    said = notes(**{"data.val": mice / "train"})
    assert "WARNING: 4 of them are trained on as well, e.g. mice-00000" in said


def test_other_objects_of_the_same_folder_name_are_not_warned_of(mice: Path, notes: Notes, tmp_path: Path) -> None:
    for target, source in (("train/sample_0", mice / "train" / "mice-00000"), ("val/sample_0", mice / "val" / "mice-10000")):
        shutil.copytree(source, tmp_path / target)
    assert "WARNING" not in notes(**{"data.train": tmp_path / "train", "data.val": tmp_path / "val"})


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("data", ["random", "black"])
def test_held_out_objects_always_have_one_background(make_job: Make, data: str) -> None:
    job = make_job(**{"data.background": data})
    assert (job.train.background, job.held_out.background) == (data, "black" if data == "black" else "white")


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_picture_cut_short_is_refused_before_the_run(mice: Path, make_job: Make, tmp_path: Path, part: str) -> None:
    write_source(MicroWorld("mice", 50, 2), tmp_path / "spoilt")
    picture = tmp_path / "spoilt" / "mice-00051" / "cam_004.png"
    picture.write_bytes(picture.read_bytes()[:200])
    with pytest.raises(InputError, match=r"mice-00051/cam_004\.png: cannot be decoded"):
        make_job(**{f"data.{part}": tmp_path / "spoilt", "data.background": "random"})


# --------------------------------------------------------------------------------------------------- what does not fit


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"train.device": "cuda"},
            r"train\.device: is cuda; this machine has no CUDA device .* use --train\.device cpu",
        ),
        (
            {"train.precision": "fp16", "train.device": "auto"},
            r"train\.precision: is fp16, which needs a CUDA device; expected fp32 or bf16",
        ),
        ({"train.precision": "fp16", "train.device": "cpu"}, r"train\.precision: is fp16, which needs a CUDA device; expected"),
        ({"monitor.preview_steps": 1001}, r"monitor\.preview_steps: is 1001; the model has 1000 timesteps"),
        ({"data.reference_view": "6"}, r"data\.reference_view: is .*; expected views from 0 to 5"),
        ({"data.reference_view": "[0, 7]"}, r"data\.reference_view: is .*; expected views from 0 to 5"),
        ({"data.limit": 5}, r"data\.limit: is 5; .* has 4 objects to train on"),
        ({"timesteps.clusters": 2000}, r"timesteps: 2000 clusters of 1000 timesteps"),
    ],
)
def test_options_that_do_not_fit_machine_model_or_data_are_refused(
    make_job: Make, options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        make_job(**options)


@pytest.mark.usefixtures("unread")
def test_v_weighting_of_a_model_that_predicts_epsilon_is_refused(make_job: Make, tmp_path: Path) -> None:
    folder = micro_with(tmp_path / "epsilon", "scheduler", "scheduler_config.json", prediction_type="epsilon")
    with pytest.raises(InputError, match=r"loss\.snr_weighting: is v, .* predicts epsilon\. Use `facelift`"):
        make_job(model=folder)
    for weighting in ("facelift", "none"):
        assert make_job(model=folder, **{"loss.snr_weighting": weighting})


# ---------------------------------------------------------------------------------------------------------------- advice


TUNED_FOR_MICRO = {"train.steps": 150, "lora.learning_rate": 0.003, "prompt.learning_rate": 0.1}
OF_ONE_S_OWN = {"train.steps": 20, "lora.learning_rate": 1e-4, "prompt.learning_rate": 0.01}


def test_the_settings_that_are_warned_of_are_the_defaults() -> None:
    config = Config()
    assert config.train.steps == TUNED_FOR_MICRO["train.steps"]
    assert config.lora.learning_rate == TUNED_FOR_MICRO["lora.learning_rate"]
    assert config.prompt.learning_rate == TUNED_FOR_MICRO["prompt.learning_rate"]


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    "unchanged",
    [[name] for name in TUNED_FOR_MICRO] + [["train.steps", "prompt.learning_rate"], list(TUNED_FOR_MICRO), []],
    ids=lambda names: " ".join(names) or "none",
)
def test_each_setting_of_the_micro_model_on_another_is_warned_of(make_job: Make, unchanged: list[str]) -> None:
    settings = OF_ONE_S_OWN | {name: TUNED_FOR_MICRO[name] for name in unchanged}
    warnings = [n for n in make_job(model=MICRO_MODEL, **settings).notes if "tuned for the micro" in n]
    if unchanged:
        (warning,) = warnings
        assert warning.startswith("WARNING ") and "configs/facelift_mouse.yaml has values for real weights" in warning
        assert {name for name in TUNED_FOR_MICRO if f"{name} {TUNED_FOR_MICRO[name]:g}" in warning} == set(unchanged)
        assert {name for name in TUNED_FOR_MICRO if name in warning} == set(unchanged)
    else:
        assert warnings == []


WARM_UP = "the learning rate of the LoRA, which trains for 4 steps, does not"
TOY_WORLD = "data.train is the embedded toy world; give --data.train"


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("options", "warning", "warned"),
    [
        (TUNED_FOR_MICRO, "tuned for", False),
        ({"train.warmup_steps": 3}, f"train.warmup_steps 3: {WARM_UP}", False),
        ({"train.warmup_steps": 4}, f"train.warmup_steps 4: {WARM_UP}", True),
        ({"train.warmup_steps": 10}, f"train.warmup_steps 10: {WARM_UP}", True),
        ({"data.train": "micro", "model": MICRO_MODEL}, TOY_WORLD, True),
        ({"data.train": "micro"}, TOY_WORLD, False),
        (
            {"curriculum.unit": "step", "curriculum.at": "[0, 5]"},
            "the curriculum reaches its end at step 5; the run has 4 steps and stops before",
            True,
        ),
        ({"curriculum.unit": "step", "curriculum.at": "[0, 4]"}, "the curriculum reaches its end", False),
    ],
)
def test_what_is_likely_not_meant_is_warned_of(notes: Notes, options: dict[str, object], warning: str, warned: bool) -> None:
    assert (warning in notes(**options)) == warned


# ----------------------------------------------------------------------------------------------------------- run folders


def test_the_next_run_folder_has_the_number_after_the_highest(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    assert next_run_folder("micro", runs) == runs / "micro-001"
    for name in ("micro-001", "micro-007", "micro-mouse-020", "other-030", "micro-x", "micro", "micro-8b"):
        (runs / name).mkdir(parents=True)
    assert next_run_folder("micro", runs) == runs / "micro-008"
    assert next_run_folder("other", runs) == runs / "other-031"
    assert next_run_folder("mouse", runs) == runs / "mouse-001"
    (runs / "micro-999").mkdir()
    assert next_run_folder("micro", runs) == runs / "micro-1000"
    (runs / "micro-1001").touch()  # a file takes the name as well
    assert next_run_folder("micro", runs) == runs / "micro-1002"


def test_a_run_s_name_is_no_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("[ab]-004", "a-009", "*-002", ".-7", "a.b-003", "axb-006"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    expected = {"[ab]": "[ab]-005", "*": "*-003", "a.b": "a.b-004", "a": "a-010"}
    assert {name: next_run_folder(name) for name in expected} == {n: Path("runs") / f for n, f in expected.items()}


# ------------------------------------------------------------------------------------------------ original domain, limit


def test_the_first_objects_are_trained_on_where_a_limit_is_given(make_job: Make) -> None:
    job = make_job(**{"data.limit": 3})
    assert list(job.train.names) == list(make_job().train.names)[:3]
    assert "data.limit 3" in "\n".join(job.notes)
    held_out = make_job(**{"data.limit": 2, "data.val": "null"})
    assert len(held_out.train) == 2 and len(held_out.held_out) == 1, "what is held out is the same with and without a limit"


def test_a_limit_says_how_many_embedded_mice_there_are(make_job: Make) -> None:
    world = {"data.train": "micro", "data.val": "micro"}
    assert [len(make_job(**world, **{"data.limit": n}).train) for n in ("3", "45")] == [3, 45]


def test_the_embedded_world_brings_heads_to_measure_forgetting_on(make_job: Make) -> None:
    job = make_job(**{"data.train": "micro", "data.val": "micro", "kl.domain": "original"})
    assert job.evaluator.original is not None and len(job.evaluator.original) == 12 and len(job.replay) == 40
    assert all(name.startswith("heads-") for name in [*job.evaluator.original.names, *job.replay.names])
    assert not set(job.evaluator.original.names) & set(job.replay.names)
    assert make_job().evaluator.original is None


def test_original_objects_of_one_s_own_are_split(mice: Path, make_job: Make) -> None:
    job = make_job(**{"data.original": mice / "train", "kl.domain": "both"})
    assert job.evaluator.original is not None and len(job.evaluator.original) == len(job.replay) == 2
    assert "original   2 objects to measure forgetting on, 2 to measure the KL on" in job.notes


def test_tokens_are_matched_where_it_is_asked_for(make_job: Make) -> None:
    plain, matched = (make_job(**{"prompt.matching": m}).adapted.prompt.waypoints for m in ("none", "per_view"))
    assert torch.equal(plain[0], matched[0]) and not torch.equal(plain[1], matched[1])
    assert torch.equal(plain[1].sort(dim=1).values, matched[1].sort(dim=1).values), "the same tokens in another order"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"timesteps.clusters": 5}, "the curriculum of the timesteps takes 20 steps or more; the run has 4"),
        ({"curriculum.pacing": "plateau", "monitor.validate_every": 2}, "the curriculum of the prompt takes 8 steps or more"),
        ({"curriculum.pacing": "plateau", "curriculum.watch": "train"}, "the loss of one batch is mostly noise"),
        ({"train.warmup_steps": 2, "prompt.train_until": 0.5}, "the learning rate of the prompt, which trains for 2 steps"),
    ],
)
def test_a_curriculum_that_cannot_arrive_is_warned_of(notes: Notes, options: dict[str, object], said: str) -> None:
    assert said in notes(**options)
    arrives = {
        "timesteps.max_stage_steps": 1,
        "curriculum.max_stage_steps": 2,
        "curriculum.smoothing": 0.9,
        "train.warmup_steps": 0,
    }
    assert said not in notes(**{**options, **arrives})


def test_what_this_project_warns_of_is_one_line_and_what_a_library_warns_of_is_not_said(
    make_job: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        long = "{view} " + "a mouse " * 90
        make_job(**{"prompt.waypoints": json.dumps(["facelift", long])})
        warnings.warn("advice of a library", FutureWarning, stacklevel=1)
    said = capsys.readouterr().err.splitlines()
    assert said and all(line.startswith("WARNING    text of ") and "is cut to 77" in line for line in said)
