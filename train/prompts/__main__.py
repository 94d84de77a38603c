"""Inspect, check, make, mix and convert prompt files, without training: `python -m train.prompts`.

probe     the untouched model's loss on samples under each text, before any training
show      describe prompts: norms, similarity of views, the tokens that carry the view, change from the first
check     check that a prompt file fits a model
make      texts => a prompt file
mix       a point between prompts => a prompt file
convert   .pt <=> .safetensors; formats of other programs (dict, list, .npy, ...); folders of FaceLift and Era3D
"""

import argparse
import difflib
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from softprompt.errors import InputError
from softprompt.prompt.templates import TEMPLATES, VIEWS
from train.cli import BAD_INPUT, PlainParser, run_command

if TYPE_CHECKING:
    from train.prompts.sources import Source

PROGRAM = "python -m train.prompts"
ANGLE = "from above at an angle"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns: 0 done, 2 bad options or files, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {PROGRAM} COMMAND ...\n\n{__doc__}\n{PROGRAM} COMMAND --help has examples of each.")
        return 0 if argv else BAD_INPUT
    name, *rest = argv
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        print(f"error: no command {name!r}; expected one of {', '.join(COMMANDS)}{hint}", file=sys.stderr)
        return BAD_INPUT
    parser, command = COMMANDS[name]
    given = parser().parse_args(rest, argparse.Namespace(command=shlex.join(["python", "-m", "train.prompts", *argv])))
    return run_command(lambda: command(given), interrupted="interrupted; nothing was written")


def _show_parser() -> PlainParser:
    parser = _parser(
        "show",
        "Describe prompts: in the terminal, and on one page, side by side.",
        "clr_embeds.pt",
        "clr_embeds.pt runs/mice-001/export/clr_embeds.safetensors --output learned.html",
        "clr_embeds.pt realistic --model pipeckpts --subject rat",
        "learned.pt --model pipeckpts --phrases facelift realistic 'a photograph of a hat' words.txt",
        "--model pipeckpts",
    )
    parser.add_argument(
        "prompts",
        nargs="*",
        default=list(TEMPLATES),
        metavar="FILE_OR_TEMPLATE",
        help="The others are compared with the first. Default: every template, with FaceLift's",
    )
    parser.add_argument("--output", default="prompts.html", help="The page; an earlier one is replaced. Default: %(default)s")
    parser.add_argument(
        "--phrases",
        nargs="+",
        metavar="TEXT_OR_FILE",
        help="Name the phrase that each view is nearest to: templates, texts (with {view}: one a view), or .txt files with one "
        "a line.",
    )
    _text_options(parser)
    return parser


def show(given: argparse.Namespace) -> int:
    """Print and draw. Raises: InputError for a name that is no prompt, or a page that would replace another file."""
    from train.prompts.report import Phrases, inspect, print_report, write_prompts_page
    from train.prompts.sources import open_encoder, read_phrases
    from train.report.template import refuse_other_page

    output, phrases = Path(given.output), None
    refuse_other_page(output, "prompts")
    sources = _open_all(given)
    if given.phrases:
        texts = read_phrases(given.phrases, subject=given.subject, angle=given.angle)
        phrases = Phrases(texts, open_encoder(given.model).embed(texts))
    shown = inspect(sources, phrases)
    write_prompts_page(shown, output, given.command)
    print_report(shown)
    print(f"page       {output}")
    return 0


def _probe_parser() -> PlainParser:
    parser = _parser(
        "probe",
        "The loss of the untouched model on your samples under every template, and under your own prompts.",
        "--model pipeckpts --data.train MICE",
        "--model pipeckpts --data.train MICE/train.txt --subject rat --also 'a photo of a lab rat, {view} view.' learned.pt",
        "--model micro --data.train micro",
    )
    _text_options(parser)
    parser.add_argument("--data.train", required=True, metavar="SAMPLES", help="List file, or folder of samples.")
    parser.add_argument("--also", nargs="+", default=[], metavar="FILE_OR_TEXT", help="Prompts beside the templates.")
    parser.add_argument("--objects", type=int, default=24, help="Samples, spread over the list. Default: %(default)s")
    parser.add_argument("--timesteps", type=int, default=8, help="Noise levels of each sample. Default: %(default)s")
    parser.add_argument("--batch_size", type=int, default=4, help="Samples at once. Default: %(default)s")
    parser.add_argument("--unet", metavar="FOLDER", help="Another UNet than the pipeline's.")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    parser.add_argument("--output", metavar="JSON", help="File for the numbers; an earlier one is replaced.")
    return parser


