"""DRaFT+: sample the batch's objects, judge the views, and send the reward's gradient back through the last sampling steps."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from softprompt.data.batch import Batch, seeded
from softprompt.errors import InputError, RunError
from softprompt.model.sampling import decode_with_gradient, with_guidance
from softprompt.objectives import draft as formulas
from softprompt.objectives.rewards import LEAST, NEED_BACKGROUND, REWARDS, Reward, has_background, statistics_of_truth
from train.objectives.terms import Context, Shown, StepBatch, Term
from train.options.objectives import DraftConfig

SMOOTHING = 0.8
"""Share of its running mean that a draft's statistics leave in place."""
_IN_WORDS = {"edges": "density of edges", "colours": "entropy of colours", "foreground": "share of the object in the picture"}


@dataclass
class Guard:
    """Running means of the drafts' statistics, each as a share of the true views' (`statistics_of_truth`)."""

    share: float
    """A statistic has collapsed where it is below this share of what it was in the first draft, or of 1 where that was above
    1; and where it is above the inverse."""
    start: dict[str, float] = field(default_factory=dict)
    """Statistics of the first draft: the pretrained model's, unless the run starts from an export."""
    now: dict[str, float] = field(default_factory=dict)
    """Running means."""

    def inspect(self, found: Mapping[str, float]) -> str | None:
        """Take in what a step drafted. Returns: what has collapsed, in words; None where nothing has."""
        self.start = {**found, **self.start}
        known = {n: min(value, 2 * self._allowed(n)[1]) for n, value in found.items()}  # one outlier is no trend
        self.now = {n: SMOOTHING * self.now.get(n, value) + (1 - SMOOTHING) * value for n, value in known.items()}
        return next(filter(None, map(self._collapsed, found)), None)

    def _collapsed(self, name: str) -> str | None:
        start, now = self.start[name], self.now[name]
        low, high = self._allowed(name)
        if low <= now <= high:
            return None
        first = f"{start:.0%} in the first draft"
        return (
            f"the {_IN_WORDS[name]} of the drafted views is {now:.0%} of that of the true ones ({first}; allowed {low:.0%} to "
            f"{high:.0%})"
        )

    def _allowed(self, name: str) -> tuple[float, float]:
        start = self.start[name]
        return self.share * min(1.0, start), max(1.0, start) / self.share

    def state(self) -> dict[str, Any]:
        """State as plain values, without the share, which is an option."""
        return {"start": self.start, "now": self.now}


