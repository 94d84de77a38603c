"""What Diffusion-DPO and SPIN-Diffusion share: sets of views of one object that are compared under one condition, at one timestep
and one noise, by the present model and by another that it is held to."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from softprompt.batch import Batch, Draw, draw, make_batch, seeded
from softprompt.conditioning import EncodedViews
from softprompt.data import view_order
from softprompt.model import noisy_and_target
from softprompt.objectives.preference import dpo_loss, item_errors, preference, prefers_winner, share_won
from softprompt.pipeline import Pipeline
from train.config import Config
from train.evaluate import view_weights
from train.objectives.own_samples import OwnSamples, Reward, Sampling, Snapshot
from train.objectives.terms import Scene, Term

if TYPE_CHECKING:
    from train.evaluate import Preview
    from train.setup import Job

Side = tuple[Tensor, Tensor]
"""Mean and deviation of the latents of one set of views, [V, C, H, W] each, by view, unscaled; what was sampled has none."""


@dataclass(frozen=True)
class Contest:
    """Sets of views of one object, from one picture of it."""

    encoded: EncodedViews
    """Of the object whose picture is given."""
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


def contest_errors(job: "Job", batch: Batch, predict: Predict) -> Tensor:
    """D of each object of a batch, [B], float64."""
    scheduler = job.pipeline.scheduler
    noisy, target = noisy_and_target(scheduler, batch)
    with job.accelerator.autocast():
        prediction = predict(noisy, batch.given, batch.timesteps, batch.labels, batch.order)
    return item_errors(
        prediction,
        target,
        scheduler.alphas_cumprod.to(batch.timesteps.device)[batch.timesteps],
        prediction_type=scheduler.config["prediction_type"],
        view_weights=view_weights(job, len(noisy)),
    )


class PreferenceTerm(Term):
    """A preference between two sets of views of each object, which the subclass gives.

    Series, after the term's name: `accuracy`, the share of pairs of which the present model prefers the winner by more than the
    one it is held to; `winner_gain` and `loser_gain`, by how much their errors are lower than that model's: the loss falls
    as well where both rise and the loser's rises faster, and then the winner is lost too.
    """

    own_passes = True

    def __init__(self, config: Config, *, weight: float, beta: float, start: float, held_out_objects: int) -> None:
        super().__init__(weight)
        self.beta = beta
        self.first = config.step_of(start)
        """The step at which it begins."""
        self.held_out_objects = held_out_objects
        self._held_out: list[HeldOut] = []
        self._expected: dict[tuple[int, int], Tensor] = {}
        """Errors of the model that held-out contests are measured against, by contest and timestep."""

    def due(self, step: int) -> bool:
        """From its first step on."""
        return step >= self.first

    # ---------------------------------------------------------------------------------------- what a subclass answers

    def turn(self, scene: Scene, index: int, generator: torch.Generator) -> Contest:
        """A winner and a loser for a training object's turn, or for another's in its place."""
        raise NotImplementedError

    def held_to(self, job: "Job") -> Predict:
        """The model that the present one is held to in training."""
        raise NotImplementedError

    def measured_against(self, job: "Job") -> Predict:
        """The same on held-out contests: one model for the whole run, so that its numbers can be compared."""
        raise NotImplementedError

    # --------------------------------------------------------------------------------------------------------- training

    def losses(self, scene: Scene) -> Iterator[Tensor]:
        """Half a batch of pairs at a time, since a pair is two objects: no more memory than the plain loss."""
        job, places = scene.job, scene.places
        at_once = max(1, len(places) // 2)
        preferred, gains = [], []
        for start in range(0, len(places), at_once):
            turns = [self._turn(scene, place, index) for place, index in places[start : start + at_once]]
            batch = contest_batch(job.pipeline, [contest for contest, _ in turns], [d for _, d in turns])
            # First the other model: it may be made of this one's weights, changed in place.
            with torch.no_grad():
                other = contest_errors(job, batch, self.held_to(job)).unflatten(0, (2, -1))
            ours = contest_errors(job, batch, lambda *inputs: job.adapted(*inputs, scene.position)).unflatten(0, (2, -1))
            errors = ours[0], ours[1], other[0], other[1]
            yield dpo_loss(*errors, beta=self.beta).float() * len(turns) / len(places)
            preferred.append(preference(*(e.detach() for e in errors)))
            gains.append(other - ours.detach())
        winner_gain, loser_gain = torch.cat(gains, dim=1).mean(dim=1)
        scene.log(f"{self.name}_accuracy", prefers_winner(torch.cat(preferred)))
        scene.log(f"{self.name}_winner_gain", winner_gain)
        scene.log(f"{self.name}_loser_gain", loser_gain)

    def _turn(self, scene: Scene, place: int, index: int) -> tuple[Contest, Draw]:
        config = scene.job.config
        generator = seeded(config.train.seed, self.name, scene.step, place)
        contest = self.turn(scene, index, generator)
        return contest, draw(
            generator,
            encoded=contest.encoded,
            num_timesteps=len(scene.job.pipeline.scheduler.alphas_cumprod),
            references=[contest.reference],
            drop_rate=config.loss.condition_drop_rate,
            lowest=scene.wanted.lowest,
        )

    # -------------------------------------------------------------------------------------------------------- held out

    def measure(self, job: "Job", position: float, shown: "Preview") -> dict[str, float]:
        """Series `held_out_accuracy` and `held_out_margin`: share of held-out pairs of which the winner is preferred, and the
        mean preference, errors averaged over the validation's timesteps; no condition is dropped."""
        del shown
        if not self._held_out:
            return {}
        margins = torch.cat([self._margins(job, position, number, one) for number, one in enumerate(self._held_out)])
        return {
            f"{self.name}_held_out_accuracy": float(prefers_winner(margins)),
            f"{self.name}_held_out_margin": float(margins.mean()),
        }

    def _margins(self, job: "Job", position: float, number: int, one: HeldOut) -> Tensor:
        """The preference of each of a contest's pairs, [pairs], on the CPU."""
        length, count = len(job.pipeline.scheduler.alphas_cumprod), job.config.monitor.validation_timesteps
        ours, other = [], []
        for timestep in (int((k + 0.5) / count * length) for k in range(count)):
            d = draw(
                seeded("held-out contest", number, timestep),
                encoded=one.contest.encoded,
                num_timesteps=length,
                references=[one.contest.reference],
                timestep=timestep,
            )
            if (number, timestep) not in self._expected:
                self._expected[number, timestep] = self._errors(job, one.contest, d, self.measured_against(job))
            other.append(self._expected[number, timestep])
            ours.append(self._errors(job, one.contest, d, lambda *inputs: job.adapted(*inputs, position)))
        now, before = torch.stack(ours).mean(dim=0), torch.stack(other).mean(dim=0)  # sides
        winners, losers = torch.tensor(one.pairs).T
        return preference(now[winners], now[losers], before[winners], before[losers])

    def _errors(self, job: "Job", contest: Contest, d: Draw, predict: Predict) -> Tensor:
        """D of each side, on the CPU; as many at once as a training step takes."""
        at_once, found = job.config.train.batch_size, []
        for start in range(0, len(contest.sides), at_once):
            part = Contest(contest.encoded, contest.reference, contest.sides[start : start + at_once])
            found.append(contest_errors(job, contest_batch(job.pipeline, [part], [d]), predict).cpu())
        return torch.cat(found)


