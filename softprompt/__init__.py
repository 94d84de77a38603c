"""softprompt: adapt FaceLift's six-view diffusion model to a new subject and camera by learning its prompt.

Shapes are written in one alphabet everywhere:

    B objects   V views   N = (B V), the view fastest   T prompt tokens (77)   D prompt width (1024)
    C H W latent channels and sides   S side of a picture in pixels   E width of a CLIP image embedding

Pictures are floats in [0, 1]; latents are scaled by the VAE's `scaling_factor` unless a docstring says otherwise.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softprompt.errors import InputError as InputError
    from softprompt.model.loading import load_pipeline as load_pipeline
    from softprompt.model.loading import load_unet as load_unet
    from softprompt.model.sampling import sample_views as sample_views
    from softprompt.model.unet import save_unet as save_unet
    from softprompt.prompt.embeddings import load_prompt as load_prompt
    from softprompt.prompt.embeddings import save_prompt as save_prompt
    from softprompt.prompt.soft_prompt import SoftPrompt as SoftPrompt

_HOME = {
    "InputError": "errors",
    "SoftPrompt": "prompt.soft_prompt",
    "load_pipeline": "model.loading",
    "load_prompt": "prompt.embeddings",
    "load_unet": "model.loading",
    "sample_views": "model.sampling",
    "save_prompt": "prompt.embeddings",
    "save_unet": "model.unet",
}
__all__ = list(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `--help` does not wait for diffusers.
    if name not in _HOME:
        raise AttributeError(f"module 'softprompt' has no attribute {name!r}")
    return getattr(importlib.import_module(f"softprompt.{_HOME[name]}"), name)
