"""What a run leaves to be looked at."""

import json
import time
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from softprompt.prompt.soft_prompt import SoftPrompt
from softprompt.prompt.templates import VIEWS
from train.evaluation.prompt_metrics import prompt_series
from train.log.grids import preview_grid, preview_tiles
from train.log.logger import Logger, tensorboard_name
from train.log.series import is_evaluation


def monitor(folder: Path, resumed: int | None = None, *, active: bool = True, evaluated: bool = False) -> Logger:
    if resumed is not None:
        time.sleep(1.1)  # TensorBoard sorts files by their second, and within it by a number as text: 10 before 9
    opened = Logger(folder, active=active)
    opened.open(resumed_step=resumed, evaluated=evaluated)
    return opened


def lines(folder: Path) -> list[dict[str, float | None]]:
    """metrics.jsonl, read as strictly as other programs do."""

    def refuse(word: str) -> NoReturn:
        raise AssertionError(f"{word} is no JSON")

    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    assert not text or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def series(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars(tensorboard_name(name))]


# ---------------------------------------------------------------------------------------------------------------- series


def test_each_line_is_json_and_what_is_not_finite_is_null(tmp_path: Path) -> None:
    m = monitor(tmp_path)
    m.scalars(0, {"loss/train": 0.1 + 0.2, "loss/validation": float("nan")})
    m.scalars(5, {"loss/train": float("inf"), "views/psnr": -float("inf"), "speed/steps_per_second": 2})
    m.close()
    assert lines(tmp_path) == [
        {"step": 0, "loss/train": 0.1 + 0.2, "loss/validation": None},
        {"step": 5, "loss/train": None, "views/psnr": None, "speed/steps_per_second": 2},
    ]


def test_tensorboard_holds_the_same_series_pictures_and_text(tmp_path: Path) -> None:
    m = monitor(tmp_path)
    for step in (0, 1, 3):
        m.scalars(step, {"loss/train": step / 4, "prompt_cosine_to_waypoint_1/front": 0.5})
    picture = Image.new("RGB", (20, 10), (255, 0, 0))
    m.picture(3, "held_out", picture)
    m.text("config", "model: micro")
    m.close()
    assert series(tmp_path, "loss/train") == [(0, 0.0), (1, 0.25), (3, 0.75)]
    assert series(tmp_path, "prompt_cosine_to_waypoint_1/front") == [(0, 0.5), (1, 0.5), (3, 0.5)]
    with Image.open(tmp_path / "previews" / "held_out-step-000003.png") as stored:
        assert stored.tobytes() == picture.tobytes() and stored.size == (20, 10)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "00_is_it_working/1_training_loss_falls",
        "01_loss/train",
        tensorboard_name("prompt_cosine_to_waypoint_1/front"),
    }
    (image,) = events.Images("held_out")
    assert (image.step, image.width, image.height) == (3, 20, 10)
    assert any("config" in tag for tag in events.Tags()["tensors"])


def test_after_a_resume_nothing_later_than_the_checkpoint_stays(tmp_path: Path) -> None:
    m = monitor(tmp_path)
    for step in (0, 2, 4, 6):
        m.scalars(step, {"loss/train": 1.0})
    m.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss/tra')
    m = monitor(tmp_path, resumed=4)
    assert [line["step"] for line in lines(tmp_path)] == [0, 2, 4]
    m.scalars(5, {"loss/train": 2.0})
    m.close()
    assert [(line["step"], line["loss/train"]) for line in lines(tmp_path)] == [(0, 1), (2, 1), (4, 1), (5, 2)]
    assert series(tmp_path, "loss/train") == [(0, 1), (2, 1), (4, 1), (5, 2)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


@pytest.mark.parametrize("evaluated", [True, False])
def test_the_evaluation_of_the_resumed_step_stays_only_where_the_checkpoint_has_it(tmp_path: Path, evaluated: bool) -> None:
    m = monitor(tmp_path)
    for step in (2, 4, 6):
        m.scalars(step, {"loss/train": step / 8})
        m.scalars(step, {"loss/validation": step / 16})
    m.close()
    m = monitor(tmp_path, resumed=4, evaluated=evaluated)
    kept = [
        {"step": 2, "loss/train": 0.25},
        {"step": 2, "loss/validation": 0.125},
        {"step": 4, "loss/train": 0.5},
        {"step": 4, "loss/validation": 0.25},
    ]
    assert lines(tmp_path) == (kept if evaluated else kept[:3]), "the training line of that step is in the checkpoint always"
    if not evaluated:
        m.scalars(4, {"loss/validation": 0.25})  # done again
    m.close()
    assert lines(tmp_path) == kept


def test_a_line_is_an_evaluation_when_it_has_a_validation_loss() -> None:
    assert is_evaluation({"step": 4, "loss/validation": 0.5, "views/psnr": 9.0})
    assert not is_evaluation({"step": 4, "loss/train": 0.5})


def test_a_monitor_that_is_not_open_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 9, "a": 1}\n')
    m = Logger(tmp_path, active=True)
    m.scalars(10, {"loss/train": 2.0})
    m.picture(10, "held_out", Image.new("RGB", (2, 2)))
    m.text("config", "model: micro")
    m.close()
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert lines(tmp_path) == [{"step": 9, "a": 1}]


