"""Checks of a data set: from measurements to findings.

What is usual is measured on the data set itself, view by view: medians, and deviations in units of the median deviation, which
a few faulty samples do not change.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np

from softprompt.prompt.templates import VIEWS
from train.doctor.inspect import Picture
from train.doctor.order import (
    BETTER_ORDER,
    Array,
    better_order,
    exchange_gains,
    order_in_words,
    unexpected_mirror,
    view_distances,
)
from train.doctor.samples import LEAST_SHARE, Sample

CUT = 0.02
"""Length of foreground on the border, in sides, from which the object is cut off: 10 pixels of 512. Less is a tight crop."""
ENOUGH_SAMPLES = 5
"""Number of samples from which medians are compared with."""
UNUSUAL = 6 * 1.4826
"""Median deviations from the median: six standard deviations of a normal distribution."""
LEAST_FACTOR = 2.0
"""Least factor between the foreground's share and its median that is unusual, however alike the other objects are."""
LEAST_OFFSET = 0.12
"""Least distance of the centre of mass from its median that is unusual, along an axis, in sides."""
WELL_NOTICED = 0.95
"""Share of exchanged views that would be noticed, from which the report does not mention the others."""


class Kind(NamedTuple):
    """A kind of finding."""

    title: str
    advice: str
    """What it means, and what to do."""


ERRORS = {
    "missing_folder": Kind(
        "sample folders missing",
        "The list names folders that do not exist. Correct the paths in the list, or mount the disk.",
    ),
    "no_views": Kind(
        "folders without views",
        "A sample's folder has no cam_ picture, neither directly nor in its images/. Move folders that are no samples away, or "
        "give a list file of the samples wanted.",
    ),
    "mixed_files": Kind(
        "mixed files or formats",
        "A view exists twice, or a sample's views have different formats; likely two exports lie in one folder. Leave one "
        "picture a view, all of one format.",
    ),
    "missing_views": Kind(
        "views missing",
        "Not every view has its cam_NNN picture. Export the views again, or remove the object.",
    ),
    "broken": Kind(
        "broken pictures",
        "A file cannot be decoded as PNG, JPEG, WebP or TIFF. Copy or export it again; convert other formats, do not rename "
        "them.",
    ),
    "empty": Kind(
        "empty pictures",
        "No pixel is visible: alpha is 0 everywhere. Segment the view again, or remove the object.",
    ),
}
"""Training would not run."""
WARNINGS = {
    "damaged": Kind(
        "damaged pictures",
        "A checksum in the file is wrong, or its end is missing; training decodes it nevertheless, with whatever it holds. "
        "Copy or export it again.",
    ),
    "nearly_empty": Kind(
        "nearly empty pictures",
        f"The picture has one colour, or its object covers less than {LEAST_SHARE:.1%} of it. Check whether the segmentation "
        "lost the object.",
    ),
    "not_square": Kind(
        "not square",
        "Training fits the picture into a square and keeps its aspect: the object gets smaller, and the rest is transparent. "
        "Crop to a square around the object.",
    ),
    "other_size": Kind(
        "other size than most pictures",
        "The picture's size differs from that of most pictures, and perhaps its scale too. Export it like the others.",
    ),
    "too_small": Kind(
        "smaller than the training size",
        "The picture has fewer pixels than --size and is scaled up: the model learns the blur. Export larger pictures.",
    ),
    "no_alpha": Kind(
        "no transparency",
        "The picture is RGB or opaque: data.background has no effect, and the model learns the background with the object. "
        "Segment the object and save RGBA, unless you want one plain background in all pictures.",
    ),
    "uneven_background": Kind(
        "uneven background",
        "The picture has no transparency and a border of several colours: the model learns the background, and object size, "
        "position and order of views cannot be checked. Segment the object and save RGBA.",
    ),
    "cut": Kind(
        "cut off at the border",
        f"The object touches the picture's border along {CUT:.0%} of a side or more. Export with a wider crop, or remove the "
        "object, unless all are meant to be cut off there, as busts are.",
    ),
    "unusual_size": Kind(
        "unusual object size",
        "The object's share of the picture is far from the data set's median for this view. Look for lost or added parts in "
        "the segmentation, and for another scale.",
    ),
    "unusual_position": Kind(
        "unusual object position",
        "The object's centre of mass is far from the data set's median for this view. Centre the crop as in the other "
        "pictures; look for stray pieces in the segmentation.",
    ),
    "identical_views": Kind(
        "identical views",
        "Views of one object are equal, pixel for pixel: the model learns to copy. Export the views again.",
    ),
    "duplicates": Kind(
        "duplicate objects",
        "Objects share pictures, pixel for pixel, and so count more than once. Keep one of them.",
    ),
    "leak": Kind(
        "training objects in validation",
        "Objects of --data.val have pictures of --data.train, pixel for pixel: validation cannot show overfitting. Remove them "
        "from one of the two.",
    ),
    "view_order": Kind(
        "order of views",
        "In another order, the object's views would look clearly more like those of the other objects. Look at the pictures; "
        "if they are in the wrong order, rename them.",
    ),
    "view_order_of_all": Kind(
        "order of views, all objects",
        "Opposite views show mirrored silhouettes; those that should be opposite do so less than others. The views are "
        f"{', '.join(VIEWS)}: azimuths 0, 45, 90, 180, 270, 315 degrees. Check whether yours are.",
    ),
}
"""Training would run, and learn from them."""
KINDS = ERRORS | WARNINGS
"""By name, in the order of the report."""


