"""Sets of views that the model made itself, kept in the run's folder: of the model as it was at one step.

Each set is drawn alone, from noise of its own: what is made again after a kill is the same, and so is what another number of
processes makes. A set is kept under all that decides it (softprompt.data.storage): none of another model is taken for it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from softprompt.data.batch import EncodedViews, Objects, rotate_views, seed_of, seeded, view_order
from softprompt.data.storage import ShardStore, key_of
from softprompt.errors import InputError, RunError
from softprompt.model.adapted import AdaptedModel, predict
from softprompt.model.sampling import decode_latents, sample_latents
from softprompt.objectives.rewards import Reward
from train.objectives.terms import Context


@dataclass(frozen=True)
class Snapshot:
    """The model as it was at a step: what it takes to sample from it, or to hold a later one to it."""

    step: int
    """Optimizer steps done."""
    position: float
    """s of the prompt."""
    prompt: Tensor
    """E(s) [V, T, D], by view."""
    lora: dict[str, Tensor]
    """By name; empty where there is none."""

    @classmethod
    @torch.no_grad()
    def take(cls, adapted: AdaptedModel, step: int, position: float) -> "Snapshot":
        """Snapshot of the model as it is now."""
        lora = {name: weight.detach().clone() for name, weight in adapted.trainable().get("lora", {}).items()}
        return cls(step, position, adapted.prompt(position).clone(), lora)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Snapshot":
        """Inverse of `state`, on the CPU."""
        return cls(state["step"], state["position"], state["prompt"], dict(state["lora"]))

    def to(self, device: torch.device) -> "Snapshot":
        """A copy on a device."""
        lora = {name: weight.to(device) for name, weight in self.lora.items()}
        return Snapshot(self.step, self.position, self.prompt.to(device), lora)

    def state(self) -> dict[str, Any]:
        """State for a checkpoint."""
        lora = {name: weight.cpu() for name, weight in self.lora.items()}
        return {"step": self.step, "position": self.position, "prompt": self.prompt.cpu(), "lora": lora}

    @property
    def key(self) -> bytes:
        """Stands for the weights, whichever step they are of."""
        tensors = {"prompt": self.prompt, **self.lora}
        return key_of(*(part for n, t in sorted(tensors.items()) for part in (n, t.float().cpu().numpy().tobytes())))


@contextmanager
def as_it_was(adapted: AdaptedModel, snapshot: Snapshot) -> Iterator[None]:
    """Inside the block the LoRA is the snapshot's, and nothing is dropped out.

    No graph may be alive: weights are changed in place, and put back bit for bit.
    """
    now = list(adapted.trainable().get("lora", {}).items())
    kept, training = [weight.detach().clone() for _, weight in now], adapted.training
    _copy([weight for _, weight in now], [snapshot.lora[name] for name, _ in now])
    adapted.eval()
    try:
        yield
    finally:
        _copy([weight for _, weight in now], kept)
        adapted.train(training)


@torch.no_grad()
def _copy(weights: list[Tensor], values: list[Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)


@torch.no_grad()
def predict_as(
    adapted: AdaptedModel,
    snapshot: Snapshot,
    noisy: Tensor,
    given: Tensor,
    timesteps: Tensor,
    labels: Tensor,
    order: Tensor,
) -> Tensor:
    """The prediction of the model as it was, in the shapes of `AdaptedModel.forward`; no gradient."""
    with as_it_was(adapted, snapshot):
        return predict(adapted.unet, snapshot.prompt, noisy, given, timesteps, labels, order)


@dataclass(frozen=True)
class Sampling:
    """How sets are drawn."""

    steps: int
    """DDIM steps."""
    guidance_scales: tuple[float, ...]
    """Guidance scales of an object's sets, in turn."""
    eta: float
    seed: int


def rate(reward: Reward, where: str, views: Tensor, truth: Tensor, masks: Tensor) -> float:
    """The reward of one set, [1, V, 3, S, S]. where: named in errors. Raises: InputError for one that is no finite number."""
    found = reward(views, truth, masks)
    if not isinstance(found, Tensor) or found.shape != (1,) or not bool(found.isfinite()):
        what = f"shape {list(found.shape)}" if isinstance(found, Tensor) and found.numel() != 1 else f"{found!s:.40}"
        raise InputError(f"{where}: is {what}; expected one finite number an object, a tensor [B]")
    return float(found)


