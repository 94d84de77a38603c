"""Training batches: which objects, in which order, with which randomness; made ahead while the device works."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import torch

from softprompt.batch import Batch, draw, make_batch, seeded
from softprompt.cache import EncodedObjects
from softprompt.pipeline import Pipeline
from train.config import Config


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
            self._ahead = {w: self._ahead.get(w) or self._thread.submit(self._make, w) for w in wanted}

    def take(self, wanted: Wanted) -> Batch:
        """On the pipeline's device. Raises: InputError when an object's pictures cannot be read any more."""
        made = self._ahead.pop(wanted, None)
        return self._make(wanted) if made is None else made.result()

    def _make(self, wanted: Wanted) -> Batch:
        """The process's objects, by their position in the global batch."""
        config = self._config
        seed, size, parts = config.train.seed, config.train.batch_size, config.train.accumulation
        source, references = self._train, config.data.references(self._pipeline.num_views)
        key: tuple[int | str, ...] = (seed, wanted.step)
        if wanted.original:
            assert self._replay is not None, "kl.domain is checked against data.original when the configuration is read"
            source, references, key = self._replay, [0], (seed, "original", wanted.step)
        first = (wanted.part * self._processes + self._process) * size
        objects, draws = [], []
        for position in range(first, first + size):
            generator = seeded(*key, position)
            index = object_at(wanted.step * size * self._processes * parts + position, len(source), seed)
            objects.append(source.get(index, generator))
            draws.append(
                draw(
                    generator,
                    encoded=objects[-1],
                    num_timesteps=len(self._pipeline.scheduler.alphas_cumprod),
                    references=references,
                    drop_rate=config.loss.condition_drop_rate,
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
