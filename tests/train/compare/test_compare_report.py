"""The report is complete and self-contained, and says what was measured and what was not."""

import base64
import csv
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
from PIL import Image

from train.compare.plan import Comparison, make_plan
from train.compare.report import curves_figure, line_styles, mean_curve, strips, write_report
from train.compare.results import read_run, summarise
from train.compare.tables import headline, number

VIEWS = ("front", "front_right", "right", "back", "left", "front_left")
NASTY = '<script>alert("x")</script>'
SIZE = 8


def write_tiles(folder, step, objects=2):
    """As a run leaves them; each tile's colour says its object, row and column."""
    image = Image.new("RGB", ((len(VIEWS) + 1) * SIZE, 3 * objects * SIZE))
    for row in range(3 * objects):
        for column in range(len(VIEWS) + 1):
            tile = Image.new("RGB", (SIZE, SIZE), (80 * (row // 3), 60 * (row % 3), 30 * column))
            image.paste(tile, (column * SIZE, row * SIZE))
    folder.mkdir(parents=True)
    image.save(folder / f"tiles-step-{step:06d}.png")


def write_run(run, factor=1.0, *, measured=True):
    """A finished run of two hundred steps. measured: whether it measured more than the held-out loss."""
    steps = run.config.train.steps
    points = [{"step": i * steps // 4, "loss/validation": factor * (0.2 - 0.03 * i) + run.seed / 500} for i in range(5)]
    (run.folder / "export").mkdir(parents=True)
    (run.folder / "export" / "clr_embeds.pt").touch()
    if measured:
        points[0]["loss/original_pretrained"] = 0.02 + run.seed / 1000
        for i, point in enumerate(points):
            point["loss/original"] = 0.02 + 0.01 * factor * i + run.seed / 1000
        points[-1] |= {"views/psnr": 20 / factor, "views/ssim": 0.8, "views/copy_score": None}
        points[-1] |= {f"views_psnr/{name}": 20 - i for i, name in enumerate(VIEWS)}
        points[-1] |= {f"views_ssim/{name}": 0.9 - i / 10 for i, name in enumerate(VIEWS)}
        points[-1]["objective/held_out_reward_ssim"] = 1.8 - factor + run.seed / 100
        write_tiles(run.folder / "previews", steps)
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(p) + "\n" for p in points))


def report(out, variants=("base", "better"), seeds=(0, 1, 2), leave_out=(), failures=None, **of_runs):
    """Write runs and the report of them. Returns: its text."""
    comparison = Comparison(
        options={"train.steps": 200, "prompt.subject": NASTY},
        seeds=list(seeds),
        baseline="base",
        variants={name: {"prompt.learning_rate": 0.1 + i / 10} for i, name in enumerate(variants)},
    )
    plan = make_plan(comparison, out)
    results = []
    for run in plan.runs():
        if run.label not in leave_out:
            write_run(run, 0.9 if run.variant == "better" else 1.0, **of_runs)
            results.append(read_run(run.folder, variant=run.variant, seed=run.seed, steps=200))
    write_report(plan, results, failures=failures or {}, command="python -m train.compare --config c.yaml --output out")
    return (out / "report.html").read_text()


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """The folder of a comparison of three variants, all runs finished; nothing may change it."""
    folder = tmp_path_factory.mktemp("complete")
    report(folder, ("base", "better", "a-variant-with-a-long-name-of-its-own"))
    return folder


@pytest.fixture
def page(complete):
    return (complete / "report.html").read_text()


def section(page, name):
    return page.split(f'id="{name}"')[1].split("</section>")[0]


# ------------------------------------------------------------------------------------------------------------- content


def test_the_report_has_its_sections_in_order_and_escapes_text(page):
    order = ["<h1>", 'class="headline"', *(f'id="{name}"' for name in ("settings", "validation", "original", "changes"))]
    order += [f'id="{name}"' for name in ("results", "views", "pictures", "missing", "limits", "again")]
    places = [page.index(part) for part in order]
    assert places == sorted(places)
    assert "better: held-out loss significantly lower than base&#39;s, by" in page
    assert "about one is significantly different from the baseline by chance" in section(page, "limits")
    assert "python -m train.compare --config c.yaml --output out" in section(page, "again")
    assert "None: every run is finished." in section(page, "missing")
    assert "front left" in section(page, "views")  # the worst view
    assert NASTY not in page and "&lt;script&gt;alert(" in page


def test_what_was_not_measured_is_said(tmp_path):
    page = report(tmp_path, measured=False)
    assert "Not measured: no run had objects of the original domain" in page
    assert "No pictures of base, better" in section(page, "pictures") and "<img" not in page
    results = section(page, "results")
    assert "<td>–</td>" in results and ">nan" not in page and ">0<" not in results and "Objectives" not in results


def test_missing_and_failed_runs_are_named(tmp_path):
    failures = {"better-seed-2": "error: out of memory"}
    page = report(tmp_path, leave_out=("better-seed-1", "better-seed-2"), failures=failures)
    missing = section(page, "missing")
    assert "better, seed 1: not finished" in missing and "better, seed 2: failed: error: out of memory" in missing
    assert "better: too few seeds for a verdict (1 finished with the baseline; 3 or more are needed)" in page


def test_report_of_nothing_yet(tmp_path):
    page = report(tmp_path, seeds=(0,), leave_out=("base-seed-0", "better-seed-0"))
    assert "0 of 2 runs are finished" in page and "No run is finished yet." in page and "no finished run" in page


def test_tables_of_numbers_hold_every_run(complete):
    with (complete / "report-results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["variant"], r["seed"]) for r in rows][:4:3] == [("base", "0"), ("base", "1")] and len(rows) == 9
    assert float(rows[0]["loss/validation"]) == pytest.approx(0.08) and rows[0]["seconds_per_step"] == ""
    with (complete / "report-summary.csv").open() as file:
        base, better, _ = csv.DictReader(file)
    assert float(better["loss_change_low"]) < float(better["loss_change"]) < float(better["loss_change_high"]) < 0
    assert float(better["forgetting_ratio"]) == pytest.approx(0.9) and better["worst_view"] == "front_left"
    changes = [row[f"objective/held_out_reward_ssim_change{end}"] for row in (base, better) for end in ("", "_low")]
    assert [float(change) for change in changes] == pytest.approx([0, 0, 0.1, 0.1])


def test_objectives_have_a_table_with_the_paired_difference(page):
    table = section(page, "results").split('aria-label="Objectives"')[1]
    assert "reward ssim" in table and "<td>0.81<small>± 0.01</small></td>" in table
    assert "<td>0.91<small>+0.1 (+0.1 to +0.1)</small></td>" in table


def test_numbers_as_words():
    assert number(float("nan")) == "–" and number(float("inf")) == "not reached" and number(0.12345) == "0.123"
    assert "nothing to compare" in headline([summarise("base", [], "base")], "base")


# ------------------------------------------------------------------------------------------------------------ pictures


def test_strips_are_cut_where_the_tiles_are_or_left_out(complete, tmp_path):
    run = read_run(complete / "runs/base/seed-0", variant="base", seed=0, steps=200)
    found = strips(run)
    assert len(found) == 2 and found[1]["now"].size == (7 * SIZE, SIZE)
    for b, rows in enumerate(found):
        for r, name in enumerate(("truth", "pretrained", "now")):
            assert rows[name].getpixel((3 * SIZE + 1, SIZE - 1)) == (80 * b, 60 * r, 90, 255)
            assert rows[name].getpixel((0, 0))[3] == (255 if name == "truth" else 0)  # the input once
    Image.new("RGB", (7 * SIZE, 4 * SIZE)).save(tmp_path / "other.png")
    assert strips(replace(run, tiles=tmp_path / "other.png")) == [], "of another shape"


def test_mean_curve_is_over_common_steps():
    steps, mean, low, high = mean_curve([{0: 1.0, 10: 2.0, 20: 3.0}, {0: 3.0, 20: 7.0}])
    assert (steps, mean, low, high) == ([0, 20], [2.0, 5.0], [1.0, 3.0], [3.0, 7.0])


def test_figures_are_the_same_for_the_same_numbers():
    curves = {"a": [{0: 1.0, 10: 2.0}], "b": []}
    drawn = [curves_figure(curves, line_styles(["a", "b"], "a"), ylabel="loss") for _ in range(2)]
    assert drawn[0] == drawn[1] and "currentColor" in drawn[0]
    assert curves_figure({"b": []}, line_styles(["b"], "b"), ylabel="loss") == ""


def test_many_variants_stay_apart():
    styles = line_styles([f"v{i}" for i in range(20)], "v0")
    assert len({(s["color"], s["linestyle"]) for s in styles.values()}) == 20


# ------------------------------------------------------------------------------------------------------- self-contained


def test_report_needs_nothing_else(page):
    assert '<meta name="viewport"' in page and "prefers-color-scheme: dark" in page
    assert all(target.startswith(("data:", "#")) for target in re.findall(r'(?:src|href)="([^"]*)"', page))
    assert "@import" not in page and "<script" not in page and not re.search(r"url\((?!#)", page)
    images = re.findall(r"<img ([^>]*)>", page)
    assert len(images) == 2 * 5, "two objects: truth, pretrained, and three variants"
    for image in images:
        assert re.search(r'alt="[^"]+"', image)
        with Image.open(io.BytesIO(base64.b64decode(re.search(r'src="data:image/png;base64,([^"]+)"', image)[1]))) as opened:
            opened.load()
            assert opened.size == (7 * SIZE, SIZE)
    svgs = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len([ElementTree.fromstring(svg) for svg in svgs]) == 3
    identifiers = re.findall(r'<(?:section|h2|g|figure)[^>]* id="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))


def test_report_opens_on_a_telephone_and_on_a_desk(complete, check_page):
    seen = check_page(complete / "report.html")
    assert seen.pictures == 2 * 5 and seen.figures == 3
