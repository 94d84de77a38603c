"""Pipelines of random weights, at the embedded model's size and at Stable Diffusion 2.1's: nothing is downloaded."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModelWithProjection

from softprompt.files import new_folder, write_json
from softprompt.micro import MICRO_MODEL
from softprompt.micro.parts import (
    EMBED_WIDTH,
    LATENT_SIZE,
    UNET_CONFIG,
    VAE_CONFIG,
    facelift_schedulers,
    model_index,
    name_as_published,
    text_config,
)
from softprompt.micro.tokenizer import write_tokenizer
from softprompt.model.pipeline import Pipeline
from softprompt.model.unet import FACELIFT_DEFAULTS, build_unet, save_unet


@dataclass(frozen=True)
class Size:
    """The architecture of a pipeline."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    vision: dict[str, Any]
    """Configuration of the CLIP image encoder."""
    text: dict[str, Any]
    """Configuration of the CLIP text encoder."""
    picture: int
    """Side in pixels that the image encoder takes."""


SIZES = {
    "micro": Size(
        unet=UNET_CONFIG,
        vae=VAE_CONFIG,
        vision={
            "hidden_size": 64,
            "intermediate_size": 128,
            "projection_dim": EMBED_WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "patch_size": 8,
        },
        text={"vocab_size": 512, "intermediate_size": 64, "num_hidden_layers": 1},
        picture=64,
    ),
    # The smallest there can be: to measure what is done around the models.
    "tiny": Size(
        unet=UNET_CONFIG
        | {
            "block_out_channels": [8],
            "down_block_types": ["CrossAttnDownBlockMV2D"],
            "up_block_types": ["CrossAttnUpBlockMV2D"],
            "attention_head_dim": [1],
            "projection_class_embeddings_input_dim": 16,
        },
        vae={
            "block_out_channels": [8],
            "down_block_types": ["DownEncoderBlock2D"],
            "up_block_types": ["UpDecoderBlock2D"],
            "layers_per_block": 1,
            "norm_num_groups": 8,
        },
        vision={
            "hidden_size": 8,
            "intermediate_size": 8,
            "projection_dim": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "patch_size": 8,
        },
        text={"vocab_size": 512, "intermediate_size": 8, "num_hidden_layers": 1},
        picture=8,
    ),
    # A hundred million weights, with every block of the full size: to try on any machine what is done with a real model.
    "medium": Size(
        unet=UNET_CONFIG
        | {
            "block_out_channels": [96, 192, 384, 384],
            "down_block_types": ["CrossAttnDownBlockMV2D"] * 3 + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlockMV2D"] * 3,
            "layers_per_block": 2,
            "attention_head_dim": [2, 3, 6, 6],
            "norm_num_groups": 32,
            "projection_class_embeddings_input_dim": 512,
        },
        vae={
            "block_out_channels": [32, 64, 128, 128],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "layers_per_block": 2,
        },
        vision={
            "hidden_size": 256,
            "intermediate_size": 1024,
            "projection_dim": 256,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "patch_size": 14,
        },
        text={"vocab_size": 8192, "intermediate_size": 1024, "num_hidden_layers": 2},
        picture=112,
    ),
    # Stable Diffusion 2.1-unCLIP's: its UNet with 8 input channels (FaceLift's), its VAE, and CLIP ViT-H/14.
    "sd21": Size(
        unet=FACELIFT_DEFAULTS
        | {
            "sample_size": 64,
            "in_channels": 8,
            "out_channels": 4,
            "block_out_channels": [320, 640, 1280, 1280],
            "down_block_types": ["CrossAttnDownBlockMV2D"] * 3 + ["DownBlock2D"],
            "mid_block_type": "UNetMidBlockMV2DCrossAttn",
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlockMV2D"] * 3,
            "layers_per_block": 2,
            "attention_head_dim": [5, 10, 20, 20],
            "cross_attention_dim": 1024,
            "class_embed_type": "projection",
            "projection_class_embeddings_input_dim": 2048,
            "use_linear_projection": True,
        },
        vae={
            "block_out_channels": [128, 256, 512, 512],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "layers_per_block": 2,
        },
        vision={
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "projection_dim": 1024,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "patch_size": 14,
            "hidden_act": "gelu",
        },
        text={"vocab_size": 49_408, "intermediate_size": 4096, "num_hidden_layers": 23, "hidden_act": "gelu"},
        picture=224,
    ),
}
DEFAULT_PICTURE = {"tiny": 8, "micro": 4 * LATENT_SIZE, "medium": 64, "sd21": 512}
"""Side S of the training pictures in pixels."""