def test_a_line_cut_off_by_a_kill_is_dropped_even_when_it_is_early(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "a": 1}\n{"step": 1')
    monitor(tmp_path, resumed=4).close()
    assert lines(tmp_path) == [{"step": 0, "a": 1}]


def test_resuming_without_earlier_metrics_writes_only_new_ones(tmp_path: Path) -> None:
    m = monitor(tmp_path, resumed=4)
    m.scalars(5, {"loss/train": 2.0})
    m.close()
    assert lines(tmp_path) == [{"step": 5, "loss/train": 2.0}]


def test_a_monitor_of_another_process_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 9, "a": 1}\n')
    m = monitor(tmp_path, active=False, resumed=4)
    m.scalars(5, {"loss/train": 2.0})
    m.picture(5, "held_out", Image.new("RGB", (2, 2)))
    m.text("config", "model: micro")
    m.close()
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert lines(tmp_path) == [{"step": 9, "a": 1}]


# --------------------------------------------------------------------------------------------------------- prompt series


def prompts() -> SoftPrompt:
    generator = torch.Generator().manual_seed(0)
    prompt = SoftPrompt(torch.randn(3, 6, 77, 16, generator=generator) + 0.5)
    prompt.learned.data += 0.3 * torch.randn(6, 77, 16, generator=generator)
    return prompt


def test_prompt_series_are_the_slow_ones() -> None:
    prompt = prompts()
    w = prompt.waypoints.double().numpy()
    path = 0.5 * (w[0] + w[1])
    e = path + prompt.learned.detach().double().numpy() - w[0]
    norms = [float(np.sqrt((e[v, t] ** 2).sum())) for v in range(6) for t in range(77)]
    path_norms = [float(np.sqrt((path[v, t] ** 2).sum())) for v in range(6) for t in range(77)]

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        a, b = a.reshape(-1), b.reshape(-1)
        return float(a @ b / (np.sqrt(a @ a) * np.sqrt(b @ b)))

    pairs = [cosine(e[a], e[b]) for a in range(6) for b in range(a)]
    apart = [float(np.linalg.norm(e[a] - e[b]) / np.linalg.norm(w[0, a] - w[0, b])) for a in range(6) for b in range(a)]
    expected = {
        "prompt_norm/mean": sum(norms) / len(norms),
        "prompt_norm/min": min(norms),
        "prompt_norm/max": max(norms),
        "prompt_norm/least_to_path": min(n / p for n, p in zip(norms, path_norms, strict=True)),
        "prompt_norm/most_to_path": max(n / p for n, p in zip(norms, path_norms, strict=True)),
        "prompt_views_alike/mean_cosine": sum(pairs) / len(pairs),
        "prompt_views_alike/closest_pair": max(pairs),
        "prompt_views_alike/closest_ratio": min(apart),
        "prompt_views_alike/front_right_front_left": cosine(e[VIEWS.index("front_right")], e[VIEWS.index("front_left")]),
    }
    for v, name in enumerate(VIEWS):
        expected[f"prompt_drift_from_start/{name}"] = float(
            np.sqrt(((e[v] - w[0, v]) ** 2).sum()) / np.sqrt((w[0, v] ** 2).sum())
        )
        for i in range(3):
            expected[f"prompt_cosine_to_waypoint_{i}/{name}"] = cosine(e[v], w[i, v])
    assert prompt_series(prompt, 0.5) == pytest.approx(expected, abs=1e-5)


def test_prompt_series_at_the_start_show_no_drift() -> None:
    found = prompt_series(SoftPrompt(prompts().waypoints), 0.0)
    assert {found[f"prompt_drift_from_start/{name}"] for name in VIEWS} == {0.0}
    assert all(found[f"prompt_cosine_to_waypoint_0/{name}"] == pytest.approx(1) for name in VIEWS)


def test_prompt_series_of_another_number_of_views_are_numbered() -> None:
    prompt = SoftPrompt(torch.randn(1, 4, 77, 8, generator=torch.Generator().manual_seed(0)))
    found = prompt_series(prompt, 0.0)
    assert "prompt_drift_from_start/view_3" in found and not any("front" in name for name in found)


