"""Separate-and-Enhance: the view's own words and the others are looked for in different places, and both somewhere."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from softprompt.errors import InputError
from softprompt.model.attention import AttentionMaps, attention_sides, watch_attention
from softprompt.model.pipeline import Pipeline
from softprompt.objectives.separate import absence, overlap
from softprompt.prompt.similarity import view_and_other_words
from softprompt.prompt.soft_prompt import SoftPrompt, point_on_path
from train.objectives.held_out import evaluate_on_held_out
from train.objectives.terms import Context, Shown, StepBatch, Term
from train.options.objectives import SeparateConfig


class Separate(Term):
    """Mean over all pictures of the batch, each under its own view's prompt."""

    name = "separate"

    def __init__(self, settings: SeparateConfig, waypoints: Sequence[str], side: int) -> None:
        super().__init__(settings.weight)
        self.settings = settings
        self.waypoints = waypoints
        self.side = side
        self._maps: AttentionMaps | None = None

    def open(self, context: Context) -> list[str]:
        """Raises: InputError where a waypoint's views have no words of their own, or no others."""
        lines = []
        for spec, prompt in zip(self.waypoints, context.adapted.prompt.waypoints, strict=True):
            view, others = view_and_other_words(prompt)
            if not (view and others):
                raise InputError(
                    f"separate.weight: prompt {spec} has {len(view)} tokens that tell its views apart and {len(others)} other "
                    f"words; expected some of each. Likely it was learned, or is no prompt"
                )
            lines.append(f"separate   {spec}: tokens {', '.join(map(str, view))} say which view it is")
        return lines

    def around(self, batch: StepBatch) -> AbstractContextManager[object]:
        """The maps of the plain loss's pass."""
        context = batch.context
        self._maps = AttentionMaps(groups_of(context.adapted.prompt, batch.position), self.side)
        return watch_attention(context.pipeline.unet, self._maps)

    def losses(self, batch: StepBatch) -> Iterator[Tensor]:
        """One part."""
        assert self._maps is not None, "it has its turn in its own block"
        maps = self._maps.mean()
        apart, lacking = overlap(*maps).mean(), absence(maps).mean()
        batch.log("separate_overlap", apart)
        batch.log("separate_absence", lacking)
        yield apart + self.settings.presence * lacking

    def evaluate(self, context: Context, position: float, shown: Shown) -> dict[str, float]:
        """Overlap and absence on held-out objects."""
        del shown
        found = evaluate_on_held_out(self, context, position)
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


def make_separate(settings: SeparateConfig, waypoints: Sequence[str], pipeline: Pipeline) -> Separate:
    """Raises: InputError for maps of a size that no layer has."""
    sides = attention_sides(pipeline.unet)
    if not sides or (settings.side is not None and settings.side not in sides):
        there = ", ".join(map(str, sides)) or "none"
        raise InputError(f"separate.side: is {settings.side}; the UNet's cross-attention has maps of side {there}")
    return Separate(settings, waypoints, sides[-1] if settings.side is None else settings.side)
