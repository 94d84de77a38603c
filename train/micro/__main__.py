"""Build the embedded micro pipeline from nothing: `python -m train.micro`.

Five phases: a VAE, and more steps for its decoder; text and image encoder (CLIP); a prior over single pictures of six kinds of
bodies, as renderings and photographs, level and from above, given nothing but a text (Stable Diffusion); then six views of
heads under one text, given a picture (FaceLift). Stopped at any time and run again, it continues from its state file.
"""

import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt.errors import InputError
from softprompt.files import folder_size, new_file
from train.cli import Parser, run_command
from train.micro.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

_GRID_HEADS = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Build it. Returns: 0 done; 2 bad input; 130 stopped by Ctrl-C."""
    parser = Parser(prog="python -m train.micro", description=Settings.__doc__)
    parser.add_class_arguments(Settings, skip={"overwrite", "report_only"})
    parser.add_argument("--overwrite", action="store_true", help="Replace the output folder if it exists.")
    parser.add_argument(
        "--report_only", action="store_true", help="Build nothing: report on, and draw, the folder that is there."
    )
    options = parser.parse_args(argv)

    def command() -> int:
        from train.device import quiet_libraries

        settings = Settings(**vars(options))
        quiet_libraries(True)
        if settings.report_only:
            report(settings)
        else:
            build(settings)
        return 0

    return run_command(command, interrupted="stopped; the same command continues from the last save")


def build(settings: Settings) -> None:
    """Run the remaining phases, then write the folder and report on it."""
    from train.micro.checks import table_of_words
    from train.micro.phases import render, train_clip, train_decoder, train_heads, train_prior, train_vae
    from train.micro.pretrain import VAE_DOMAINS, encode_domain
    from train.micro.trainer import Trainer, new_parts, save_parts
    from train.micro.words import FACELIFT_DOMAIN, prior_domains

    folder = settings.output
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not settings.overwrite:
        raise InputError(f"output: {folder} exists already and is not an empty folder; name a new one, or add --overwrite")
    began = time.monotonic()
    parts = new_parts(settings.seed)
    trainer = Trainer(settings, parts)
    half = max(1, settings.objects // 2)
    seen_by_vae = cache(lambda: render(VAE_DOMAINS, settings.objects) | render(["mice"], half))
    seen_by_prior = cache(lambda: render(prior_domains(settings.left_out), settings.prior_objects))

    def encoded(pictures: dict[str, Any]) -> dict[str, Any]:
        return {domain: encode_domain(parts.pipeline, rgba) for domain, rgba in pictures.items()}

    phases: dict[str, Callable[[], None]] = {
        "vae": lambda: train_vae(trainer, seen_by_vae()),
        "decoder": lambda: train_decoder(trainer, seen_by_vae()),
        "clip": lambda: train_clip(trainer, seen_by_prior()),
        "prior": lambda: train_prior(trainer, encoded(seen_by_prior())),
        "heads": lambda: train_heads(trainer, encoded(render([FACELIFT_DOMAIN], settings.objects))[FACELIFT_DOMAIN]),
    }
    for phase, train in phases.items():
        if not trainer.done(phase):
            train()
            trainer.finish(phase)
            if phase == "prior":
                encoders = (parts.tokenizer, parts.text_encoder)
                print(f"after {phase}\n{table_of_words(parts.pipeline, encoders, settings.evaluated)}", flush=True)
    save_parts(parts, folder)
    settings.state_file.unlink(missing_ok=True)
    print(f"made {folder} in {(time.monotonic() - began) / 60:.1f} min", flush=True)
    report(settings)


def report(settings: Settings) -> None:
    """Read the folder back, and print and draw its quality."""
    from softprompt.model.loading import load_pipeline, load_text_encoder
    from softprompt.prompt.encoding import encode_texts
    from train.micro.checks import table_of_templates, table_of_words
    from train.micro.words import facelift_texts

    pipeline, encoders = load_pipeline(settings.output), load_text_encoder(settings.output)
    print(table_of_words(pipeline, encoders, settings.evaluated), flush=True)
    print(table_of_templates(pipeline, encoders, settings.evaluated), flush=True)
    sizes = {part.name: folder_size(part) for part in settings.output.iterdir()}
    print(", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in sizes.items() if size > 1e5), end="; ")
    print(f"{sum(sizes.values()) / 1e6:.2f} MB in all")
    if settings.grid is not None:
        draw_grid(pipeline, encode_texts(facelift_texts(), *encoders), settings.grid)


def draw_grid(pipeline: Any, prompt: "Tensor", path: Path) -> None:
    """A row per held-out head: input | six true views | six sampled views."""
    import torch
    from einops import rearrange
    from PIL import Image

    from softprompt.model.sampling import sample_views
    from train.micro.pretrain import given_picture, held_out

    source = held_out("heads", _GRID_HEADS)
    true = torch.stack([given_picture(source, i) for i in range(len(source))])  # B V 3 S S
    sampled = sample_views(pipeline, prompt, true[:, 0], steps=25, guidance_scale=2.0, eta=0.0)
    rows = torch.cat([true[:, :1], true, sampled], dim=1)
    pixels = (rearrange(rows, "b k c h w -> (b h) (k w) c") * 255).round().byte().numpy()
    with new_file(path) as partial:
        Image.fromarray(pixels).resize((pixels.shape[1] * 2, pixels.shape[0] * 2), Image.Resampling.NEAREST).save(partial)


if __name__ == "__main__":
    sys.exit(main())
