"""One optimizer step, from batch to update.

for each batch of the step:
    E = path(s) + carry(s) (P - W_0)                                     the prompt at its position
    v = model(z_t, t, picture, E)                                        forward
    L = denoising(v) + KL(v || pretrained) + sum of objectives           loss, see `batch_loss`
        (+ separation hinge of the prompts, once a step)
    backward
clip the gradients of prompt and LoRA, each by its own norm
update, unless a number is not finite; then regularise the prompt
"""

import math
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from softprompt.data.batch import Batch, seed_of
from softprompt.model.adapted import AdaptedModel
from softprompt.objectives.losses import denoising_loss, kl_to_reference, kl_weights, separation_hinge, snr, snr_weights
from softprompt.prompt.pacing import Curriculum, CurriculumState
from train.batches import Batches, Wanted
from train.objectives.terms import Context, Objectives, StepBatch, Term
from train.options.groups import KLConfig, LossConfig, PromptConfig

KL_TIMESTEP_GROUPS = 4
"""Number of equal ranges of timesteps by which the log splits the KL."""


@dataclass
class Trainer:
    """Everything that a step uses. Made by `train.setup.prepare`, or by hand."""

    context: Context
    model: torch.nn.Module
    """`context.adapted`, wrapped by accelerate where there are several processes."""
    optimizer: torch.optim.Optimizer
    """One parameter group for `prompt` and one for `lora`, by those names."""
    batches: Batches
    curriculum: Curriculum
    loss: LossConfig
    kl: KLConfig
    prompt: PromptConfig
    objectives: Objectives
    windows: Mapping[str, tuple[int, int]]
    """Group => the steps [first, end) in which it trains."""
    max_grad_norm: float
    needs_denoising: bool
    """Whether the denoising loss is computed even in a step that trains nothing on it."""

    @property
    def adapted(self) -> AdaptedModel:
        """Prompt, LoRA and UNet."""
        return self.context.adapted

    def kl_domains(self, step: int) -> tuple[str, ...]:
        """The domains on which a step computes the KL: objects of the `new` and the `original` one, or none."""
        if self.kl.weight == 0 or step % self.kl.every:
            return ()
        return ("new", "original") if self.kl.domain == "both" else (self.kl.domain,)

    def trains(self, group: str, step: int) -> bool:
        """Whether a step updates a group."""
        first, end = self.windows[group]
        return first <= step < end


@dataclass(frozen=True)
class StepResult:
    """Numbers of one optimizer step, averaged over its objects on all processes."""

    denoising: float | None
    """None in a step that leaves the loss out (`loss.weight` 0)."""
    kl: float | None
    """KL in nats per latent element, mean over its domains; None in a step that leaves it out."""
    kl_on_original: float | None
    """KL on the original domain."""
    kl_sums: list[list[float]]
    """[2][V + KL_TIMESTEP_GROUPS]: sums of the KL by view and by range of timesteps, and their counts."""
    grad_norms: dict[str, float]
    """Gradient norm of each group before clipping; 0 for a group that the step does not train."""
    skipped: bool
    """Nothing was trained: a number was not finite, or fp16's gradient scaler found an overflow."""
    not_finite: str | None
    """Description of what was not finite; None if all was. An overflow that the scaler handles does not count."""
    spike: bool = False
    """Whether the loss was far above its running mean."""
    objectives: dict[str, float] = field(default_factory=dict)
    """Values of the objectives, by the names of their series."""


