"""Training batches: which objects, in which order, with which randomness; made ahead while the device works."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from softprompt.data.batch import Batch, Objects, draw, seeded
from softprompt.model.conditioning import make_batch
from softprompt.model.pipeline import Pipeline


@dataclass(frozen=True)
class Wanted:
    """One batch of one process: with the settings of `Batches` this determines it."""

    step: int
    part: int
    """Index among the step's batches (`train.accumulation`)."""
    lowest: int
    """The least noisy timestep that is drawn."""
    original: bool = False
    """Objects of the original domain, given view 0, instead of the training objects."""


class Batches:
    """Batches of this process. A batch is the same whether it was made ahead or not, and in whatever order batches are taken.

    train, replay: training objects, and those of the original domain for the KL. batch_size: objects of a batch.
    accumulation: batches of training objects in a step. references: views that may be the input picture. drop_rate: r of
    `keep_conditions`.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        train: Objects,
        replay: Objects | None,
        *,
        seed: int,
        batch_size: int,
        accumulation: int,
        references: Sequence[int],
        drop_rate: float,
        process: int,
        processes: int,
    ) -> None:
        self._pipeline = pipeline
        self._train = train
        self._replay = replay
        self._seed = seed
        self._batch_size = batch_size
        self._references = references
        self._drop_rate = drop_rate
        self._process = process
        self._processes = processes
        self.accumulation = accumulation
        # On a CPU the thread would only take cores that the step needs.
        self._thread = ThreadPoolExecutor(1) if pipeline.device.type != "cpu" else None
        self._ahead: dict[Wanted, Future[Batch]] = {}

    @property
    def objects_per_step(self) -> int:
        """Objects that all processes together train on in a step."""
        return self._batch_size * self.accumulation * self._processes

    def of_step(self, step: int, lowest: int, *, original: bool) -> list[Wanted]:
        """The batches of a step, in order. original: whether each comes with one of the original domain, before it."""
        domains = [True, False] if original else [False]
        return [Wanted(step, part, lowest, domain) for part in range(self.accumulation) for domain in domains]

    def make_ahead(self, wanted: Sequence[Wanted]) -> None:
        """Begin to make these; drop batches that were made ahead and not taken."""
        if self._thread is not None:
            self._ahead = {w: self._ahead.get(w) or self._thread.submit(self.make, w) for w in wanted}

    def take(self, wanted: Wanted) -> Batch:
        """A batch, on the pipeline's device. Raises: InputError when an object's pictures cannot be read any more."""
        made = self._ahead.pop(wanted, None)
        return self.make(wanted) if made is None else made.result()

    def names(self, wanted: Wanted) -> list[str]:
        """Names of the batch's samples, in its order."""
        source = self._source(wanted)
        return [source.names[index] for _, index in self.places(wanted)]

    def places(self, wanted: Wanted) -> list[tuple[int, int]]:
        """For each object of a batch: its place in the step's global batch, and its index in its source."""
        count = len(self._source(wanted))
        first = (wanted.part * self._processes + self._process) * self._batch_size
        before = wanted.step * self.objects_per_step
        return [(p, object_at(before + p, count, self._seed)) for p in range(first, first + self._batch_size)]

    def true_views(self, wanted: Wanted, order: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures of a batch's objects on its backgrounds, [B, V, 3, S, S] in [0, 1], and their masks, [B, V, 1, S, S].

        order: [B, V], of the batch: which view is in each slot. Returns: on the pipeline's device.
        """
        source, device = self._source(wanted), self._pipeline.device
        found = [source.views(index, self._generator(wanted, place)) for place, index in self.places(wanted)]
        pictures, masks = (
            torch.stack([views[slots] for views, slots in zip(kind, order.cpu(), strict=True)]).to(device)
            for kind in zip(*found, strict=True)
        )
        return pictures, masks

    def make(self, wanted: Wanted, *, drop_rate: float | None = None) -> Batch:
        """As `take`, but never one that was made ahead. drop_rate: instead of the run's."""
        source = self._source(wanted)
        objects, draws = [], []
        for place, index in self.places(wanted):
            generator = self._generator(wanted, place)
            objects.append(source.get(index, generator))
            draws.append(
                draw(
                    generator,
                    encoded=objects[-1],
                    num_timesteps=len(self._pipeline.scheduler.alphas_cumprod),
                    references=[0] if wanted.original else self._references,
                    drop_rate=self._drop_rate if drop_rate is None else drop_rate,
                    lowest=wanted.lowest,
                )
            )
        return make_batch(self._pipeline, objects, draws)

    def _source(self, wanted: Wanted) -> Objects:
        if not wanted.original:
            return self._train
        assert self._replay is not None, "kl.domain is checked against data.original when the configuration is read"
        return self._replay

    def _generator(self, wanted: Wanted, place: int) -> torch.Generator:
        """Generator of one object's background and draw."""
        domain = ("original",) if wanted.original else ()
        return seeded(self._seed, *domain, wanted.step, place)


def object_at(place: int, count: int, seed: int) -> int:
    """Index of the object, of `count`, at a place in the endless training order: a new permutation in each epoch."""
    epoch, within = divmod(place, count)
    return int(_order(epoch, count, seed)[within])


@lru_cache(maxsize=4)
def _order(epoch: int, count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=seeded(seed, "epoch", epoch))
