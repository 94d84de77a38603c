"""The interface of an objective: a term of the loss, computed from a batch of a step.

To add one: an option group with a `weight` in train.options.objectives (its name in OBJECTIVES) and train.options.config, its
formulas as pure functions in softprompt.objectives, a subclass of `Term` in train.objectives, and a line in train.setup's
`make_objectives`. The contract:

- The gradient of a term is that of weight * the sum of the scalars that `losses` yields, divided by the number of batches of a
  step. `losses` is called for each batch of training objects, never for one of the original domain.
- `own_passes` False: the term reads `batch.prediction` and shares the backward pass of the denoising loss. True: it runs the
  model itself (`context.adapted`), before the denoising loss; the backward pass of each scalar follows at once, so only one
  part of a large loss is in memory. Whatever must stay in place for that, such as the encoders on the device, is held by a
  `with` around the `yield`.
- All randomness comes from `seeded(seed, NAME, step, place, ...)`, where a place is that of an object in the global batch
  (`batch.places`): a resumed step, or one that is shared out differently, is the same.
- `open` checks what the term needs, once the run is prepared. `begin` prepares what depends on the model as it is before a step
  (samples, say) in the run's folder; it is called while `begins` says so.
- `state` holds what the term carries from step to step, as tensors and plain values, for the checkpoint. A step may be repeated
  after it ran out of memory: a second call for the same step changes nothing.
- `batch.log(name, value)` logs the series objective/NAME, averaged over batches, processes and the steps between two points of
  the log; all processes log the same names in a step. The unweighted loss is logged as objective/<name of the term>.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from softprompt.data.batch import Batch, Objects
from softprompt.model.adapted import AdaptedModel
from softprompt.model.conditioning import noisy_and_target
from softprompt.model.pipeline import Pipeline
from softprompt.objectives.losses import PredictionType, clean_latents


@dataclass(frozen=True)
class Context:
    """The parts of a run that its objectives may use."""

    accelerator: Accelerator
    pipeline: Pipeline
    adapted: AdaptedModel
    train: Objects
    held_out: Objects
    seed: int
    batch_size: int
    drop_rate: float
    """r of `keep_conditions`."""
    own_view: bool
    """Whether the view that shows the input picture counts in the loss."""
    references: Sequence[int]
    """Views that may be the input picture in training."""
    reference_view: int
    """The one that is in validation and previews."""
    held_out_timesteps: Sequence[int]
    """Timesteps at which held-out objects are evaluated."""

    def view_weights(self, objects: int) -> Tensor | None:
        """[B, V]: 0 for slot 0, the view of the input picture, unless `own_view`; None where every view counts."""
        if self.own_view:
            return None
        weights = torch.ones(objects, self.pipeline.num_views, device=self.accelerator.device)
        weights[:, 0] = 0
        return weights


@dataclass(frozen=True)
class Shown:
    """Views of a few held-out objects; slot 0 of each is the input picture's view."""

    pictures: Tensor
    """[B, 3, S, S]: the input pictures."""
    truth: Tensor
    """[B, V, 3, S, S]: the true views."""
    masks: Tensor
    """[B, V, 1, S, S]: foreground of the true views."""
    pretrained: Tensor
    """[B, V, 3, S, S]: sampled by the pretrained model."""
    now: Tensor
    """[B, V, 3, S, S]: sampled by the adapted model."""
    names: tuple[str, ...]
    """Names of the views, in slot order."""


