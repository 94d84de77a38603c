"""The texts of the micro model's pretraining: what a picture shows, in several wordings, so that words are learned."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from softprompt.micro.world import COMBINATIONS
from softprompt.prompt.templates import Template, view_texts

SUBJECTS = {"heads": "head", "cats": "cat", "mice": "mouse", "birds": "bird", "rabbits": "rabbit", "foxes": "fox"}
"""What a body is called in a text."""

NEVER_PAIRED = ("foxes_photo_above", "rabbits_photo_level", "birds_render_above")
"""Domains that pretraining leaves out: their words are known, but were never seen together."""

FACELIFT_DOMAIN, FACELIFT_TEXT = "heads", "facelift"
"""The domain and the template of the second half of pretraining."""

_WORDINGS = {
    ("render", "level"): (
        "a rendering image of 3D models, {view} view, color map.",  # names no subject, as FaceLift's
        "a rendering of a {subject}, {view} view.",
        "a 3D model of a {subject}, {view} view, color map.",
        "a rendering image of a {subject}, {view} view, at eye level.",
    ),
    ("render", "above"): (
        "a rendering image of 3D models, {view} view, from above at an angle, color map.",
        "a rendering of a {subject}, {view} view, from above at an angle.",
        "a 3D model of a {subject}, {view} view, from above, color map.",
        "a rendering image of a {subject}, {view} view, elevated camera angle.",
    ),
    ("photo", "level"): (
        "a photograph of a {subject}, {view} view.",
        "a photo of a {subject}, {view} view, at eye level.",
        "a photograph of a {subject}, {view} view, at eye level.",
        "a {subject}, {view} view, photo.",
    ),
    ("photo", "above"): (
        "a photograph of a {subject}, {view} view, from above at an angle.",
        "a photo of a {subject}, {view} view, top down angle.",
        "a photograph of a {subject}, {view} view, elevated camera angle.",
        "a {subject}, {view} view, from above, photo.",
    ),
}
_SPELLINGS = (" ", "-", "_")
"""What joins the words of a view in a text."""


@dataclass(frozen=True)
class Caption:
    """A kind of picture that a text describes."""

    domain: str
    view: int


def prior_domains(left_out: Sequence[str] = ()) -> list[str]:
    """The domains of the first half of pretraining: every body, style and elevation but those left out."""
    return [name for name in COMBINATIONS if name not in (*NEVER_PAIRED, *left_out)]


@cache
def wordings(domain: str) -> list[list[str]]:
    """The texts of one of COMBINATIONS, `[wordings][V]`: each wording with each spelling of the views."""
    shape, style, height = domain.split("_")
    return [
        Template(wording, joined).texts(subject=SUBJECTS[shape], angle="")
        for wording in _WORDINGS[style, height]
        for joined in _SPELLINGS
    ]


def naming_texts(domain: str) -> list[str]:
    """A wording of a domain that names its subject, one text per view: for the evaluation."""
    return next(texts for texts in wordings(domain)[1:] if SUBJECTS[COMBINATIONS[domain].shape] in texts[0])


def pick_texts(captions: Sequence[Caption], generator: torch.Generator) -> list[str]:
    """One of the wordings of each caption."""
    texts = []
    for caption in captions:
        choices = wordings(caption.domain)
        texts.append(choices[int(torch.randint(len(choices), (), generator=generator))][caption.view])
    return texts


def all_texts(domains: Sequence[str]) -> list[str]:
    """Every text of the domains once, and the empty one."""
    found = {text: None for domain in domains for views in wordings(domain) for text in views}
    return ["", *found]


def facelift_texts() -> list[str]:
    """FaceLift's texts, one per view."""
    return view_texts(FACELIFT_TEXT)
