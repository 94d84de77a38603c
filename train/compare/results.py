"""Finished runs as plain numbers, and what may be said of them. Reads metrics.jsonl; trains and draws nothing.

Every comparison is paired: the same seed is the same order of data and the same noise, so each variant's run is set against
the baseline's run of that seed, and only the differences are averaged.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, Literal

from train.log.series import is_evaluation, read_series

FEWEST_SEEDS = 3
"""For an interval to say anything."""
CONFIDENCE = 0.95
Outcome = Literal["baseline", "lower", "higher", "noise", "unknown", "absent"]
RESAMPLES = 9999
OBJECTIVES = "objective/held_out_"
"""What the names of series of objectives on held-out objects begin with (`monitor.objectives`)."""


@dataclass(frozen=True)
class Curve:
    """A series at the steps where it was measured."""

    steps: tuple[int, ...] = ()
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class RunResult:
    """What one finished run measured."""

    variant: str
    seed: int
    steps: int
    validation: Curve
    original: Curve
    """Loss on the pretrained model's own domain; empty where it was not measured."""
    original_pretrained: float
    """The same of the untouched pretrained model under its own prompt; NaN where it was not measured."""
    final: Mapping[str, float]
    """Series of the last evaluation, by their names in metrics.jsonl; what was not finite is left out."""
    prompts_alike: float
    """Mean cosine between the views' prompts at the end; NaN where it was not logged."""
    seconds_per_step: float
    """Median; NaN where it was not logged."""
    tiles: Path | None
    """The pictures of the last evaluation; None where the run wrote none."""

    def number(self, name: str) -> float:
        """A series at the end, NaN where it is absent."""
        return self.final.get(name, math.nan)

    @property
    def forgotten(self) -> float:
        """How much higher the loss on the pretrained model's domain is at the end than the untouched model's; NaN where it was
        not measured. Not the rise since step 0: a variant that begins under other prompts begins worse than that model."""
        measured = self.original.steps[-1:] == (self.steps,)
        return self.original.values[-1] - self.original_pretrained if measured else math.nan

    def views(self, kind: str) -> dict[str, float]:
        """`views_psnr` or `views_ssim` by view, in the order of the views in the pictures."""
        return {name.split("/", 1)[1]: value for name, value in self.final.items() if name.startswith(f"{kind}/")}


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval; NaN is unknown, infinity is never reached."""

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Spread:
    """A number over seeds; NaN is unknown."""

    mean: float = math.nan
    deviation: float = math.nan
    """Standard deviation over seeds (n - 1); NaN with one seed."""
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Reach:
    """How soon a variant came to the baseline's final loss."""

    share: Interval
    """Of the baseline's steps; the median over seeds."""
    reached: int
    of: int


@dataclass(frozen=True)
class Summary:
    """A variant over all its seeds."""

    variant: str
    seeds: tuple[int, ...]
    paired: int
    """Seeds that the baseline has too."""
    loss: Spread
    change: Interval
    """Of the final loss, relative to the baseline on the same seeds: -0.1 is a tenth lower."""
    changes: tuple[float, ...]
    """The same for each paired seed."""
    outcome: Outcome
    """What the change lets one say."""
    verdict: str
    """The same in words."""
    reach: Reach
    forgotten: Spread
    forgotten_ratio: Interval
    """Over the baseline's."""
    series: Mapping[str, Spread]
    """Other series at the end, by their names in metrics.jsonl."""
    objective_changes: Mapping[str, Interval]
    """Of what the objectives are for on held-out objects, by the names of the series: paired differences to the baseline."""
    psnr_change: Interval
    """In dB, paired."""
    view_psnr: Mapping[str, float]
    view_ssim: Mapping[str, float]
    prompts_alike: Spread
    seconds_per_step: Spread

    @property
    def worst_view(self) -> str | None:
        """The view of the lowest PSNR."""
        return min(self.view_psnr, key=self.view_psnr.__getitem__) if self.view_psnr else None


# ------------------------------------------------------------------------------------------------------------- reading


def is_finished(run: Path, steps: int) -> bool:
    """Whether a run has evaluated its last step and exported its prompt."""
    evaluated = any(line["step"] == steps and is_evaluation(line) for line in read_series(run))
    return evaluated and (run / "export" / "clr_embeds.pt").is_file()