class Turn(Protocol):
    """A training batch's place in the training order."""

    @property
    def lowest(self) -> int:
        """The least noisy timestep that is drawn."""

    @property
    def places(self) -> list[tuple[int, int]]:
        """For each object: its place in the step's global batch, and its index among the training objects."""

    def undropped(self) -> Batch:
        """The same batch with no condition dropped."""

    def true_views(self, order: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures [B, V, 3, S, S] in [0, 1] on the batch's backgrounds and masks [B, V, 1, S, S], in the order given."""


@dataclass
class StepBatch:
    """One batch of a step. Expensive parts are computed when they are first asked for, and once."""

    context: Context
    batch: Batch
    step: int
    position: float
    """Position s of the prompt."""
    turn: Turn | None = None
    """None for a batch of held-out objects."""
    prediction: Tensor | None = None
    """[B, V, C, H, W]: the adapted model's prediction, set by the denoising loss's forward pass."""
    series: dict[str, Tensor] = field(default_factory=dict)
    """Logged values."""

    @cached_property
    def _noisy_and_target(self) -> tuple[Tensor, Tensor]:
        return noisy_and_target(self.context.pipeline.scheduler, self.batch)

    @property
    def noisy(self) -> Tensor:
        """z_t, [B, V, C, H, W]."""
        return self._noisy_and_target[0]

    @property
    def target(self) -> Tensor:
        """The target of the prediction, v or epsilon, [B, V, C, H, W]."""
        return self._noisy_and_target[1]

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Inputs of the model, but for the position."""
        batch = self.batch
        return self.noisy, batch.given, batch.timesteps, batch.labels, batch.order

    @cached_property
    def reference(self) -> Tensor:
        """The pretrained model's prediction on the same input (adapters off and prompt W_0), [B, V, C, H, W]; no gradient. The
        KL term and all others share it."""
        with self.context.accelerator.autocast():
            return self.context.adapted.reference(*self.inputs)

    @property
    def alphas_cumprod(self) -> Tensor:
        """[num_timesteps], on the device."""
        return self.context.pipeline.scheduler.alphas_cumprod.to(self.batch.timesteps.device)

    @property
    def prediction_type(self) -> PredictionType:
        """Whether the model predicts v or epsilon."""
        kind: PredictionType = self.context.pipeline.scheduler.config["prediction_type"]
        return kind

    def clean(self, prediction: Tensor) -> Tensor:
        """The clean latents that a prediction on this batch implies, [B, V, C, H, W], float32."""
        return clean_latents(self.noisy, prediction, self.alphas_cumprod, self.batch.timesteps, self.prediction_type)

    @property
    def in_training(self) -> Turn:
        """Its turn. Only for a training batch."""
        assert self.turn is not None, "a held-out batch has no place in the training order"
        return self.turn

    @property
    def places(self) -> list[tuple[int, int]]:
        """See `Turn.places`."""
        return self.in_training.places

    @cached_property
    def undropped(self) -> Batch:
        """See `Turn.undropped`."""
        return self.in_training.undropped()

    @cached_property
    def true_views(self) -> tuple[Tensor, Tensor]:
        """See `Turn.true_views`; by slot."""
        return self.in_training.true_views(self.batch.order)

    def log(self, name: str, value: Tensor) -> None:
        """Log a scalar as objective/NAME."""
        self.series[name] = value.detach().float()


class Term(ABC):
    """An objective; see this module's contract."""

    name: ClassVar[str]
    """Name of its option group and of its series."""
    own_passes: ClassVar[bool] = False
    """Whether it runs the model itself."""
    decodes: bool = False
    """Whether its steps need the VAE: then the encoders stay on the device."""
    copies: ClassVar[int] = 0
    """Copies of prompt and LoRA that its `state` keeps in each checkpoint, at most."""

    def __init__(self, weight: float) -> None:
        self.weight = weight
        """0 where the objective is only evaluated (monitor.objectives)."""

    def open(self, context: Context) -> list[str]:
        """Check what it needs, once the run is prepared. Returns: notes for the user. Raises: InputError."""
        del context
        return []

    def begins(self, step: int) -> bool:
        """Whether something is to be prepared before this step with the model as it is then; the same on every process."""
        del step
        return False

    def begin(self, context: Context, folder: Path, step: int, position: float, stopped: Callable[[], bool]) -> None:
        """Prepare it, shared out over the processes. folder: the run's; files in it survive the run.

        stopped: whether the run is to stop: long work then ends early, and `begin` is called again when the run is resumed.
        """
        del context, folder, step, position, stopped

    def kept_bytes(self, context: Context) -> int:
        """Bytes that it keeps in the run's folder, at most."""
        del context
        return 0

    def rehearse(self, context: Context) -> bool:
        """Be ready for the steps of a dry run with nothing prepared. Returns: whether its values are meaningless there, so that
        only its time and memory count."""
        del context
        return False

    def due(self, step: int) -> bool:
        """Whether a step has the term."""
        del step
        return True

    def around(self, batch: StepBatch) -> AbstractContextManager[object]:
        """Entered around forward and backward pass of the denoising loss, for a term that reads its prediction."""
        del batch
        return nullcontext()

    @abstractmethod
    def losses(self, batch: StepBatch) -> Iterator[Tensor]:
        """The summands of its loss on a batch, scalars with a gradient."""

    def inspect(self, step: int, values: Mapping[str, float]) -> None:
        """Inspect a step's values, after its backward pass and before the update; the same on every process.

        values: its series by name, averaged over batches and processes. Raises: RunError to end the run.
        """
        del step, values

    def evaluate(self, context: Context, position: float, shown: Shown) -> dict[str, float]:
        """Evaluate the objective on held-out objects, at an evaluation with previews, on the main process, trained or not.
        The model is in evaluation mode, without gradients.

        Returns: values by NAME of the series objective/NAME.
        """
        del context, position, shown
        return {}

    def state(self) -> dict[str, Any]:
        """State for the checkpoint; {} for most."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state`."""
        del state


class Objectives:
    """The objectives of a run: those that are trained, and those that are only evaluated."""

    def __init__(self, terms: Sequence[Term] = ()) -> None:
        self.terms = tuple(terms)

    def trained(self, step: int, *, own_passes: bool) -> list[Term]:
        """The terms of one kind that a step trains."""
        return [t for t in self.terms if t.weight > 0 and t.own_passes is own_passes and t.due(step)]

    def begins(self, step: int) -> list[Term]:
        """The terms that prepare something before a step."""
        return [term for term in self.terms if term.begins(step)]

    @property
    def decode(self) -> bool:
        """Whether a trained term needs the VAE at its steps."""
        return any(term.decodes and term.weight > 0 for term in self.terms)

    def inspect(self, step: int, values: Mapping[str, float]) -> None:
        """See `Term.inspect`."""
        for term in self.terms:
            if term.weight > 0 and term.due(step):
                term.inspect(step, values)

    @torch.no_grad()
    def evaluate(self, context: Context, position: float, shown: Shown) -> dict[str, float]:
        """See `Term.evaluate`. Returns: values by the full names of the series."""
        return {f"objective/{name}": v for t in self.terms for name, v in t.evaluate(context, position, shown).items()}

    def state(self) -> dict[str, dict[str, Any]]:
        """State of the terms, by name."""
        return {term.name: state for term in self.terms if (state := term.state())}

    def load_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Inverse of `state`; a term without one starts afresh."""
        for term in self.terms:
            if term.name in state:
                term.load_state(state[term.name])
