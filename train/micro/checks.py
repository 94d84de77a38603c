"""Does the micro model know words? The loss of pictures under right and wrong texts, given nothing else."""

from collections.abc import Mapping

import torch
from einops import repeat
from torch import Tensor

from softprompt.data.batch import draw, seeded
from softprompt.model.conditioning import encode_views
from softprompt.prompt.encoding import encode_texts
from train.micro.pretrain import (
    denoising_errors,
    held_out,
    on_background,
    single,
    single_pictures,
    text_alone,
)
from train.micro.trainer import MicroParts
from train.micro.words import NEVER_PAIRED, naming_texts

TIMESTEPS = (150, 400, 700)

CHECKED = ("heads_render_level", "cats_photo_above", "mice_photo_level", "mice_photo_above", *NEVER_PAIRED)
"""Domains of the pictures."""
TEXTS = ("heads_render_level", "cats_photo_above", "mice_photo_level", "mice_render_above", "mice_photo_above")
"""Domains of the texts, beside the pictures' own."""


@torch.no_grad()
def text_losses(parts: MicroParts, domain: str, prompts: Mapping[str, Tensor], count: int) -> dict[str, float]:
    """Mean squared error of single pictures of a domain at fixed noise, under each prompt [V, T, D].

    count: held-out objects, one view of each, in turn.
    """
    source = held_out(domain, count)
    sums = dict.fromkeys(prompts, 0.0)
    with single_pictures(parts.pipeline):
        for index in range(count):
            view = index % parts.pipeline.num_views
            picture = single(encode_views(parts.pipeline, on_background(source.load(index), 0)), view)
            draws = text_alone(
                [
                    draw(seeded("words", index, t), encoded=picture, num_timesteps=1000, timestep=t)
                    for t in TIMESTEPS
                    for _ in "ab"
                ]
            )  # the attention's layers take pictures by sixes
            for name, prompt in prompts.items():
                errors = denoising_errors(
                    parts.pipeline, [picture] * len(draws), repeat(prompt[view], "t d -> b 1 t d", b=len(draws)), draws
                )
                sums[name] += float(errors.mean()) / count
    return sums


def table_of_words(parts: MicroParts, phase: str, count: int) -> str:
    """A row per domain of pictures: the loss under its own text, with the views shifted by one, under no text, and others'."""

    def prompt_of(domain: str) -> Tensor:
        return encode_texts(naming_texts(domain), parts.tokenizer, parts.text_encoder)

    others = {name: prompt_of(name) for name in TEXTS}
    empty = repeat(encode_texts([""], parts.tokenizer, parts.text_encoder)[0], "t d -> v t d", v=parts.pipeline.num_views)
    lines = [
        f"after {phase}; single pictures, text alone",
        f"{'pictures':22}" + "".join(f"{n:>19}" for n in ("own", "views shifted", "none", *TEXTS)),
    ]
    for domain in CHECKED:
        own = prompt_of(domain)
        losses = text_losses(parts, domain, {"own": own, "views shifted": own.roll(1, 0), "none": empty, **others}, count)
        lines.append(f"{domain:22}" + "".join(f"{loss:19.4f}" for loss in losses.values()))
    return "\n".join(lines)