def random_pipeline(
    size: str, *, device: torch.device | str, dtype: torch.dtype = torch.float32, views: int = 6, picture: int | None = None
) -> Pipeline:
    """A FaceLift pipeline of random weights, frozen.

    size: a key of SIZES. device: `meta` for shapes alone. dtype: of the UNet. views: V. picture: S in pixels, a multiple of
    what the VAE and the UNet halve; None: the size's own.
    """
    parts, side = SIZES[size], picture or DEFAULT_PICTURE[size]
    factor = 2 ** (len(parts.vae["block_out_channels"]) - 1)
    vision = CLIPVisionConfig(**parts.vision, image_size=parts.picture)
    with torch.device(device):
        pipeline = Pipeline(
            unet=_cast(build_unet(parts.unet | {"sample_size": side // factor, "num_views": views}), dtype),
            vae=AutoencoderKL(**parts.vae | {"sample_size": side}),
            image_encoder=CLIPVisionModelWithProjection(vision),
            feature_extractor=CLIPImageProcessorPil(
                size={"shortest_edge": parts.picture}, crop_size={"height": parts.picture, "width": parts.picture}
            ),
            image_normalizer=StableUnCLIPImageNormalizer(parts.vision["projection_dim"]),
            **facelift_schedulers(),
            folder=MICRO_MODEL,  # of which nothing is read
        )
    for model in (pipeline.unet, pipeline.vae, pipeline.image_encoder, pipeline.image_normalizer):
        model.requires_grad_(False).eval()
    return pipeline


def write_pipeline(size: str, folder: str | Path, *, picture: int | None = None, dtype: torch.dtype = torch.float32) -> None:
    """Write a complete pipeline folder in FaceLift's format, of random weights: to try what is done with a real one.

    size, picture: as `random_pipeline`. dtype: in which the weights are stored. The tokenizer splits texts as the embedded
    model's, and has as many tokens as the text encoder of that size.
    Raises: InputError when the folder exists and is not empty.
    """
    pipeline = random_pipeline(size, device="cpu", dtype=dtype, picture=picture)
    text = SIZES[size].text
    with new_folder(folder) as partial:
        (partial / "tokenizer").mkdir()
        used = write_tokenizer(partial / "tokenizer")
        vocabulary = json.loads((partial / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
        vocabulary |= {f"<unused_{number}>": number for number in range(used, text["vocab_size"])}
        (partial / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        tokenizer = CLIPTokenizer.from_pretrained(partial / "tokenizer", local_files_only=True)
        write_json(partial / "model_index.json", model_index())
        save_unet(pipeline.unet, partial / "unet", layout="facelift")
        for name in ("vae", "image_encoder", "image_normalizer"):
            getattr(pipeline, name).to(dtype).save_pretrained(partial / name)
        for name in ("image_noising_scheduler", "scheduler", "feature_extractor"):
            getattr(pipeline, name).save_pretrained(partial / name)
        text_encoder = CLIPTextModel(text_config(tokenizer, **text)).to(dtype)
        text_encoder.save_pretrained(partial / "text_encoder")
        name_as_published(partial / "text_encoder" / "model.safetensors")


def _cast(model: nn.Module, dtype: torch.dtype) -> Any:
    for parameter in model.parameters():  # diffusers' own `to` would warn
        parameter.data = parameter.data.to(dtype)
    return model


class NoisePictures:
    """A source (see softprompt.data.samples) of opaque random pictures: as dear to encode and train on as any."""

    locations: tuple[str, ...] = ()

    def __init__(self, count: int, views: int, size: int) -> None:
        self.names = [f"noise-{index:06d}" for index in range(count)]
        self._shape = (views, 4, size, size)

    def __len__(self) -> int:
        return len(self.names)

    def check(self, indices: object) -> None:
        """They are always there."""

    def files(self, index: int) -> tuple[()]:
        """None."""
        return ()

    def load(self, index: int) -> Tensor:
        """Returns: uint8 [V, 4, S, S]."""
        generator = torch.Generator().manual_seed(index)
        pixels = torch.randint(256, self._shape, generator=generator, dtype=torch.uint8)
        pixels[:, 3] = 255
        return pixels
