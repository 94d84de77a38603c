"""From measurements to findings.

Pure functions of what train.doctor.look measured. What is usual is taken from the data set itself, view by view: medians, and
deviations in units of the median deviation, which a few faulty samples do not move.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from train.doctor.kinds import CUT, KINDS, LEAST_SHARE, Finding, Sample, view_names
from train.doctor.look import Picture
from train.doctor.order import ENOUGH_SAMPLES, Array, comparable, noticed_exchanges, order_of_all, orders

UNUSUAL = 6 * 1.4826
"""Median deviations from the median: six standard deviations, were they normally distributed."""
LEAST_FACTOR = 2.0
"""Share of the foreground against the median that is unusual at least, however alike the others are."""
LEAST_OFFSET = 0.12
"""Distance of the centre of mass from the median along an axis, in sides, likewise."""
WELL_NOTICED = 0.95
"""Share of exchanged views that would be noticed, from which on nothing is said of the others."""


@dataclass(frozen=True)
class ViewNumbers:
    """What is usual in a view, over all pictures whose foreground is known."""

    name: str
    pictures: int
    share: float
    """Median share of the foreground, in [0, 1]; this and the next NaN where there is no picture."""
    centre: tuple[float, float]
    """Median centre of mass, right and down from the middle, in sides."""


def find(samples: Sequence[Sample], num_views: int, size: int) -> list[Finding]:
    """Everything that is wrong, in the order of KINDS.

    size: side in pixels at which training takes the pictures.
    """
    names = view_names(num_views)
    reordered = orders(samples, names)
    disordered = {s for finding in reordered for s in finding.samples}
    found = chain(
        _faults(samples, names),
        _of_pictures(samples, names, size),
        # Views in the wrong order have the sizes and places of other views: one cause is said once.
        _outliers([None if s in disordered else sample for s, sample in enumerate(samples)], names),
        _shared(samples, names),
        reordered,
        order_of_all(samples, names),
    )
    rank = {kind: place for place, kind in enumerate(KINDS)}
    return sorted(found, key=lambda finding: (rank[finding.kind], finding.samples))


def not_looked_at(samples: Sequence[Sample]) -> list[str]:
    """What no finding can be made of, and why: sentences."""
    said = []
    complete = len(comparable(samples))
    if complete < ENOUGH_SAMPLES:
        said.append(
            f"Order of views: {complete} of {len(samples)} objects have all views, different ones, with a known foreground; "
            f"compared from {ENOUGH_SAMPLES} on."
        )
    noticed = noticed_exchanges(samples)
    if noticed < WELL_NOTICED:
        said.append(
            f"Views that look alike here: of all exchanges of two views in one object, {noticed:.0%} would be noticed in this "
            "data set."
        )
    if sum(any(picture is not None for picture in sample.pictures) for sample in samples) < ENOUGH_SAMPLES:
        said.append(f"Unusual sizes and places: there are fewer than {ENOUGH_SAMPLES} objects.")
    said.append(
        "An order of views that all objects share, where it keeps opposite views opposite (the whole ring the other way round)."
    )
    return said


def usual(samples: Sequence[Sample], num_views: int) -> list[ViewNumbers]:
    """The data set in numbers, by view."""
    found = []
    for view, name in enumerate(view_names(num_views)):
        shares, centres = _places([sample.foreground(view) for sample in samples])
        there = np.isfinite(shares) & np.isfinite(centres).all(1)
        share, (x, y) = (
            (float(np.median(shares[there])), np.median(centres[there], axis=0)) if there.any() else (np.nan, (np.nan, np.nan))
        )
        found.append(ViewNumbers(name, int(there.sum()), share, (float(x), float(y))))
    return found


# ------------------------------------------------------------------------------------------------------ single pictures


def _faults(samples: Sequence[Sample], names: Sequence[str]) -> Iterator[Finding]:
    """What training refuses."""
    for s, sample in enumerate(samples):
        if sample.fault:
            yield Finding(sample.fault[0], (s,), (), sample.fault[1])
            continue
        if sample.missing:
            yield _by_view("missing_views", s, sample.missing, names)
        if sample.broken:
            yield _by_view("broken", s, sample.broken, names, "; ".join(dict.fromkeys(sample.broken.values())))
        if sample.empty:
            yield _by_view("empty", s, sample.empty, names)


def _of_pictures(samples: Sequence[Sample], names: Sequence[str], size: int) -> Iterator[Finding]:
    """What can be told from each picture, but for the size that most have."""
    sizes = Counter((p.width, p.height) for sample in samples for p in sample.pictures if p is not None)
    usual_size, holders = sizes.most_common(1)[0] if sizes else ((0, 0), 0)
    has_usual = 2 * holders > sizes.total()
    for s, sample in enumerate(samples):
        there = {v: p for v, p in enumerate(sample.pictures) if p is not None}
        by_kind: dict[str, dict[int, str]] = defaultdict(dict)
        for v, picture in there.items():
            for kind, said in _picture_kinds(picture, size, usual_size if has_usual else None):
                by_kind[kind][v] = said
        for kind, views in by_kind.items():
            yield _by_view(kind, s, views, names, ", ".join(dict.fromkeys(filter(None, views.values()))))


def _picture_kinds(picture: Picture, size: int, usual_size: tuple[int, int] | None) -> Iterator[tuple[str, str]]:
    """(kind, detail) of what is wrong with one picture."""
    sides = (picture.width, picture.height)
    written = f"{picture.width}x{picture.height}"
    if picture.width != picture.height:
        yield "not_square", written
    elif picture.width < size:
        yield "small", written
    elif usual_size is not None and sides != usual_size:
        yield "other_size", f"{written}, most are {usual_size[0]}x{usual_size[1]}"
    if not picture.is_intact:
        yield "damaged", ""
    if picture.is_plain or picture.share < LEAST_SHARE:
        yield "nearly_empty", ""
    if not picture.has_alpha and picture.even_border:
        yield "no_alpha", ""
    if not picture.even_border:
        yield "uneven_background", ""
    if picture.at_border >= CUT:
        yield "cut", ""


def _by_view(kind: str, s: int, views: Iterable[int], names: Sequence[str], said: str = "") -> Finding:
    views = tuple(views)
    which = _which(views, names)
    return Finding(kind, (s,), views, f"{which}: {said}" if said else which)


def _which(views: Sequence[int], names: Sequence[str]) -> str:
    return "all views" if len(views) == len(names) > 1 else ", ".join(names[v] for v in views)


# ------------------------------------------------------------------------------------------------- against the data set


def _places(pictures: Sequence[Picture | None]) -> tuple[Array, Array]:
    """Shares [B] and centres [B, 2]; NaN where there is no picture."""
    shares = np.array([np.nan if p is None else p.share for p in pictures])
    return shares, np.array([(np.nan, np.nan) if p is None else p.centre for p in pictures]).reshape(-1, 2)


def _outliers(samples: Sequence[Sample | None], names: Sequence[str]) -> Iterator[Finding]:
    """Sizes and places far from the median of their view."""
    sizes: dict[int, dict[int, str]] = defaultdict(dict)
    places: dict[int, dict[int, str]] = defaultdict(dict)
    for view in range(len(names)):
        shares, centres = _places([None if sample is None else sample.foreground(view) for sample in samples])
        if np.isfinite(shares).sum() < ENOUGH_SAMPLES:
            continue
        median = np.nanmedian(shares)
        for s in _far(np.log(shares), np.log(LEAST_FACTOR)):
            sizes[s][view] = f"{names[view]} {shares[s]:.1%} (median {median:.1%})"
        x, y = np.nanmedian(centres, axis=0)
        for s in {*_far(centres[:, 0], LEAST_OFFSET), *_far(centres[:, 1], LEAST_OFFSET)}:
            places[s][view] = f"{names[view]} {centres[s, 0]:+.2f} {centres[s, 1]:+.2f} (median {x:+.2f} {y:+.2f})"
    for kind, found in (("size", sizes), ("place", places)):
        for s, said in found.items():
            yield Finding(kind, (s,), tuple(said), "; ".join(said.values()))


def _far(values: Array, least: float) -> list[int]:
    """Indices of those further from the median than UNUSUAL median deviations, and than `least`. NaN is left out."""
    distance = np.abs(values - np.nanmedian(values))
    return [int(i) for i in np.flatnonzero(distance > max(least, UNUSUAL * float(np.nanmedian(distance))))]


def _shared(samples: Sequence[Sample], names: Sequence[str]) -> Iterator[Finding]:
    """The same picture in two views, in two objects, in training and validation. Plain pictures are all the same."""
    holders: dict[bytes, list[tuple[int, int]]] = defaultdict(list)
    for s, sample in enumerate(samples):
        for v, picture in enumerate(sample.pictures):
            if picture is not None and not picture.is_plain:
                holders[picture.content].append((s, v))
    same_views: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    groups: dict[tuple[str, tuple[int, ...]], list[int]] = defaultdict(list)
    for places in holders.values():
        views_of: dict[int, list[int]] = defaultdict(list)
        for s, v in places:
            views_of[s].append(v)
        for s, equal in views_of.items():
            if len(equal) > 1:
                same_views[s].append(tuple(equal))
        train, val = ([s for s in views_of if samples[s].is_train == is_train] for is_train in (True, False))
        for kind, group, wanted in (
            ("duplicates", train, len(train) > 1),
            ("duplicates", val, len(val) > 1),
            ("leak", train + val, bool(train and val)),
        ):
            if wanted:
                groups[kind, tuple(group)] += views_of[group[0]]
    for s, equals in same_views.items():
        said = "; ".join(" = ".join(names[v] for v in equal) for equal in equals)
        yield Finding("same_views", (s,), tuple(sorted(chain(*equals))), said)
    for (kind, members), shared in groups.items():
        in_views = tuple(sorted(set(shared)))
        yield Finding(kind, members, in_views, f"the same in {_which(in_views, names)}")
