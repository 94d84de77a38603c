"""DRaFT+: sample the batch's objects, judge the views, and send the reward's gradient back through the last sampling steps."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from softprompt.data.batch import Batch, seeded
from softprompt.errors import InputError, RunError
from softprompt.model.sampling import decode_with_gradient, with_guidance
from softprompt.objectives import draft as formulas
from softprompt.objectives.rewards import LEAST, NEED_BACKGROUND, REWARDS, Reward, has_background, statistics_of_truth
from train.objectives.guard import Guard
from train.objectives.terms import Scene, Term
from train.options.objectives import DraftConfig

if TYPE_CHECKING:
    from train.evaluation.evaluate import Preview
    from train.setup import Job


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

    def losses(self, scene: Scene) -> Iterator[Tensor]:
        """Object by object: a draft needs no more memory for a larger batch."""
        pictures, masks = scene.true_views
        drafts, rewards, kls = [], [], []
        with scene.job.pipeline.encoders_on_device():
            for index, (place, _) in enumerate(scene.places):
                one = slice(index, index + 1)
                for views, kl in self._drafts(scene, scene.undropped.only(index), place):
                    reward = self.judge(views, pictures[one], masks[one])
                    rewards.append(reward.detach().mean())
                    kls.append(kl.detach().mean())
                    share = 1 / len(scene.places) / max(1, self.settings.renoise)
                    yield share * formulas.draft_loss(reward, kl, self.settings.kl)
                drafts.append(views.detach())
        scene.log("draft_reward", torch.stack(rewards).mean())
        scene.log("draft_kl", torch.stack(kls).mean())
        for name, value in statistics_of_truth(torch.cat(drafts), pictures, masks).items():
            scene.log(f"draft_{name}", value)

    def _drafts(self, scene: Scene, batch: Batch, place: int) -> Iterator[tuple[Tensor, Tensor]]:
        """One object's drafted pictures, [1, V, 3, S, S], and KL, [K, 1], both with a gradient; several with DRaFT-LV."""
        job, settings = scene.job, self.settings
        scheduler = DDIMScheduler.from_config(job.pipeline.scheduler.config)
        scheduler.set_timesteps(settings.steps, device=job.pipeline.device)
        key = (job.config.train.seed, "draft", scene.step, place)
        z = torch.randn(batch.noise.shape, generator=seeded(*key)).to(batch.noise) * scheduler.init_noise_sigma
        drawn = seeded(*key, "steps") if settings.truncation == "random" else None
        count = 0 if settings.renoise else formulas.steps_with_gradient(settings.steps, settings.backward_steps, drawn)
        clean = z
        with torch.no_grad():
            for t in scheduler.timesteps[: settings.steps - count]:
                z, clean, _ = self._step(scene, scheduler, batch, z, t)
        kls: list[Tensor] = []
        for t in scheduler.timesteps[settings.steps - count :]:
            z, clean, kl = self._step(scene, scheduler, batch, z, t, anew=count > 1)
            kls.append(kl)
        if settings.renoise == 0:
            yield decode_with_gradient(job.pipeline, clean), torch.stack(kls)
            return
        last = scheduler.timesteps[-1]
        for number in range(settings.renoise):
            noise = torch.randn(z.shape, generator=seeded(*key, "renoise", number)).to(z)
            again = formulas.renoised(clean, noise, scheduler.alphas_cumprod.to(z)[last])
            _, drafted, kl = self._step(scene, scheduler, batch, again, last)
            yield decode_with_gradient(job.pipeline, drafted), kl[None]

    def _step(
        self, scene: Scene, scheduler: DDIMScheduler, batch: Batch, z: Tensor, t: Tensor, *, anew: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A DDIM step (eta 0) from timestep t. z: [1, V, C, H, W].

        Returns: z at the next timestep, the clean estimate, and the KL's term, [1]. It is the last clean estimate that is
        decoded, as NeMo does: with FaceLift's schedule the last z keeps the noise of timestep 0, which the eye does not see,
        but it has less than a third of the gradient.

        Without a gradient the KL is left out, and 0. anew: compute the pass again on the way back, and keep nothing of it:
        with several steps there would be too much.
        """
        adapted, scale, timesteps = scene.job.adapted, self.settings.guidance_scale, t.expand(len(z))

        def ours(noisy: Tensor) -> Tensor:
            model = partial(adapted, position=scene.position)
            return _pass(scene, model, batch, scale, noisy, timesteps)

        prediction = checkpoint(ours, z, use_reentrant=False) if anew else ours(z)
        kl = z.new_zeros(len(z))
        if torch.is_grad_enabled():
            untouched = _pass(scene, adapted.reference, batch, scale, z.detach(), timesteps)
            kl = formulas.trajectory_kl(z, prediction, untouched, scheduler.alphas_cumprod, timesteps, scene.prediction_type)
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

    def look(self, step: int, values: Mapping[str, float]) -> None:
        """Raises: RunError where the drafted pictures have collapsed."""
        if self.guard is None:
            return
        collapsed = self.guard.look({name: values[f"draft_{name}"] for name in LEAST})
        if collapsed is not None:
            raise RunError(
                f"step {step}: the reward is gamed: {collapsed}; draft.reward {self.settings.reward} is at "
                f"{values['draft_reward']:.4g}. The run is stopped; its checkpoints stay, and export/best is the one that was "
                f"best on held-out objects. Try a lower draft.weight, a higher draft.kl, another draft.reward, or draft.guard "
                f"null to go on all the same (--resume RUN --resume-override)"
            )

    def measure(self, job: "Job", position: float, shown: "Preview") -> dict[str, float]:
        """The previews by its own reward and all others that these pictures allow, and what the guard looks at."""
        del job, position
        views, truth, masks = (p.float() for p in (shown.now, shown.truth, shown.masks))
        found = {f"held_out_reward_{self.reward_name}": self.judge(views, truth, masks).mean()}
        for name, reward in REWARDS.items():
            if has_background(masks) or name not in NEED_BACKGROUND:
                found[f"held_out_reward_{name}"] = reward(views, truth, masks).mean()
        found |= {f"held_out_{name}": value for name, value in statistics_of_truth(views, truth, masks).items()}
        return {name: float(value) for name, value in found.items()}

    @property
    def reward_name(self) -> str:
        """Of the reward; a function of the user's may be called as one of ours is."""
        _, own, name = self.settings.reward.rpartition(":")
        return f"own_{name}" if own else name

    def state(self) -> dict[str, Any]:
        """Of the guard."""
        return {} if self.guard is None else self.guard.state()

    def go_on_from(self, state: Mapping[str, Any]) -> None:
        """Of the guard."""
        if self.settings.guard is not None:
            self.guard = Guard(self.settings.guard, **state)


def _pass(scene: Scene, model: Callable[..., Tensor], batch: Batch, scale: float, z: Tensor, timesteps: Tensor) -> Tensor:
    """A prediction with guidance, [B, V, C, H, W], float32, of z at timesteps [B]. model: takes what `AdaptedModel` does, but
    for the position."""
    noisy, given, times, labels, order = z, batch.given, timesteps, batch.labels, batch.order
    if scale != 1:  # the first half sees no picture; the prompt is the same in both
        noisy, times, order = (torch.cat([x, x]) for x in (noisy, times, order))
        given, labels = (torch.cat([torch.zeros_like(x), x]) for x in (given, labels))
    with scene.job.accelerator.autocast():
        prediction = model(noisy, given, times, labels, order).float()
    if scale == 1:
        return prediction
    without, with_picture = prediction.chunk(2)
    return with_guidance(without, with_picture, scale)
