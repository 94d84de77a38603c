"""The numbers of finished runs, and the statistics of a variant against the baseline.

Every comparison is paired: the same seed means the same order of data and the same noise, so each run of a variant is compared
with the baseline's run of that seed, and only the differences are averaged.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, Literal

from train.log.series import is_evaluation, read_series

FEWEST_SEEDS = 3
"""Seeds without which there is no verdict."""
CONFIDENCE = 0.95
RESAMPLES = 9999
LOSS, ORIGINAL, PSNR = "loss/validation", "loss/original", "views/psnr"
FORGETTING, PROMPTS_ALIKE, SECONDS = "forgetting", "prompt_views_alike/mean_cosine", "seconds_per_step"
"""Numbers of a run beside those of its last evaluation: how much higher the loss on the original domain is at the end than the
pretrained model's; mean cosine between the views' prompts at the end; median time."""
OBJECTIVES = "objective/held_out_"
"""Prefix of the objectives that are measured on held-out objects (`monitor.objectives`)."""
Outcome = Literal["baseline", "lower", "higher", "not significantly different", "too few seeds", "no finished run"]
Curve = Mapping[int, float]
"""The values of a series by step, in order."""


@dataclass(frozen=True)
class RunResult:
    """The numbers of one finished run."""

    variant: str
    seed: int
    steps: int
    validation: Curve
    original: Curve
    """Loss on the original domain; empty where it was not measured."""
    final: Mapping[str, float]
    """Series of the last evaluation by their names in metrics.jsonl, without those that were not finite; and FORGETTING,
    PROMPTS_ALIKE and SECONDS, NaN where they are unknown."""
    tiles: Path | None
    """Picture of the last previews; None where the run wrote none."""

    def number(self, name: str) -> float:
        """A final number; NaN where it is unknown."""
        return self.final.get(name, math.nan)


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval; NaN is unknown, infinity is never reached."""

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (n - 1) over seeds; NaN is unknown, as the deviation is with one seed."""

    mean: float = math.nan
    deviation: float = math.nan


@dataclass(frozen=True)
class Summary:
    """A variant over all its seeds."""

    variant: str
    seeds: tuple[int, ...]
    paired: int
    """Seeds with a run of the baseline as well."""
    series: Mapping[str, Spread]
    """Final numbers, by name."""
    differences: Mapping[str, Interval]
    """Paired differences of the same numbers to the baseline."""
    change: Interval
    """Paired relative change of the final loss to the baseline: -0.1 is a tenth lower."""
    changes: tuple[float, ...]
    """The change for each paired seed."""
    outcome: Outcome
    reach: Interval
    """Share of all steps after which the loss came down to the baseline's final loss; the median over the paired seeds."""
    reached: tuple[int, int]
    """How many paired seeds came down to it, of how many."""
    forgetting_ratio: Interval
    """Forgetting over the baseline's."""

    def of(self, name: str) -> Spread:
        """A final number over the seeds; unknown where no run has it."""
        return self.series.get(name, Spread())

    def difference(self, name: str) -> Interval:
        """Paired difference of a final number to the baseline; unknown where no run has it."""
        return self.differences.get(name, Interval())

    @property
    def amount(self) -> str:
        """The change of the loss in words, e.g. `12 % (9 to 15)`."""
        near, far = sorted((abs(self.change.low), abs(self.change.high)))
        return f"{_percent(abs(self.change.value))} % ({_percent(near)} to {_percent(far)})"

    @property
    def verdict(self) -> str:
        """The outcome in words, e.g. `lower by 12 % (9 to 15)`."""
        return f"{self.outcome} by {self.amount}" if self.outcome in ("lower", "higher") else self.outcome

    @property
    def worst_view(self) -> str | None:
        """The view with the lowest PSNR."""
        return min(views(self.series), key=lambda view: self.of(f"views_psnr/{view}").mean, default=None)


def _percent(share: float) -> str:
    return f"{100 * share:.0f}" if share >= 0.095 else f"{100 * share:.2g}"


