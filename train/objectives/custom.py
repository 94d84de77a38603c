"""An objective of one's own: `custom.function: module:function`."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softprompt.errors import InputError
from softprompt.objectives.seen import Seen
from train.objectives.functions import call
from train.objectives.held_out import measure_on_held_out
from train.objectives.terms import Scene, Term

if TYPE_CHECKING:
    from train.evaluation.evaluate import Preview
    from train.setup import Job


class Custom(Term):
    """The function's own value on each batch."""

    name = "custom"

    def __init__(self, weight: float, function: Callable[[Seen], Any], spec: str) -> None:
        super().__init__(weight)
        self.function = function
        self.spec = spec

    def losses(self, scene: Scene) -> Iterator[Tensor]:
        """Raises: InputError where the function fails, or returns something else than a scalar with a gradient."""
        value = call(self.function, seen_of(scene), spec=self.spec, option="custom.function")
        if not isinstance(value, Tensor) or value.dim() != 0:
            found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"custom.function: {self.spec} returned {found}; expected a scalar tensor, e.g. by .mean()")
        if torch.is_grad_enabled() and not value.requires_grad:
            raise InputError(
                f"custom.function: {self.spec} has no gradient; expected one through seen.prediction or seen.prompt, by "
                f"operations of torch alone"
            )
        yield value.float()

    def measure(self, job: "Job", position: float, shown: "Preview") -> dict[str, float]:
        """The function's value on held-out objects."""
        del shown
        return {"held_out_custom": measure_on_held_out(self, job, position)["custom"]}


def seen_of(scene: Scene) -> Seen:
    """A batch as a function of the user's sees it."""
    assert scene.prediction is not None, "it has its turn after the plain loss's forward pass"
    batch, prompt = scene.batch, scene.job.adapted.prompt
    return Seen(
        prediction=scene.prediction,
        target=scene.target,
        clean=scene.clean(scene.prediction),
        latents=batch.latents,
        noisy=scene.noisy,
        given=batch.given,
        timesteps=batch.timesteps,
        alphas_cumprod=scene.job.pipeline.scheduler.alphas_cumprod.to(batch.timesteps.device),
        order=batch.order,
        prompt=prompt(scene.position),
        start=prompt.start,
        step=scene.step,
        prediction_type=scene.prediction_type,
        untouched=lambda: scene.reference,
    )
