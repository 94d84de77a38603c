"""The common part of Diffusion-DPO and SPIN-Diffusion: sets of views of one object, compared under one condition, at one
timestep and one noise, by the present model and by another that it is held to."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from softprompt.data.batch import Batch, Draw, EncodedViews, draw, seeded, view_order
from softprompt.errors import RunError
from softprompt.model.conditioning import make_batch, noisy_and_target
from softprompt.model.pipeline import Pipeline
from softprompt.objectives.preference import dpo_loss, item_errors, preference, prefers_winner, share_won
from softprompt.objectives.rewards import Reward
from train.objectives.own_samples import OwnSamples, Sampling, Snapshot
from train.objectives.terms import Context, Shown, StepBatch, Term
from train.options.config import Config
from train.options.preferences import DpoConfig, SpinConfig

Side = tuple[Tensor, Tensor]
"""Mean and deviation of the latents of one set of views, [V, C, H, W] each, by view, unscaled; what was sampled has none."""


@dataclass(frozen=True)
class Contest:
    """Sets of views of one object, from one picture of it."""

    encoded: EncodedViews
    """Encoded views of the object of the input picture."""
    reference: int
    """Which of its views that is."""
    sides: tuple[Side, ...]


@dataclass(frozen=True)
class HeldOut:
    """A contest that nothing is trained on, and which of its sides are better than which."""

    contest: Contest
    pairs: tuple[tuple[int, int], ...]
    """(winner, loser)."""


def sampled(latents: Tensor) -> Side:
    """A set of views that was sampled: it is what it is."""
    return latents, torch.zeros_like(latents)


def contest_batch(pipeline: Pipeline, contests: Sequence[Contest], draws: Sequence[Draw]) -> Batch:
    """All first sides, then all second sides, ...: each under its object's own condition, timestep and noise.

    A dropped condition is dropped for all sides of a contest.
    """
    batch = make_batch(pipeline, [contest.encoded for contest in contests], draws)
    sides = len(contests[0].sides)
    latents = [
        (mean + std * d.target_noise)[view_order(d.reference, len(mean))]
        for side in range(sides)
        for (mean, std), d in zip((contest.sides[side] for contest in contests), draws, strict=True)
    ]
    repeated = {field.name: torch.cat([getattr(batch, field.name)] * sides) for field in fields(batch)}
    scale = pipeline.vae.config.scaling_factor
    return Batch(**repeated | {"latents": torch.stack(latents).to(pipeline.device) * scale})


Predict = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Noisy and given latents, timesteps, labels and order of a batch => what a model predicts."""


def contest_errors(context: Context, batch: Batch, predict: Predict) -> Tensor:
    """D of each object of a batch, [B], float64; without the reference's own view where `loss.own_view` is off."""
    scheduler = context.pipeline.scheduler
    noisy, target = noisy_and_target(scheduler, batch)
    with context.accelerator.autocast():
        prediction = predict(noisy, batch.given, batch.timesteps, batch.labels, batch.order)
    return item_errors(
        prediction,
        target,
        scheduler.alphas_cumprod.to(batch.timesteps.device)[batch.timesteps],
        prediction_type=scheduler.config["prediction_type"],
        view_weights=context.view_weights(len(noisy)),
    )