class Draft(Term):
    """Minus the reward of drafted views, plus the KL on the steps that a gradient goes through."""

    name = "draft"
    own_passes = True
    decodes = True

    def __init__(self, settings: DraftConfig, reward: Reward) -> None:
        super().__init__(settings.weight * settings.every)  # on every n-th step, n times the weight
        self.settings = settings
        self.reward = reward
        self.guard = None if settings.guard is None else Guard(settings.guard)

    def due(self, step: int) -> bool:
        """On every n-th step."""
        return step % self.settings.every == 0

    def losses(self, step: StepBatch) -> Iterator[Tensor]:
        """Object by object: a draft needs no more memory for a larger batch."""
        pictures, masks = step.true_views
        drafts, rewards, kls = [], [], []
        with step.context.pipeline.encoders_on_device():
            for index, (place, _) in enumerate(step.places):
                one = slice(index, index + 1)
                for views, kl in self._drafts(step, step.undropped.only(index), place):
                    reward = self.judge(views, pictures[one], masks[one])
                    rewards.append(reward.detach().mean())
                    kls.append(kl.detach().mean())
                    share = 1 / len(step.places) / max(1, self.settings.renoise)
                    yield share * formulas.draft_loss(reward, kl, self.settings.kl)
                drafts.append(views.detach())
        step.log("draft_reward", torch.stack(rewards).mean())
        step.log("draft_kl", torch.stack(kls).mean())
        for name, value in statistics_of_truth(torch.cat(drafts), pictures, masks).items():
            step.log(f"draft_{name}", value)

    def _drafts(self, step: StepBatch, batch: Batch, place: int) -> Iterator[tuple[Tensor, Tensor]]:
        """One object's drafted pictures, [1, V, 3, S, S], and KL, [K, 1], both with a gradient; several with DRaFT-LV."""
        context, settings = step.context, self.settings
        scheduler = DDIMScheduler.from_config(context.pipeline.scheduler.config)
        scheduler.set_timesteps(settings.steps, device=context.pipeline.device)
        key = (context.seed, "draft", step.step, place)
        z = torch.randn(batch.noise.shape, generator=seeded(*key)).to(batch.noise) * scheduler.init_noise_sigma
        drawn = seeded(*key, "steps") if settings.truncation == "random" else None
        count = 0 if settings.renoise else formulas.steps_with_gradient(settings.steps, settings.backward_steps, drawn)
        clean = z
        with torch.no_grad():
            for t in scheduler.timesteps[: settings.steps - count]:
                z, clean, _ = self._ddim_step(step, scheduler, batch, z, t)
        kls: list[Tensor] = []
        for t in scheduler.timesteps[settings.steps - count :]:
            z, clean, kl = self._ddim_step(step, scheduler, batch, z, t, anew=count > 1)
            kls.append(kl)
        if settings.renoise == 0:
            yield decode_with_gradient(context.pipeline, clean), torch.stack(kls)
            return
        last = scheduler.timesteps[-1]
        for number in range(settings.renoise):
            noise = torch.randn(z.shape, generator=seeded(*key, "renoise", number)).to(z)
            again = formulas.renoised(clean, noise, scheduler.alphas_cumprod.to(z)[last])
            _, drafted, kl = self._ddim_step(step, scheduler, batch, again, last)
            yield decode_with_gradient(context.pipeline, drafted), kl[None]

    def _ddim_step(
        self, step: StepBatch, scheduler: DDIMScheduler, batch: Batch, z: Tensor, t: Tensor, *, anew: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A DDIM step (eta 0) from timestep t. z: [1, V, C, H, W].

        Returns: z at the next timestep, the clean estimate, and the KL's term, [1]. It is the last clean estimate that is
        decoded, as NeMo does: with FaceLift's schedule the last z keeps the noise of timestep 0, which the eye does not see,
        but it has less than a third of the gradient.

        Without a gradient the KL is left out, and 0. anew: compute the pass again on the way back, and keep nothing of it:
        with several steps there would be too much.
        """
        adapted, scale, timesteps = step.context.adapted, self.settings.guidance_scale, t.expand(len(z))

        def ours(noisy: Tensor) -> Tensor:
            model = partial(adapted, position=step.position)
            return _pass(step, model, batch, scale, noisy, timesteps)

        prediction = checkpoint(ours, z, use_reentrant=False) if anew else ours(z)
        kl = z.new_zeros(len(z))
        if torch.is_grad_enabled():
            pretrained = _pass(step, adapted.reference, batch, scale, z.detach(), timesteps)
            kl = formulas.trajectory_kl(z, prediction, pretrained, scheduler.alphas_cumprod, timesteps, step.prediction_type)
        done = scheduler.step(prediction, t, z)
        return done.prev_sample, done.pred_original_sample, kl

    def judge(self, views: Tensor, truth: Tensor, masks: Tensor) -> Tensor:
        """The reward, [B]. Raises: InputError for pictures that it cannot judge, or where it gives something else."""
        name = self.settings.reward
        reward = self.reward(views, truth, masks)
        if not isinstance(reward, Tensor) or reward.shape != views.shape[:1]:
            found = list(reward.shape) if isinstance(reward, Tensor) else type(reward).__name__
            raise InputError(f"draft.reward: {name} returned {found}; expected a tensor [{len(views)}], a number an object")
        if torch.is_grad_enabled() and not reward.requires_grad:
            raise InputError(
                f"draft.reward: {name} has no gradient; expected one through the views, by operations of torch alone"
            )
        return reward.float()

    def inspect(self, step: int, values: Mapping[str, float]) -> None:
        """Raises: RunError where the drafted pictures have collapsed."""
        if self.guard is None:
            return
        collapsed = self.guard.inspect({name: values[f"draft_{name}"] for name in LEAST})
        if collapsed is not None:
            raise RunError(
                f"step {step}: the reward is gamed: {collapsed}; draft.reward {self.settings.reward} is at "
                f"{values['draft_reward']:.4g}. The run is stopped; its checkpoints stay, and export/best is the one that was "
                f"best on held-out objects. Try a lower draft.weight, a higher draft.kl, another draft.reward, or draft.guard "
                f"null to go on all the same (--resume RUN --resume-override)"
            )

    def evaluate(self, context: Context, position: float, shown: Shown) -> dict[str, float]:
        """The previews by its own reward and all others that these pictures allow, and what the guard looks at."""
        del context, position
        views, truth, masks = (p.float() for p in (shown.now, shown.truth, shown.masks))
        found = {f"held_out_reward_{self.reward_name}": self.judge(views, truth, masks).mean()}
        for name, reward in REWARDS.items():
            if has_background(masks) or name not in NEED_BACKGROUND:
                found[f"held_out_reward_{name}"] = reward(views, truth, masks).mean()
        found |= {f"held_out_{name}": value for name, value in statistics_of_truth(views, truth, masks).items()}
        return {name: float(value) for name, value in found.items()}

    @property
    def reward_name(self) -> str:
        """Name of the reward; a user's function may have the name of a built-in one."""
        _, own, name = self.settings.reward.rpartition(":")
        return f"own_{name}" if own else name

    def state(self) -> dict[str, Any]:
        """State of the guard."""
        return {} if self.guard is None else self.guard.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state`."""
        if self.settings.guard is not None:
            self.guard = Guard(self.settings.guard, **state)


def _pass(step: StepBatch, model: Callable[..., Tensor], batch: Batch, scale: float, z: Tensor, timesteps: Tensor) -> Tensor:
    """A prediction with guidance, [B, V, C, H, W], float32, of z at timesteps [B]. model: takes what `AdaptedModel` does, but
    for the position."""
    noisy, given, times, labels, order = z, batch.given, timesteps, batch.labels, batch.order
    if scale != 1:  # the first half sees no picture; the prompt is the same in both
        noisy, times, order = (torch.cat([x, x]) for x in (noisy, times, order))
        given, labels = (torch.cat([torch.zeros_like(x), x]) for x in (given, labels))
    with step.context.accelerator.autocast():
        prediction = model(noisy, given, times, labels, order).float()
    if scale == 1:
        return prediction
    without, with_picture = prediction.chunk(2)
    return with_guidance(without, with_picture, scale)
