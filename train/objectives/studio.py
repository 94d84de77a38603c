"""DomainStudio: keep how the untouched model tells objects, or the views of one, from each other."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from einops import rearrange
from torch import Tensor

from softprompt.errors import InputError
from softprompt.model.pipeline import Pipeline
from softprompt.model.sampling import decode_with_gradient
from softprompt.objectives.domain_studio import detail_loss, high_frequency, pair_loss
from train.objectives.held_out import evaluate_on_held_out
from train.objectives.terms import Context, Shown, StepBatch, Term
from train.options.objectives import StudioConfig

PARTS = ("pairs", "detail_pairs", "detail")
"""Parts of the loss, by the names of their weights."""


class Studio(Term):
    """Pairs of the batch's objects, view by view, or of each object's views."""

    name = "studio"

    def __init__(self, settings: StudioConfig) -> None:
        super().__init__(settings.weight)
        self.settings = settings
        self.decodes = settings.space == "pictures"

    def open(self, context: Context) -> list[str]:
        """Raises: InputError where there are too few objects to train on, or to measure on where it is measured alone."""
        if self.weight > 0 and self.settings.over == "objects" and len(context.train) < 3:
            raise InputError(
                f"studio.over: is objects; there are {len(context.train)} to train on (data.train, data.limit), and pairwise "
                f"similarity needs 3 or more different ones. Give more, or use studio.over: views"
            )
        if self._is_measurable(context):
            return []
        few = f"there are {len(context.held_out)} held-out objects; studio.over: objects is measured on 3 or more"
        if self.weight == 0:
            raise InputError(f"monitor.objectives: has studio, and {few}. Give more (data.val), or studio.over: views")
        return [f"WARNING    no objective/held_out_studio_objects is logged: {few}"]

    def _is_measurable(self, context: Context) -> bool:
        return self.settings.over == "views" or len(context.held_out) >= 3

    def around(self, batch: StepBatch) -> AbstractContextManager[object]:
        """The decoder stays where it is until the gradient is made."""
        return batch.context.pipeline.encoders_on_device() if self.decodes else nullcontext()

    def losses(self, batch: StepBatch) -> Iterator[Tensor]:
        """One part, weighted by the options of the group."""
        assert batch.prediction is not None, "objectives run after the denoising loss's forward pass"
        ours = self._items(batch, batch.clean(batch.prediction))
        with torch.no_grad():
            source = self._items(batch, batch.clean(batch.reference))
            target = self._items(batch, batch.batch.latents)
        found = {
            "pairs": _mean_over_sets(ours, source),
            "detail_pairs": _mean_over_sets(high_frequency(ours), high_frequency(source)),
            "detail": detail_loss(ours, target),
        }
        for name, value in found.items():
            batch.log(f"studio_{name}", value)
        yield torch.stack([getattr(self.settings, name) * value for name, value in found.items()]).sum()

    def _items(self, batch: StepBatch, latents: Tensor) -> Tensor:
        """[B, V, C, H, W] => [sets, N, C, H, W], latents or pictures: the items that are compared with each other in each
        set."""
        items = latents if self.settings.space == "latents" else decode_with_gradient(batch.context.pipeline, latents)
        if self.settings.over == "views":
            return items
        return rearrange(_by_view(items, batch.batch.order), "b v c h w -> v b c h w")

    def evaluate(self, context: Context, position: float, shown: Shown) -> dict[str, float]:
        """How far the pairs of held-out objects are from the untouched model's."""
        del shown
        if not self._is_measurable(context):
            return {}
        found = evaluate_on_held_out(self, context, position)
        of = self.settings.over if self.settings.space == "latents" else f"{self.settings.over}_in_pictures"
        return {f"held_out_studio_{of}_{name}": found[f"studio_{name}"] for name in PARTS}


def _by_view(items: Tensor, order: Tensor) -> Tensor:
    """Slots put back in the order of views: where the view given differs, the same slot is another view of each object.

    items: [B, V, ...]. order: [B, V], the view in each slot.
    """
    rows = torch.arange(len(items), device=items.device)[:, None]
    return items[rows, order.argsort(dim=1)]


def _mean_over_sets(ours: Tensor, source: Tensor) -> Tensor:
    return torch.stack([pair_loss(one, other) for one, other in zip(ours, source, strict=True)]).mean()


def make_studio(settings: StudioConfig, pipeline: Pipeline) -> Studio:
    """Raises: InputError where an object has too few views for pairs."""
    if settings.over == "views" and pipeline.num_views < 3:
        raise InputError(
            f"studio.over: is views; the model has {pipeline.num_views}, and pairwise similarity needs 3 or more items. Use "
            f"studio.over: objects, with train.batch_size 3 or more"
        )
    return Studio(settings)
