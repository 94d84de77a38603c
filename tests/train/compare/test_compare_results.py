"""The numbers of a comparison are read as the runs wrote them; statistics against slow, obvious versions."""

import itertools
import json
import math
import random
from statistics import fmean, median, stdev

import pytest

from train.compare.results import (
    FORGETTING,
    LOSS,
    PROMPTS_ALIKE,
    PSNR,
    SECONDS,
    Interval,
    first_crossing,
    median_share,
    paired_change,
    paired_difference,
    paired_ratio,
    ratio_of_means,
    read_run,
    spread,
    summarise,
    views,
)

T_975 = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645}
"""Of Student's t by degrees of freedom, from a printed table."""


def result(tmp_path, variant, seed, losses, original=None, **last):
    """A finished run: three evaluations, at steps 0, 10 and 20, a training line between them."""
    found = [{"step": 10 * i, "loss/validation": loss} for i, loss in enumerate(losses)]
    for line, value in zip(found, original or [], strict=False):
        line["loss/original"] = value
    if original:
        found[0]["loss/original_pretrained"] = 0.1
    found[-1] |= last
    training = {"step": 10, "loss/train": 9.0, "speed/steps_per_second": 4.0, "prompt_views_alike/mean_cosine": 0.5}
    run = tmp_path / variant / str(seed)
    (run / "export").mkdir(parents=True)
    (run / "export" / "clr_embeds.pt").touch()
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [found[0], training, *found[1:]]))
    return read_run(run, variant=variant, seed=seed, steps=20)


# ------------------------------------------------------------------------------------------------------------- reading


def test_a_run_is_read_as_it_was_written(tmp_path):
    last = {PSNR: 20.0, "views_psnr/front": 21.0, "views_psnr/back": 19.0, "views_ssim/front": 0.9}
    run = result(tmp_path, "a", 3, [0.4, 0.3, 0.2], [0.1, 0.2, 0.4], **last)
    assert run.validation == {0: 0.4, 10: 0.3, 20: 0.2}
    assert run.number(LOSS) == 0.2 and run.number(PSNR) == 20.0
    assert run.number(FORGETTING) == pytest.approx(0.3)
    begun_elsewhere = result(tmp_path, "b", 3, [0.4, 0.3, 0.2], [0.3, 0.2, 0.4])
    assert begun_elsewhere.number(FORGETTING) == pytest.approx(0.3), "against the pretrained model, not its own start"
    assert views(run.final) == ["front", "back"]
    assert summarise("a", [run], "a").worst_view == "back"
    assert run.number(SECONDS) == 0.25 and run.number(PROMPTS_ALIKE) == 0.5 and run.tiles is None


def test_what_is_absent_is_unknown_not_zero(tmp_path):
    run = result(tmp_path, "a", 0, [0.4, 0.3, 0.2], **{"views/copy_score": None})
    assert all(math.isnan(run.number(name)) for name in (PSNR, "views/copy_score", FORGETTING))
    assert math.isnan(summarise("a", [run], "a").of(FORGETTING).mean)


def test_a_run_is_finished_when_it_is_evaluated_at_the_last_step_and_exported(tmp_path):
    def is_finished(folder):
        return read_run(folder, variant="a", seed=0, steps=20) is not None

    assert result(tmp_path, "done", 0, [0.4, 0.3, 0.2]) is not None and not is_finished(tmp_path / "absent")
    half = tmp_path / "done" / "0"
    *earlier, last = (half / "metrics.jsonl").read_text().splitlines(keepends=True)
    (half / "metrics.jsonl").write_text("".join(earlier))
    assert not is_finished(half)
    (half / "metrics.jsonl").write_text("".join(earlier) + last[:20])  # killed while it wrote
    assert not is_finished(half)
    (half / "metrics.jsonl").write_text("".join(earlier) + last)
    assert is_finished(half)
    (half / "export" / "clr_embeds.pt").unlink()
    assert not is_finished(half)


# ---------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("n", [2, 3, 5])
def test_paired_interval_is_the_textbooks(n):
    draw = random.Random(n)
    baseline = [draw.uniform(1, 2) for _ in range(n)]
    values = [b + draw.gauss(0.2, 0.1) for b in baseline]
    differences = [v - b for v, b in zip(values, baseline, strict=True)]
    half = T_975[n - 1] * stdev(differences) / math.sqrt(n)
    found = paired_difference(values, baseline)
    assert found.value == pytest.approx(fmean(differences))
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), rel=1e-4)


def test_change_is_the_ratio_of_geometric_means_less_one():
    found = paired_change([0.5, 2.0, 1.0], [1.0, 1.0, 1.0])
    assert found.value == pytest.approx(0.0)
    assert (1 + found.low) * (1 + found.high) == pytest.approx(1.0)  # twice and half are equally far
    assert paired_change([0.9], [1.0]).value == pytest.approx(-0.1)
    assert math.isnan(paired_change([0.9], [1.0]).low)


