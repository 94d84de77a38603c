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
from train.setup import prepare
from train.state.folder import next_run_folder

Small = Callable[..., Config]


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


def notes_of(config: Config) -> str:
    return "\n".join(prepare(config).notes)


# -------------------------------------------------------------------------------------------------- device and precision


@pytest.mark.usefixtures("no_cuda")
def test_cuda_asked_for_where_there_is_none_is_refused(mice: Path, small_config: Small) -> None:
    with pytest.raises(InputError, match=r"train\.device: is cuda; this machine has no CUDA device .* use --train\.device cpu"):
        prepare(small_config(mice, **{"train.device": "cuda"}))


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_fp16_on_a_cpu_is_refused(mice: Path, small_config: Small, device: str) -> None:
    with pytest.raises(InputError, match=r"train\.precision: is fp16, which needs a CUDA device; expected fp32 or bf16"):
        prepare(small_config(mice, **{"train.precision": "fp16", "train.device": device}))


@pytest.mark.usefixtures("no_cuda", "unread")
def test_what_auto_chose_is_said(mice: Path, small_config: Small) -> None:
    assert "CPU, " in (said := notes_of(small_config(mice))) and "fp32 (chosen from the machine)" in said
    said = notes_of(small_config(mice, **{"train.device": "cpu", "train.precision": "fp32"}))
    assert "fp32 (as asked for)" in said


@pytest.mark.usefixtures("no_cuda", "unread")
def test_frozen_weights_take_the_precision_and_what_trains_stays_float32(mice: Path, small_config: Small) -> None:
    job = prepare(small_config(mice, **{"train.precision": "bf16", "train.device": "cpu"}))
    assert job.pipeline.unet.conv_in.weight.dtype == torch.bfloat16
    trained = [p for group in job.adapted.trainable().values() for p in group.values()]
    assert {p.dtype for p in trained} == {torch.float32}
    assert "bf16 (as asked for)" in "\n".join(job.notes)


# ------------------------------------------------------------------------------------------------------------- optimizer


@pytest.mark.usefixtures("unread")
def test_each_group_has_its_own_rate_and_the_prompt_no_decay(mice: Path, small_config: Small) -> None:
    rates = {"prompt.learning_rate": 0.03, "lora.learning_rate": 0.002, "lora.weight_decay": 0.25}
    job = prepare(small_config(mice, **rates))
    groups = {g["name"]: g for g in job.trainer.optimizer.param_groups}
    assert {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()} == {"prompt": (0.03, 0.0), "lora": (0.002, 0.25)}
    assert [id(p) for p in groups["prompt"]["params"]] == [id(job.adapted.prompt.learned)]
    lora = {id(p) for name, p in job.pipeline.unet.named_parameters() if ".lora_" in name}
    assert lora and {id(p) for p in groups["lora"]["params"]} == lora


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(("option", "left"), [({"lora.rank": 0}, "prompt"), ({"prompt.learn": "false"}, "lora")])
def test_a_group_that_is_switched_off_is_not_optimised(
    mice: Path, small_config: Small, option: dict[str, object], left: str
) -> None:
    job = prepare(small_config(mice, **option))
    assert [g["name"] for g in job.trainer.optimizer.param_groups] == [left] == list(job.adapted.trainable())


@pytest.mark.usefixtures("unread")
def test_lora_starts_elsewhere_from_another_seed(mice: Path, small_config: Small) -> None:
    def start(seed: int) -> torch.Tensor:
        lora = prepare(small_config(mice, **{"train.seed": seed})).adapted.trainable()["lora"]
        return torch.cat([p.detach().flatten() for p in lora.values()])

    assert not torch.equal(start(3), start(4))


