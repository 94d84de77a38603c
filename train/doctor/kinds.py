"""What a finding is: the kinds of fault there are, and of which sample and views one is."""

from dataclasses import dataclass, field

from softprompt.prompt.templates import VIEWS
from train.doctor.look import Picture

LEAST_SHARE = 1e-3
"""Of the foreground in a picture: a disc of 18 pixels' diameter in 512x512."""
CUT = 0.02
"""Sides of the border that are foreground, from which on the object is cut: 10 pixels of 512. Less is a tight crop."""


@dataclass(frozen=True)
class Kind:
    """A kind of fault."""

    title: str
    is_error: bool
    """Training would not run; otherwise it would, and learn from it."""
    meaning: str
    advice: str


KINDS = {
    "missing_folder": Kind(
        "sample folders missing",
        True,
        "The list names folders that are not there.",
        "Correct the paths in the list, or mount the disk.",
    ),
    "no_views": Kind(
        "folders without views",
        True,
        "A sample's folder has no cam_ picture, neither in it nor in its images/.",
        "Move what is no sample away, or give a list file of the samples wanted.",
    ),
    "mixed": Kind(
        "views in several files or formats",
        True,
        "A view is there twice, or a sample's views are of different formats.",
        "Leave one picture a view, all of one format: likely two exports lie in one folder.",
    ),
    "missing_views": Kind(
        "views missing",
        True,
        "Not every view has its cam_NNN picture.",
        "Export the views again, or take the object out.",
    ),
    "broken": Kind(
        "broken pictures",
        True,
        "A file cannot be decoded as PNG, JPEG, WebP or TIFF.",
        "Copy or export it again; convert other formats, do not rename them.",
    ),
    "empty": Kind(
        "empty pictures",
        True,
        "No pixel is visible: alpha is 0 everywhere.",
        "Segment the view again, or take the object out.",
    ),
    "damaged": Kind(
        "damaged pictures",
        False,
        "A checksum in the file is wrong, or its end is missing; training decodes it all the same, with whatever it holds.",
        "Copy or export it again.",
    ),
    "nearly_empty": Kind(
        "nearly empty pictures",
        False,
        f"One colour throughout, or an object on less than {LEAST_SHARE:.1%} of the picture.",
        "Look whether the segmentation lost the object.",
    ),
    "not_square": Kind(
        "not square",
        False,
        "Training fits the picture into a square, aspect kept: the object gets smaller, and the rest is transparent.",
        "Crop to a square around the object.",
    ),
    "other_size": Kind(
        "other size than the rest",
        False,
        "The picture is not of the size that most have, and maybe of another scale.",
        "Export it again as the rest.",
    ),
    "small": Kind(
        "smaller than trained",
        False,
        "The picture has fewer pixels than --size and is scaled up: the model learns the blur.",
        "Export larger pictures.",
    ),
    "no_alpha": Kind(
        "no transparency",
        False,
        "RGB, or opaque throughout: data.background does nothing, and the background is learned with the object.",
        "Segment the object and save RGBA; leave it if one plain background in all pictures is what you want.",
    ),
    "uneven_background": Kind(
        "uneven background",
        False,
        "No transparency, and the border has no one colour: the background is part of what is learned, and size, place and "
        "order of views cannot be checked.",
        "Segment the object and save RGBA.",
    ),
    "cut": Kind(
        "cut at the border",
        False,
        f"The object reaches over the border of the picture, on {CUT:.0%} of a side or more.",
        "Export with a wider crop, or take the object out; leave it where all are meant to be cut there, as busts are.",
    ),
    "size": Kind(
        "unusual size",
        False,
        "The object's share of the picture is far from the data set's median for this view.",
        "Look for lost or added parts in the segmentation, and for another scale.",
    ),
    "place": Kind(
        "unusual place",
        False,
        "The object's centre of mass is far from the data set's median for this view.",
        "Centre the crop as in the rest; look for stray pieces in the segmentation.",
    ),
    "same_views": Kind(
        "one picture as several views",
        False,
        "Views of one object are the same, pixel for pixel: the model learns to copy.",
        "Export the views again.",
    ),
    "duplicates": Kind(
        "duplicates",
        False,
        "Objects share pictures, pixel for pixel, and so count more than once.",
        "Keep one of them.",
    ),
    "leak": Kind(
        "validated on what is trained on",
        False,
        "Objects of --data.val have pictures of --data.train, pixel for pixel: validation cannot show overfitting.",
        "Take them out of one of the two.",
    ),
    "order": Kind(
        "order of views",
        False,
        "Another order of the object's views would look clearly more like the rest of the data set.",
        "Look at the pictures; if they are in the wrong order, rename them.",
    ),
    "order_of_all": Kind(
        "order of views, all objects",
        False,
        "Opposite views show mirrored silhouettes. Those that should be opposite do so less than others.",
        f"The views are {', '.join(VIEWS)}: azimuths 0, 45, 90, 180, 270, 315 degrees. Look whether yours are.",
    ),
}
"""By name; errors first, in the order of the report."""


@dataclass(frozen=True)
class Sample:
    """One object and what was found in its files."""

    name: str
    is_train: bool
    """False: it is validated on."""
    pictures: list[Picture | None]
    """By view; None for one that is missing, broken or empty."""
    missing: list[int] = field(default_factory=list)
    """Views without a file."""
    broken: dict[int, str] = field(default_factory=dict)
    """By view, of files that cannot be decoded: why."""
    empty: list[int] = field(default_factory=list)
    """Views that training refuses since nothing is visible."""
    fault: tuple[str, str] | None = None
    """Of the folder as a whole: a kind, and the detail."""

    def foreground(self, view: int) -> Picture | None:
        """The picture of a view, where there is one and its foreground is known and more than a speck."""
        picture = self.pictures[view]
        return picture if picture is not None and picture.share >= LEAST_SHARE else None


@dataclass(frozen=True)
class Finding:
    """One fault of one sample, or one that several share."""

    kind: str
    """Key of KINDS."""
    samples: tuple[int, ...]
    """Indices; empty for a fault of the data set as a whole."""
    views: tuple[int, ...]
    detail: str


def view_names(num_views: int) -> list[str]:
    """FaceLift's names where there are as many."""
    return list(VIEWS) if num_views == len(VIEWS) else [f"view {view}" for view in range(num_views)]