def training_step(trainer: Trainer, step: int, state: CurriculumState | None = None) -> StepResult:
    """Forward, backward and update for step number `step`, counted from 0.

    state: of the curricula; None: as at step 0. Weights stay as they are where a loss or a gradient is not finite.
    """
    context, optimizer = trainer.context, trainer.optimizer
    state = state or trainer.curriculum.start()
    position = trainer.curriculum.position(state, step)
    torch.manual_seed(seed_of(context.seed, "dropout", step, context.accelerator.process_index))

    totals = _forward_and_backward(trainer, step, state, position)
    numbers = _to_numbers(trainer, totals, _clip_gradients(trainer, step))

    not_finite = _what_is_not_finite(trainer, numbers)
    if not_finite is None:
        trainer.objectives.inspect(step, numbers.objectives)
    else:
        # The optimizer steps nevertheless: without gradients it moves nothing, and fp16's scaler must learn of the overflow.
        optimizer.zero_grad(set_to_none=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    skipped = not_finite is not None or context.accelerator.optimizer_step_was_skipped
    if not skipped:
        _regularise_prompt(trainer, step, position)

    return StepResult(
        denoising=numbers.denoising,
        kl=sum(numbers.kl.values()) / len(numbers.kl) if numbers.kl else None,
        kl_on_original=numbers.kl.get("original"),
        kl_sums=numbers.kl_sums,
        grad_norms=numbers.grad_norms,
        skipped=skipped,
        not_finite=not_finite,
        objectives=numbers.objectives,
    )


# ---------------------------------------------------------------------------------------------------- forward and backward


@dataclass
class _Totals:
    """Values of a step on this process, still on the device; each batch adds its share."""

    kl_sums: Tensor
    denoising: Tensor | None = None
    kl: dict[str, Tensor] = field(default_factory=dict)
    objectives: dict[str, Tensor] = field(default_factory=dict)


def _forward_and_backward(trainer: Trainer, step: int, state: CurriculumState, position: float) -> _Totals:
    """Accumulate the gradients of a step's batches."""
    context, batches, accelerator = trainer.context, trainer.batches, trainer.context.accelerator
    lowest = trainer.curriculum.lowest_timestep(state)
    domains = trainer.kl_domains(step)
    wanted = batches.of_step(step, lowest, original="original" in domains)
    batches.make_ahead(wanted + batches.of_step(step + 1, lowest, original="original" in trainer.kl_domains(step + 1)))

    totals = _Totals(torch.zeros(2, context.pipeline.num_views + KL_TIMESTEP_GROUPS, device=accelerator.device))
    for one in wanted:
        batch, last = step_batch(trainer, one, batches.take(one), step, position), one is wanted[-1]
        if not one.original:
            _objectives_with_own_passes(trainer, batch, batches.accumulation)
        sharing = [] if one.original else trainer.objectives.trained(step, own_passes=False)
        with ExitStack() as around:
            # Processes synchronise their gradients once a step, at its last batch.
            around.enter_context(nullcontext() if last else accelerator.no_sync(trainer.model))
            for term in sharing:
                around.enter_context(term.around(batch))
            loss = batch_loss(trainer, batch, one, sharing, state, totals)
            if trainer.prompt.separation and last:
                prompt = trainer.adapted.prompt
                loss = loss + trainer.prompt.separation * separation_hinge(prompt(position), prompt.start)
            if loss.requires_grad:
                accelerator.backward(loss)
        for name, value in batch.series.items():
            totals.objectives[name] = totals.objectives.get(name, 0) + value / batches.accumulation
    return totals


def batch_loss(
    trainer: Trainer, batch: StepBatch, wanted: Wanted, sharing: list[Term], state: CurriculumState, totals: _Totals
) -> Tensor:
    """The loss of one batch: denoising, KL to the pretrained model, and the objectives that share its forward pass.

    A batch of the original domain has the KL alone. Every `kl.every`-th step has the KL, with as many times its weight.
    """
    loss, parts = batch.batch.latents.new_zeros(()), trainer.batches.accumulation
    domain, domains = "original" if wanted.original else "new", trainer.kl_domains(batch.step)
    with_kl = domain in domains
    if not (with_kl or sharing or trainer.needs_denoising):
        return loss

    denoising, kl = denoising_and_kl(trainer, batch, with_kl=with_kl)
    loss = loss + (denoising.new_zeros(()) if wanted.original else trainer.loss.weight * denoising / parts)
    if with_kl:
        loss = loss + state.kl_weight * trainer.kl.every / len(domains) / parts * kl.mean()
        totals.kl[domain] = totals.kl.get(domain, 0) + kl.detach().mean() / parts
        totals.kl_sums += _kl_sums(trainer, batch.batch, kl)
    if not wanted.original:
        totals.denoising = (0 if totals.denoising is None else totals.denoising) + denoising.detach() / parts
    for term in sharing:
        loss = loss + term.weight * _logged(batch, term) / parts
    return loss


def denoising_and_kl(trainer: Trainer, batch: StepBatch, *, with_kl: bool) -> tuple[Tensor, Tensor]:
    """One forward pass: the denoising loss, a scalar, and the KL to the pretrained model, [B, V] (0 unless `with_kl`).

    The prediction stays in `batch.prediction`.
    """
    scheduler, timesteps = trainer.context.pipeline.scheduler, batch.batch.timesteps
    with trainer.context.accelerator.autocast():
        batch.prediction = prediction = trainer.model(*batch.inputs, batch.position)
    weights = snr_weights(snr(scheduler.alphas_cumprod, timesteps), trainer.loss.snr_weighting, gamma=trainer.loss.snr_gamma)
    denoising = denoising_loss(prediction, batch.target, weights, trainer.context.view_weights(len(prediction)))
    if not with_kl:
        return denoising, denoising.new_zeros(batch.batch.order.shape)
    of_step = kl_weights(
        scheduler.alphas_cumprod,
        timesteps,
        prediction_type=batch.prediction_type,
        weighting=trainer.kl.weighting,
        clip=trainer.kl.clip,
    )
    return denoising, kl_to_reference(prediction, batch.reference, of_step)


def _kl_sums(trainer: Trainer, batch: Batch, kl: Tensor) -> Tensor:
    """[2, V + KL_TIMESTEP_GROUPS]: sums of the KL [B, V] by view and by range of timesteps, and their counts."""
    kl, views = kl.detach().float(), kl.shape[1]
    group = batch.timesteps * KL_TIMESTEP_GROUPS // len(trainer.context.pipeline.scheduler.alphas_cumprod)
    places = torch.cat([batch.order.flatten(), views + group.repeat_interleave(views)])
    values = torch.stack([kl.flatten().repeat(2), torch.ones_like(places, dtype=kl.dtype)])
    return kl.new_zeros(2, views + KL_TIMESTEP_GROUPS).index_add_(1, places, values)


# --------------------------------------------------------------------------------------------------------------- objectives


@dataclass(frozen=True)
class _Turn:
    """A training batch's place in the training order; see train.objectives.terms.Turn."""

    batches: Batches
    wanted: Wanted

    @property
    def lowest(self) -> int:
        return self.wanted.lowest

    @property
    def places(self) -> list[tuple[int, int]]:
        return self.batches.places(self.wanted)

    def undropped(self) -> Batch:
        return self.batches.make(self.wanted, drop_rate=0.0)

    def true_views(self, order: Tensor) -> tuple[Tensor, Tensor]:
        return self.batches.true_views(self.wanted, order)


def step_batch(trainer: Trainer, wanted: Wanted, batch: Batch, step: int, position: float) -> StepBatch:
    """A batch as the loss terms see it."""
    return StepBatch(trainer.context, batch, step, position, _Turn(trainer.batches, wanted))


def _objectives_with_own_passes(trainer: Trainer, batch: StepBatch, parts: int) -> None:
    """Add the gradients of the objectives that run the model themselves, one summand at a time, divided by `parts`."""
    accelerator = trainer.context.accelerator
    for term in trainer.objectives.trained(batch.step, own_passes=True):
        total = batch.batch.latents.new_zeros(())
        with accelerator.no_sync(trainer.model):
            for part in term.losses(batch):
                total += part.detach()
                accelerator.backward(term.weight * part / parts)
        batch.log(term.name, total)


def _logged(batch: StepBatch, term: Term) -> Tensor:
    """The loss of an objective that reads the prediction."""
    total = sum(term.losses(batch), batch.batch.latents.new_zeros(()))
    batch.log(term.name, total)
    return total


def objectives_alone(trainer: Trainer, batch: StepBatch) -> dict[str, float]:
    """Values of a batch's objectives, with their gradients added as `training_step` adds them, but not divided by the number of
    batches and without denoising loss and KL."""
    _objectives_with_own_passes(trainer, batch, parts=1)
    if sharing := trainer.objectives.trained(batch.step, own_passes=False):
        with ExitStack() as around:
            for term in sharing:
                around.enter_context(term.around(batch))
            denoising_and_kl(trainer, batch, with_kl=False)
            trainer.context.accelerator.backward(sum(term.weight * _logged(batch, term) for term in sharing))
    return {name: float(value) for name, value in batch.series.items()}


# ------------------------------------------------------------------------------------------------------- numbers and update


@dataclass(frozen=True)
class _Numbers:
    """The values of a step as numbers, averaged over processes."""

    denoising: float | None
    kl: dict[str, float]
    kl_sums: list[list[float]]
    objectives: dict[str, float]
    grad_norms: dict[str, float]


def _clip_gradients(trainer: Trainer, step: int) -> dict[str, Tensor]:
    """Clip each group's gradient, and drop that of a group that the step does not train. Returns: the norms before."""
    norms = {}
    trainer.context.accelerator.unscale_gradients(trainer.optimizer)
    for name, parameters in trainer.adapted.trainable().items():
        if trainer.trains(name, step):
            norms[name] = torch.nn.utils.clip_grad_norm_(parameters.values(), trainer.max_grad_norm)
            continue
        norms[name] = torch.zeros((), device=trainer.context.accelerator.device)
        for parameter in parameters.values():
            parameter.grad = None  # a zero gradient would still move it, by Adam's momentum
    return norms


def _to_numbers(trainer: Trainer, totals: _Totals, norms: Mapping[str, Tensor]) -> _Numbers:
    """Average over processes and fetch all values from the device at once: each fetch waits for everything before it."""
    scalars = {"denoising": totals.denoising} if totals.denoising is not None else {}
    scalars |= {f"kl/{name}": value for name, value in totals.kl.items()}
    scalars |= {f"objective/{name}": value for name, value in totals.objectives.items()}
    flat = torch.cat([*(value.reshape(1) for value in scalars.values()), totals.kl_sums.flatten()])
    averaged = trainer.context.accelerator.reduce(flat, reduction="mean")
    fetched = torch.cat([averaged, torch.stack(list(norms.values()))]).tolist()

    values = dict(zip(scalars, fetched, strict=False))
    sums = fetched[len(scalars) : len(averaged)]
    half = len(sums) // 2

    def group(prefix: str) -> dict[str, float]:
        return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}

    return _Numbers(
        denoising=values.get("denoising"),
        kl=group("kl/"),
        kl_sums=[sums[:half], sums[half:]],
        objectives=group("objective/"),
        grad_norms=dict(zip(norms, fetched[len(averaged) :], strict=True)),
    )


