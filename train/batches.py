"""Training batches: which objects, in which order, with which randomness; made ahead while the device works."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import torch

from softprompt.data.batch import Batch, draw, seeded
from softprompt.data.cache import EncodedObjects
from softprompt.model.conditioning import make_batch
from softprompt.model.pipeline import Pipeline
from train.options.config import Config


@dataclass(frozen=True)
class Wanted:
    """One batch of one process; with the configuration it says all there is to say of it."""

    step: int
    part: int
    """Which of the step's batches (`train.accumulation`)."""
    lowest: int
    """The least noisy timestep that is drawn."""
    original: bool = False
    """Of the pretrained model's own domain, given view 0, instead of the training objects."""


class Batches:
    """This process's batches. The same batch comes whether it was made ahead or not, and in whatever order they are taken."""

    def __init__(
        self,
        config: Config,
        pipeline: Pipeline,
        train: EncodedObjects,
        replay: EncodedObjects | None,
        *,
        process: int,
        processes: int,
    ) -> None:
        self._config = config
        self._pipeline = pipeline
        self._train = train
        self._replay = replay
        self._process = process
        self._processes = processes
        # On a CPU it would only take the threads that the step needs.
        self._thread = ThreadPoolExecutor(1) if pipeline.device.type != "cpu" else None
        self._ahead: dict[Wanted, Future[Batch]] = {}

    def of_step(self, step: int, lowest: int) -> list[Wanted]:
        """What a step takes, in order. lowest: the least noisy timestep that is drawn."""
        domains = [True, False] if "original" in kl_domains(self._config, step) else [False]
        return [Wanted(step, part, lowest, o) for part in range(self._config.train.accumulation) for o in domains]

    def make_ahead(self, wanted: Sequence[Wanted]) -> None:
        """Begin to make these; drop what was made ahead and not taken."""
        if self._thread is not None:
            self._ahead = {w: self._ahead.get(w) or self._thread.submit(self.make, w) for w in wanted}

    def take(self, wanted: Wanted) -> Batch:
        """On the pipeline's device. Raises: InputError when an object's pictures cannot be read any more."""
        made = self._ahead.pop(wanted, None)
        return self.make(wanted) if made is None else made.result()

    def names(self, wanted: Wanted) -> list[str]:
        """Of the batch's samples, in its order."""
        source = self._source(wanted)
        return [source.names[index] for _, index in self.places(wanted)]

    def places(self, wanted: Wanted) -> list[tuple[int, int]]:
        """(place in the step's global batch, which object of its source) of each of this process's objects in a batch."""
        return self._places(wanted, len(self._source(wanted)))

    def _source(self, wanted: Wanted) -> EncodedObjects:
        if not wanted.original:
            return self._train
        assert self._replay is not None, "kl.domain is checked against data.original when the configuration is read"
        return self._replay

    def _places(self, wanted: Wanted, count: int) -> list[tuple[int, int]]:
        """(position in the global batch, which of `count` objects) of each of this process's objects."""
        train = self._config.train
        first = (wanted.part * self._processes + self._process) * train.batch_size
        before = wanted.step * train.batch_size * self._processes * train.accumulation
        return [(p, object_at(before + p, count, train.seed)) for p in range(first, first + train.batch_size)]

    def true_views(self, wanted: Wanted, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch's objects as pictures, [B, V, 3, S, S] in [0, 1] on its backgrounds, and masks, [B, V, 1, S, S].

        order: [B, V], of the batch: which view is in each slot. Returns: on the pipeline's device.
        """
        source, device = self._source(wanted), self._pipeline.device
        found = [source.views(index, self._generator(wanted, place)) for place, index in self.places(wanted)]
        pictures, masks = (
            torch.stack([views[slots] for views, slots in zip(kind, order.cpu(), strict=True)]).to(device)
            for kind in zip(*found, strict=True)
        )
        return pictures, masks

    def _generator(self, wanted: Wanted, place: int) -> torch.Generator:
        """Of one object's background and draw."""
        domain = ("original",) if wanted.original else ()
        return seeded(self._config.train.seed, *domain, wanted.step, place)

    def make(self, wanted: Wanted, *, drop_rate: float | None = None) -> Batch:
        """As `take`, without a look at what was made ahead. drop_rate: of conditions, in place of the configuration's."""
        config, source = self._config, self._source(wanted)
        references = [0] if wanted.original else config.data.references(self._pipeline.num_views)
        objects, draws = [], []
        for place, index in self.places(wanted):
            generator = self._generator(wanted, place)
            objects.append(source.get(index, generator))
            draws.append(
                draw(
                    generator,
                    encoded=objects[-1],
                    num_timesteps=len(self._pipeline.scheduler.alphas_cumprod),
                    references=references,
                    drop_rate=config.loss.condition_drop_rate if drop_rate is None else drop_rate,
                    lowest=wanted.lowest,
                )
            )
        return make_batch(self._pipeline, objects, draws)


def kl_domains(config: Config, step: int) -> tuple[str, ...]:
    """Where a step measures and holds the KL: on the `new` and the `original` domain's objects, or nowhere."""
    if config.kl.weight == 0 or step % config.kl.every:
        return ()
    return ("new", "original") if config.kl.domain == "both" else (config.kl.domain,)


def object_at(place: int, count: int, seed: int) -> int:
    """Which of `count` objects stands at a place of the endless training order: each epoch a new permutation."""
    epoch, within = divmod(place, count)
    return int(_order(epoch, count, seed)[within])


@lru_cache(maxsize=4)
def _order(epoch: int, count: int, seed: int) -> torch.Tensor:
    return torch.randperm(count, generator=seeded(seed, "epoch", epoch))
