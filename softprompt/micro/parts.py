"""The micro pipeline: FaceLift's classes at a small size, with random weights, and the folder they are written to."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from softprompt.errors import InputError
from softprompt.files import new_folder, write_json
from softprompt.micro.tokenizer import END, START, write_tokenizer
from softprompt.model.pipeline import Pipeline
from softprompt.model.unet import FACELIFT_DEFAULTS, build_unet, save_unet

PICTURE_SIZE, LATENT_SIZE, EMBED_WIDTH, PROMPT_WIDTH = 64, 16, 64, 1024

UNET_CONFIG: dict[str, Any] = FACELIFT_DEFAULTS | {
    "sample_size": LATENT_SIZE,
    "in_channels": 8,
    "out_channels": 4,
    "block_out_channels": [32, 64, 64],
    "down_block_types": ["CrossAttnDownBlockMV2D", "CrossAttnDownBlockMV2D", "DownBlock2D"],
    "mid_block_type": "UNetMidBlockMV2DCrossAttn",
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlockMV2D", "CrossAttnUpBlockMV2D"],
    "layers_per_block": 1,
    "attention_head_dim": [2, 4, 4],  # the number of heads, as in Stable Diffusion 2
    "cross_attention_dim": PROMPT_WIDTH,
    "class_embed_type": "projection",
    "projection_class_embeddings_input_dim": 2 * EMBED_WIDTH,
    "norm_num_groups": 8,
    "use_linear_projection": True,
}

VAE_CONFIG: dict[str, Any] = {
    "sample_size": PICTURE_SIZE,
    "block_out_channels": [16, 32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 1,
    "norm_num_groups": 8,
}

_CLASSES = {
    "feature_extractor": ("transformers", "CLIPImageProcessor"),
    "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
    "image_noising_scheduler": ("diffusers", "DDPMScheduler"),
    "image_normalizer": ("stable_diffusion", "StableUnCLIPImageNormalizer"),
    "scheduler": ("diffusers", "DDIMScheduler"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "unet": ("mvdiffusion.models.unet_mv2d_condition", "UNetMV2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}
"""model_index.json, as FaceLift's."""


@dataclass
class MicroParts:
    """A pipeline being trained, with its text encoder."""

    pipeline: Pipeline
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer

    def models(self) -> dict[str, nn.Module]:
        """Everything that has weights, by the name of its folder."""
        p = self.pipeline
        return {
            "unet": p.unet,
            "vae": p.vae,
            "image_encoder": p.image_encoder,
            "image_normalizer": p.image_normalizer,
            "text_encoder": self.text_encoder,
        }


def new_parts(seed: int, scratch: Path) -> MicroParts:
    """All parts with random weights, nothing frozen.

    scratch: an existing folder for the tokenizer's files.
    """
    num_tokens = write_tokenizer(scratch)
    tokenizer = CLIPTokenizer.from_pretrained(scratch, local_files_only=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = Pipeline(
            unet=build_unet(UNET_CONFIG, origin="micro UNet"),
            vae=AutoencoderKL(**VAE_CONFIG),
            image_encoder=CLIPVisionModelWithProjection(_vision_config()),
            feature_extractor=CLIPImageProcessorPil(
                size={"shortest_edge": PICTURE_SIZE}, crop_size={"height": PICTURE_SIZE, "width": PICTURE_SIZE}
            ),
            image_normalizer=StableUnCLIPImageNormalizer(EMBED_WIDTH),
            **facelift_schedulers(),
            folder=scratch,
        )
        text_encoder = CLIPTextModel(
            text_config(tokenizer, vocab_size=num_tokens, intermediate_size=64, num_hidden_layers=1, projection_dim=EMBED_WIDTH)
        )
        _start_certain(pipeline.vae)
    parts = MicroParts(pipeline, text_encoder, tokenizer)
    for model in parts.models().values():
        model.requires_grad_(False).eval()
    return parts


def facelift_schedulers() -> dict[str, Any]:
    """The noise schedules that FaceLift ships, by the name of their field in a pipeline."""
    return {
        "image_noising_scheduler": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        "scheduler": DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type="v_prediction",
        ),
    }


def _start_certain(vae: AutoencoderKL) -> None:
    """Let the VAE's posterior start narrow: with a standard deviation of 1 it would first have to learn that."""
    mean, log_variance = vae.quant_conv.bias.data.chunk(2)
    vae.quant_conv.weight.data[len(mean) :] = 0
    log_variance.fill_(-6)


def _vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        projection_dim=EMBED_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=PICTURE_SIZE,
        patch_size=8,
    )


def text_config(tokenizer: CLIPTokenizer, **options: Any) -> CLIPTextConfig:
    """Of a text encoder as wide as FaceLift's prompts. options: of its configuration, beside its width and special tokens."""
    return CLIPTextConfig(
        hidden_size=PROMPT_WIDTH,
        num_attention_heads=16,
        bos_token_id=tokenizer.convert_tokens_to_ids(START),
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )


def round_weights(model: nn.Module) -> None:
    """Round to the float16 values that will be stored, so that what follows is trained on exactly those."""
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()


def check_output(folder: Path, *, overwrite: bool) -> None:
    """Raises: InputError when the folder has something in it and may not be replaced."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not overwrite:
        raise InputError(f"output: {folder} exists already and is not an empty folder; name a new one, or add --overwrite")


def save_parts(parts: MicroParts, folder: Path, *, overwrite: bool) -> None:
    """Write a complete pipeline folder in FaceLift's layout; it appears whole or not at all.

    The UNet and the text encoder, which is most of it, are stored as float16.
    Raises: InputError when the folder has something in it and `overwrite` is not given.
    """
    check_output(folder, overwrite=overwrite)
    pipeline = parts.pipeline
    with _replaced_folder(folder) as partial:
        write_json(partial / "model_index.json", model_index())
        save_unet(UNet2DConditionModel.half(pipeline.unet), partial / "unet", layout="facelift")
        pipeline.unet.float()
        parts.text_encoder.half().save_pretrained(partial / "text_encoder")
        parts.text_encoder.float()
        name_as_published(partial / "text_encoder" / "model.safetensors")
        (partial / "tokenizer").mkdir()
        write_tokenizer(partial / "tokenizer")
        pipeline.vae.save_pretrained(partial / "vae")
        pipeline.image_encoder.save_pretrained(partial / "image_encoder")
        pipeline.image_normalizer.save_pretrained(partial / "image_normalizer")
        pipeline.image_noising_scheduler.save_pretrained(partial / "image_noising_scheduler")
        pipeline.scheduler.save_pretrained(partial / "scheduler")
        pipeline.feature_extractor.save_pretrained(partial / "feature_extractor")


def name_as_published(weights: Path) -> None:
    """Newer transformers leave out the prefix that every published CLIPTextModel has, and that older ones need."""
    prefix = "text_model."
    named = {prefix + name.removeprefix(prefix): tensor for name, tensor in load_file(weights).items()}
    save_file(named, weights, metadata={"format": "pt"})


def model_index() -> dict[str, Any]:
    """The content of model_index.json, as FaceLift has it."""
    named = {"_class_name": "StableUnCLIPImg2ImgPipeline", "_diffusers_version": diffusers.__version__}
    return named | {name: list(origin) for name, origin in _CLASSES.items()}


@contextmanager
def _replaced_folder(folder: Path) -> Iterator[Path]:
    """As softprompt.files.new_folder, but an old folder of that name makes room once the new one is whole."""
    fresh, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    for left_over in (fresh, old):
        shutil.rmtree(left_over, ignore_errors=True)
    with new_folder(fresh) as partial:
        yield partial
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
