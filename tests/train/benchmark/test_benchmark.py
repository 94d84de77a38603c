"""The benchmark counts what is known, measures every way, and says in one line what it cannot do."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from softprompt.micro.models import SIZES, random_pipeline
from train.benchmark import growth
from train.benchmark.__main__ import main
from train.benchmark.count import arms, count_parts, objective_arms
from train.benchmark.measure import matmul_flops
from train.benchmark.steps import adapting_ways
from train.benchmark.way import Setting

WAYS = [
    "FaceLift",
    "LoRA, encoding live",
    "LoRA, cached",
    "ours, no KL",
    "ours, KL at each",
    "ours, KL at every",
    "ours, KL on the",
]
OBJECTIVES = [
    "with DRaFT+, 10 steps, K = 1",
    "with DRaFT+, 10 steps, K = 2",
    "with Diffusion-DPO",
    "with DomainStudio on latents",
    "with DomainStudio on pictures",
    "with Separate-and-Enhance",
]


def test_full_size_has_the_operations_and_weights_of_stable_diffusion_2_1() -> None:
    parts = count_parts("sd21")
    # Known of the published models: 870 M weights, 5.56, 1.12 and 0.33 TFLOP.
    assert parts.unet_parameters == pytest.approx(870e6, rel=0.002)
    assert parts.reference == pytest.approx(5.56e12, rel=0.005)
    assert parts.vae == pytest.approx(1.12e12, rel=0.005)
    assert parts.clip == pytest.approx(0.33e12, rel=0.02)
    found = {arm.name: arm for arm in arms(parts)}
    assert [name for name in found if not any(name.startswith(way) for way in WAYS)] == [] and len(found) == len(WAYS)
    facelift, ours = (next(a for n, a in found.items() if n.startswith(w)) for w in ("FaceLift", "ours, KL at each"))
    assert facelift.flop == pytest.approx(37.7e12, rel=0.005)
    assert facelift.flop > 2 * ours.flop and facelift.state_bytes > 9 * ours.state_bytes
    assert ours.activation_bytes is not None and ours.activation_bytes + ours.state_bytes < 10e9
    assert parts.decode == pytest.approx(2.48e12, rel=0.02), "of the published decoder"
    drafts = [objective_arms(parts, last=k)[0] for k in (1, 2)]
    assert all(d.activation_bytes is not None and d.activation_bytes + d.state_bytes < 24e9 for d in drafts), "of 80 GB"
    assert drafts[0].flop == pytest.approx(
        2 * (20 * parts.forward + parts.backward_adapted + parts.reference) + 6 * (2 * parts.decode + parts.backward_decode)
    )


@pytest.mark.parametrize(("views", "picture"), [(1, 64), (4, 128)])
def test_a_random_pipeline_has_the_views_and_the_size_asked_for(views: int, picture: int) -> None:
    pipeline = random_pipeline("micro", device="meta", views=views, picture=picture)
    assert (pipeline.num_views, pipeline.picture_size) == (views, picture)
    assert not any(p.requires_grad for p in pipeline.unet.parameters())


@pytest.fixture
def as_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The micro size is as small as the tiny one."""
    monkeypatch.setitem(SIZES, "micro", SIZES["tiny"])


@pytest.mark.usefixtures("as_tiny")
@pytest.mark.slow
def test_every_way_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--repeats=1", "--device=cpu", "--rank=2", f"--output={tmp_path / 'b.json'}"]) == 0
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "b.json").read_text())["ways"]
    for way, row in zip(WAYS, rows, strict=True):
        assert row["name"].startswith(way) and row["name"] in printed
        assert len(row["seconds"]) == 1 and all(s > 0 for s in row["seconds"]) and row["objects_per_second"] > 0
        known = {"batch", "forward", "reference", "backward", "optimizer"}
        assert set(row["phases"]) <= known and row["phases"]["backward"] > 0
    by_name = {row["name"]: row for row in rows}
    none, each, fourth = (by_name[f"ours, {kl}"] for kl in ("no KL", "KL at each step", "KL at every 4th"))
    assert "reference" not in none["phases"] and each["phases"]["reference"] > 0
    assert none["flop"] < fourth["flop"] < each["flop"]
    reference = each["flop"] - none["flop"]
    assert fourth["flop"] - none["flop"] == pytest.approx(reference / 4, rel=1e-6), "the KL of every fourth step, once a cycle"


def test_objectives_are_ways_of_their_own_where_asked_for() -> None:
    setting = Setting("tiny", torch.device("cpu"), torch.float32, rank=2)
    ways = adapting_ways(setting, Accelerator(cpu=True), objectives=True)
    assert [way.name for way in ways[-len(OBJECTIVES) :]] == OBJECTIVES
    for way in ways[-len(OBJECTIVES) :]:
        way.step(0)


def test_counting_needs_no_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--count", "--tflops=100"]) == 0
    printed = capsys.readouterr().out
    assert "nothing was run" in printed and "least time" in printed and all(way in printed for way in WAYS)


@pytest.mark.slow
def test_a_cache_of_more_objects_opens_as_fast_takes_no_more_memory_and_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {"batch_size": [{"batch_size": 1, "seconds": 0.1}], "views": [{"views": 2, "seconds": 0.1}]}
    monkeypatch.setattr(growth, "growing_steps", lambda *_, **__: few | {"picture": [{"picture": 64, "seconds": 0.1}]})
    assert main(["--growth", "--objects=[10, 200]", "--device=cpu", f"--output={tmp_path / 'g.json'}"]) == 0
    small, large = json.loads((tmp_path / "g.json").read_text())["objects"]
    assert [(row["objects"], row["built"]) for row in (small, large)] == [(10, 10), (200, 190)]
    assert large["open_seconds"] < small["open_seconds"] + 0.5
    assert large["epoch_memory_bytes"] < 20e6
    with Image.open(tmp_path / "g.png") as picture:
        assert picture.width > 500
    assert "written/s" in capsys.readouterr().out


def test_the_speed_of_a_matrix_product_is_plausible() -> None:
    assert 1e8 < matmul_flops(torch.device("cpu"), torch.float32, repeats=2) < 1e15


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--repeats=0", "error: repeats: is 0; expected 1 or more"),
        ("--objects=[10, 5]", "error: objects: is [10, 5]; expected rising numbers"),
        ("--tflops=-1", "error: tflops: is -1.0; expected a positive number"),
        ("--size=sd3", "error: size: is sd3; expected tiny or micro or medium or sd21"),
        ("--batchsize=2", "error: unknown option 'batchsize'; did you mean 'batch_size'?"),
        ("--device=cuda", "error: device: is cuda; this machine has no CUDA device"),
    ],
)
def test_bad_options_are_refused_in_one_line(option: str, message: str, error_of: Callable[..., str]) -> None:
    if "cuda" in option and torch.cuda.is_available():
        pytest.skip("there is one here")
    assert error_of(main, option).startswith(message)