def probe(given: argparse.Namespace) -> int:
    """Measure and print. Raises: InputError for samples, prompts or a device that cannot be used."""
    from train.prompts.probe import run_probe

    run_probe(given)
    return 0


def _check_parser() -> PlainParser:
    parser = _parser(
        "check",
        "Check that a prompt file fits a model: one line, and exit code 0 or 2.",
        "clr_embeds.pt --model pipeckpts",
        "mine.safetensors --model micro",
    )
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--model", required=True, help="Pipeline folder, or micro: the embedded model.")
    return parser


def check(given: argparse.Namespace) -> int:
    """Compare a file with a model's configuration and text encoder. Raises: InputError with the cause if it does not fit."""
    from softprompt.prompt.embeddings import load_prompt
    from train.prompts.sources import TOY, has_toy_encoder, model_folder, model_takes, open_file

    folder = model_folder(given.model)
    views, width = model_takes(folder)
    load_prompt(given.file, num_views=views, width=width)
    source = open_file(given.file)
    if source.toy is not None and source.toy != has_toy_encoder(folder):
        file, model = (TOY, "another") if source.toy else ("another text encoder", "the embedded toy's")
        raise InputError(
            f"{given.file}: was made with {file}, says the JSON beside it, and {given.model} has {model}; its shape fits, but "
            f"its numbers mean nothing there. Encode the texts with the model's own: {PROGRAM} make --model {given.model}"
        )
    print(f"{given.file}: fits {given.model}: {source.shape}; {_which_encoder(source, given.model)}")
    return 0


def _which_encoder(source: "Source", model: str) -> str:
    """A sentence that says whether a model's own text encoder made a prompt."""
    from train.prompts.make import SAME
    from train.prompts.measure import start_distance
    from train.prompts.sources import open_encoder

    try:
        encoder = open_encoder(model)
    except InputError:
        return "not known whether its own text encoder made it: the folder has none that can be read"
    distance = start_distance(source.prompt, encoder.embed([""]))
    if distance <= SAME:
        return "its own text encoder made it, by the start token"
    return f"its start token is {distance:.0%} off that of the model's own text encoder: it was trained, or made with another"


def _make_parser() -> PlainParser:
    parser = _parser(
        "make",
        "Texts => a prompt file, with the text encoder of a pipeline folder.",
        "--text realistic --subject rat --model pipeckpts --reference clr_embeds.pt --output rat.pt",
        '--text "a photo of a beetle, {view} view, {angle}." --cameras opencv_cameras.json --output beetle.safetensors',
        "--text simple --views front,right,back,left --output four.pt",
    )
    parser.add_argument("--text", required=True, help=f"A template ({', '.join(TEMPLATES)}), or a text with {{view}}.")
    _output_options(parser)
    _text_options(parser, angle=None)
    parser.add_argument("--views", default=",".join(VIEWS), help="Names of the views, in order. Default: %(default)s")
    parser.add_argument("--cameras", metavar="JSON", help="opencv_cameras.json: each view's camera position fills {angle}.")
    parser.add_argument("--frames", metavar="N,N,...", help="Frames of --cameras to use, one a view. Default: all.")
    parser.add_argument(
        "--reference", metavar="FILE", help="FaceLift's clr_embeds.pt: check that the encoder reproduces it from its six texts."
    )
    return parser