def views(names: Iterable[str]) -> list[str]:
    """The views among the names of series, in the order of the views in the pictures."""
    return [name.removeprefix("views_psnr/") for name in names if name.startswith("views_psnr/")]


def read_run(run: Path, *, variant: str, seed: int, steps: int) -> RunResult | None:
    """The numbers of a run; None where it has not evaluated its last step and exported its prompt."""
    points = read_series(run)
    last = {name: v for point in points if point["step"] == steps and is_evaluation(point) for name, v in point.items()}
    if not last or not (run / "export" / "clr_embeds.pt").is_file():
        return None
    original = _curve(points, ORIGINAL)
    # Not the rise since step 0: a variant that begins under another prompt begins worse than the pretrained model.
    pretrained = next(iter(_curve(points, "loss/original_pretrained").values()), math.nan)
    speeds = [value for value in _curve(points, "speed/steps_per_second").values() if value > 0]
    derived = {
        FORGETTING: original.get(steps, math.nan) - pretrained,
        PROMPTS_ALIKE: next(reversed(_curve(points, PROMPTS_ALIKE).values()), math.nan),
        SECONDS: median(1 / speed for speed in speeds) if speeds else math.nan,
    }
    tiles = run / "previews" / f"tiles-step-{steps:06d}.png"
    return RunResult(
        variant=variant,
        seed=seed,
        steps=steps,
        validation=_curve(points, LOSS),
        original=original,
        final={name: float(v) for name, v in last.items() if v is not None and name != "step"} | derived,
        tiles=tiles if tiles.is_file() else None,
    )


def _curve(points: Sequence[Mapping[str, Any]], name: str) -> dict[int, float]:
    return dict(sorted({point["step"]: float(point[name]) for point in points if point.get(name) is not None}.items()))