def _what_is_not_finite(trainer: Trainer, numbers: _Numbers) -> str | None:
    # Under fp16 an infinite gradient is normal: the scaler skips that step and lowers its scale.
    found = [*numbers.kl.values(), *numbers.objectives.values()]
    found += [] if numbers.denoising is None else [numbers.denoising]
    found += numbers.grad_norms.values() if trainer.context.accelerator.scaler is None else ()
    if all(math.isfinite(number) for number in found):
        return None
    denoising = "not measured" if numbers.denoising is None else f"{numbers.denoising:.3g}"
    kl = ", ".join(f"{kl:.3g}" for kl in numbers.kl.values()) or "not measured"
    others = "".join(f"{name} {value:.3g}, " for name, value in numbers.objectives.items())
    gradients = ", ".join(f"{name} {norm:.3g}" for name, norm in numbers.grad_norms.items())
    return f"denoising loss {denoising}, KL {kl}, {others}gradient norms {gradients}"


def _regularise_prompt(trainer: Trainer, step: int, position: float) -> None:
    """Decay the learned offset and clamp the token norms, after an update of the prompt."""
    settings, prompt = trainer.prompt, trainer.adapted.prompt
    if not (settings.learn and trainer.trains("prompt", step)):
        return
    if settings.decay:
        rate = next(g["lr"] for g in trainer.optimizer.param_groups if g["name"] == "prompt")
        prompt.decay_toward_start(min(1.0, rate * settings.decay))
    if settings.norm_band is not None:
        prompt.clamp_norms(settings.norm_band, position)