def make(given: argparse.Namespace) -> int:
    """Encode and write. Raises: InputError for texts that cannot be encoded, or a reference that is not reproduced."""
    from train.prompts.make import metadata, reproduce
    from train.prompts.output import refuse_output, write
    from train.prompts.sources import TOY, fill_in, model_takes, open_encoder, open_file

    output = Path(given.output)
    refuse_output(output, overwrite=given.overwrite)
    views = tuple(name.strip() for name in given.views.split(","))
    if len(views) < 2 or len(set(views)) < len(views) or not all(views):
        raise InputError(f"--views {given.views}: expected two names or more, all different, e.g. front,right,back,left")
    texts = fill_in(given.text, subject=given.subject, angles=_angles(given, views), views=views)
    reference = open_file(given.reference) if given.reference else None
    encoder = open_encoder(given.model)
    toy = f"{TOY} ({encoder.name}); the file fits only the embedded model"
    print(f"encoder    {toy if encoder.is_toy else f'that of {encoder.name}'}")
    unchecked = "unchecked  no --reference: give FaceLift's clr_embeds.pt to check that this text encoder made it"
    print(f"checked    {reproduce(encoder, reference)}" if reference else unchecked)
    source = encoder.encode(given.text, texts, views)
    for view, text in zip(views, texts, strict=True):
        print(f"  {view:<{max(map(len, views))}}  {text}")
    print(f"written    {write(source.prompt, output, views, metadata(source, model=given.model, text=given.text))}")
    taken = model_takes(encoder.folder)
    if taken != (len(views), source.prompt.shape[2]):
        print(f"warning    the UNet of {given.model} takes {taken[0]} views, {taken[1]} wide: not this file")
    return 0


def _angles(given: argparse.Namespace, views: Sequence[str]) -> str | list[str]:
    """Values of {angle}: one for all views, or one each."""
    if given.cameras is None:
        if given.frames is not None:
            raise InputError(f"--frames {given.frames}: needs --cameras, the file with these frames")
        return ANGLE if given.angle is None else str(given.angle)
    from train.prompts.make import camera_text, read_angles

    if given.angle is not None:
        raise InputError("--angle: --cameras is given too, and fills {angle}; leave one of them out")
    text = TEMPLATES[given.text].text if given.text in TEMPLATES else given.text
    if "{angle}" not in text:
        raise InputError(f"--cameras: {text!r} has no {{angle}}, so cameras would change nothing; e.g. --text realistic has")
    try:
        frames = None if given.frames is None else [int(number) for number in given.frames.split(",")]
    except ValueError as error:
        raise InputError(f"--frames {given.frames}: expected numbers from 0 up, e.g. 0,4,8,16,24,28") from error
    return [camera_text(*angles) for angles in read_angles(given.cameras, frames, len(views))]


def _mix_parser() -> PlainParser:
    parser = _parser(
        "mix",
        "A point on the path between prompts, as training interpolates it, as a file.",
        "clr_embeds.pt realistic.safetensors --position 0.25 --output quarter.pt",
        "clr_embeds.pt elevated realistic --position 1.5 --interpolation slerp --model pipeckpts --output mix.pt",
    )
    parser.add_argument("prompts", nargs="+", metavar="FILE_OR_TEMPLATE", help="Two or more, in the order of the path.")
    parser.add_argument("--position", type=float, required=True, help="0 is the first, 1 the second, and so on.")
    parser.add_argument(
        "--interpolation", choices=("lerp", "slerp"), default="lerp", help="For each token. Default: %(default)s"
    )
    _output_options(parser)
    _text_options(parser)
    return parser