def test_every_prompt_series_has_a_place_in_tensorboard() -> None:
    names = [tensorboard_name(name) for name in prompt_series(prompts(), 0.0)]
    assert len(set(names)) == len(names)
    assert tensorboard_name("loss/train") < tensorboard_name("views/psnr") < min(names) < tensorboard_name("gradient/norm_lora")


# ------------------------------------------------------------------------------------------------------------------ grid


def flat_pictures(*values: int, size: int) -> Tensor:
    """Pictures of one grey each."""
    return (torch.tensor(values) / 255)[:, None, None, None].expand(-1, 3, size, size)


@pytest.mark.parametrize(("size", "tile"), [(64, 128), (100, 200), (128, 128), (512, 512), (6, 132)])
def test_each_tile_of_a_preview_grid_is_in_its_place(size: int, tile: int) -> None:
    objects, views = 2, 3
    rows = [
        (
            label,
            torch.stack([flat_pictures(*(100 * b + 30 * r + 5 * v for v in range(views)), size=size) for b in range(objects)]),
        )
        for r, label in enumerate(("truth", "pretrained", "now"))
    ]
    grid = preview_grid(rows, flat_pictures(250, 240, size=size), ("front", "left", "back"))
    margin, header, gap = 92, 18, 10
    assert grid.size == (margin + (views + 1) * tile, header + objects * (3 * tile + gap))
    pixels = np.array(grid)

    def tile_at(x: int, y: int) -> set[int]:
        return set(np.unique(pixels[y : y + tile, x : x + tile]).tolist())

    for b in range(objects):
        top = header + b * (3 * tile + gap)
        assert tile_at(margin, top) == {250 - 10 * b}, "the picture that was given is at the left"
        assert tile_at(margin, top + tile) == {255}, "and only once"
        for r in range(3):
            for v in range(views):
                assert tile_at(margin + (v + 1) * tile, top + r * tile) == {100 * b + 30 * r + 5 * v}


def test_a_preview_grid_has_names_above_and_labels_beside() -> None:
    rows = [("truth", torch.ones(1, 2, 3, 64, 64)), ("now", torch.ones(1, 2, 3, 64, 64))]
    pixels = np.array(preview_grid(rows, torch.ones(1, 3, 64, 64), ("front", "left")))
    for column in range(3):
        assert (pixels[:18, 92 + column * 128 : 92 + (column + 1) * 128] < 128).any(), f"no name above column {column}"
    for row in range(2):
        assert (pixels[18 + row * 128 : 18 + (row + 1) * 128, :92] < 128).any(), f"no label beside row {row}"


def test_a_tile_is_its_picture_upright_and_not_blurred() -> None:
    picture = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    grid = np.array(preview_grid([("now", picture[None, None] * 2 - 0.5)], picture[None], ("front",)))
    expected = (picture * 255).round().byte().permute(1, 2, 0).numpy().repeat(2, 0).repeat(2, 1)
    assert np.array_equal(grid[18:146, 92:220], expected)
    clipped = ((picture * 2 - 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy().repeat(2, 0).repeat(2, 1)
    assert np.array_equal(grid[18:146, 220:348], clipped)


def test_hyper_parameters_of_any_kind_are_written_beside_the_last_numbers(tmp_path: Path) -> None:
    m = monitor(tmp_path)
    m.hparams({"lora.rank": 8, "data.val": None, "curriculum.at": [0.0, 0.25], "prompt.learn": True}, {"loss/validation": 0.5})
    m.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    for expected in (b"lora.rank", b"data.val", b"None", b"[0.0, 0.25]", b"prompt.learn"):
        assert expected in content
    experiment = events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    assert tensorboard_name("loss/validation").encode() in experiment


def test_tiles_are_the_pictures_with_nothing_around_them(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.rand(2, 6, 3, 8, 8, generator=generator) for _ in range(3)]
    given = torch.rand(2, 3, 8, 8, generator=generator)
    m = monitor(tmp_path)
    m.tiles(7, "tiles", preview_tiles(rows, given))
    m.close()
    pixels = np.array(Image.open(tmp_path / "previews" / "tiles-step-000007.png"))
    assert pixels.shape == (2 * 3 * 8, 7 * 8, 3)

    def tile(row: int, column: int) -> Tensor:
        return torch.from_numpy(pixels[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]).permute(2, 0, 1) / 255

    for b in range(2):
        for r in range(3):
            assert torch.allclose(tile(3 * b + r, 0), given[b], atol=1 / 255)
            for v in range(6):
                assert torch.allclose(tile(3 * b + r, v + 1), rows[r][b, v], atol=1 / 255)
