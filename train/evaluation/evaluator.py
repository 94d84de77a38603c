"""Held-out objects: a loss that is the same at every evaluation, and sampled views beside the true ones."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor

from softprompt.data.batch import Batch, Objects, draw, rotate_views, seeded, view_order
from softprompt.metrics import copy_score, psnr_per_view, separation_ratio, ssim_per_view
from softprompt.model.adapted import AdaptedModel, adapters_off, predict
from softprompt.model.conditioning import make_batch, noisy_and_target
from softprompt.model.pipeline import Pipeline
from softprompt.model.sampling import sample_views
from softprompt.prompt.soft_prompt import point_on_path
from softprompt.prompt.templates import view_names
from train.log.series import HANDED_ON
from train.objectives.terms import Shown


@contextmanager
def averaged(adapted: AdaptedModel, ema: EMAModel | None) -> Iterator[None]:
    """Inside the block prompt and LoRA are their moving average, where one is kept; the model is in evaluation mode."""
    parameters = list(adapted.all_trainable().values())
    if ema is not None:
        ema.store(parameters)
        ema.copy_to(parameters)
    adapted.eval()
    try:
        yield
    finally:
        adapted.train()
        if ema is not None:
            ema.restore(parameters)


def fixed_batches(
    pipeline: Pipeline, objects: Objects, items: Sequence[tuple[int, int]], *, reference: int, batch_size: int
) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    """Batches of (object, timestep) whose noise follows from these two alone; no condition is dropped.

    reference: the view that is the input picture. Yields: the batch, and its noisy latents and target, [B, V, C, H, W].
    """
    schedule_length = len(pipeline.scheduler.alphas_cumprod)
    for start in range(0, len(items), batch_size):
        encoded, draws = [], []
        for index, timestep in items[start : start + batch_size]:
            generator = seeded("validation", index, timestep)
            encoded.append(objects.get(index, generator))
            draws.append(
                draw(generator, encoded=encoded[-1], num_timesteps=schedule_length, references=[reference], timestep=timestep)
            )
        batch = make_batch(pipeline, encoded, draws)
        yield batch, *noisy_and_target(pipeline.scheduler, batch)


def view_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each view, by slot: [B, V, C, H, W] => [B, V], float64."""
    return (prediction.float() - target.float()).square().mean(dim=(2, 3, 4)).double()