@dataclass(frozen=True)
class Finding:
    """One fault of a sample, or one that several share."""

    kind: str
    """Key of KINDS."""
    samples: tuple[int, ...]
    """Indices; empty for a fault of the whole data set."""
    views: tuple[int, ...]
    detail: str

    @property
    def is_error(self) -> bool:
        """Whether training would refuse it."""
        return self.kind in ERRORS


@dataclass(frozen=True)
class ViewNumbers:
    """Medians of a view over all pictures whose foreground is known."""

    name: str
    pictures: int
    share: float
    """Share of the foreground, in [0, 1]; NaN without pictures."""
    centre: tuple[float, float]
    """Centre of mass, right and down from the middle, in sides; NaN without pictures."""


def view_names(num_views: int) -> list[str]:
    """FaceLift's names for six views, numbers otherwise."""
    return list(VIEWS) if num_views == len(VIEWS) else [f"view {view}" for view in range(num_views)]


def find(samples: Sequence[Sample], num_views: int, size: int) -> list[Finding]:
    """All findings, in the order of KINDS.

    size: side in pixels at which training reads the pictures.
    """
    names = view_names(num_views)
    disordered = list(_view_orders(samples, names))
    moved = {s for finding in disordered for s in finding.samples}
    found = chain(
        _pictures(samples, names, size),
        # Views in the wrong order have the sizes and positions of other views: one cause, one finding.
        _outliers([None if s in moved else sample for s, sample in enumerate(samples)], names),
        _shared(samples, names),
        disordered,
        _view_order_of_all(samples, names),
    )
    rank = {kind: place for place, kind in enumerate(KINDS)}
    return sorted(found, key=lambda finding: (rank[finding.kind], finding.samples))


def not_inspected(samples: Sequence[Sample]) -> list[str]:
    """Sentences: what could not be checked, and why."""
    said = []
    which = _comparable(samples)
    if len(which) < ENOUGH_SAMPLES:
        said.append(
            f"Order of views: {len(which)} of {len(samples)} objects have all views, all different, with a known foreground; "
            f"expected {ENOUGH_SAMPLES} or more."
        )
    elif len(samples[which[0]].pictures) > 1:
        noticed = np.mean(exchange_gains(view_distances(_small(samples, which))) > BETTER_ORDER)
        if noticed < WELL_NOTICED:
            said.append(
                f"Views that look alike: of all exchanges of two views in one object, {noticed:.0%} would be noticed here."
            )
    if sum(any(picture is not None for picture in sample.pictures) for sample in samples) < ENOUGH_SAMPLES:
        said.append(f"Unusual sizes and positions: there are fewer than {ENOUGH_SAMPLES} objects.")
    return [*said, "An order that all objects share and that keeps opposite views opposite, such as the reversed ring."]


