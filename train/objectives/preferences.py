"""What Diffusion-DPO and SPIN-Diffusion share: sets of views of one object that are compared under one condition, at one
timestep and one noise, by the present model and by another that it is held to."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from softprompt.data.batch import Batch, Draw, EncodedViews, draw, seeded, spread_timesteps, view_order
from softprompt.errors import RunError
from softprompt.model.conditioning import make_batch, noisy_and_target
from softprompt.model.pipeline import Pipeline
from softprompt.objectives.preference import dpo_loss, item_errors, preference, prefers_winner, share_won
from softprompt.objectives.rewards import Reward
from train.objectives.own_samples import OwnSamples, Sampling, Snapshot
from train.objectives.terms import Scene, Term, view_weights
from train.options.config import Config
from train.options.preferences import DpoConfig, SpinConfig

if TYPE_CHECKING:
    from train.evaluation.evaluate import Preview
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
    """D of each object of a batch, [B], float64; without the reference's own view where `loss.own_view` is off."""
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
    as well where both rise and the loser's rises faster, and then the winner is lost too. What `measure` gives is said there.
    """

    own_passes = True
    copies = 1
    options: DpoConfig | SpinConfig

    def __init__(self, config: Config, settings: DpoConfig | SpinConfig, *, start: float) -> None:
        super().__init__(settings.weight)
        self.beta = settings.beta
        self.first, self.end = config.step_of(start), config.train.steps
        """The steps in which it trains: [first, end)."""
        self.started_from: Snapshot | None = None
        """The model as it was at the first."""
        self.others: OwnSamples | None = None
        """What that made of held-out objects."""
        self.held_out: list[HeldOut] = []
        self.options = settings
        self._expected: dict[tuple[int, int], Tensor] = {}
        """Errors of the model that held-out contests are measured against, by contest and timestep."""
        self._rehearsing = False

    def due(self, step: int) -> bool:
        """From its first step on."""
        return step >= self.first

    def rehearse(self, job: "Job") -> bool:
        """Compare true views with themselves, from the first step on: no samples are made for it."""
        del job
        self._rehearsing, self.first = True, 0
        return True

    # ---------------------------------------------------------------------------------------- what a subclass answers

    @abstractmethod
    def turn(self, scene: Scene, index: int, generator: torch.Generator) -> Contest:
        """A winner and a loser for a training object's turn, or for another's in its place."""

    @abstractmethod
    def held_to(self, job: "Job") -> Predict:
        """The model that the present one is held to in training."""

    @abstractmethod
    def measured_against(self, job: "Job") -> Predict:
        """The same on held-out contests: one model for the whole run, so that its numbers can be compared."""

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
            yield dpo_loss(*ours, *other, beta=self.beta).float() * len(turns) / len(places)
            preferred.append(preference(*ours.detach(), *other))
            gains.append(other - ours.detach())
        winner_gain, loser_gain = torch.cat(gains, dim=1).mean(dim=1)
        scene.log(f"{self.name}_accuracy", prefers_winner(torch.cat(preferred)))
        scene.log(f"{self.name}_winner_gain", winner_gain)
        scene.log(f"{self.name}_loser_gain", loser_gain)

    def _turn(self, scene: Scene, place: int, index: int) -> tuple[Contest, Draw]:
        config = scene.job.config
        assert scene.wanted is not None, "held-out objects have no turn"
        generator = seeded(config.train.seed, self.name, scene.step, place)
        contest = _rehearsal(scene.job, index, generator) if self._rehearsing else self.turn(scene, index, generator)
        return contest, draw(
            generator,
            encoded=contest.encoded,
            num_timesteps=len(scene.job.pipeline.scheduler.alphas_cumprod),
            references=[contest.reference],
            drop_rate=config.loss.condition_drop_rate,
            lowest=scene.wanted.lowest,
        )

    # ------------------------------------------------------------------------------------------------------ own samples

    def take_start(self, job: "Job", step: int, position: float) -> Snapshot:
        """The model as it was when the objective began: as it is now, if it begins now."""
        started = self.started_from or Snapshot.take(job.adapted, step, position)
        self.started_from = started.to(job.accelerator.device)
        return self.started_from

    def samples_of_training(
        self, job: "Job", folder: Path, name: str, snapshot: Snapshot, *, sets: int, reward: tuple[str, Reward]
    ) -> OwnSamples:
        """What a snapshot makes of training objects; they are still to be made. folder: of the run."""
        return OwnSamples(
            job,
            job.train,
            self.options.objects or len(job.train),
            folder / "samples" / f"{self.name}-{name}",
            snapshot,
            self._sampling(job.config),
            sets=sets,
            references=job.config.data.references(job.pipeline.num_views),
            reward=reward,
        )

    def samples_of_held_out(self, job: "Job", folder: Path, *, sets: int, reward: tuple[str, Reward]) -> OwnSamples:
        """What the model as it was when the objective began makes of held-out objects, all of it, whatever stops the run: they
        are few."""
        assert self.started_from is not None, "it is taken first"
        others = OwnSamples(
            job,
            job.held_out,
            self.options.held_out_objects,
            folder / "samples" / f"{self.name}-held-out",
            self.started_from,
            self._sampling(job.config),
            sets=sets,
            references=[job.config.data.first_reference],
            reward=reward,
        )
        if not others.fill(stopped=lambda: False, what=f"{self.name}: samples of held-out objects"):
            raise RunError(f"{others.folder}: what was written there cannot be read back; likely the disk is failing")
        return others

    def guidance_scales(self, config: Config) -> tuple[float, ...]:
        """Of an object's sets, in turn: the previews'."""
        return (config.monitor.guidance_scale,)

    def _sampling(self, config: Config) -> Sampling:
        return Sampling(self.options.sample_steps, self.guidance_scales(config), config.monitor.eta, config.train.seed)

    def cost_of_samples(self, job: "Job", *, sets: int, rounds: int) -> str:
        """In words. rounds: how often they are made of training objects."""
        objects, held_out = self._counts(job)
        passes = (objects * rounds + held_out) * sets * self.options.sample_steps
        when = f"at step {self.first}" if rounds == 1 else f"in each of {rounds} rounds, the first at step {self.first}"
        wide = "" if set(self.guidance_scales(job.config)) == {1} else ", twice as wide with guidance"
        made = f"{objects} objects {when}, and of {held_out} held out" if objects else f"{held_out} held-out objects"
        return f"{self.name:<10} own samples, {sets} of each of {made}: {passes:,} passes of the model{wide}"

    def bytes_of_samples(self, job: "Job", *, sets: int) -> int:
        """Of the samples of training objects, made once, and of held-out ones."""
        return sum(self._counts(job)) * sets * 4 * job.pipeline.num_views * math.prod(job.pipeline.latent_shape)

    def _counts(self, job: "Job") -> tuple[int, int]:
        """How many training and held-out objects there are samples of."""
        objects = min(self.options.objects or len(job.train), len(job.train)) if self.weight > 0 else 0
        return objects, min(self.options.held_out_objects, len(job.held_out))

    # --------------------------------------------------------------------------------------------------------- held out

    def measure(self, job: "Job", position: float, shown: "Preview") -> dict[str, float]:
        """On held-out objects, series after `held_out_` and the term's name.

        `accuracy`, `margin`: share of pairs of which the winner is preferred, and the mean preference, each pair's errors
        averaged over the validation's timesteps, no condition dropped. `reward`: of the first set of each object, drawn anew by
        the present model; `win_rate`: share of them that have more reward than when the objective began, from the same noise; a
        half where nothing has changed.
        """
        del shown
        series = {}
        if self.held_out:
            margins = torch.cat([self._margins(job, position, number, one) for number, one in enumerate(self.held_out)])
            series = {"accuracy": float(prefers_winner(margins)), "margin": float(margins.mean())}
        if (others := self.others) is not None:
            prompt, objects = job.adapted.prompt(position), range(len(others))
            ours = torch.tensor([others.draw(index, 0, prompt)[1] for index in objects])
            theirs = torch.tensor([others.rewards(index)[0] for index in objects])
            series |= {"reward": float(ours.mean()), "win_rate": float(share_won(ours, theirs))}
        return {f"held_out_{self.name}_{name}": value for name, value in series.items()}

    def _margins(self, job: "Job", position: float, number: int, one: HeldOut) -> Tensor:
        """The preference of each of a contest's pairs, [pairs], on the CPU."""
        length = len(job.pipeline.scheduler.alphas_cumprod)
        ours, other = [], []
        for timestep in spread_timesteps(job.config.monitor.validation_timesteps, length):
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


def _rehearsal(job: "Job", index: int, generator: torch.Generator) -> Contest:
    encoded = job.train.get(index, generator)
    true = (encoded.mean, encoded.std)
    return Contest(encoded, job.config.data.references(job.pipeline.num_views)[0], (true, true))