def mix(given: argparse.Namespace) -> int:
    """Interpolate and write. Raises: InputError for prompts that cannot be mixed, or a position outside the path."""
    import torch

    from softprompt.prompt.soft_prompt import point_on_path
    from train.prompts.output import refuse_output, write
    from train.prompts.report import other_encoder

    output, last = Path(given.output), len(given.prompts) - 1
    if last < 1:
        raise InputError(f"mix {given.prompts[0]}: is one prompt; expected two or more")
    if not 0 <= given.position <= last:
        raise InputError(f"--position {given.position:g}: is not on the path; expected 0 ({given.prompts[0]}) to {last}")
    refuse_output(output, overwrite=given.overwrite)
    sources = _open_all(given)
    first = sources[0]
    for source in sources[1:]:
        if source.prompt.shape != first.prompt.shape:
            raise InputError(
                f"{source.name}: is {list(source.prompt.shape)}, {first.name} {list(first.prompt.shape)}; expected one shape; "
                f"likely another text encoder, or another number of views"
            )
        if {source.toy, first.toy} == {True, False}:
            raise InputError(f"{source.name}: was made with another text encoder than {first.name}; a mix would mean nothing")
        if other_encoder(source, first):
            print(f"warning    {source.name} is likely of another text encoder than {first.name}: their start tokens differ")
    prompt = point_on_path(torch.stack([source.prompt for source in sources]), given.position, given.interpolation)
    metadata = {
        "origin": "mixed",
        "waypoints": [source.name for source in sources],
        "position": given.position,
        "interpolation": given.interpolation,
        "toy_encoder": first.toy if all(source.toy == first.toy for source in sources) else None,
    }
    print(f"written    {write(prompt, output, first.views, metadata)}")
    return 0


def _convert_parser() -> PlainParser:
    parser = _parser(
        "convert",
        ".pt <=> .safetensors; prompts of other programs (a dict or list of tensors, a state dict, .npy, .npz); and folders "
        "with clr_embeds, perhaps normal_embeds, as in FaceLift, Era3D and Wonder3D.",
        "export/clr_embeds.safetensors clr_embeds.pt",
        "prompt_embeds.npy mine.pt",
        "FACELIFT/mvdiffusion/data/fixed_prompt_embeds_6view mine.safetensors",
        "Era3D/mvdiffusion/data/fixed_prompt_embeds_7view embeds_7view",
    )
    parser.add_argument("given", metavar="IN", help="Prompt file or folder.")
    parser.add_argument("output", metavar="OUT", help=".pt, .safetensors, or a new folder: from a folder, the other format.")
    parser.add_argument("--overwrite", action="store_true", help="Replace an existing file.")
    return parser


def convert(given: argparse.Namespace) -> int:
    """Rewrite. Raises: InputError for a file that is no prompt, or cannot be written."""
    from train.prompts.output import convert as rewrite

    for sentence in rewrite(Path(given.given), Path(given.output), overwrite=given.overwrite):
        print(sentence)
    return 0


def _parser(name: str, description: str, *examples: str) -> PlainParser:
    return PlainParser(prog=f"{PROGRAM} {name}", description=description, examples=examples)


def _text_options(parser: PlainParser, angle: str | None = ANGLE) -> None:
    parser.add_argument(
        "--model", default="micro", help="Pipeline folder whose text encoder encodes texts. Default: micro, the embedded toy."
    )
    parser.add_argument("--subject", default="mouse", help="Fills {subject} in templates. Default: %(default)s")
    parser.add_argument("--angle", default=angle, help=f"Fills {{angle}} in templates. Default: {ANGLE}")


def _output_options(parser: PlainParser) -> None:
    parser.add_argument("--output", required=True, metavar="FILE", help=".pt: float16, for FaceLift; .safetensors: float32.")
    parser.add_argument("--overwrite", action="store_true", help="Replace an existing file.")


def _open_all(given: argparse.Namespace) -> list["Source"]:
    from train.prompts.sources import open_all

    return open_all(given.prompts, model=given.model, subject=given.subject, angle=given.angle)


Command = tuple[Callable[[], PlainParser], Callable[[argparse.Namespace], int]]
COMMANDS: dict[str, Command] = {
    "probe": (_probe_parser, probe),
    "show": (_show_parser, show),
    "check": (_check_parser, check),
    "make": (_make_parser, make),
    "mix": (_mix_parser, mix),
    "convert": (_convert_parser, convert),
}

if __name__ == "__main__":
    sys.exit(main())