# ------------------------------------------------------------------------------------------------------------------ data


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (40, 2), (600, 24)])
def test_without_a_list_the_last_5_percent_are_held_out(
    mice: Path, small_config: Small, monkeypatch: pytest.MonkeyPatch, count: int, held_out: int
) -> None:
    everything = MicroWorld("mice", 0, count)
    monkeypatch.setattr(setup, "open_source", lambda path, **_: everything)
    job = prepare(small_config(mice, **{"data.val": "null"}))
    assert [*job.train.names, *job.held_out.names] == everything.names
    assert len(job.held_out) == held_out
    said = "\n".join(job.notes)
    assert f"{count - held_out} objects to train on, {held_out} held out (the last of the list)" in said


@pytest.mark.usefixtures("unread")
def test_held_out_objects_are_those_given(mice: Path, small_config: Small) -> None:
    job = prepare(small_config(mice))
    assert list(job.train.names) == [f"mice-{i:05d}" for i in range(4)]
    assert list(job.held_out.names) == ["mice-10000", "mice-10001"]
    assert "4 objects to train on, 2 held out" in (said := "\n".join(job.notes)) and "WARNING" not in said


@pytest.mark.usefixtures("unread")
def test_a_single_object_that_is_trained_and_validated_on_is_warned_of(mice: Path, small_config: Small) -> None:
    only = mice / "train" / "mice-00002"
    job = prepare(small_config(mice, **{"data.train": only, "data.val": "null"}))
    assert list(job.train.names) == list(job.held_out.names) == ["mice-00002"]
    assert "WARNING: the only object is both trained on and validated on" in "\n".join(job.notes)


@pytest.mark.usefixtures("unread")
def test_objects_in_both_lists_are_warned_of(mice: Path, small_config: Small) -> None:
    said = notes_of(small_config(mice, **{"data.val": mice / "train"}))
    assert "WARNING: 4 of them are trained on as well, e.g. mice-00000" in said


def test_other_objects_of_the_same_folder_name_are_not_warned_of(mice: Path, small_config: Small, tmp_path: Path) -> None:
    for target, source in (("train/sample_0", mice / "train" / "mice-00000"), ("val/sample_0", mice / "val" / "mice-10000")):
        shutil.copytree(source, tmp_path / target)
    assert "WARNING" not in notes_of(small_config(mice, **{"data.train": tmp_path / "train", "data.val": tmp_path / "val"}))


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("data", ["random", "black"])
def test_held_out_objects_always_have_one_background(mice: Path, small_config: Small, data: str) -> None:
    job = prepare(small_config(mice, **{"data.background": data}))
    assert (job.train.background, job.held_out.background) == (data, "black" if data == "black" else "white")


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_picture_cut_short_is_refused_before_the_run(mice: Path, small_config: Small, tmp_path: Path, part: str) -> None:
    write_source(MicroWorld("mice", 50, 2), tmp_path / "spoilt")
    picture = tmp_path / "spoilt" / "mice-00051" / "cam_004.png"
    picture.write_bytes(picture.read_bytes()[:200])
    with pytest.raises(InputError, match=r"mice-00051/cam_004\.png: cannot be decoded"):
        prepare(small_config(mice, **{f"data.{part}": tmp_path / "spoilt", "data.background": "random"}))


# --------------------------------------------------------------------------------------------------- what does not fit


def test_more_steps_than_the_model_has_are_refused(mice: Path, small_config: Small) -> None:
    with pytest.raises(InputError, match=r"monitor\.preview_steps: is 1001; the model has 1000 timesteps"):
        prepare(small_config(mice, **{"monitor.preview_steps": 1001}))


@pytest.mark.parametrize("given", ["6", "[0, 7]"])
def test_a_reference_view_out_of_range_is_refused(mice: Path, small_config: Small, given: str) -> None:
    with pytest.raises(InputError, match=r"data\.reference_view: is .*; expected views from 0 to 5"):
        prepare(small_config(mice, **{"data.reference_view": given}))


@pytest.mark.usefixtures("unread")
def test_v_weighting_of_a_model_that_predicts_epsilon_is_refused(mice: Path, small_config: Small, tmp_path: Path) -> None:
    folder = micro_with(tmp_path / "epsilon", "scheduler", "scheduler_config.json", prediction_type="epsilon")
    with pytest.raises(InputError, match=r"loss\.snr_weighting: is v, .* predicts epsilon\. Use `facelift`"):
        prepare(small_config(mice, model=folder))
    for weighting in ("facelift", "none"):
        assert prepare(small_config(mice, model=folder, **{"loss.snr_weighting": weighting}))