def test_pairs_with_an_unknown_are_left_out():
    found = paired_difference([1.0, math.nan, 3.0], [0.5, 1.0, math.nan])
    assert found.value == 0.5 and math.isnan(found.low)
    assert math.isnan(paired_change([-1.0, 0.0], [1.0, 1.0]).value)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([0.1, 0.2, 0.3], "not significantly different"),  # the same numbers
        ([0.088, 0.177, 0.263], "lower by 12 % (11 to 13)"),
        ([0.1034, 0.2067, 0.3104], "higher by 3.4 % (3.3 to 3.6)"),
        ([0.08, 0.21, 0.26], "not significantly different"),
        ([0.05, 0.1], "too few seeds"),
        ([], "no finished run"),
    ],
)
def test_verdicts_in_words(tmp_path, values, verdict):
    runs = [result(tmp_path, "base", seed, [1, 1, loss]) for seed, loss in enumerate([0.1, 0.2, 0.3])]
    runs += [result(tmp_path, "new", seed, [1, 1, loss]) for seed, loss in enumerate(values)]
    assert summarise("new", runs, "base").verdict == verdict
    assert summarise("base", runs, "base").verdict == "baseline"


def test_forgetting_ratios_are_those_of_logs_where_all_are_positive():
    values, baseline = [0.01, 0.02, 0.04], [0.1, 0.1, 0.2]
    logs = [math.log(v / b) for v, b in zip(values, baseline, strict=True)]
    found = paired_ratio(values, baseline)
    assert found.value == pytest.approx(math.exp(sum(logs) / 3)) and found.low < found.value < found.high
    assert paired_ratio([-0.01, 0.02, 0.04], baseline) == ratio_of_means([-0.01, 0.02, 0.04], baseline)


def crossing_by_walking(curve, level):
    """Ten thousand small steps along the line."""
    for (x0, y0), (x1, y1) in itertools.pairwise(curve.items()):
        for k in range(10_001):
            if y0 + (y1 - y0) * k / 10_000 <= level:
                return x0 + (x1 - x0) * k / 10_000
    return math.inf


@pytest.mark.parametrize("level", [1.0, 0.8, 0.55, 0.3, 0.1])
def test_first_crossing_is_found_by_walking(level):
    curve = {0: 0.9, 10: 0.5, 30: 0.7, 40: 0.2}
    assert first_crossing(curve, level) == pytest.approx(crossing_by_walking(curve, level), abs=0.01)
    assert math.isnan(first_crossing(curve, math.nan)), "unknown"


def test_bootstrap_of_the_median_is_near_the_exact_one():
    values = [0.3, 0.5, 0.6, 0.9]
    exact = sorted(median(pick) for pick in itertools.product(values, repeat=len(values)))  # every way to draw n of n
    found = median_share(values)
    assert found.value == pytest.approx(0.55)
    assert exact[int(0.01 * len(exact))] <= found.low <= exact[int(0.05 * len(exact))]
    assert exact[int(0.95 * len(exact))] <= found.high <= exact[-1]


def test_never_reached_stays_never():
    some = median_share([0.4, 0.5, 0.6, math.inf, math.inf])
    assert some.value == 0.6 and some.low == pytest.approx(0.4) and math.isinf(some.high)
    never = median_share([math.inf] * 3)
    assert math.isinf(never.value) and math.isinf(never.low)
    two = median_share([0.5, math.inf])
    assert math.isinf(two.value) and math.isnan(two.low)
    assert math.isnan(median_share([]).value)


def test_ratio_of_means_draws_pairs_together():
    baseline = [1.0, 2.0, 4.0]
    found = ratio_of_means([2 * b for b in baseline], baseline)
    assert found == Interval(2.0, 2.0, 2.0)  # drawn apart, it would have a wide interval
    values = [0.5, 1.5, 1.0]
    found = ratio_of_means(values, baseline)
    pairs = list(zip(values, baseline, strict=True))
    exact = sorted(fmean(v for v, _ in p) / fmean(b for _, b in p) for p in itertools.product(pairs, repeat=3))
    assert found.value == pytest.approx(3 / 7)
    assert exact[0] - 1e-9 <= found.low <= exact[2] + 1e-9 and exact[-3] - 1e-9 <= found.high <= exact[-1] + 1e-9


def test_ratio_to_a_baseline_that_forgot_nothing_is_unknown():
    assert math.isnan(ratio_of_means([1.0, 1.0, 1.0], [-0.1, 0.05, -0.2]).value)
    partly = ratio_of_means([1.0, 1.0, 1.0], [-0.1, 0.5, 0.5])
    assert partly.value > 0 and math.isnan(partly.low)


def test_spread_of_one_has_no_deviation():
    assert spread([2.0]).mean == 2.0 and math.isnan(spread([2.0]).deviation)
    assert spread([1.0, math.nan, 3.0]).deviation == pytest.approx(math.sqrt(2))


def test_summary_pairs_by_seed_and_ignores_the_unpaired(tmp_path):
    runs = [result(tmp_path, "base", seed, [0.4, 0.3, 0.2 + seed / 100], [0.1, 0.1, 0.2]) for seed in range(4)]
    runs += [result(tmp_path, "new", seed, [0.4, 0.2, 0.9 * (0.2 + seed / 100)], [0.1, 0.1, 0.15]) for seed in (1, 2, 3, 7)]
    found = summarise("new", runs, "base")
    assert found.seeds == (1, 2, 3, 7) and found.paired == 3
    assert found.change.value == pytest.approx(-0.1) and found.verdict == "lower by 10 % (10 to 10)"
    assert found.changes == pytest.approx([-0.1] * 3)
    assert found.forgetting_ratio.value == pytest.approx(0.5)
    assert found.reached == (3, 3) and found.reach.value < 0.5
