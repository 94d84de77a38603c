"""Pipelines of random weights in FaceLift's format, from the smallest to Stable Diffusion 2.1's size: nothing is downloaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler
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

from softprompt.files import new_folder, write_json
from softprompt.micro import MICRO_MODEL
from softprompt.micro.tokenizer import END, START, write_tokenizer
from softprompt.model.pipeline import Pipeline
from softprompt.model.unet import FACELIFT_DEFAULTS, build_unet, save_unet

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


@dataclass(frozen=True)
class Size:
    """The architecture of a pipeline."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    vision: dict[str, Any]
    """Options of the CLIP image encoder."""
    text: dict[str, Any]
    """Options of the CLIP text encoder, beside its width and its tokens."""
    tokens: int
    """Tokens of the text encoder."""
    picture: int
    """Side S of the training pictures in pixels, unless another is asked for."""


def _unet(channels: list[int], heads: list[int], label_width: int, *, layers: int = 2, groups: int = 32) -> dict[str, Any]:
    """channels: of each resolution; the lowest has no attention if there are several. label_width: of the image embedding."""
    attention, plain = max(1, len(channels) - 1), int(len(channels) > 1)
    return FACELIFT_DEFAULTS | {
        "in_channels": 8,
        "out_channels": 4,
        "block_out_channels": channels,
        "down_block_types": ["CrossAttnDownBlockMV2D"] * attention + ["DownBlock2D"] * plain,
        "mid_block_type": "UNetMidBlockMV2DCrossAttn",
        "up_block_types": ["UpBlock2D"] * plain + ["CrossAttnUpBlockMV2D"] * attention,
        "layers_per_block": layers,
        "attention_head_dim": heads,  # the number of heads, as in Stable Diffusion 2
        "cross_attention_dim": 1024,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 2 * label_width,
        "norm_num_groups": groups,
        "use_linear_projection": True,
    }


def vae_config(channels: list[int], *, layers: int = 2, groups: int = 32) -> dict[str, Any]:
    """channels: of each resolution."""
    return {
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "layers_per_block": layers,
        "norm_num_groups": groups,
    }


def _vision(width: int, inner: int, embedding: int, layers: int, heads: int, patch: int, picture: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "projection_dim": embedding,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "patch_size": patch,
        "image_size": picture,
    }


SIZES = {
    # The embedded model.
    "micro": Size(
        unet=_unet([32, 64, 64], [2, 4, 4], 64, layers=1, groups=8),
        vae=vae_config([16, 32, 32], layers=1, groups=8),
        vision=_vision(64, 128, 64, 2, 4, 8, 64),
        text={"intermediate_size": 64, "num_hidden_layers": 1},
        tokens=512,
        picture=64,
    ),
    # The smallest possible: to measure what is done around the models.
    "tiny": Size(
        unet=_unet([8], [1], 8, layers=1, groups=8),
        vae=vae_config([8], layers=1, groups=8),
        vision=_vision(8, 8, 8, 1, 1, 8, 8),
        text={"intermediate_size": 8, "num_hidden_layers": 1},
        tokens=512,
        picture=8,
    ),
    # A hundred million weights, with every block of the full size: to try on any machine what is done with a real model.
    "medium": Size(
        unet=_unet([96, 192, 384, 384], [2, 3, 6, 6], 256),
        vae=vae_config([32, 64, 128, 128]),
        vision=_vision(256, 1024, 256, 8, 4, 14, 112),
        text={"intermediate_size": 1024, "num_hidden_layers": 2},
        tokens=8192,
        picture=64,
    ),
    # Stable Diffusion 2.1-unCLIP's: its UNet with 8 input channels (FaceLift's), its VAE, and CLIP ViT-H/14.
    "sd21": Size(
        unet=_unet([320, 640, 1280, 1280], [5, 10, 20, 20], 1024),
        vae=vae_config([128, 256, 512, 512]),
        vision=_vision(1280, 5120, 1024, 32, 16, 14, 224) | {"hidden_act": "gelu"},
        text={"intermediate_size": 4096, "num_hidden_layers": 23, "hidden_act": "gelu"},
        tokens=49_408,
        picture=512,
    ),
}


