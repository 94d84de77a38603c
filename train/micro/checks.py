"""Does the micro model know words? Its loss on pictures under right and wrong texts."""

from collections.abc import Mapping

import torch
from einops import repeat
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from softprompt.data.batch import draw, seeded
from softprompt.model.conditioning import encode_views
from softprompt.model.pipeline import Pipeline
from softprompt.prompt.encoding import encode_texts
from softprompt.prompt.templates import TEMPLATES, view_texts
from train.micro.pretrain import (
    denoising_errors,
    fixed_noise_loss,
    held_out,
    on_background,
    single,
    single_pictures,
    text_alone,
)
from train.micro.words import NEVER_PAIRED, naming_texts

Encoders = tuple[CLIPTokenizer, CLIPTextModel]
TIMESTEPS = (150, 400, 700)

CHECKED = ("heads_render_level", "cats_photo_above", "mice_photo_level", "mice_photo_above", *NEVER_PAIRED)
"""Domains of the pictures."""
TEXTS = ("heads_render_level", "cats_photo_above", "mice_photo_level", "mice_render_above", "mice_photo_above")
"""Domains of the texts, beside the pictures' own."""


@torch.no_grad()
def text_losses(pipeline: Pipeline, domain: str, prompts: Mapping[str, Tensor], count: int) -> dict[str, float]:
    """Mean squared error of single pictures of a domain at fixed noise, under each prompt [V, T, D].

    count: held-out objects, one view of each, in turn.
    """
    source = held_out(domain, count)
    sums = dict.fromkeys(prompts, 0.0)
    with single_pictures(pipeline):
        for index in range(count):
            view = index % pipeline.num_views
            picture = single(encode_views(pipeline, on_background(source.load(index), 0)), view)
            draws = text_alone(
                [draw(seeded("words", index, t), encoded=picture, num_timesteps=1000, timestep=t) for t in TIMESTEPS]
            )
            for name, prompt in prompts.items():
                errors = denoising_errors(
                    pipeline, [picture] * len(draws), repeat(prompt[view], "t d -> b 1 t d", b=len(draws)), draws
                )
                sums[name] += float(errors.mean()) / count
    return sums


def table_of_words(pipeline: Pipeline, encoders: Encoders, count: int) -> str:
    """The loss of single pictures given a text alone, a row per domain of pictures: under its own text, under its own with the
    views shifted by one, under no text, and under other domains'. count: held-out objects of each domain."""

    def prompt_of(domain: str) -> Tensor:
        return encode_texts(naming_texts(domain), *encoders)

    others = {name: prompt_of(name) for name in TEXTS}
    empty = repeat(encode_texts([""], *encoders)[0], "t d -> v t d", v=pipeline.num_views)
    rows = {}
    for domain in CHECKED:
        own = prompt_of(domain)
        prompts = {"own": own, "views shifted": own.roll(1, 0), "none": empty, **others}
        rows[domain] = text_losses(pipeline, domain, prompts, count)
    return _table("single pictures, given a text", rows)


def table_of_templates(pipeline: Pipeline, encoders: Encoders, count: int) -> str:
    """The loss of six views of heads and of mice, given the picture, under every template: what training begins with."""
    prompts = {name: encode_texts(view_texts(name), *encoders) for name in TEMPLATES}
    prompts["realistic, cat"] = encode_texts(view_texts("realistic", subject="cat"), *encoders)
    prompts |= {f"{name}, views shifted": prompts[name].roll(1, 0) for name in ("facelift", "realistic")}
    sources = {domain: held_out(domain, count) for domain in ("heads", "mice")}
    rows = {
        name: {domain: fixed_noise_loss(pipeline, source, prompt) for domain, source in sources.items()}
        for name, prompt in prompts.items()
    }
    return _table("six views, given a picture", rows)


def _table(title: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    first = max(len(title), *map(len, rows))
    columns = next(iter(rows.values()))
    widths = [max(8, len(name) + 2) for name in columns]
    lines = [f"{title:<{first}}" + "".join(f"{name:>{width}}" for name, width in zip(columns, widths, strict=True))]
    for name, losses in rows.items():
        numbers = "".join(f"{loss:{width}.4f}" for loss, width in zip(losses.values(), widths, strict=True))
        lines.append(f"{name:<{first}}{numbers}")
    return "\n".join(lines)
