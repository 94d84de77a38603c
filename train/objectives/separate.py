"""Separate-and-Enhance: the view's own words and the others are looked for in different places, and both somewhere."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from softprompt.errors import InputError
from softprompt.model.attention import AttentionMaps, attention_sides, watch_attention
from softprompt.model.pipeline import Pipeline
from softprompt.objectives.separate import absence, overlap
from softprompt.prompt.path import point_on_path
from softprompt.prompt.similarity import view_and_other_words
from softprompt.prompt.soft_prompt import SoftPrompt
from train.objectives.held_out import measure_on_held_out
from train.objectives.terms import Scene, Term
from train.options.objectives import SeparateConfig

if TYPE_CHECKING:
    from train.evaluation.evaluate import Preview
    from train.setup import Job


class Separate(Term):
    """Mean over all pictures of the batch, each under its own view's prompt."""

    name = "separate"

    def __init__(self, settings: SeparateConfig, side: int) -> None:
        super().__init__(settings.weight)
        self.settings = settings
        self.side = side
        self._maps: AttentionMaps | None = None

    def open(self, job: "Job") -> list[str]:
        """Raises: InputError where a waypoint's views have no words of their own, or no others."""
        lines = []
        for spec, prompt in zip(job.config.prompt.waypoints, job.adapted.prompt.waypoints, strict=True):
            view, others = view_and_other_words(prompt)
            if not (view and others):
                raise InputError(
                    f"separate.weight: prompt {spec} has {len(view)} tokens that tell its views apart and {len(others)} other "
                    f"words; expected some of each. Likely it was learned, or is no prompt"
                )
            lines.append(f"separate   {spec}: tokens {', '.join(map(str, view))} say which view it is")
        return lines

    def around(self, scene: Scene) -> AbstractContextManager[object]:
        """The maps of the plain loss's pass."""
        prompt = scene.job.adapted.prompt
        self._maps = AttentionMaps(groups_of(prompt, scene.position), self.side)
        return watch_attention(scene.job.pipeline.unet, self._maps)

    def losses(self, scene: Scene) -> Iterator[Tensor]:
        """One part."""
        assert self._maps is not None, "it has its turn in its own block"
        maps = self._maps.mean()
        apart, lacking = overlap(*maps).mean(), absence(maps).mean()
        scene.log("separate_overlap", apart)
        scene.log("separate_absence", lacking)
        yield apart + self.settings.presence * lacking

    def measure(self, job: "Job", position: float, shown: "Preview") -> dict[str, float]:
        """Overlap and absence on held-out objects."""
        del shown
        found = measure_on_held_out(self, job, position)
        return {f"held_out_{name}": found[name] for name in ("separate_overlap", "separate_absence")}


def groups_of(prompt: SoftPrompt, position: float) -> Tensor:
    """[2, T]: which tokens are the view's own words, and which the others, on the path at a position.

    On the path, not in E: what is learned changes every token, but not what each was put there to say.
    """
    path = point_on_path(prompt.waypoints, position, prompt.interpolation)
    groups = torch.zeros(2, path.shape[1], device=path.device)
    for group, tokens in zip(groups, view_and_other_words(path), strict=True):
        group[tokens] = 1
    return groups


def make_separate(settings: SeparateConfig, pipeline: Pipeline) -> Separate:
    """Raises: InputError for maps of a size that no layer has."""
    sides = attention_sides(pipeline.unet)
    if not sides or (settings.side is not None and settings.side not in sides):
        there = ", ".join(map(str, sides)) or "none"
        raise InputError(f"separate.side: is {settings.side}; the UNet's cross-attention has maps of side {there}")
    return Separate(settings, sides[-1] if settings.side is None else settings.side)