def medians(samples: Sequence[Sample], num_views: int) -> list[ViewNumbers]:
    """The data set in numbers, by view."""
    found = []
    for view, name in enumerate(view_names(num_views)):
        shares, centres = _positions([sample.foreground(view) for sample in samples])
        there = np.isfinite(shares) & np.isfinite(centres).all(1)
        share, x, y = np.median(np.column_stack([shares, centres])[there], axis=0) if there.any() else [np.nan] * 3
        found.append(ViewNumbers(name, int(there.sum()), float(share), (float(x), float(y))))
    return found


# ------------------------------------------------------------------------------------------------------ single pictures


def _pictures(samples: Sequence[Sample], names: Sequence[str], size: int) -> Iterator[Finding]:
    """Findings about each sample by itself, except for the size that most pictures have."""
    sizes = Counter((p.width, p.height) for sample in samples for p in sample.pictures if p is not None)
    usual_size = next((sides for sides, count in sizes.most_common(1) if 2 * count > sizes.total()), None)
    for s, sample in enumerate(samples):
        if sample.fault:
            yield Finding(sample.fault[0], (s,), (), sample.fault[1])
        by_kind: dict[str, dict[int, str]] = defaultdict(dict, {kind: dict(views) for kind, views in sample.refused.items()})
        for v, picture in enumerate(sample.pictures):
            for kind, said in () if picture is None else _picture_kinds(picture, size, usual_size):
                by_kind[kind][v] = said
        for kind, views in by_kind.items():
            if views:
                said = "; ".join(dict.fromkeys(filter(None, views.values())))
                yield Finding(kind, (s,), tuple(views), _which(views, names) + (f": {said}" if said else ""))


def _picture_kinds(picture: Picture, size: int, usual_size: tuple[int, int] | None) -> Iterator[tuple[str, str]]:
    """(kind, detail) of each finding about one picture."""
    sides = f"{picture.width}x{picture.height}"
    if picture.width != picture.height:
        yield "not_square", sides
    elif picture.width < size:
        yield "too_small", sides
    elif usual_size is not None and (picture.width, picture.height) != usual_size:
        yield "other_size", f"{sides}, most are {usual_size[0]}x{usual_size[1]}"
    if not picture.is_intact:
        yield "damaged", ""
    if picture.is_plain or picture.share < LEAST_SHARE:
        yield "nearly_empty", ""
    if not picture.has_foreground:
        yield "uneven_background", ""
    elif not picture.has_alpha:
        yield "no_alpha", ""
    if picture.at_border >= CUT:
        yield "cut", ""


def _which(views: Iterable[int], names: Sequence[str]) -> str:
    found = [names[v] for v in views]
    return "all views" if len(found) == len(names) > 1 else ", ".join(found)


# --------------------------------------------------------------------------------------------- against the whole data set


def _positions(pictures: Sequence[Picture | None]) -> tuple[Array, Array]:
    """Shares [B] and centres [B, 2] of the foreground; NaN for None."""
    shares = np.array([np.nan if p is None else p.share for p in pictures])
    return shares, np.array([(np.nan, np.nan) if p is None else p.centre for p in pictures]).reshape(-1, 2)


