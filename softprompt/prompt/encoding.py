"""Encoding texts to view prompts, and the waypoints of a path from files, templates and texts."""

import difflib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from softprompt.errors import InputError, InputWarning
from softprompt.model.loading import load_text_encoder
from softprompt.prompt.embeddings import check_prompt, load_prompt
from softprompt.prompt.prompt_files import NUM_TOKENS
from softprompt.prompt.templates import FOREIGN_SUFFIXES, PROMPT_SUFFIXES, TEMPLATES, view_texts

_IN_FOLDERS = ("clr_embeds.safetensors", "clr_embeds.pt", "export/clr_embeds.safetensors", "export/clr_embeds.pt")
"""Prompt files in an export, in FaceLift's fixed_prompt_embeds_6view, and in a run's folder."""


@torch.no_grad()
def encode_texts(texts: Sequence[str], tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> Tensor:
    """Encode texts as FaceLift does: padded to 77 tokens, the encoder's first output.

    texts: one per view. Returns: [V, T, D], float32, on the CPU.
    Warns when a text is longer than 77 tokens and is cut.
    Source: FaceLift, mvdiffusion/data/generate_fixed_text_embeds.py.
    """
    for text, ids in zip(texts, tokenizer(list(texts)).input_ids, strict=True):
        if len(ids) > NUM_TOKENS:
            warnings.warn(f"text of {len(ids)} tokens is cut to {NUM_TOKENS}: {text!r}", InputWarning, stacklevel=2)
    tokens = tokenizer(list(texts), padding="max_length", max_length=NUM_TOKENS, truncation=True, return_tensors="pt").input_ids
    # Without an attention mask, as Stable Diffusion does: padding is encoded like any other token.
    return text_encoder(tokens.to(text_encoder.device))[0].float().cpu()


def load_waypoints(
    specs: Sequence[str],
    *,
    folder: str | Path,
    subject: str,
    angle: str,
    num_views: int,
    width: int,
    option: str = "prompt.waypoints",
) -> Tensor:
    """Load the waypoints of a path, each a prompt file, a template's name, or a text with {view}.

    folder: pipeline folder whose tokenizer and text encoder encode the texts; not read when every waypoint is a file.
    num_views, width: V and D of the model. option: that named the waypoints, for errors.
    Returns: [S + 1, V, T, D], float32, on the CPU.
    Raises: InputError for a name that is none of the three, and as `load_prompt` and `view_texts`.
    """
    prompts, encoders = [], None
    for spec in specs:
        is_file = spec not in TEMPLATES and os.path.isfile(spec)  # a text may be longer than a file's name can be
        if is_file or Path(spec).suffix in (*PROMPT_SUFFIXES, *FOREIGN_SUFFIXES):
            prompts.append(load_prompt(spec, num_views=num_views, width=width))
            continue
        if spec not in TEMPLATES and "{" not in spec:
            raise _unknown(spec, option)
        texts = view_texts(spec, subject=subject, angle=angle)
        if len(texts) != num_views:
            raise InputError(
                f"{option}: {spec!r} makes {len(texts)} views and the model has {num_views}; expected a prompt file of "
                f"{num_views} views"
            )
        encoders = encoders or load_text_encoder(folder)
        prompt = encode_texts(texts, *encoders)
        prompts.append(check_prompt(prompt, num_views=num_views, width=width, origin=f"{spec!r} encoded by {folder}"))
    return torch.stack(prompts)


def _unknown(spec: str, option: str) -> InputError:
    inside = next((Path(spec, name) for name in _IN_FOLDERS if os.path.isfile(Path(spec, name))), None)
    if inside is not None:
        return InputError(f"{option}: {spec} is a folder; expected the prompt file in it: {inside}")
    near = difflib.get_close_matches(spec, TEMPLATES, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return InputError(
        f"{option}: {spec!r} is no prompt file (.pt, .safetensors), no template ({', '.join(TEMPLATES)}) and no text with "
        f"{{view}}{hint}"
    )
