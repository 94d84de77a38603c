"""What an objective is to the trainer: a term of the loss, given the scene of a step.

To add one: a group of options with a `weight` in train.options.objectives (its name in OBJECTIVES) and train.options.config, pure
functions in softprompt.objectives, a subclass of `Term` in train.objectives, and a line in train.objectives.make. The contract:

- A term's gradient is that of weight * the sum of what `losses` yields, divided by the batches of a step; it is called for each
  batch of training objects (never for those the KL is held on). It yields scalars with a gradient.
- `own_passes` False: the term reads `scene.prediction`, that of the plain loss; its part of the loss goes back with the plain
  one. True: it runs the model itself (`scene.job.adapted`, never `scene.job.model`). It has its turn before the plain loss, and
  each scalar it yields goes back at once, so that one part of a large loss is in memory at a time. What must be in place for
  that, such as the encoders on the device, is held by a `with` around the `yield`.
- All randomness comes from `seeded(seed, NAME, step, place, ...)` of softprompt.data.batch, places being those of the objects in the
  global batch (`scene.places`), so that a resumed step, or one shared out otherwise, is the same.
- What it needs of its own it looks at in `open`, once the run is prepared. What it needs of the model as it is before a step it
  makes in `begin`, in the run's folder: called before the step is evaluated and taken, while `begins` says so.
- What it remembers from step to step is in `state`: tensors and plain values, as a checkpoint takes them. A step may be done
  again after it ran out of memory: to be called twice for the same step must change nothing.
- `scene.log(name, value)` writes the series objective/NAME: the mean over batches, processes and the steps of a point in the
  log. On a given step all processes log the same names. The unweighted loss itself is objective/<the term's name>.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from softprompt.data.batch import Batch
from softprompt.model.conditioning import noisy_and_target
from softprompt.objectives.losses import clean_latents
from train.batches import Wanted

if TYPE_CHECKING:
    from train.evaluation.evaluate import Preview
    from train.setup import Job


def view_weights(job: "Job", num_objects: int) -> Tensor | None:
    """[B, V]: 0 for the reference's own view where `loss.own_view` is off; None where every view counts."""
    if job.config.loss.own_view:
        return None
    weights = torch.ones(num_objects, job.pipeline.num_views, device=job.accelerator.device)
    weights[:, 0] = 0
    return weights


@dataclass
class Scene:
    """What a step has of one batch: what costs something is computed when it is first asked for, and once."""

    job: "Job"
    wanted: Wanted | None
    """Which training batch it is; None for one of held-out objects."""
    batch: Batch
    step: int
    position: float
    """s of the prompt."""
    prediction: Tensor | None = None
    """[B, V, C, H, W]: the adapted model's, from the plain loss; None before that."""
    series: dict[str, Tensor] = field(default_factory=dict)
    """What was logged of it."""

    @cached_property
    def _noisy_and_target(self) -> tuple[Tensor, Tensor]:
        return noisy_and_target(self.job.pipeline.scheduler, self.batch)

    @property
    def noisy(self) -> Tensor:
        """z_t, [B, V, C, H, W]."""
        return self._noisy_and_target[0]

    @property
    def target(self) -> Tensor:
        """What the model is to predict, v or epsilon, [B, V, C, H, W]."""
        return self._noisy_and_target[1]

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Of the model, but for the position."""
        batch = self.batch
        return self.noisy, batch.given, batch.timesteps, batch.labels, batch.order

    @cached_property
    def reference(self) -> Tensor:
        """The untouched model's prediction on the same input (adapters off and prompt W_0), [B, V, C, H, W]; no gradient. The
        KL term and all others share it."""
        with self.job.accelerator.autocast():
            return self.job.adapted.reference(*self.inputs)

    @property
    def prediction_type(self) -> str:
        """`v_prediction` or `epsilon`."""
        return str(self.job.pipeline.scheduler.config["prediction_type"])

    def clean(self, prediction: Tensor) -> Tensor:
        """The clean latents that a prediction on this batch amounts to, [B, V, C, H, W], float32."""
        schedule = self.job.pipeline.scheduler.alphas_cumprod
        return clean_latents(self.noisy, prediction, schedule, self.batch.timesteps, self.prediction_type)

    @property
    def places(self) -> list[tuple[int, int]]:
        """Of each object: its place in the step's global batch, and which of the training objects it is."""
        return self.job.batches.places(self._training_batch)

    @cached_property
    def undropped(self) -> Batch:
        """The same batch with no condition dropped."""
        return self.job.batches.make(self._training_batch, drop_rate=0.0)

    @cached_property
    def true_views(self) -> tuple[Tensor, Tensor]:
        """The objects' pictures, [B, V, 3, S, S] in [0, 1] on the batch's background, and masks, [B, V, 1, S, S], by slot."""
        return self.job.batches.true_views(self._training_batch, self.batch.order)

    @property
    def _training_batch(self) -> Wanted:
        assert self.wanted is not None, "a held-out batch has no place in the training order"
        return self.wanted

    def log(self, name: str, value: Tensor) -> None:
        """A scalar for the series objective/NAME."""
        self.series[name] = value.detach().float()