def _outliers(samples: Sequence[Sample | None], names: Sequence[str]) -> Iterator[Finding]:
    """Sizes and positions far from the median of their view."""
    sizes: dict[int, dict[int, str]] = defaultdict(dict)
    positions: dict[int, dict[int, str]] = defaultdict(dict)
    for view, name in enumerate(names):
        shares, centres = _positions([None if sample is None else sample.foreground(view) for sample in samples])
        if np.isfinite(shares).sum() < ENOUGH_SAMPLES:
            continue
        median = np.nanmedian(shares)
        for s in _far(np.log(shares), np.log(LEAST_FACTOR)):
            sizes[s][view] = f"{name} {shares[s]:.1%} (median {median:.1%})"
        x, y = np.nanmedian(centres, axis=0)
        for s in {*_far(centres[:, 0], LEAST_OFFSET), *_far(centres[:, 1], LEAST_OFFSET)}:
            positions[s][view] = f"{name} {centres[s, 0]:+.2f} {centres[s, 1]:+.2f} (median {x:+.2f} {y:+.2f})"
    for kind, found in (("unusual_size", sizes), ("unusual_position", positions)):
        for s, said in found.items():
            yield Finding(kind, (s,), tuple(said), "; ".join(said.values()))


def _far(values: Array, least: float) -> list[int]:
    """Indices further from the median than `least` and than UNUSUAL median deviations. NaN is left out."""
    distance = np.abs(values - np.nanmedian(values))
    return [int(i) for i in np.flatnonzero(distance > max(least, UNUSUAL * float(np.nanmedian(distance))))]


def _shared(samples: Sequence[Sample], names: Sequence[str]) -> Iterator[Finding]:
    """Equal pictures in two views, in two objects, in training and validation; plain pictures, all equal, are skipped."""
    holders: dict[bytes, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))  # content => sample => views
    for s, sample in enumerate(samples):
        for v, picture in enumerate(sample.pictures):
            if picture is not None and not picture.is_plain:
                holders[picture.content][s].append(v)
    same_views: dict[int, list[list[int]]] = defaultdict(list)
    groups: dict[tuple[str, tuple[int, ...]], set[int]] = defaultdict(set)
    for views_of in holders.values():
        for s, equal in views_of.items():
            if len(equal) > 1:
                same_views[s].append(equal)
        train, val = (tuple(s for s in views_of if samples[s].is_train == is_train) for is_train in (True, False))
        for kind, group in (("duplicates", train), ("duplicates", val), ("leak", train + val if train and val else ())):
            if len(group) > 1:
                groups[kind, group].update(views_of[group[0]])
    for s, equals in same_views.items():
        said = "; ".join(" = ".join(names[v] for v in equal) for equal in equals)
        yield Finding("identical_views", (s,), tuple(sorted(chain(*equals))), said)
    for (kind, members), shared in groups.items():
        yield Finding(kind, members, tuple(sorted(shared)), f"equal in {_which(sorted(shared), names)}")


def _comparable(samples: Sequence[Sample]) -> list[int]:
    """Samples with all views, known foregrounds, and no two views equal."""
    return [
        s
        for s, sample in enumerate(samples)
        if sample.pictures
        and all(sample.foreground(v) is not None for v in range(len(sample.pictures)))
        and len({p.content for p in sample.pictures if p is not None}) == len(sample.pictures)
    ]


def _small(samples: Sequence[Sample], which: Sequence[int]) -> Array:
    """[B, V, 16, 16, 4] in [0, 1], premultiplied."""
    return np.stack([[p.small for p in samples[s].pictures if p is not None] for s in which]) / np.float32(255)


def _view_orders(samples: Sequence[Sample], names: Sequence[str]) -> Iterator[Finding]:
    """Samples whose views, in another order, would look clearly more like the rest."""
    which = _comparable(samples)
    if len(which) < ENOUGH_SAMPLES or len(names) < 2:
        return
    for s, distance in zip(which, view_distances(_small(samples, which)), strict=True):
        order, gain = better_order(distance)
        if gain > BETTER_ORDER:
            moved = tuple(v for v, looks_like in enumerate(order) if v != looks_like)
            yield Finding("view_order", (s,), moved, f"{order_in_words(order, names)}: {gain:.0%} nearer to the rest")


def _view_order_of_all(samples: Sequence[Sample], names: Sequence[str]) -> Iterator[Finding]:
    which = _comparable(samples)
    if list(names) == list(VIEWS) and len(which) >= ENOUGH_SAMPLES:
        found = unexpected_mirror(_small(samples, which))
        if found:
            yield Finding("view_order_of_all", (), *found)