@dataclass(frozen=True)
class Evaluator:
    """Evaluates the adapted model on held-out objects."""

    accelerator: Accelerator
    pipeline: Pipeline
    adapted: AdaptedModel
    held_out: Objects
    original: Objects | None
    """Held-out objects of the original domain."""
    reference_view: int
    """The view that is the input picture."""
    timesteps: Sequence[int]
    """Timesteps of the validation loss."""
    batch_size: int
    preview_objects: int
    preview_steps: int
    """DDIM steps of previews."""
    guidance_scale: float
    eta: float
    seed: int
    """Seed of the previews' noise."""

    # ------------------------------------------------------------------------------------------------------- validation

    @torch.no_grad()
    def losses(self, position: float, objects: Objects, *, reference: int) -> Tensor:
        """Mean squared error of the prediction of each view, at fixed noise and timesteps, unweighted.

        No condition is dropped and every view counts: whatever the training was, the losses of two runs on the same objects are
        comparable. Each process takes its share of the objects; all get the mean.
        reference: the view that is the input picture.
        Returns: [V], float64, on the CPU.
        """
        accelerator, pipeline = self.accelerator, self.pipeline
        total = torch.zeros(pipeline.num_views, dtype=torch.float64, device=accelerator.device)
        items = [(index, timestep) for index in range(len(objects)) for timestep in self.timesteps]
        mine = items[accelerator.process_index :: accelerator.num_processes]
        for batch, noisy, target in fixed_batches(pipeline, objects, mine, reference=reference, batch_size=self.batch_size):
            with accelerator.autocast():
                prediction = self.adapted(noisy, batch.given, batch.timesteps, batch.labels, batch.order, position)
            total.index_add_(0, batch.order.flatten(), view_errors(prediction, target).flatten())
        return accelerator.reduce(total, reduction="sum").cpu() / len(items)

    def validation(self, position: float, *, with_original: bool) -> dict[str, float]:
        """Series of a validation: the loss on held-out objects, in all and by view, and if asked for on the original domain."""
        losses = self.losses(position, self.held_out, reference=self.reference_view)
        series = {"loss/validation": float(losses.mean())}
        if with_original and self.original is not None:
            series["loss/original"] = self.original_loss(position)
        names = view_names(self.pipeline.num_views)
        return series | {f"loss_view/{name}": float(loss) for name, loss in zip(names, losses, strict=True)}

    def original_loss(self, position: float) -> float:
        """Loss on the original domain under E(position); view 0 is the input picture, as in the pretraining."""
        assert self.original is not None, "data.original is needed"
        return float(self.losses(position, self.original, reference=0).mean())

    @torch.no_grad()
    def pretrained_original_loss(self) -> float:
        """Loss of the pretrained model on the original domain, whatever this model has learned or started from."""
        prompt = self.adapted.prompt
        learned = prompt.learned.detach().clone()
        prompt.learned.copy_(prompt.start)
        try:
            with adapters_off(self.pipeline.unet):
                return self.original_loss(0.0)
        finally:
            prompt.learned.copy_(learned)

    @torch.no_grad()
    def learned_effect(self, position: float) -> float | None:
        """Effect of the learned offset on the prediction: its root mean square difference to that under the path alone, as a
        share of its root mean square; on one held-out object at the middle timestep. None where E(position) has no part of it.
        """
        prompt, pipeline = self.adapted.prompt, self.pipeline
        if prompt.share(position) == 0:
            return None
        generator = seeded("effect")
        encoded, length = self.held_out.get(0, generator), len(pipeline.scheduler.alphas_cumprod)
        batch = make_batch(pipeline, [encoded], [draw(generator, encoded=encoded, num_timesteps=length, timestep=length // 2)])
        noisy, _ = noisy_and_target(pipeline.scheduler, batch)
        path = point_on_path(prompt.waypoints, position, prompt.interpolation)
        with self.accelerator.autocast():
            ours, plain = (
                predict(self.adapted.unet, one, noisy, batch.given, batch.timesteps, batch.labels, batch.order).float()
                for one in (prompt(position), path)
            )
        return float((ours - plain).square().mean().sqrt() / ours.square().mean().sqrt())

    # --------------------------------------------------------------------------------------------------------- previews

    @torch.no_grad()
    def preview(self, prompt: Tensor, pretrained: Tensor | None) -> Shown:
        """Sample the first held-out objects at a fixed seed.

        prompt: E [V, T, D]. pretrained: views by the pretrained model from an earlier preview; they never change.
        """
        count, reference, device = min(self.preview_objects, len(self.held_out)), self.reference_view, self.pipeline.device
        views = [rotate_views(self.held_out.pictures(i, seeded("preview", i)), reference) for i in range(count)]
        truth = torch.stack(views).to(device)
        order = view_order(reference, self.pipeline.num_views)
        with self.pipeline.encoders_on_device():  # moved once for all of them
            if pretrained is None:
                with adapters_off(self.pipeline.unet):
                    pretrained = self.sample(self.adapted.prompt.start[order.to(prompt.device)], truth[:, 0])
            now = self.sample(prompt[order.to(prompt.device)], truth[:, 0])
        masks = torch.stack([rotate_views(self.held_out.masks(i), reference) for i in range(count)]).to(truth)
        names = view_names(self.pipeline.num_views)
        return Shown(truth[:, 0], truth, masks, pretrained, now, tuple(names[int(i)] for i in order))

    def sample(self, prompt: Tensor, pictures: Tensor) -> Tensor:
        """Views of each picture, sampled as the previews are.

        prompt: [V, T, D], in slot order. pictures: [B, 3, S, S]. Returns: [B, V, 3, S, S].
        """
        views = [
            sample_views(
                self.pipeline,
                prompt,
                picture,
                steps=self.preview_steps,
                guidance_scale=self.guidance_scale,
                eta=self.eta,
                seed=self.seed,
            )
            for picture in pictures  # one at a time, to need no more memory than training does
        ]
        return torch.cat(views)

    @torch.no_grad()
    def ablation(self, prompt: Tensor, shown: Shown) -> dict[str, Tensor]:
        """Views of the previewed objects with prompt and LoRA each alone, and with the prompts shifted by one view.

        prompt: E [V, T, D]. shown: its previews.
        Returns: row => [B, V, 3, S, S]; see train.evaluation.ablation. The rows of each alone need a LoRA.
        """
        order = view_order(self.reference_view, self.pipeline.num_views).to(prompt.device)
        own, start = prompt[order], self.adapted.prompt.start[order]
        has_lora = "lora" in self.adapted.trainable()
        rows = {"pretrained": shown.pretrained}
        with self.pipeline.encoders_on_device():
            if has_lora:
                with adapters_off(self.pipeline.unet):
                    rows["prompt_alone"] = self.sample(own, shown.pictures)
                rows["lora_alone"] = self.sample(start, shown.pictures)
            rows["both" if has_lora else "prompt"] = shown.now
            rows[HANDED_ON] = self.sample(own.roll(-1, dims=0), shown.pictures)
        return rows


def preview_series(shown: Shown) -> dict[str, float]:
    """Quality of the previewed views, in all and by view, and whether they copy the input picture or collapse."""
    psnr, ssim = psnr_per_view(shown.now, shown.truth), ssim_per_view(shown.now, shown.truth)
    series = {f"views_psnr/{name}": float(p) for name, p in zip(shown.names, psnr, strict=True)}
    series |= {f"views_ssim/{name}": float(s) for name, s in zip(shown.names, ssim, strict=True)}
    return series | {
        "views/psnr": float(psnr.mean()),
        "views/ssim": float(ssim.mean()),
        "views/psnr_foreground": float(psnr_per_view(shown.now, shown.truth, shown.masks).mean()),
        "views/ssim_foreground": float(ssim_per_view(shown.now, shown.truth, shown.masks).mean()),
        "views/copy_score": copy_score(shown.now, shown.truth, shown.pictures),
        "views/separation_ratio": separation_ratio(shown.now, shown.truth),
    }