class Term(ABC):
    """An objective; see this module's contract."""

    name: ClassVar[str]
    """Of its group of options and of its series."""
    own_passes: ClassVar[bool] = False
    """Whether it runs the model itself."""
    decodes: bool = False
    """Whether it needs the VAE at its steps: then the encoders stay on the device."""

    copies: ClassVar[int] = 0
    """Of prompt and LoRA that its `state` keeps in each checkpoint, at most."""

    def __init__(self, weight: float) -> None:
        self.weight = weight
        """0 where it is only measured (monitor.objectives)."""

    def open(self, job: "Job") -> list[str]:
        """Look at what it needs of its own, once the run is prepared. Returns: what is to be said of it. Raises: InputError."""
        del job
        return []

    def begins(self, step: int) -> bool:
        """Whether something is to be made before this step, of the model as it is then; the same on every process."""
        del step
        return False

    def begin(self, job: "Job", folder: Path, step: int, position: float, stopped: Callable[[], bool]) -> None:
        """Make it, shared out over the processes. folder: of the run; what is kept there survives it.

        stopped: whether the run is to stop: what takes long is then cut short. It is called again where the run goes on.
        """
        del job, folder, step, position, stopped

    def kept_bytes(self, job: "Job") -> int:
        """What it keeps in the run's folder, at most."""
        del job
        return 0

    def rehearse(self, job: "Job") -> bool:
        """Be ready for steps of a dry run, with nothing made for them. Returns: whether its numbers mean nothing then, and its
        time and memory alone are to be looked at."""
        del job
        return False

    def due(self, step: int) -> bool:
        """Whether a step has the term."""
        del step
        return True

    def around(self, scene: Scene) -> AbstractContextManager[object]:
        """Entered around the plain loss, forward and backward, where the term reads its prediction."""
        del scene
        return nullcontext()

    @abstractmethod
    def losses(self, scene: Scene) -> Iterator[Tensor]:
        """The parts of its loss on a batch."""

    def look(self, step: int, values: Mapping[str, float]) -> None:
        """See what a step measured, after its gradients are made and before it moves the weights; the same on every process.

        values: its series by name, averaged over batches and processes. Raises: RunError to end the run.
        """
        del step, values

    def measure(self, job: "Job", position: float, shown: "Preview") -> dict[str, float]:
        """At an evaluation with previews, on the main process: what the objective is for, on held-out objects, whether it is
        trained or not. The model is in evaluation mode and nothing has a gradient.

        shown: the previews. Returns: by NAME of the series objective/NAME.
        """
        del job, position, shown
        return {}

    def state(self) -> dict[str, Any]:
        """What it remembers; {} for most."""
        return {}

    def go_on_from(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave."""
        del state


class Objectives:
    """The terms of a run: those that are trained, and those that are only measured."""

    def __init__(self, terms: Sequence[Term] = ()) -> None:
        self.terms = tuple(terms)

    def open(self, job: "Job") -> list[str]:
        """See `Term.open`."""
        return [line for term in self.terms for line in term.open(job)]

    def begins(self, step: int) -> bool:
        """See `Term.begins`."""
        return any(term.begins(step) for term in self.terms)

    def begin(self, job: "Job", folder: Path, step: int, position: float, stopped: Callable[[], bool]) -> None:
        """See `Term.begin`."""
        for term in self.terms:
            if term.begins(step):
                term.begin(job, folder, step, position, stopped)

    def kept_bytes(self, job: "Job") -> int:
        """See `Term.kept_bytes`."""
        return sum(term.kept_bytes(job) for term in self.terms)

    @property
    def copies(self) -> int:
        """See `Term.copies`."""
        return sum(term.copies for term in self.terms)

    def rehearse(self, job: "Job") -> list[str]:
        """See `Term.rehearse`. Returns: the terms whose numbers mean nothing."""
        return [term.name for term in self.terms if term.rehearse(job)]

    def trained(self, step: int, *, own_passes: bool) -> list[Term]:
        """The terms that a step trains, of one kind."""
        return [t for t in self.terms if t.weight > 0 and t.own_passes is own_passes and t.due(step)]

    @property
    def decode(self) -> bool:
        """Whether some trained term needs the VAE at its steps."""
        return any(term.decodes and term.weight > 0 for term in self.terms)

    def look(self, step: int, values: Mapping[str, float]) -> None:
        """See `Term.look`."""
        for term in self.terms:
            if term.weight > 0 and term.due(step):
                term.look(step, values)

    @torch.no_grad()
    def measure(self, job: "Job", position: float, shown: "Preview") -> dict[str, float]:
        """See `Term.measure`. Returns: by the series' full names."""
        return {f"objective/{name}": v for t in self.terms for name, v in t.measure(job, position, shown).items()}

    def state(self) -> dict[str, dict[str, Any]]:
        """What the terms remember, by name."""
        return {term.name: state for term in self.terms if (state := term.state())}

    def go_on_from(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over what `state` gave; a term that it does not know begins anew."""
        for term in self.terms:
            if term.name in state:
                term.go_on_from(state[term.name])
