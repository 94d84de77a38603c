"""The ways of training that are compared: one optimizer step of each, on the same random objects."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator

from softprompt.data.batch import EncodedViews, draw, seeded
from softprompt.data.cache import EncodedObjects
from softprompt.data.pictures import composite
from softprompt.errors import InputError
from softprompt.micro.models import random_pipeline
from softprompt.model.adapted import AdaptedModel, add_lora, compile_blocks, predict
from softprompt.model.attention import attention_sides
from softprompt.model.conditioning import image_embeddings, make_batch, noisy_and_target
from softprompt.model.pipeline import Pipeline
from softprompt.objectives.losses import denoising_loss, snr, snr_weights
from softprompt.objectives.rewards import REWARDS
from softprompt.prompt.soft_prompt import SoftPrompt
from train.benchmark.way import Setting, Way
from train.build import build_trainer, make_curriculum
from train.objectives.dpo import OwnDpo
from train.objectives.draft import Draft
from train.objectives.separate import Separate
from train.objectives.studio import Studio
from train.objectives.terms import Objectives, Term
from train.options.config import Config
from train.options.groups import KLConfig
from train.options.objectives import DraftConfig, SeparateConfig, StudioConfig
from train.options.preferences import DpoConfig
from train.step import training_step

FACELIFT = "FaceLift: every weight, encoding live, checkpointing"
"""Name of FaceLift's own way of training."""
OBJECTS = 8
"""Random objects that all ways train on."""


