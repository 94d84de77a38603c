"""Numbers of a comparison: read as the runs wrote them, and statistics against slow, obvious versions."""

import itertools
import json
import math
import random
from statistics import fmean, median, stdev

import pytest

from train.compare.results import (
    Curve,
    Interval,
    first_crossing,
    in_words,
    is_finished,
    outcome_of,
    paired_change,
    paired_difference,
    paired_ratio,
    ratio_of_means,
    reach,
    read_run,
    spread,
    summarise,
)

T_975 = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645}
"""Of Student's t by degrees of freedom, from a printed table."""


def write_run(folder, lines, *, exported=True):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if exported:
        (folder / "export").mkdir()
        (folder / "export" / "clr_embeds.pt").touch()
    return folder


def lines(losses, original=None, **last):
    """Three evaluations, at steps 0, 10 and 20, a training line between them."""
    found = [{"step": 10 * i, "loss/validation": loss} for i, loss in enumerate(losses)]
    for line, value in zip(found, original or [], strict=False):
        line["loss/original"] = value
    if original:
        found[0]["loss/original_pretrained"] = 0.1
    found[-1] |= last
    training = {"step": 10, "loss/train": 9.0, "speed/steps_per_second": 4.0, "prompt_views_alike/mean_cosine": 0.5}
    return [found[0], training, *found[1:]]


def result(tmp_path, variant, seed, losses, original=None, **last):
    folder = write_run(tmp_path / variant / str(seed), lines(losses, original, **last))
    return read_run(folder, variant=variant, seed=seed, steps=20)


# ------------------------------------------------------------------------------------------------------------- reading


def test_a_run_is_read_as_it_was_written(tmp_path):
    last = {"views/psnr": 20.0, "views_psnr/front": 21.0, "views_psnr/back": 19.0, "views_ssim/front": 0.9}
    run = result(tmp_path, "a", 3, [0.4, 0.3, 0.2], [0.1, 0.2, 0.4], **last)
    assert run.validation == Curve((0, 10, 20), (0.4, 0.3, 0.2))
    assert run.number("loss/validation") == 0.2 and run.number("views/psnr") == 20.0
    assert run.forgotten == pytest.approx(0.3)
    begun_elsewhere = result(tmp_path, "b", 3, [0.4, 0.3, 0.2], [0.3, 0.2, 0.4])
    assert begun_elsewhere.forgotten == pytest.approx(0.3), "against the untouched model, not against its own start"
    assert run.views("views_psnr") == {"front": 21.0, "back": 19.0}
    assert run.seconds_per_step == 0.25 and run.prompts_alike == 0.5 and run.tiles is None


def test_what_is_absent_is_unknown_not_zero(tmp_path):
    run = result(tmp_path, "a", 0, [0.4, 0.3, 0.2], **{"views/copy_score": None})
    for value in (run.number("views/psnr"), run.number("views/copy_score"), run.forgotten):
        assert math.isnan(value)
    assert math.isnan(summarise("a", [run], "a").forgotten.mean)


def test_finished_means_evaluated_at_the_last_step_and_exported(tmp_path):
    done = lines([0.4, 0.3, 0.2])
    assert is_finished(write_run(tmp_path / "done", done), 20)
    assert not is_finished(write_run(tmp_path / "early", done[:-1]), 20)
    assert not is_finished(write_run(tmp_path / "unexported", done, exported=False), 20)
    assert not is_finished(tmp_path / "absent", 20)
    half = write_run(tmp_path / "half", done[:-1])
    with (half / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "loss/vali')  # killed while it wrote
    assert not is_finished(half, 20)


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


def test_the_same_numbers_are_inside_the_noise():
    change = paired_change([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])
    assert (change.value, change.low, change.high) == (0, 0, 0)
    assert outcome_of(change, 3) == "noise"


def test_verdicts_in_words():
    def verdict(change, pairs):
        return in_words(outcome_of(change, pairs), change)

    assert verdict(Interval(-0.12, -0.15, -0.09), 3) == "lower by 12 % (9 to 15)"
    assert verdict(Interval(0.034, 0.021, 0.05), 5) == "higher by 3.4 % (2.1 to 5)"
    assert verdict(Interval(-0.12, -0.25, 0.01), 5) == "inside the noise"
    assert verdict(Interval(-0.5, -0.6, -0.4), 2) == "too few seeds to say"
    assert verdict(Interval(-0.5), 1) == "too few seeds to say"


def test_forgetting_ratios_are_those_of_logs_where_all_are_positive():
    values, baseline = [0.01, 0.02, 0.04], [0.1, 0.1, 0.2]
    logs = [math.log(v / b) for v, b in zip(values, baseline, strict=True)]
    found = paired_ratio(values, baseline)
    assert found.value == pytest.approx(math.exp(sum(logs) / 3)) and found.low < found.value < found.high
    assert paired_ratio([-0.01, 0.02, 0.04], baseline) == ratio_of_means([-0.01, 0.02, 0.04], baseline)


def crossing_by_walking(curve, level):
    """Ten thousand small steps along the line."""
    pieces = list(itertools.pairwise(zip(curve.steps, curve.values, strict=True)))
    for (x0, y0), (x1, y1) in pieces:
        for k in range(10_001):
            if y0 + (y1 - y0) * k / 10_000 <= level:
                return x0 + (x1 - x0) * k / 10_000
    return math.inf


@pytest.mark.parametrize("level", [1.0, 0.8, 0.55, 0.3, 0.1])
def test_first_crossing_is_found_by_walking(level):
    curve = Curve((0, 10, 30, 40), (0.9, 0.5, 0.7, 0.2))
    assert first_crossing(curve, level) == pytest.approx(crossing_by_walking(curve, level), abs=0.01)


def test_crossing_of_an_unknown_level_is_unknown():
    assert math.isnan(first_crossing(Curve((0,), (1.0,)), math.nan))


def all_resamples(values):
    """The exact bootstrap distribution: every way to draw n of n."""
    return sorted(median(pick) for pick in itertools.product(values, repeat=len(values)))


def test_bootstrap_of_the_median_is_near_the_exact_one():
    values = [0.3, 0.5, 0.6, 0.9]
    exact = all_resamples(values)
    found = reach(values)
    assert found.share.value == pytest.approx(0.55) and (found.reached, found.of) == (4, 4)
    assert exact[int(0.01 * len(exact))] <= found.share.low <= exact[int(0.05 * len(exact))]
    assert exact[int(0.95 * len(exact))] <= found.share.high <= exact[-1]


def test_never_reached_stays_never():
    some = reach([0.4, 0.5, 0.6, math.inf, math.inf])
    assert (some.reached, some.of) == (3, 5)
    assert some.share.value == 0.6 and some.share.low == pytest.approx(0.4) and math.isinf(some.share.high)
    never = reach([math.inf] * 3)
    assert never.reached == 0 and math.isinf(never.share.value) and math.isinf(never.share.low)
    two = reach([0.5, math.inf])
    assert math.isinf(two.share.value) and math.isnan(two.share.low)
    assert reach([]).of == 0 and math.isnan(reach([]).share.value)


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
    assert found.forgotten_ratio.value == pytest.approx(0.5)
    assert found.reach.reached == 3 and found.reach.share.value < 0.5
    assert summarise("base", runs, "base").verdict == "the baseline"
    assert summarise("other", runs, "base").verdict == "no finished run"


def test_worst_view_is_named(tmp_path):
    last = {"views_psnr/front": 21.0, "views_psnr/back": 19.0}
    assert summarise("a", [result(tmp_path, "a", 0, [1, 1, 1], **last)], "a").worst_view == "back"
