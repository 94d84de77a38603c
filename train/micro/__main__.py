"""Build the embedded micro pipeline from nothing: `python -m train.micro`.

Four phases: a VAE; a prior over heads and cats, level and from above, each under its own text, with the text and image
encoders trained along; then heads alone under FaceLift's text, which makes the model a small FaceLift; last, more
steps for the VAE's decoder. Stopped at any time and run again, it continues from its state file. Under 40 minutes on two
cores.
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
    from train.micro.phases import render, train_decoder, train_heads, train_prior, train_vae
    from train.micro.pretrain import PRIOR_TEXTS, encode_domain
    from train.micro.trainer import Trainer, new_parts, save_parts

    folder = settings.output
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not settings.overwrite:
        raise InputError(f"output: {folder} exists already and is not an empty folder; name a new one, or add --overwrite")
    began = time.monotonic()
    parts = new_parts(settings.seed)
    trainer = Trainer(settings, parts)
    pictures = render(settings.objects)

    @cache
    def encoded() -> dict[str, Any]:  # needs the trained VAE
        return {domain: encode_domain(parts.pipeline, pictures[domain]) for domain in PRIOR_TEXTS}

    phases: dict[str, Callable[[], None]] = {
        "vae": lambda: train_vae(trainer, pictures),
        "prior": lambda: train_prior(trainer, encoded()),
        "heads": lambda: train_heads(trainer, encoded()["heads"]),
        "decoder": lambda: train_decoder(trainer, pictures),
    }
    for phase, train in phases.items():
        if not trainer.done(phase):
            train()
            trainer.finish(phase)
    save_parts(parts, folder)
    settings.state_file.unlink(missing_ok=True)
    print(f"made {folder} in {(time.monotonic() - began) / 60:.1f} min", flush=True)
    report(settings)


def report(settings: Settings) -> None:
    """Read the folder back, and print and draw its quality."""
    from softprompt.model.loading import load_pipeline, load_text_encoder
    from softprompt.prompt.encoding import encode_texts
    from softprompt.prompt.templates import view_texts
    from train.micro.pretrain import fixed_noise_loss, held_out

    pipeline, encoders = load_pipeline(settings.output), load_text_encoder(settings.output)
    prompts = {template: encode_texts(view_texts(template), *encoders) for template in ("facelift", "realistic")}
    for domain, template in (("heads", "facelift"), ("mice", "facelift"), ("mice", "realistic")):
        loss = fixed_noise_loss(pipeline, held_out(domain, settings.evaluated), prompts[template])
        print(f"loss on held-out {domain} under {template} prompts: {loss:.4f}")
    sizes = {part.name: folder_size(part) for part in settings.output.iterdir()}
    print(", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in sizes.items() if size > 1e5), end="; ")
    print(f"{sum(sizes.values()) / 1e6:.2f} MB in all")
    if settings.grid is not None:
        draw_grid(pipeline, prompts["facelift"], settings.grid)


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