# ---------------------------------------------------------------------------------------------------------- statistics


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation of the values that are known."""
    known = [v for v in values if not math.isnan(v)]
    if not known:
        return Spread()
    return Spread(fmean(known), stdev(known) if len(known) > 1 else math.nan)


def finite_pairs(values: Sequence[float], baseline: Sequence[float]) -> list[tuple[float, float]]:
    """The pairs of which both numbers are finite."""
    return [(v, b) for v, b in zip(values, baseline, strict=True) if math.isfinite(v) and math.isfinite(b)]


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Interval:
    """Mean of the paired differences and its 95 % t interval; the bounds are unknown with one pair."""
    from scipy.stats import t

    differences = [v - b for v, b in finite_pairs(values, baseline)]
    if not differences:
        return Interval()
    mean, n = fmean(differences), len(differences)
    if n < 2:
        return Interval(mean)
    # As scipy.stats.ttest_rel's interval, which warns where all differences are the same.
    half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * stdev(differences) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def paired_change(values: Sequence[float], baseline: Sequence[float]) -> Interval:
    """Relative difference to the baseline: the paired t interval of log(value / baseline), as exp(.) - 1.

    Logarithms, since losses differ by factors, and so that twice and half are equally far from the baseline. A pair with a
    value that is not positive is left out.
    """
    logs = [[math.log(v) if v > 0 else math.nan for v in side] for side in (values, baseline)]
    found = paired_difference(*logs)
    return Interval(math.expm1(found.value), math.expm1(found.low), math.expm1(found.high))


def first_crossing(curve: Curve, level: float) -> float:
    """The step at which the line through a curve's points first comes down to `level`; infinity if it never does, NaN where
    the level is."""
    if math.isnan(level):
        return math.nan
    before: tuple[int, float] | None = None
    for step, value in curve.items():
        if value <= level:
            if before is None:
                return float(step)
            return before[0] + (before[1] - level) / (before[1] - value) * (step - before[0])
        before = (step, value)
    return math.inf


def _bootstrap(samples: Sequence[Sequence[float]], statistic: Callable[..., Any]) -> tuple[float, float]:
    """Bounds of the 95 % percentile bootstrap interval, which draws seeds: all samples of a seed together."""
    import numpy as np
    from scipy.stats import bootstrap

    bounds = bootstrap(
        samples,
        statistic,
        paired=len(samples) > 1,
        vectorized=True,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(bounds.low), float(bounds.high)


def median_share(shares: Sequence[float]) -> Interval:
    """Median of the shares (infinity: never reached) and its 95 % percentile bootstrap interval.

    A median or bound that lies between a finite share and infinity is infinite: nothing in between was seen.
    """
    import numpy as np

    known = [s for s in shares if not math.isnan(s)]
    if not known:
        return Interval()
    largest = max(filter(math.isfinite, known), default=0.0)
    never = 1e9 * (1 + largest)  # finite, since infinities cannot be interpolated
    stand_in = [s if math.isfinite(s) else never for s in known]
    found = [median(stand_in), *(_bootstrap([stand_in], np.median) if len(known) >= FEWEST_SEEDS else ())]
    return Interval(*(math.inf if v > largest * (1 + 1e-9) else v for v in found))


def ratio_of_means(values: Sequence[float], baseline: Sequence[float]) -> Interval:
    """Mean of the values over the baseline's mean, with a percentile bootstrap interval.

    Unknown unless the baseline's mean is positive (where nothing was forgotten, a ratio would mean nothing); its bounds are
    unknown unless every baseline value is.
    """
    import numpy as np

    pairs = finite_pairs(values, baseline)
    if not pairs or fmean(b for _, b in pairs) <= 0:
        return Interval()
    over, under = zip(*pairs, strict=True)
    value = fmean(over) / fmean(under)
    if len(pairs) < FEWEST_SEEDS or min(under) <= 0:
        return Interval(value)
    return Interval(value, *_bootstrap([over, under], lambda v, b, axis=-1: np.mean(v, axis=axis) / np.mean(b, axis=axis)))


def paired_ratio(values: Sequence[float], baseline: Sequence[float]) -> Interval:
    """Value over baseline: the mean of the paired log ratios and its t interval where all are positive, as for the loss;
    otherwise the ratio of the means with its bootstrap interval, which is too narrow with few seeds."""
    if not all(v > 0 for v in (*values, *baseline) if math.isfinite(v)):
        return ratio_of_means(values, baseline)
    change = paired_change(values, baseline)
    return Interval(1 + change.value, 1 + change.low, 1 + change.high)


def outcome_of(change: Interval, pairs: int) -> Outcome:
    """What a paired relative change of the loss shows at the 5 % level."""
    if pairs < FEWEST_SEEDS or math.isnan(change.low):
        return "too few seeds"
    if change.low <= 0 <= change.high:
        return "not significantly different"
    return "lower" if change.value < 0 else "higher"


def summarise(variant: str, results: Sequence[RunResult], baseline: str) -> Summary:
    """All runs of one variant against the baseline's runs of the same seeds.

    results: the finished runs of all variants.
    """
    own = sorted((r for r in results if r.variant == variant), key=lambda r: r.seed)
    against = {r.seed: r for r in results if r.variant == baseline}
    pairs = [(r, against[r.seed]) for r in own if r.seed in against]

    def sides(name: str) -> tuple[list[float], list[float]]:
        return [r.number(name) for r, _ in pairs], [b.number(name) for _, b in pairs]

    names = dict.fromkeys(name for r in own for name in r.final)
    losses = sides(LOSS)
    change = paired_change(*losses)
    usable = len(finite_pairs(*losses))
    shares = [first_crossing(r.validation, b.number(LOSS)) / b.steps for r, b in pairs]
    return Summary(
        variant=variant,
        seeds=tuple(r.seed for r in own),
        paired=len(pairs),
        series={name: spread([r.number(name) for r in own]) for name in names},
        differences={name: paired_difference(*sides(name)) for name in names},
        change=change,
        changes=tuple(v / b - 1 if b > 0 else math.nan for v, b in zip(*losses, strict=True)),
        outcome="baseline" if variant == baseline else outcome_of(change, usable) if own else "no finished run",
        reach=median_share(shares),
        reached=(sum(map(math.isfinite, shares)), sum(not math.isnan(share) for share in shares)),
        forgetting_ratio=paired_ratio(*sides(FORGETTING)),
    )
