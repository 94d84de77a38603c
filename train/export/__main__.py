"""Export a trained prompt and LoRA for use elsewhere: `python -m train.export`.

Reads any checkpoint, or an earlier export. Writes prompt, LoRA (diffusers, peft, kohya), FaceLift's pipeline folder with the
LoRA merged, and a model card; each is read back and compared. Also puts an export into FaceLift's repository, and takes it out
again.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from softprompt.errors import InputError, RunError, base_of
from softprompt.files import folder_size, lack_of_space, new_folder, refuse_taken
from train.cli import PlainParser, run_command

if TYPE_CHECKING:
    from train.export.read import Source

EXAMPLES = (
    ("the newest checkpoint, LoRA also for peft and kohya", "runs/mice-001 --output mice --lora peft kohya"),
    ("an earlier one", "runs/mice-001 --step 2000 --output mice-2000"),
    ("the run's own export into FaceLift", "runs/mice-001/export --into ../FaceLift --pipeline"),
    ("both at once, of the best validation", "runs/mice-001 --step best --pipeline --output mice-best --into ../FaceLift"),
    ("FaceLift as it was", "--undo ../FaceLift"),
)
LORA_FORMATS = ("peft", "kohya")


def make_parser() -> PlainParser:
    """The parser of this command."""
    parser = PlainParser(
        prog="python -m train.export",
        description=__doc__,
        epilog="examples:\n" + "\n".join(f"  {what}:\n    python -m train.export {command}" for what, command in EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        nargs="?",
        type=Path,
        metavar="RUN_OR_EXPORT",
        help="Folder of a run, or of an export, e.g. RUN/export.",
    )
    parser.add_argument("--step", help="The run's checkpoint: newest (default), best (lowest validation loss), or a step.")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="New or empty: for prompt, LoRA, model card.")
    parser.add_argument(
        "--lora",
        nargs="+",
        choices=LORA_FORMATS,
        default=[],
        metavar="FORMAT",
        help="With --output: also write the LoRA for peft (lora_peft/) and kohya (lora_kohya.safetensors; ComfyUI, A1111). The "
        "LoRA for diffusers (lora/) is always written.",
    )
    parser.add_argument(
        "--pipeline",
        action="store_true",
        help="Also FaceLift's pipeline folder with the LoRA merged, as large as the model.",
    )
    parser.add_argument("--model", help="Pipeline folder (pipeckpts) that was trained from, where it has moved since.")
    parser.add_argument(
        "--unet",
        metavar="FOLDER",
        help="Folder of the UNet (option unet of the run) that was trained from, where it has moved.",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where there is one.")
    parser.add_argument(
        "--into",
        type=Path,
        metavar="FACELIFT",
        help="FaceLift's repository: the prompt takes its place there, with --pipeline the model too; originals are kept.",
    )
    parser.add_argument("--undo", type=Path, metavar="FACELIFT", help="Restore the files from before --into; do nothing else.")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    given = make_parser().parse_args(argv)
    undo = f"; --undo {given.into} restores FaceLift" if given.into else ""

    def command() -> int:
        _check(given)
        try:
            return _export(given)
        except OSError as error:
            raise RunError(f"{error}; likely the disk is full, or read-only. Nothing half-written is left") from error

    return run_command(command, interrupted=f"interrupted; nothing half-written is left{undo}")


def _check(given: argparse.Namespace) -> None:
    """Raises: InputError for options that do not go together."""
    if given.undo is not None:
        if given.source is not None or given.output is not None or given.into is not None:
            raise InputError("--undo: stands alone; it needs no run, --output or --into")
        return
    source = given.source
    if source is None:
        raise InputError("the run or export to take is missing: python -m train.export RUN --output FOLDER, or --undo FACELIFT")
    if not source.is_dir():
        place = base_of(source).removeprefix(" in ")
        raise InputError(
            f"{source}: no such folder; expected a run (runs/NAME-001) or an export of one (RUN/export)"
            f"{f', by a path from {place}' if place else ''}"
        )
    if not any((source / name).is_file() for name in ("config.yaml", "clr_embeds.pt")):
        raise InputError(
            f"{source}: is no run (it has no config.yaml) and no export (no clr_embeds.pt); expected one of the two"
        )
    if given.output is not None:
        refuse_taken(given.output)
    else:
        if given.into is None:
            raise InputError("nothing to do: give --output FOLDER to write an export, --into FACELIFT to put one in, or both")
        if not (source / "clr_embeds.pt").is_file():
            there = source / "export"
            hint = f"give its own export, {there}, or" if (there / "clr_embeds.pt").is_file() else "give"
            raise InputError(f"--into: {source} holds no export; {hint} --output FOLDER as well, to write one first")
        for option in ("lora", "model", "unet", "step"):
            if getattr(given, option):
                raise InputError(f"--{option}: changes what --output writes, which is not given; {source} is put in as it is")


def _export(given: argparse.Namespace) -> int:
    from train.export.facelift import how_to_use, put_in, refuse_another_folder, undo

    if given.undo is not None:
        print("\n".join(undo(given.undo)))
        return 0
    if given.into is not None:
        refuse_another_folder(given.into)  # before anything long
    folder = given.source
    if given.output is not None:
        folder = given.output
        source = _open(given)
        print(_describe(source))
        print("\n".join(_write(source, given)))
    if given.into is not None:
        print("\n".join(put_in(given.into, folder, with_pipeline=given.pipeline)))
        print(f"to undo it: python -m train.export --undo {shlex.quote(str(given.into))}")
    else:
        print("\n".join(["", *how_to_use(folder)]))
    return 0


def _open(given: argparse.Namespace) -> "Source":
    """Raises: InputError."""
    from train.device import choose_device, choose_precision, quiet_libraries
    from train.export.read import is_run
    from train.export.source import open_export, open_run

    quiet_libraries(True)
    choose_precision(given.device, "fp32", group="")  # refuses a device that is not there
    device = choose_device(given.device)
    if is_run(given.source):
        return open_run(given.source, given.step or "newest", model=given.model, unet=given.unet, device=device)
    if given.step is not None:
        raise InputError(f"--step: {given.source} is an export, of one step; give the run's folder to choose one")
    return open_export(given.source, model=given.model, unet=given.unet, device=device)


def _describe(source: "Source") -> str:
    average = ", the moving average" if source.averaged else ""
    line = f"source     {source.folder}: step {source.step}, position {source.metadata['position']:g}{average}"
    return "\n".join([line, *(f"weights    {note}" for note in source.pipeline.notes)])


def _write(source: "Source", given: argparse.Namespace) -> list[str]:
    """Write and verify FOLDER. Returns: a report of it, in lines. Raises: InputError, RunError."""
    import torch
    from tqdm import tqdm

    from softprompt.micro.world import MicroWorld
    from softprompt.prompt.embeddings import load_prompt
    from train.export.card import write_card
    from train.export.lora import FORMATS, verify_lora
    from train.export.write import full_float32, has_lora, verify, write_pipeline, write_prompt_and_lora
    from train.setup import FIRST_HELD_OUT

    pipeline, prompt, tolerance = source.pipeline, source.prompt, source.tolerance
    if given.lora and not has_lora(pipeline.unet):
        raise InputError(f"--lora: {source.folder} has no LoRA (lora.rank 0); only its prompt was trained")
    size = folder_size(pipeline.folder) if given.pipeline else 0
    if (disk := lack_of_space(given.output, size)) is not None:
        raise InputError(f"--output: {disk}; the merged pipeline folder takes about {size / 1e9:.1f} GB")
    # Any picture shows a difference: this one is always there, the run's own may have moved.
    picture = MicroWorld("mice", FIRST_HELD_OUT, 1, size=pipeline.picture_size).load(0)[0, :3] / 255
    parts = ["prompt and LoRA", *dict.fromkeys(given.lora), *(["merged pipeline"] if given.pipeline else [])]
    found: dict[str, float] = {}
    with new_folder(given.output) as partial, full_float32(), torch.no_grad():
        for part in tqdm(parts, unit="part", delay=2, disable=not sys.stderr.isatty()):
            if part in FORMATS:
                written = load_prompt(partial / "clr_embeds.pt", num_views=pipeline.num_views)
                FORMATS[part].write(pipeline.unet, partial / FORMATS[part].path)
                found[part] = verify_lora(pipeline, written, partial, FORMATS[part], picture=picture, tolerance=tolerance)
            elif part == "merged pipeline":
                new = partial / "pipeckpts"
                found[part] = write_pipeline(pipeline, partial, new, picture=picture, tolerance=tolerance)
            else:
                write_prompt_and_lora(pipeline, prompt, partial, source.metadata)
                found[part], rounding = verify(pipeline, prompt, partial, picture=picture, tolerance=tolerance)
        without = write_card(source, partial)
    made = sorted(name + ("/" if (given.output / name).is_dir() else "") for name in os.listdir(given.output))
    differences = ", ".join(f"{part} {value:.1e}" for part, value in found.items())
    return [
        f"made       {given.output}: {', '.join(made)}",
        f"verified   read back in a fresh model, views differ by at most: {differences} (allowed {tolerance:g}); rounding the "
        f"prompt to float16 changes them by {rounding:.1e}",
        *(f"WARNING    the model card is without {what}" for what in without),
    ]


if __name__ == "__main__":
    sys.exit(main())
