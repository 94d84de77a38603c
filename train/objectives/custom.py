"""An objective of one's own: `custom.function: module:function`."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from softprompt.errors import InputError
from softprompt.objectives.seen import Seen
from train.objectives.functions import call
from train.objectives.held_out import evaluate_on_held_out
from train.objectives.terms import Context, Shown, StepBatch, Term


class Custom(Term):
    """The function's own value on each batch."""

    name = "custom"

    def __init__(self, weight: float, function: Callable[[Seen], Any], spec: str) -> None:
        super().__init__(weight)
        self.function = function
        self.spec = spec

    def losses(self, batch: StepBatch) -> Iterator[Tensor]:
        """Raises: InputError where the function fails, or returns something else than a scalar with a gradient."""
        value = call(self.function, seen_of(batch), spec=self.spec, option="custom.function")
        if not isinstance(value, Tensor) or value.dim() != 0:
            found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"custom.function: {self.spec} returned {found}; expected a scalar tensor, e.g. by .mean()")
        if torch.is_grad_enabled() and not value.requires_grad:
            raise InputError(
                f"custom.function: {self.spec} has no gradient; expected one through seen.prediction or seen.prompt, by "
                f"operations of torch alone"
            )
        yield value.float()

    def evaluate(self, context: Context, position: float, shown: Shown) -> dict[str, float]:
        """The function's value on held-out objects."""
        del shown
        return {"held_out_custom": evaluate_on_held_out(self, context, position)["custom"]}


def seen_of(batch: StepBatch) -> Seen:
    """A batch as a user's function gets it."""
    assert batch.prediction is not None, "objectives run after the denoising loss's forward pass"
    prompt = batch.context.adapted.prompt
    return Seen(
        prediction=batch.prediction,
        target=batch.target,
        clean=batch.clean(batch.prediction),
        latents=batch.batch.latents,
        noisy=batch.noisy,
        given=batch.batch.given,
        timesteps=batch.batch.timesteps,
        alphas_cumprod=batch.alphas_cumprod,
        order=batch.batch.order,
        prompt=prompt(batch.position),
        start=prompt.start,
        step=batch.step,
        prediction_type=batch.prediction_type,
        untouched=lambda: batch.reference,
    )