def read_run(run: Path, *, variant: str, seed: int, steps: int) -> RunResult:
    """The numbers of a finished run."""
    lines = read_series(run)
    at_end = {name: v for line in lines if line["step"] == steps and is_evaluation(line) for name, v in line.items()}
    alike = _curve(lines, "prompt_views_alike/mean_cosine")
    speeds = [value for value in _curve(lines, "speed/steps_per_second").values if value > 0]
    tiles = run / "previews" / f"tiles-step-{steps:06d}.png"
    return RunResult(
        variant=variant,
        seed=seed,
        steps=steps,
        validation=_curve(lines, "loss/validation"),
        original=_curve(lines, "loss/original"),
        original_pretrained=next(iter(_curve(lines, "loss/original_pretrained").values), math.nan),
        final={name: float(v) for name, v in at_end.items() if v is not None and name != "step"},
        prompts_alike=alike.values[-1] if alike.values else math.nan,
        seconds_per_step=median(1 / speed for speed in speeds) if speeds else math.nan,
        tiles=tiles if tiles.is_file() else None,
    )


def _curve(lines: Sequence[Mapping[str, Any]], name: str) -> Curve:
    points = {line["step"]: float(line[name]) for line in lines if line.get(name) is not None}
    return Curve(tuple(sorted(points)), tuple(points[step] for step in sorted(points)))


# ---------------------------------------------------------------------------------------------------------- statistics


def spread(values: Sequence[float]) -> Spread:
    """Mean, standard deviation and range of the values that are known."""
    known = [v for v in values if not math.isnan(v)]
    if not known:
        return Spread()
    return Spread(fmean(known), stdev(known) if len(known) > 1 else math.nan, min(known), max(known))


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Interval:
    """Mean of the paired differences and its 95 % t interval; unknown bounds with one pair."""
    from scipy.stats import t

    pairs = [(v, b) for v, b in zip(values, baseline, strict=True) if math.isfinite(v) and math.isfinite(b)]
    if not pairs:
        return Interval()
    differences = [v - b for v, b in pairs]
    mean = fmean(differences)
    if len(pairs) < 2:
        return Interval(mean)
    half = float(t.ppf((1 + CONFIDENCE) / 2, len(pairs) - 1)) * stdev(differences) / math.sqrt(len(pairs))
    return Interval(mean, mean - half, mean + half)


