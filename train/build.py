"""From options to the parts of a run: pipeline, adapted model, optimizer, curricula, trainer."""

from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from softprompt.data.batch import Objects, spread_timesteps
from softprompt.micro import MICRO_MODEL
from softprompt.model.adapted import AdaptedModel, add_lora
from softprompt.model.loading import load_pipeline
from softprompt.model.pipeline import Pipeline
from softprompt.prompt.curriculum import timestep_edges
from softprompt.prompt.encoding import load_waypoints
from softprompt.prompt.pacing import Curriculum, PathSchedule, TimestepSchedule
from softprompt.prompt.soft_prompt import SoftPrompt, match_tokens
from train.batches import Batches
from train.objectives.terms import Context, Objectives
from train.options.config import Config
from train.options.groups import MICRO, LoraConfig, PromptConfig
from train.step import Trainer


def pipeline_folder(model: str) -> Path:
    """The folder that the option `model` names; `micro` is the embedded model's."""
    return MICRO_MODEL if model == MICRO else Path(model)


def build_pipeline(config: Config, dtype: torch.dtype, device: torch.device) -> Pipeline:
    """The pretrained pipeline. Raises: InputError."""
    return load_pipeline(pipeline_folder(config.model), unet=config.unet, dtype=dtype).to(device)


def build_waypoints(config: Config, pipeline: Pipeline) -> Tensor:
    """The prompts that the path leads through, [S + 1, V, T, D], tokens matched. Raises: InputError."""
    settings = config.prompt
    waypoints = load_waypoints(
        settings.waypoints,
        folder=pipeline_folder(config.model),
        subject=settings.subject,
        angle=settings.angle,
        num_views=pipeline.num_views,
        width=pipeline.prompt_width,
    )
    return match_tokens(waypoints, settings.matching)


def build_adapted(
    pipeline: Pipeline, waypoints: Tensor, prompt: PromptConfig, lora: LoraConfig, *, seed: int = 0
) -> AdaptedModel:
    """Prompt and LoRA on the pipeline's UNet, as they are before the first step. seed: of the LoRA's random half.

    Raises: InputError for layers that the UNet does not have.
    """
    soft_prompt = SoftPrompt(waypoints, carry=prompt.carry, interpolation=prompt.interpolation)
    soft_prompt.requires_grad_(prompt.learn)
    if lora.rank:
        add_lora(pipeline.unet, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, targets=lora.targets, seed=seed)
    return AdaptedModel(pipeline.unet, soft_prompt).to(pipeline.device)


def build_optimizer(
    adapted: AdaptedModel, prompt: PromptConfig, lora: LoraConfig, *, scaled: bool = False
) -> torch.optim.AdamW:
    """AdamW with one group for each part that trains, by its name. scaled: whether fp16's gradient scaler is used."""
    settings = {
        "prompt": {"lr": prompt.learning_rate, "weight_decay": 0.0},  # zero: it would pull toward 0, not toward the start
        "lora": {"lr": lora.learning_rate, "weight_decay": lora.weight_decay},
    }
    groups = [
        {"name": name, "params": list(parameters.values()), **settings[name]}
        for name, parameters in adapted.trainable().items()
    ]
    # A fused step would hide from accelerate that the scaler has skipped it.
    return torch.optim.AdamW(groups, fused=next(adapted.parameters()).is_cuda and not scaled)


def make_curriculum(config: Config, alphas_cumprod: Tensor) -> Curriculum:
    """The curricula that the options ask for. alphas_cumprod: of the model's noise schedule, [num_timesteps]."""
    timesteps = config.timesteps
    edges = [0, len(alphas_cumprod)]
    if timesteps.clusters > 1:
        edges = timestep_edges(alphas_cumprod, timesteps.clusters, timesteps.edges)
    return Curriculum(
        path=PathSchedule(steps=config.train.steps, **asdict(config.curriculum)),
        timesteps=TimestepSchedule(
            edges=edges,
            patience=timesteps.patience,
            smoothing=timesteps.smoothing,
            max_stage_steps=timesteps.max_stage_steps,
        ),
        kl_weight=config.kl.weight,
        kl_target=config.kl.target,
        kl_rate=config.kl.rate,
    )


def build_trainer(
    config: Config,
    accelerator: Accelerator,
    pipeline: Pipeline,
    adapted: AdaptedModel,
    *,
    train: Objects,
    held_out: Objects,
    replay: Objects | None,
    objectives: Objectives,
    curriculum: Curriculum,
) -> Trainer:
    """Everything that a step uses. replay: objects of the original domain that the KL may be measured on."""
    references = config.data.references(pipeline.num_views)
    timesteps = spread_timesteps(config.monitor.validation_timesteps, len(pipeline.scheduler.alphas_cumprod))
    model, optimizer = accelerator.prepare(
        adapted, build_optimizer(adapted, config.prompt, config.lora, scaled=accelerator.scaler is not None)
    )
    watched = config.curriculum.pacing == "plateau" and config.curriculum.watch == "train"
    # Several processes synchronise their gradients in the backward pass of the denoising loss.
    needs_denoising = config.loss.weight > 0 or accelerator.num_processes > 1 or config.timesteps.clusters > 1 or watched
    return Trainer(
        context=Context(
            accelerator=accelerator,
            pipeline=pipeline,
            adapted=adapted,
            train=train,
            held_out=held_out,
            seed=config.train.seed,
            batch_size=config.train.batch_size,
            drop_rate=config.loss.condition_drop_rate,
            own_view=config.loss.own_view,
            references=references,
            reference_view=config.data.first_reference,
            held_out_timesteps=timesteps,
        ),
        model=model,
        optimizer=optimizer,
        batches=Batches(
            pipeline,
            train,
            replay,
            seed=config.train.seed,
            batch_size=config.train.batch_size,
            accumulation=config.train.accumulation,
            references=references,
            drop_rate=config.loss.condition_drop_rate,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
        ),
        curriculum=curriculum,
        loss=config.loss,
        kl=config.kl,
        prompt=config.prompt,
        objectives=objectives,
        windows={group: config.window(group) for group in ("prompt", "lora")},
        max_grad_norm=config.train.max_grad_norm,
        needs_denoising=needs_denoising,
    )