class OwnSampling(PreferenceTerm):
    """One that compares sets of views that the model itself has made.

    Series, after the term's name, of one set of each of a few held-out objects: `held_out_reward`, its mean, and `win_rate`,
    the share of objects whose set has more reward than that of the model as it was when the objective began, from the same
    noise; a half where they are the same.
    """

    def __init__(
        self, config: Config, *, weight: float, beta: float, start: float, held_out_objects: int, sample_steps: int
    ) -> None:
        super().__init__(config, weight=weight, beta=beta, start=start, held_out_objects=held_out_objects)
        self.sampling = Sampling(sample_steps, config.monitor.guidance_scale, config.monitor.eta, config.train.seed)
        self.started_from: Snapshot | None = None
        """The model as it was when the objective began."""
        self._started: list[float] = []
        """Rewards of its sets of held-out objects."""
        self._others: OwnSamples | None = None
        """Its sets of held-out objects."""

    def own(
        self, job: "Job", folder: Path, name: str, snapshot: Snapshot, *, sets: int, objects: int | None, rate: tuple[str, Reward]
    ) -> OwnSamples:
        """Sets of training objects. objects: how many at most; None: all."""
        return OwnSamples(
            job,
            job.train,
            objects or len(job.train),
            folder / "samples" / f"{self.name}-{name}",
            snapshot,
            self.sampling,
            sets=sets,
            references=job.config.data.references(job.pipeline.num_views),
            reward=rate[1],
            reward_name=rate[0],
        )

    def own_held_out(self, job: "Job", folder: Path, snapshot: Snapshot, *, sets: int, rate: tuple[str, Reward]) -> OwnSamples:
        """Sets of held-out objects, all made, whatever stops the run: they are few."""
        others = OwnSamples(
            job,
            job.held_out,
            self.held_out_objects,
            folder / "samples" / f"{self.name}-held-out",
            snapshot,
            self.sampling,
            sets=sets,
            references=[job.config.data.first_reference],
            reward=rate[1],
            reward_name=rate[0],
        )
        others.fill(stopped=lambda: False, what=f"{self.name}: own samples of held-out objects")
        self._others = others
        return others

    def measure(self, job: "Job", position: float, shown: "Preview") -> dict[str, float]:
        """See the class, and `PreferenceTerm.measure`."""
        series = super().measure(job, position, shown)
        if self._others is None:
            return series
        others, prompt = self._others, job.adapted.prompt(position)
        ours = [others.draw(index, 0, prompt)[1] for index in range(len(others))]
        theirs = [others.rewards(index)[0] for index in range(len(others))]
        return series | {
            f"{self.name}_held_out_reward": sum(ours) / len(ours),
            f"{self.name}_win_rate": float(share_won(torch.tensor(ours), torch.tensor(theirs))),
        }