def random_pipeline(
    size: str, *, device: torch.device | str, dtype: torch.dtype = torch.float32, views: int = 6, picture: int | None = None
) -> Pipeline:
    """A FaceLift pipeline of random weights, frozen.

    size: a key of SIZES. device: `meta` for shapes alone. dtype: of the UNet. views: V. picture: S in pixels, a multiple of
    what the VAE and the UNet halve; None: the size's own.
    """
    parts = SIZES[size]
    side, embedded = picture or parts.picture, parts.vision["image_size"]
    factor = 2 ** (len(parts.vae["block_out_channels"]) - 1)
    with torch.device(device):
        pipeline = Pipeline(
            unet=cast(build_unet(parts.unet | {"sample_size": side // factor, "num_views": views}), dtype),
            vae=AutoencoderKL(**parts.vae | {"sample_size": side}),
            image_encoder=CLIPVisionModelWithProjection(CLIPVisionConfig(**parts.vision)),
            feature_extractor=CLIPImageProcessorPil(
                size={"shortest_edge": embedded}, crop_size={"height": embedded, "width": embedded}
            ),
            image_normalizer=StableUnCLIPImageNormalizer(parts.vision["projection_dim"]),
            image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),  # both schedules as FaceLift ships them
            scheduler=DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
                prediction_type="v_prediction",
            ),
            folder=MICRO_MODEL,  # only a name for its encoders, e.g. in a cache
        )
    for model in (pipeline.unet, pipeline.vae, pipeline.image_encoder, pipeline.image_normalizer):
        model.requires_grad_(False).eval()
    return pipeline


def random_text_encoder(folder: Path, *, tokens: int = 0, **options: Any) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """The embedded tokenizer, written to a folder, and a CLIP text encoder of random weights, as wide as FaceLift's prompts.

    tokens: at least, padded with unused ones. options: of the encoder's configuration.
    """
    write_tokenizer(folder, tokens)
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=1024,
        num_attention_heads=16,
        bos_token_id=tokenizer.convert_tokens_to_ids(START),
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    return tokenizer, CLIPTextModel(config)


def cast(model: nn.Module, dtype: torch.dtype) -> Any:
    """Convert a model's weights in place; diffusers' own `to` would warn. Returns: the model."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def save_models(pipeline: Pipeline, text_encoder: CLIPTextModel, folder: Path) -> None:
    """Write all of a pipeline folder in FaceLift's format but its tokenizer."""
    versions = {"_class_name": "StableUnCLIPImg2ImgPipeline", "_diffusers_version": diffusers.__version__}
    write_json(folder / "model_index.json", versions | {name: list(origin) for name, origin in _CLASSES.items()})
    save_unet(pipeline.unet, folder / "unet", layout="facelift")
    for name in _CLASSES.keys() - {"unet", "tokenizer", "text_encoder"}:
        getattr(pipeline, name).save_pretrained(folder / name)
    text_encoder.save_pretrained(folder / "text_encoder")
    # Newer transformers leave out the prefix that every published CLIPTextModel has, and that older ones need.
    weights, prefix = folder / "text_encoder" / "model.safetensors", "text_model."
    named = {prefix + name.removeprefix(prefix): tensor for name, tensor in load_file(weights).items()}
    save_file(named, weights, metadata={"format": "pt"})


def write_pipeline(size: str, folder: str | Path, *, picture: int | None = None, dtype: torch.dtype = torch.float32) -> None:
    """Write a complete pipeline folder in FaceLift's format, of random weights: to try what is done with a real one.

    size, picture: as `random_pipeline`. dtype: of the stored weights. The tokenizer splits texts as the embedded model's.
    Raises: InputError when the folder exists and is not empty.
    """
    pipeline = random_pipeline(size, device="cpu", dtype=dtype, picture=picture)
    with new_folder(folder) as partial:
        (partial / "tokenizer").mkdir()
        _, text_encoder = random_text_encoder(partial / "tokenizer", tokens=SIZES[size].tokens, **SIZES[size].text)
        for model in (pipeline.vae, pipeline.image_encoder, pipeline.image_normalizer, text_encoder):
            cast(model, dtype)
        save_models(pipeline, text_encoder, partial)