class NoisePictures:
    """A source (see softprompt.data.samples) of opaque random pictures: as costly to encode and train on as any."""

    locations: tuple[str, ...] = ()

    def __init__(self, count: int, views: int, size: int) -> None:
        self.names = [f"noise-{index:06d}" for index in range(count)]
        self._shape = (views, 4, size, size)

    def __len__(self) -> int:
        return len(self.names)

    def check(self, indices: object) -> None:
        """Nothing to check."""

    def files(self, index: int) -> tuple[()]:
        """It has no files."""
        return ()

    def load(self, index: int) -> torch.Tensor:
        """Returns: uint8 [V, 4, S, S]."""
        pixels = torch.randint(256, self._shape, generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        pixels[:, 3] = 255
        return pixels


class LiveObjects(EncodedObjects):
    """Objects that are encoded each time they are read; nothing is cached."""

    def __init__(self, source: NoisePictures, pipeline: Pipeline, *, through_vae: int, through_clip: int) -> None:
        super().__init__(source, pipeline, "random")
        self.through_vae = through_vae
        self.through_clip = through_clip

    def get(self, index: int, generator: torch.Generator) -> EncodedViews:
        """Encode `through_vae` pictures, the views first, then the input again and again; `through_clip` likewise."""
        pipeline, device = self.pipeline, self.pipeline.device
        views = composite(self.source.load(index).to(device), torch.ones(3))
        again = views[:1].expand(self.through_vae - len(views), -1, -1, -1)
        with torch.no_grad():
            parts = torch.cat([views, again]).split(pipeline.pictures_at_once)
            posteriors = [pipeline.vae.encode(part.to(pipeline.vae.dtype) * 2 - 1).latent_dist for part in parts]
        mean, std = (torch.cat([getattr(p, name) for p in posteriors])[: len(views)].float().cpu() for name in ("mean", "std"))
        embeds = image_embeddings(pipeline, views[:1].expand(self.through_clip, -1, -1, -1))
        return EncodedViews(mean, std, embeds[:1].expand(len(views), -1).float().cpu())


def adapting_ways(
    setting: Setting, accelerator: Accelerator, *, objectives: bool = False, only: str | None = None
) -> list[Way]:
    """LoRA alone, and prompt and LoRA as `python -m train.softprompt` trains them, where asked for with each objective; one
    UNet and one LoRA serves them all.

    only: part of the names of those that are wanted. Where none of them encodes, the encoders leave the device, as in training.
    Raises: InputError where no way has such a name.
    """
    pipeline = _pipeline(setting, setting.dtype)
    config = Config()
    config = replace(
        config,
        train=replace(config.train, batch_size=setting.batch_size, steps=10**6),
        lora=replace(config.lora, rank=setting.rank, alpha=float(setting.rank)),
    )
    add_lora(pipeline.unet, rank=setting.rank, alpha=float(setting.rank), targets=config.lora.targets)
    if setting.compiled:
        compile_blocks(pipeline.unet)
    source = NoisePictures(OBJECTS, setting.views, pipeline.picture_size)
    cached = EncodedObjects(source, pipeline, "white")
    cached.fill(progress=False)
    live = LiveObjects(source, pipeline, through_vae=setting.views + 1, through_clip=1)
    prompt = 0.1 * torch.randn(2, setting.views, 77, pipeline.prompt_width, generator=seeded("prompt"))

    def way(
        name: str, kl: KLConfig, *, learn: bool = True, objects: EncodedObjects = cached, terms: Sequence[Term] = ()
    ) -> Way:
        settings = replace(config, kl=kl, prompt=replace(config.prompt, learn=learn))
        adapted = AdaptedModel(pipeline.unet, SoftPrompt(prompt).requires_grad_(learn)).to(setting.device).train()
        trainer = build_trainer(
            settings,
            accelerator,
            pipeline,
            adapted,
            train=objects,
            held_out=objects,
            replay=objects,
            objectives=Objectives(terms),
            curriculum=make_curriculum(settings, pipeline.scheduler.alphas_cumprod),
        )
        for term in terms:
            term.rehearse(trainer.context)
        phases = {
            "batch": (trainer.batches, "take"),
            "forward": (adapted, "forward"),
            "reference": (adapted, "reference"),
            "backward": (accelerator, "backward"),
            "optimizer": (trainer.optimizer, "step"),
        }
        return Way(name, lambda number: void(training_step(trainer, number)), phases)

    none = KLConfig(weight=0)
    drafts = [DraftConfig(weight=1.0, guard=None, backward_steps=k) for k in (1, 2)]
    added: list[Term] = [
        *(Draft(one, REWARDS["psnr"]) for one in drafts),
        OwnDpo(replace(config, dpo=DpoConfig(weight=1.0)), ("psnr", REWARDS["psnr"])),
        *(Studio(StudioConfig(weight=1.0, over="views", space=space)) for space in ("latents", "pictures")),
        Separate(SeparateConfig(weight=1.0), config.prompt.waypoints, attention_sides(pipeline.unet)[-1]),
    ]
    names = [f"with DRaFT+, {one.steps} steps, K = {one.backward_steps}" for one in drafts]
    names += [
        "with Diffusion-DPO",
        "with DomainStudio on latents",
        "with DomainStudio on pictures",
        "with Separate-and-Enhance",
    ]
    ways = [
        way("LoRA, encoding live", none, learn=False, objects=live),
        way("LoRA, cached", none, learn=False),
        way("ours, no KL", none),
        way("ours, KL at each step", KLConfig(domain="new", every=1)),
        way("ours, KL at every 4th", KLConfig(domain="new", every=4)),
        way("ours, KL on the original domain at every 4th", KLConfig(domain="original", every=4)),
        *(way(name, none, terms=[term]) for name, term in zip(names, added, strict=True) if objectives),
    ]
    wanted = [one for one in ways if only is None or only in one.name]
    if not wanted:
        raise InputError(f"only: is {only}; expected part of the name of a way: {', '.join(one.name for one in ways)}")
    if only is not None and not any("live" in one.name or "with" in one.name for one in wanted):
        with pipeline.encoders_on_device():
            pipeline.encoders_rest = True
    return wanted


def facelift_way(setting: Setting) -> Way:
    """FaceLift's own way of training: every weight, gradient checkpointing, fp16 autocast on a GPU, its min-SNR weights, and at
    each step twelve pictures through the VAE and six through CLIP."""
    pipeline = _pipeline(setting, torch.float32)
    unet, scheduler = pipeline.unet.requires_grad_(True).train(), pipeline.scheduler
    unet.enable_gradient_checkpointing()
    source = NoisePictures(OBJECTS, setting.views, pipeline.picture_size)
    objects = LiveObjects(source, pipeline, through_vae=2 * setting.views, through_clip=setting.views)
    prompt = 0.1 * torch.randn(setting.views, 77, pipeline.prompt_width, generator=seeded("prompt")).to(setting.device)
    on_gpu = setting.device.type == "cuda"
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, fused=on_gpu)
    scaler = torch.amp.GradScaler(enabled=on_gpu)
    half = torch.autocast(setting.device.type, torch.float16, enabled=on_gpu)

    class Trainer:
        """Its phases, to be timed one by one."""

        def batch(self, number: int) -> Any:
            encoded, draws = [], []
            for place in range(setting.batch_size):
                generator = seeded("facelift", number, place)
                with half:
                    encoded.append(objects.get((number * setting.batch_size + place) % OBJECTS, generator))
                draws.append(draw(generator, encoded=encoded[-1], num_timesteps=len(scheduler.alphas_cumprod), drop_rate=0.05))
            return make_batch(pipeline, encoded, draws)

        def forward(self, batch: Any) -> torch.Tensor:
            noisy, target = noisy_and_target(scheduler, batch)
            own = batch.order + setting.views * torch.arange(len(noisy), device=setting.device)[:, None]
            with half:  # each object is given prompts of its own, as FaceLift's batches hold them
                prediction = predict(
                    unet, prompt.repeat(len(noisy), 1, 1), noisy, batch.given, batch.timesteps, batch.labels, own
                )
            weights = snr_weights(snr(scheduler.alphas_cumprod, batch.timesteps), "facelift", gamma=5.0)
            return denoising_loss(prediction, target, weights, None)

        def backward(self, loss: torch.Tensor) -> None:
            scaler.scale(loss).backward()

        def optimizer(self) -> None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

    trainer = Trainer()

    def step(number: int) -> None:
        trainer.backward(trainer.forward(trainer.batch(number)))
        trainer.optimizer()

    phases = {name: (trainer, name) for name in ("batch", "forward", "backward", "optimizer")}
    return Way(FACELIFT, step, phases)


def void(_: object) -> None:
    """Drop a result."""


def _pipeline(setting: Setting, dtype: torch.dtype) -> Pipeline:
    made = random_pipeline(setting.size, device=setting.device, dtype=dtype, views=setting.views, picture=setting.picture)
    return made.to(setting.device)  # where it is already, but in the memory format of training
