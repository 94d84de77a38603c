"""The models of FaceLift's pipeline folder (`pipeckpts`) as one dataclass."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

_MOVING = Lock()


@dataclass
class Pipeline:
    """The models that turn one picture into six views, all frozen and in evaluation mode."""

    unet: UNet2DConditionModel
    """Denoiser; 8 input channels: the noisy latents, then those of the input picture."""
    vae: AutoencoderKL
    """Pictures to latents and back."""
    image_encoder: CLIPVisionModelWithProjection
    """Pictures to CLIP image embeddings."""
    feature_extractor: CLIPImageProcessorPil
    """Resizes and normalises pictures for the image encoder."""
    image_normalizer: StableUnCLIPImageNormalizer
    """Mean and standard deviation of CLIP image embeddings."""
    image_noising_scheduler: DDPMScheduler
    """Noises image embeddings (FaceLift: at level 0 always)."""
    scheduler: DDIMScheduler
    """Noise schedule of the latents, and the sampler."""
    folder: Path
    """Where it was loaded from."""
    other_unet: Path | None = None
    """Where the UNet was loaded from, if that is not the folder's own."""
    notes: list[str] = field(default_factory=list)
    """Remarks for the user on how the weights were read: variants, names with a wrapper's prefix."""
    encoders_rest: bool = False
    """Whether VAE and image encoder wait on the CPU while they are not used, which frees 3 GB for training."""
    _users: int = field(default=0, init=False, repr=False)
    """Number of blocks that use the encoders at present."""

    @property
    def device(self) -> torch.device:
        """Device of the UNet."""
        return self.unet.device

    @property
    def unet_folder(self) -> Path:
        """Where the UNet was loaded from."""
        return self.folder / "unet" if self.other_unet is None else self.other_unet

    @property
    def num_views(self) -> int:
        """V."""
        return int(self.unet.config["num_views"])

    @property
    def prompt_width(self) -> int:
        """D: width of a prompt token in the UNet's cross-attention."""
        return int(self.unet.config["cross_attention_dim"])

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one view's latents."""
        side = int(self.unet.config["sample_size"])
        return int(self.unet.config["out_channels"]), side, side

    @property
    def pictures_at_once(self) -> int:
        """Number of pictures in one pass of the VAE: one of 512x512 needs about 0.8 GB."""
        return max(1, 512 * 512 // self.picture_size**2)

    @property
    def picture_size(self) -> int:
        """S: side of a picture in pixels."""
        return self.latent_shape[-1] * 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    @property
    def encoded_bytes(self) -> int:
        """Size of one picture's latents (mean and deviation) and image embedding, float32."""
        return 4 * (2 * math.prod(self.latent_shape) + int(self.image_encoder.config.projection_dim))

    @contextmanager
    def encoders_on_device(self) -> Iterator[None]:
        """Keep VAE and image encoder on the UNet's device inside the block, for any thread; blocks may be nested."""
        with _MOVING:
            self._users += 1
            self._move_encoders(self.device)
        try:
            yield
        finally:
            with _MOVING:
                self._users -= 1
                if self.encoders_rest and self._users == 0:
                    self._move_encoders(torch.device("cpu"))

    def _move_encoders(self, device: torch.device) -> None:
        for model in (self.vae, self.image_encoder):
            if model.device != device:
                model.to(device)

    def to(self, device: torch.device | str) -> "Pipeline":
        """Move every model; returns itself."""
        place(self.unet, device)
        for model in (self.vae, self.image_encoder, self.image_normalizer):
            model.to(device)
        return self


def place(unet: UNet2DConditionModel, device: torch.device | str) -> UNet2DConditionModel:
    """Move a UNet; returns itself. On a GPU its weights get channels last, which convolutions there take without a copy."""
    unet.to(device)
    if torch.device(device).type == "cuda":
        unet.to(memory_format=torch.channels_last)
    return unet