class PreferenceTerm(Term):
    """A preference between two sets of views of each object, which the subclass gives.

    Series, after the term's name: `accuracy`, the share of pairs of which the present model prefers the winner by more than the
    one it is held to; `winner_gain` and `loser_gain`, by how much their errors are lower than that model's: the loss falls
    as well where both rise and the loser's rises faster, and then the winner is lost too. What `measure` gives is said there.
    """

    own_passes = True
    copies = 1
    options: DpoConfig | SpinConfig

    def __init__(
        self, config: Config, settings: DpoConfig | SpinConfig, *, start: float, guidance_scales: Sequence[float]
    ) -> None:
        super().__init__(settings.weight)
        self.sampling = Sampling(settings.sample_steps, tuple(guidance_scales), config.monitor.eta, config.train.seed)
        self.beta = settings.beta
        self.first, self.end = config.step_of(start), config.train.steps
        """The steps in which it trains: [first, end)."""
        self.started_from: Snapshot | None = None
        """The model as it was at the first."""
        self.others: OwnSamples | None = None
        """Samples of held-out objects by that model."""
        self.held_out: list[HeldOut] = []
        self.options = settings
        self._expected: dict[tuple[int, int], Tensor] = {}
        """Errors of the model that held-out contests are measured against, by contest and timestep."""
        self._rehearsing = False

    def due(self, step: int) -> bool:
        """From its first step on."""
        return step >= self.first

    def rehearse(self, context: Context) -> bool:
        """Compare true views with themselves, from the first step on: no samples are made for it."""
        del context
        self._rehearsing, self.first = True, 0
        return True

    # ---------------------------------------------------------------------------------------- what a subclass answers

    @abstractmethod
    def turn(self, batch: StepBatch, index: int, generator: torch.Generator) -> Contest:
        """A winner and a loser for a training object's turn, or for another's in its place."""

    @abstractmethod
    def regularised_toward(self, context: Context) -> Predict:
        """The model that the present one is held to in training."""

    @abstractmethod
    def measured_against(self, context: Context) -> Predict:
        """The model that held-out contests are compared with: one for the whole run, so that its numbers are comparable."""

    # --------------------------------------------------------------------------------------------------------- training

    def losses(self, batch: StepBatch) -> Iterator[Tensor]:
        """Half a batch of pairs at a time, since a pair is two objects: no more memory than the plain loss."""
        context, places = batch.context, batch.places
        at_once = max(1, len(places) // 2)
        preferred, gains = [], []
        for start in range(0, len(places), at_once):
            turns = [self._turn(batch, place, index) for place, index in places[start : start + at_once]]
            contests = contest_batch(context.pipeline, [contest for contest, _ in turns], [d for _, d in turns])
            # First the other model: it may be made of this one's weights, changed in place.
            with torch.no_grad():
                other = contest_errors(context, contests, self.regularised_toward(context)).unflatten(0, (2, -1))
            ours = contest_errors(context, contests, lambda *inputs: context.adapted(*inputs, batch.position))
            ours = ours.unflatten(0, (2, -1))
            yield dpo_loss(*ours, *other, beta=self.beta).float() * len(turns) / len(places)
            preferred.append(preference(*ours.detach(), *other))
            gains.append(other - ours.detach())
        winner_gain, loser_gain = torch.cat(gains, dim=1).mean(dim=1)
        batch.log(f"{self.name}_accuracy", prefers_winner(torch.cat(preferred)))
        batch.log(f"{self.name}_winner_gain", winner_gain)
        batch.log(f"{self.name}_loser_gain", loser_gain)

    def _turn(self, batch: StepBatch, place: int, index: int) -> tuple[Contest, Draw]:
        context = batch.context
        generator = seeded(context.seed, self.name, batch.step, place)
        contest = _rehearsal(context, index, generator) if self._rehearsing else self.turn(batch, index, generator)
        return contest, draw(
            generator,
            encoded=contest.encoded,
            num_timesteps=len(context.pipeline.scheduler.alphas_cumprod),
            references=[contest.reference],
            drop_rate=context.drop_rate,
            lowest=batch.in_training.lowest,
        )

    # ------------------------------------------------------------------------------------------------------ own samples

    def take_start(self, context: Context, step: int, position: float) -> Snapshot:
        """The model as it was when the objective began: as it is now, if it begins now."""
        started = self.started_from or Snapshot.take(context.adapted, step, position)
        self.started_from = started.to(context.accelerator.device)
        return self.started_from

    def samples_of_training(
        self, context: Context, folder: Path, name: str, snapshot: Snapshot, *, sets: int, reward: tuple[str, Reward]
    ) -> OwnSamples:
        """Samples of training objects by a snapshot, still to be made. folder: the run's."""
        return OwnSamples(
            context,
            context.train,
            self.options.objects or len(context.train),
            folder / "samples" / f"{self.name}-{name}",
            snapshot,
            self.sampling,
            sets=sets,
            references=context.references,
            reward=reward,
        )

    def samples_of_held_out(self, context: Context, folder: Path, *, sets: int, reward: tuple[str, Reward]) -> OwnSamples:
        """Samples of held-out objects by the model as it was when the objective began; all are made at once, since they are
        few."""
        assert self.started_from is not None, "it is taken first"
        others = OwnSamples(
            context,
            context.held_out,
            self.options.held_out_objects,
            folder / "samples" / f"{self.name}-held-out",
            self.started_from,
            self.sampling,
            sets=sets,
            references=[context.reference_view],
            reward=reward,
        )
        if not others.fill(stopped=lambda: False, what=f"{self.name}: samples of held-out objects"):
            raise RunError(f"{others.folder}: what was written there cannot be read back; likely the disk is failing")
        return others

    def cost_of_samples(self, context: Context, *, sets: int, rounds: int) -> str:
        """In words. rounds: how often they are made of training objects."""
        objects, held_out = self._counts(context)
        passes = (objects * rounds + held_out) * sets * self.options.sample_steps
        when = f"at step {self.first}" if rounds == 1 else f"in each of {rounds} rounds, the first at step {self.first}"
        wide = "" if set(self.sampling.guidance_scales) == {1} else ", twice as wide with guidance"
        made = f"{objects} objects {when}, and of {held_out} held out" if objects else f"{held_out} held-out objects"
        return f"{self.name:<10} own samples, {sets} of each of {made}: {passes:,} passes of the model{wide}"

    def bytes_of_samples(self, context: Context, *, sets: int) -> int:
        """Bytes of the samples of training objects, made once, and of held-out ones."""
        return sum(self._counts(context)) * sets * 4 * context.pipeline.num_views * math.prod(context.pipeline.latent_shape)

    def _counts(self, context: Context) -> tuple[int, int]:
        """How many training and held-out objects there are samples of."""
        objects = min(self.options.objects or len(context.train), len(context.train)) if self.weight > 0 else 0
        return objects, min(self.options.held_out_objects, len(context.held_out))

    # --------------------------------------------------------------------------------------------------------- held out

    def evaluate(self, context: Context, position: float, shown: Shown) -> dict[str, float]:
        """On held-out objects, series after `held_out_` and the term's name.

        `accuracy`, `margin`: share of pairs of which the winner is preferred, and the mean preference, each pair's errors
        averaged over the validation's timesteps, no condition dropped. `reward`: of the first set of each object, drawn anew by
        the present model; `win_rate`: share of them that have more reward than when the objective began, from the same noise; a
        half where nothing has changed.
        """
        del shown
        series = {}
        if self.held_out:
            margins = torch.cat([self._margins(context, position, number, one) for number, one in enumerate(self.held_out)])
            series = {"accuracy": float(prefers_winner(margins)), "margin": float(margins.mean())}
        if (others := self.others) is not None:
            prompt, objects = context.adapted.prompt(position), range(len(others))
            ours = torch.tensor([others.draw(index, 0, prompt)[1] for index in objects])
            theirs = torch.tensor([others.rewards(index)[0] for index in objects])
            series |= {"reward": float(ours.mean()), "win_rate": float(share_won(ours, theirs))}
        return {f"held_out_{self.name}_{name}": value for name, value in series.items()}

    def _margins(self, context: Context, position: float, number: int, one: HeldOut) -> Tensor:
        """The preference of each of a contest's pairs, [pairs], on the CPU."""
        length = len(context.pipeline.scheduler.alphas_cumprod)
        ours, other = [], []
        for timestep in context.held_out_timesteps:
            d = draw(
                seeded("held-out contest", number, timestep),
                encoded=one.contest.encoded,
                num_timesteps=length,
                references=[one.contest.reference],
                timestep=timestep,
            )
            if (number, timestep) not in self._expected:
                self._expected[number, timestep] = self._errors(context, one.contest, d, self.measured_against(context))
            other.append(self._expected[number, timestep])
            ours.append(self._errors(context, one.contest, d, lambda *inputs: context.adapted(*inputs, position)))
        now, before = torch.stack(ours).mean(dim=0), torch.stack(other).mean(dim=0)  # sides
        winners, losers = torch.tensor(one.pairs).T
        return preference(now[winners], now[losers], before[winners], before[losers])

    def _errors(self, context: Context, contest: Contest, d: Draw, predict: Predict) -> Tensor:
        """D of each side, on the CPU; as many at once as a training step takes."""
        at_once, found = context.batch_size, []
        for start in range(0, len(contest.sides), at_once):
            part = Contest(contest.encoded, contest.reference, contest.sides[start : start + at_once])
            found.append(contest_errors(context, contest_batch(context.pipeline, [part], [d]), predict).cpu())
        return torch.cat(found)


def _rehearsal(context: Context, index: int, generator: torch.Generator) -> Contest:
    encoded = context.train.get(index, generator)
    true = (encoded.mean, encoded.std)
    return Contest(encoded, context.references[0], (true, true))