def test_a_prompt_768_wide_is_refused_as_a_waypoint(mice: Path, small_config: Small, tmp_path: Path) -> None:
    torch.save(torch.randn(6, 77, 768).half(), tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"other\.pt: is 768 wide .* takes 1024\. Likely .* CLIP ViT-L/14"):
        prepare(small_config(mice, **{"prompt.waypoints": f"[facelift, {tmp_path / 'other.pt'}]"}))


def test_a_folder_that_is_no_pipeline_is_refused(mice: Path, small_config: Small, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is no FaceLift pipeline folder; missing model_index\.json, unet/config\.json, vae/"):
        prepare(small_config(mice, model=tmp_path))
    with pytest.raises(InputError, match=r"none: no such folder"):
        prepare(small_config(mice, model=tmp_path / "none"))


def test_an_unknown_lora_target_is_refused(mice: Path, small_config: Small) -> None:
    with pytest.raises(InputError, match=r"lora\.targets: no layer of the UNet is called to_moon"):
        prepare(small_config(mice, **{"lora.targets": "[to_q, to_moon]"}))


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
def test_each_setting_of_the_micro_model_on_another_is_warned_of(mice: Path, small_config: Small, unchanged: list[str]) -> None:
    settings = OF_ONE_S_OWN | {name: TUNED_FOR_MICRO[name] for name in unchanged}
    warnings = [n for n in prepare(small_config(mice, model=MICRO_MODEL, **settings)).notes if "tuned for the micro" in n]
    if unchanged:
        (warning,) = warnings
        assert warning.startswith("WARNING ") and "configs/facelift_mouse.yaml has values for real weights" in warning
        assert {name for name in TUNED_FOR_MICRO if f"{name} {TUNED_FOR_MICRO[name]:g}" in warning} == set(unchanged)
        assert {name for name in TUNED_FOR_MICRO if name in warning} == set(unchanged)
    else:
        assert warnings == []


@pytest.mark.usefixtures("unread")
def test_settings_of_the_micro_model_on_itself_are_not_warned_of(mice: Path, small_config: Small) -> None:
    assert "tuned for" not in notes_of(small_config(mice, **TUNED_FOR_MICRO))


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(("warmup", "warned"), [(3, False), (4, True), (10, True)])
def test_a_warm_up_as_long_as_the_run_is_warned_of(mice: Path, small_config: Small, warmup: int, warned: bool) -> None:
    said = notes_of(small_config(mice, **{"train.warmup_steps": warmup}))
    assert (f"train.warmup_steps {warmup}: the learning rate of the LoRA, which trains for 4 steps, does not" in said) == warned


@pytest.mark.usefixtures("unread")
def test_the_toy_world_under_another_model_is_warned_of(mice: Path, small_config: Small) -> None:
    warning = "data.train is the embedded toy world; give --data.train"
    assert warning in notes_of(small_config(mice, model=MICRO_MODEL, **{"data.train": "micro"}))
    assert warning not in notes_of(small_config(mice, **{"data.train": "micro"}))


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(("end", "warned"), [(5, True), (4, False)])
def test_a_curriculum_longer_than_the_run_is_warned_of(mice: Path, small_config: Small, end: int, warned: bool) -> None:
    said = notes_of(small_config(mice, **{"curriculum.unit": "step", "curriculum.at": f"[0, {end}]"}))
    assert (f"the curriculum reaches its end at step {end}; the run has 4 steps and stops before" in said) == warned


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


def test_the_first_objects_are_trained_on_where_a_limit_is_given(mice: Path, small_config: Small) -> None:
    job = prepare(small_config(mice, **{"data.limit": 3}))
    assert list(job.train.names) == list(prepare(small_config(mice)).train.names)[:3]
    assert "data.limit 3" in "\n".join(job.notes)
    held_out = prepare(small_config(mice, **{"data.limit": 2, "data.val": "null"}))
    assert len(held_out.train) == 2 and len(held_out.held_out) == 1, "what is held out is the same with and without a limit"


def test_a_limit_says_how_many_embedded_mice_there_are(mice: Path, small_config: Small) -> None:
    world = {"data.train": "micro", "data.val": "micro"}
    assert [len(prepare(small_config(mice, **world, **{"data.limit": n})).train) for n in ("3", "45")] == [3, 45]


def test_the_embedded_world_brings_heads_to_measure_forgetting_on(mice: Path, small_config: Small) -> None:
    job = prepare(small_config(mice, **{"data.train": "micro", "data.val": "micro", "kl.domain": "original"}))
    assert job.evaluator.original is not None and len(job.evaluator.original) == 12 and len(job.replay) == 40
    assert all(name.startswith("heads-") for name in [*job.evaluator.original.names, *job.replay.names])
    assert not set(job.evaluator.original.names) & set(job.replay.names)
    assert prepare(small_config(mice)).evaluator.original is None


def test_original_objects_of_one_s_own_are_split(mice: Path, small_config: Small) -> None:
    job = prepare(small_config(mice, **{"data.original": mice / "train", "kl.domain": "both"}))
    assert job.evaluator.original is not None and len(job.evaluator.original) == len(job.replay) == 2
    assert "original   2 objects to measure forgetting on, 2 to measure the KL on" in job.notes


def test_tokens_are_matched_where_it_is_asked_for(mice: Path, small_config: Small) -> None:
    plain, matched = (
        prepare(small_config(mice, **{"prompt.matching": m})).adapted.prompt.waypoints for m in ("none", "per_view")
    )
    assert torch.equal(plain[0], matched[0]) and not torch.equal(plain[1], matched[1])
    assert torch.equal(plain[1].sort(dim=1).values, matched[1].sort(dim=1).values), "the same tokens in another order"


def test_more_objects_than_there_are_cannot_be_asked_for(mice: Path, small_config: Small) -> None:
    with pytest.raises(InputError, match=r"data\.limit: is 5; .* has 4 objects to train on"):
        prepare(small_config(mice, **{"data.limit": 5}))


def test_clusters_that_would_be_empty_are_refused(mice: Path, small_config: Small) -> None:
    with pytest.raises(InputError, match=r"timesteps: 2000 clusters of 1000 timesteps"):
        prepare(small_config(mice, **{"timesteps.clusters": 2000}))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"timesteps.clusters": 5}, "the curriculum of the timesteps takes 20 steps or more; the run has 4"),
        ({"curriculum.pacing": "plateau", "monitor.validate_every": 2}, "the curriculum of the prompt takes 8 steps or more"),
        ({"curriculum.pacing": "plateau", "curriculum.watch": "train"}, "the loss of one batch is mostly noise"),
        ({"train.warmup_steps": 2, "prompt.train_until": 0.5}, "the learning rate of the prompt, which trains for 2 steps"),
    ],
)
def test_a_curriculum_that_cannot_arrive_is_warned_of(
    mice: Path, small_config: Small, options: dict[str, object], said: str
) -> None:
    assert said in notes_of(small_config(mice, **options))
    arrives = {
        "timesteps.max_stage_steps": 1,
        "curriculum.max_stage_steps": 2,
        "curriculum.smoothing": 0.9,
        "train.warmup_steps": 0,
    }
    assert said not in notes_of(small_config(mice, **{**options, **arrives}))


def test_what_this_project_warns_of_is_one_line_and_what_a_library_warns_of_is_not_said(
    mice: Path, small_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        long = "{view} " + "a mouse " * 90
        prepare(small_config(mice, **{"prompt.waypoints": json.dumps(["facelift", long])}))
        warnings.warn("advice of a library", FutureWarning, stacklevel=1)
    said = capsys.readouterr().err.splitlines()
    assert said and all(line.startswith("WARNING    text of ") and "is cut to 77" in line for line in said)