def paired_change(values: Sequence[float], baseline: Sequence[float]) -> Interval:
    """Relative difference to the baseline: the paired t interval of log(value / baseline), as exp(.) - 1.

    Logarithms, since losses differ by factors, and so that twice and half are equally far from the baseline. Values that are
    not positive are left out with their pair.
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
    for step, value in zip(curve.steps, curve.values, strict=True):
        if value <= level:
            if before is None:
                return float(step)
            return before[0] + (before[1] - level) / (before[1] - value) * (step - before[0])
        before = (step, value)
    return math.inf


def reach(shares: Sequence[float]) -> Reach:
    """Median of the shares (infinity: never reached), its 95 % percentile bootstrap interval, and how many are finite.

    A median or bound that lies between a finite share and infinity is infinite: nothing in between was seen.
    """
    import numpy as np
    from scipy.stats import bootstrap

    finite = [s for s in shares if math.isfinite(s)]
    known = [s for s in shares if not math.isnan(s)]
    if not known:
        return Reach(Interval(), 0, 0)
    largest = max(finite, default=0.0)
    never = 1e9 * (1 + largest)  # finite, since interpolation between infinities is no number
    stand_in = [s if math.isfinite(s) else never for s in known]

    def back(value: float) -> float:
        return math.inf if value > largest * (1 + 1e-9) else float(value)

    value = back(median(stand_in))
    if len(known) < FEWEST_SEEDS:
        return Reach(Interval(value), len(finite), len(known))
    if min(stand_in) == max(stand_in):  # each resample is the same
        return Reach(Interval(value, value, value), len(finite), len(known))
    bounds = bootstrap(
        (stand_in,),
        np.median,
        vectorized=True,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Reach(Interval(value, back(bounds.low), back(bounds.high)), len(finite), len(known))


def ratio_of_means(values: Sequence[float], baseline: Sequence[float]) -> Interval:
    """Mean of the values over the baseline's mean, with a percentile bootstrap that draws seeds, the pair together.

    Unknown unless the baseline's mean is positive (nothing was forgotten there: a ratio would mean nothing); its bounds are
    unknown unless every baseline value is.
    """
    import numpy as np
    from scipy.stats import bootstrap

    pairs = [(v, b) for v, b in zip(values, baseline, strict=True) if math.isfinite(v) and math.isfinite(b)]
    if not pairs or fmean(b for _, b in pairs) <= 0:
        return Interval()
    value = fmean(v for v, _ in pairs) / fmean(b for _, b in pairs)
    ratios = [v / b for v, b in pairs if b > 0]
    if len(pairs) < FEWEST_SEEDS or len(ratios) < len(pairs):
        return Interval(value)
    if max(ratios) - min(ratios) <= 1e-12 * abs(value):
        return Interval(value, value, value)
    bounds = bootstrap(
        ([v for v, _ in pairs], [b for _, b in pairs]),
        lambda v, b, axis=-1: np.mean(v, axis=axis) / np.mean(b, axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(value, float(bounds.low), float(bounds.high))


def paired_ratio(values: Sequence[float], baseline: Sequence[float]) -> Interval:
    """Value over baseline: the mean of the paired log ratios and its t interval where all are positive, as for the loss;
    otherwise the ratio of the means with its bootstrap interval, which is too narrow with few seeds."""
    known = [v for side in (values, baseline) for v in side if math.isfinite(v)]
    if not all(v > 0 for v in known):
        return ratio_of_means(values, baseline)
    change = paired_change(values, baseline)
    return Interval(*(1 + bound for bound in (change.value, change.low, change.high)))


def outcome_of(change: Interval, pairs: int) -> Outcome:
    """What a paired relative difference of the loss lets one say."""
    if pairs < FEWEST_SEEDS or math.isnan(change.low):
        return "unknown"
    if change.low <= 0 <= change.high:
        return "noise"
    return "lower" if change.value < 0 else "higher"


def in_words(outcome: Outcome, change: Interval) -> str:
    """An outcome for people, e.g. `lower by 12 % (9 to 15)`."""
    if outcome not in ("lower", "higher"):
        return {
            "baseline": "the baseline",
            "noise": "inside the noise",
            "unknown": "too few seeds to say",
            "absent": "no finished run",
        }[outcome]
    near, far = sorted((abs(change.low), abs(change.high)))
    return f"{outcome} by {_percent(abs(change.value))} % ({_percent(near)} to {_percent(far)})"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}" if share >= 0.095 else f"{100 * share:.2g}"


def summarise(variant: str, results: Sequence[RunResult], baseline: str) -> Summary:
    """All runs of one variant against the baseline's runs of the same seeds.

    results: of all variants.
    """
    own = sorted((r for r in results if r.variant == variant), key=lambda r: r.seed)
    against = {r.seed: r for r in results if r.variant == baseline}
    pairs = [(r, against[r.seed]) for r in own if r.seed in against]
    losses = [(r.number("loss/validation"), b.number("loss/validation")) for r, b in pairs]
    change = paired_change(*_sides(losses))
    names = dict.fromkeys(name for r in own for name in r.final)
    usable = sum(math.isfinite(v) and math.isfinite(b) for v, b in losses)
    outcome: Outcome = "baseline" if variant == baseline else outcome_of(change, usable) if own else "absent"
    return Summary(
        variant=variant,
        seeds=tuple(r.seed for r in own),
        paired=len(pairs),
        loss=spread([r.number("loss/validation") for r in own]),
        change=change,
        changes=tuple(v / b - 1 if b > 0 else math.nan for v, b in losses),
        outcome=outcome,
        verdict=in_words(outcome, change),
        reach=reach([first_crossing(r.validation, b.number("loss/validation")) / b.steps for r, b in pairs]),
        forgotten=spread([r.forgotten for r in own]),
        forgotten_ratio=paired_ratio(*_sides([(r.forgotten, b.forgotten) for r, b in pairs])),
        series={name: spread([r.number(name) for r in own]) for name in names},
        objective_changes={
            name: paired_difference(*_sides([(r.number(name), b.number(name)) for r, b in pairs]))
            for name in names
            if name.startswith(OBJECTIVES)
        },
        psnr_change=paired_difference(*_sides([(r.number("views/psnr"), b.number("views/psnr")) for r, b in pairs])),
        view_psnr=_mean_views(own, "views_psnr"),
        view_ssim=_mean_views(own, "views_ssim"),
        prompts_alike=spread([r.prompts_alike for r in own]),
        seconds_per_step=spread([r.seconds_per_step for r in own]),
    )


def _sides(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [v for v, _ in pairs], [b for _, b in pairs]


def _mean_views(own: Sequence[RunResult], kind: str) -> dict[str, float]:
    by_run = [r.views(kind) for r in own]
    names = dict.fromkeys(name for views in by_run for name in views)
    return {name: spread([views[name] for views in by_run if name in views]).mean for name in names}