class OwnSamples:
    """Sets of views of the first objects of a source, by one snapshot.

    folder: where they are kept. sets: of each object. references: views that may be given; one is drawn for each object, and
    its background with it. reward: what it is called in errors, e.g. `dpo.reward: ssim`, and what sets are rated by.
    """

    def __init__(
        self,
        context: Context,
        objects: Objects,
        count: int,
        folder: Path,
        snapshot: Snapshot,
        sampling: Sampling,
        *,
        sets: int,
        references: Sequence[int],
        reward: tuple[str, Reward],
    ) -> None:
        self.folder = folder
        self.snapshot = snapshot
        self._context = context
        self._objects = objects
        self._count = min(count, len(objects))
        self._store = ShardStore(folder)
        self._sampling = sampling
        self._sets = sets
        self._references = references
        self._reward_name, self._reward = reward
        settings = (sampling.steps, repr(sampling.guidance_scales), sampling.eta, sampling.seed, repr(list(references)))
        self._key = key_of("own samples", snapshot.key, *settings, objects.background, self._reward_name)

    def __len__(self) -> int:
        """Objects that there are sets of."""
        return self._count

    def fill(self, *, stopped: Callable[[], bool], what: str) -> bool:
        """Make what is missing, shared out over the processes. stopped: asked after each object. what: for the bar.

        Returns: whether all is there, the same for every process.
        Raises: RunError where the disk is full; InputError for a picture that cannot be read any more.
        """
        accelerator = self._context.accelerator
        self._store.refresh()
        share = range(accelerator.process_index, len(self), accelerator.num_processes)  # whatever the others have made by now
        mine = [index for index in share if not self._kept(index)]
        bar = tqdm(mine, desc=what, unit="object", disable=not accelerator.is_main_process, leave=False, delay=2)
        with self._context.pipeline.encoders_on_device():  # once there and back for all of them
            for index in bar:
                if stopped():
                    break
                self._make(index)
        accelerator.wait_for_everyone()
        self._store.refresh()
        return all(self._kept(index) for index in range(len(self)))

    def given(self, index: int) -> tuple[EncodedViews, int]:
        """An object's true views, encoded on the background of its sets, and which of them the sets were made from."""
        generator = self._generator(index)
        encoded = self._objects.get(index, generator)
        return encoded, self._pick(generator)

    def latents(self, index: int) -> Tensor:
        """[M, V, C, H, W]: an object's sets, by view, unscaled, on the CPU; made anew where they were lost meanwhile."""
        return self._rows(index)["latents"]

    def rewards(self, index: int) -> list[float]:
        """Rewards of an object's sets."""
        found: list[float] = self._rows(index)["reward"].tolist()
        return found

    @torch.no_grad()
    def draw(self, index: int, number: int, prompt: Tensor) -> tuple[Tensor, float]:
        """One set of an object, with noise and guidance of its set `number`, by the model as it is, and its reward.

        prompt: E [V, T, D], by view. Returns: [V, C, H, W], by view, unscaled, on the CPU; the reward.
        Raises: InputError for a reward that cannot be computed, or is no finite number.
        """
        generator = self._generator(index)
        pictures, masks = self._objects.views(index, generator)
        reference, pipeline = self._pick(generator), self._context.pipeline
        truth, masks = rotate_views(pictures, reference), rotate_views(masks, reference)
        with pipeline.encoders_on_device():
            z = sample_latents(
                pipeline,
                prompt[view_order(reference, len(truth)).to(prompt.device)],
                truth[0],
                steps=self._sampling.steps,
                guidance_scale=self._sampling.guidance_scales[number % len(self._sampling.guidance_scales)],
                eta=self._sampling.eta,
                seed=seed_of(self._sampling.seed, "own samples", self._objects.names[index], number),
            )
            views = decode_latents(pipeline, z)
            where = f"{self._reward_name} of {self._objects.names[index]}"
            reward = rate(self._reward, where, views, truth[None].to(views), masks[None].to(views))
        by_view = rotate_views(z[0], (len(truth) - reference) % len(truth))
        return by_view.cpu() / pipeline.vae.config.scaling_factor, reward

    def _generator(self, index: int) -> torch.Generator:
        """Generator of an object's background and input view."""
        return seeded(self._sampling.seed, "own samples", self._objects.names[index])

    def _pick(self, generator: torch.Generator) -> int:
        return self._references[int(torch.randint(len(self._references), (), generator=generator))]

    def _keys(self, index: int) -> list[bytes]:
        return [key_of(self._key, self._objects.names[index], number) for number in range(self._sets)]

    def _kept(self, index: int) -> bool:
        return all(key in self._store for key in self._keys(index))

    def _rows(self, index: int) -> dict[str, Tensor]:
        if (rows := self._store.read(self._keys(index))) is None:
            self._make(index)
            rows = self._store.read(self._keys(index))
        if rows is None:
            raise RunError(f"{self._store.folder}: what was written there was read back damaged; likely the disk is failing")
        return rows

    def _make(self, index: int) -> None:
        adapted = self._context.adapted
        with as_it_was(adapted, self.snapshot):
            drawn = [self.draw(index, number, self.snapshot.prompt) for number in range(self._sets)]
        rows = {
            "latents": torch.stack([latents for latents, _ in drawn]),
            "reward": torch.tensor([reward for _, reward in drawn], dtype=torch.float64),
        }
        try:
            self._store.write(self._keys(index), rows)
        except InputError as error:
            size = sum(tensor.nbytes for tensor in rows.values()) * len(self) / 1e6
            raise RunError(
                f"{self._store.folder}: own samples cannot be written; all of them take {size:.0f} MB there. Likely the disk "
                f"is full or read-only: make room and go on with --resume; what is kept stays usable"
            ) from error
