"""Inspect, check, make, mix and convert prompt files, without training: `python -m train.prompts`.

show      what is in prompts: norms, likeness of views, the tokens that carry the view, distance to the first
check     would this file work with that model
make      texts => a prompt file
mix       a point between prompts as a file
convert   .pt <=> .safetensors; what other programs write (dict, list, .npy, ...); folders as FaceLift and Era3D keep them
"""

import argparse
import difflib
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from softprompt.errors import InputError
from softprompt.prompt.templates import FOREIGN_SUFFIXES, PROMPT_SUFFIXES, TEMPLATES, VIEWS
from train.cli import BAD_INPUT, PlainParser, run_command

if TYPE_CHECKING:
    from train.prompts.report import Phrases
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
    given = parser().parse_args(rest)
    line = shlex.join(["python", "-m", "train.prompts", *argv])
    return run_command(lambda: command(given, line), interrupted="interrupted; nothing was written")


# ------------------------------------------------------------------------------------------------------------------ show


def show_parser() -> PlainParser:
    """Of `show`."""
    parser = PlainParser(
        prog=f"{PROGRAM} show",
        description="What is in prompts: in the terminal, and as one page with them side by side.",
        examples=[
            "clr_embeds.pt",
            "clr_embeds.pt runs/mice-001/export/clr_embeds.safetensors --output learned.html",
            "clr_embeds.pt realistic --model pipeckpts --subject rat",
            "learned.pt --model pipeckpts --phrases facelift realistic 'a photograph of a hat' words.txt",
        ],
    )
    parser.add_argument(
        "prompts", nargs="+", metavar="FILE_OR_TEMPLATE", help="The first is what the others are compared with."
    )
    parser.add_argument("--output", default="prompts.html", help="The page; an earlier one is replaced. Default: %(default)s")
    parser.add_argument(
        "--phrases",
        nargs="+",
        metavar="TEXT_OR_FILE",
        help="Say of each view which of these it reads nearest to: templates, texts (with {view}: one a view), .txt files of "
        "one a line.",
    )
    _text_options(parser)
    return parser


def _phrases(given: argparse.Namespace) -> "Phrases":
    """Encoded by --model. Raises: InputError."""
    from softprompt.prompt.encoding import encode_texts
    from train.prompts.report import Phrases
    from train.prompts.sources import open_encoder, read_phrases

    texts = read_phrases(given.phrases, subject=given.subject, angle=given.angle)
    encoder = open_encoder(given.model)
    return Phrases(tuple(texts), encode_texts(texts, encoder.tokenizer, encoder.model))


def show(given: argparse.Namespace, command: str) -> int:
    """Print and draw. Raises: InputError for what is no prompt, or a page that would replace something else."""
    from train.prompts.report import look_at, print_report, refuse_other_page, write_page

    output = Path(given.output)
    refuse_other_page(output)
    shown = look_at(_open_all(given), _phrases(given) if given.phrases else None)
    write_page(shown, output, command)
    print_report(shown)
    print(f"page       {output}")
    return 0


# ----------------------------------------------------------------------------------------------------------------- check


def check_parser() -> PlainParser:
    """Of `check`."""
    parser = PlainParser(
        prog=f"{PROGRAM} check",
        description="Would this file work with that model: one line, and exit code 0 or 2.",
        examples=["clr_embeds.pt --model pipeckpts", "mine.safetensors --model micro"],
    )
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--model", required=True, help="Pipeline folder, or micro: the embedded model.")
    return parser


def check(given: argparse.Namespace, command: str) -> int:
    """Compare a file with what a model takes. Raises: InputError with the cause when it would not work."""
    del command
    from softprompt.prompt.embeddings import load_prompt
    from train.prompts.sources import TOY, has_toy_encoder, model_folder, model_takes, open_file

    folder = model_folder(given.model)
    views, width = model_takes(folder)
    load_prompt(given.file, num_views=views, width=width)
    source = open_file(given.file)
    if source.toy is not None and source.toy != has_toy_encoder(folder):
        file, model = (TOY, "another") if source.toy else ("another text encoder", "the embedded toy's")
        raise InputError(
            f"{given.file}: was made with {file}, says the JSON beside it, and {given.model} has {model}; its shape fits, its "
            f"numbers mean nothing there. Encode the texts with the model's own: {PROGRAM} make --model {given.model}"
        )
    print(f"{given.file}: fits {given.model}: {source.shape}; {_whose_start(source, given.model)}")
    return 0


def _whose_start(source: "Source", model: str) -> str:
    """Whether a prompt begins as all that a model's own text encoder makes do, in words."""
    from softprompt.prompt.encoding import encode_texts
    from train.prompts.make import SAME
    from train.prompts.measure import start_distance
    from train.prompts.sources import open_encoder

    try:
        encoder = open_encoder(model)
    except InputError:
        return "whether its own text encoder made it is not known, there is none in the folder that can be read"
    distance = start_distance(source.prompt, encode_texts([""], encoder.tokenizer, encoder.model))
    if distance <= SAME:
        return "its own text encoder made it, by the start token"
    return f"its start token is {distance:.0%} off that of the model's own text encoder: it was trained, or made with another"


# ------------------------------------------------------------------------------------------------------------------ make


def make_parser() -> PlainParser:
    """Of `make`."""
    parser = PlainParser(
        prog=f"{PROGRAM} make",
        description="Texts => a prompt file, with the text encoder of a pipeline folder.",
        examples=[
            "--text realistic --subject rat --model pipeckpts --reference clr_embeds.pt --output rat.pt",
            '--text "a photo of a beetle, {view} view, {angle}." --cameras opencv_cameras.json --output beetle.safetensors',
            "--text simple --views front,right,back,left --output four.pt",
        ],
    )
    parser.add_argument("--text", required=True, help=f"A template ({', '.join(TEMPLATES)}), or a text with {{view}}.")
    parser.add_argument("--output", required=True, metavar="FILE", help=".pt: float16, for FaceLift; .safetensors: float32.")
    _text_options(parser, angle=None)
    parser.add_argument("--views", default=",".join(VIEWS), help="Names of the views, in order. Default: %(default)s")
    parser.add_argument("--cameras", metavar="JSON", help="opencv_cameras.json: where each view's camera stands fills {angle}.")
    parser.add_argument("--frames", metavar="N,N,...", help="Which of its frames, one a view. Default: all.")
    parser.add_argument("--reference", metavar="FILE", help="FaceLift's clr_embeds.pt: first reproduce it from its six texts.")
    parser.add_argument("--overwrite", action="store_true", help="Replace a file that is there.")
    return parser


def make(given: argparse.Namespace, command: str) -> int:
    """Encode and write. Raises: InputError for what cannot be encoded, or a reference that is not reproduced."""
    del command
    from train.prompts.make import metadata, reproduce, whose
    from train.prompts.sources import fill_in, model_takes, open_encoder, open_file, refuse_output, write

    output = Path(given.output)
    refuse_output(output, overwrite=given.overwrite)
    views = _views(given.views)
    texts = fill_in(given.text, subject=given.subject, angles=_angles(given, views), views=views)
    reference = open_file(given.reference) if given.reference else None
    encoder = open_encoder(given.model)
    print(f"encoder    {whose(encoder)}")
    said = "no --reference: give FaceLift's clr_embeds.pt to see that this is the text encoder it was made with"
    print(f"checked    {reproduce(encoder, reference)}" if reference else f"unchecked  {said}")
    cut: list[str] = []
    source = encoder.encode(given.text, texts, views, is_cut=cut)
    for sentence in cut:
        print(f"warning    {sentence}")
    for view, text in zip(views, texts, strict=True):
        print(f"  {view:<{max(map(len, views))}}  {text}")
    written = write(source.prompt, output, views, metadata(source, model=given.model, text=given.text))
    print(f"written    {written}")
    taken = model_takes(encoder.folder)
    if taken != (len(views), source.prompt.shape[2]):
        print(f"warning    the UNet of {given.model} takes {taken[0]} views, {taken[1]} wide: not this file")
    return 0


def _views(names: str) -> tuple[str, ...]:
    views = tuple(name.strip() for name in names.split(","))
    if len(views) < 2 or len(set(views)) < len(views) or not all(views):
        raise InputError(f"--views {names}: expected two names or more, all different, e.g. front,right,back,left")
    return views


def _angles(given: argparse.Namespace, views: tuple[str, ...]) -> str | list[str]:
    """What fills {angle}: one for all views, or one each."""
    if given.cameras is None:
        if given.frames is not None:
            raise InputError(f"--frames {given.frames}: there is no --cameras whose frames they are")
        return ANGLE if given.angle is None else str(given.angle)
    from train.prompts.cameras import in_words, read_angles

    if given.angle is not None:
        raise InputError("--angle: --cameras is given too, and fills {angle}; leave one of them out")
    text = TEMPLATES[given.text].text if given.text in TEMPLATES else given.text
    if "{angle}" not in text:
        raise InputError(f"--cameras: {text!r} has no {{angle}}, so cameras would change nothing; e.g. --text realistic has")
    try:
        frames = None if given.frames is None else [int(number) for number in given.frames.split(",")]
    except ValueError as error:
        raise InputError(f"--frames {given.frames}: expected numbers from 0 up, e.g. 0,4,8,16,24,28") from error
    return [in_words(*angles) for angles in read_angles(given.cameras, frames, len(views))]


# ------------------------------------------------------------------------------------------------------------------- mix


def mix_parser() -> PlainParser:
    """Of `mix`."""
    parser = PlainParser(
        prog=f"{PROGRAM} mix",
        description="A point of the path between prompts, as training takes it, as a file.",
        examples=[
            "clr_embeds.pt realistic.safetensors --position 0.25 --output quarter.pt",
            "clr_embeds.pt elevated realistic --position 1.5 --interpolation slerp --model pipeckpts --output mix.pt",
        ],
    )
    parser.add_argument("prompts", nargs="+", metavar="FILE_OR_TEMPLATE", help="Two or more, in the order of the path.")
    parser.add_argument("--position", type=float, required=True, help="0 is the first, 1 the second, and so on.")
    parser.add_argument("--interpolation", choices=("lerp", "slerp"), default="lerp", help="Per token. Default: %(default)s")
    parser.add_argument("--output", required=True, metavar="FILE", help=".pt: float16, for FaceLift; .safetensors: float32.")
    _text_options(parser)
    parser.add_argument("--overwrite", action="store_true", help="Replace a file that is there.")
    return parser


def mix(given: argparse.Namespace, command: str) -> int:
    """Interpolate and write. Raises: InputError for prompts between which there is no path, or a position off it."""
    del command
    import torch

    from softprompt.prompt.soft_prompt import point_on_path
    from train.prompts.measure import ANOTHER_ENCODER, start_distance
    from train.prompts.sources import refuse_output, write

    output, last = Path(given.output), len(given.prompts) - 1
    if last < 1:
        raise InputError(f"mix {given.prompts[0]}: is one prompt; expected two or more, between which to mix")
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
        far = start_distance(source.prompt, first.prompt) > ANOTHER_ENCODER
        if far and source.steps == first.steps == 0:  # training moves the start token too
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


# --------------------------------------------------------------------------------------------------------------- convert


def convert_parser() -> PlainParser:
    """Of `convert`."""
    parser = PlainParser(
        prog=f"{PROGRAM} convert",
        description=".pt <=> .safetensors; prompts as other programs write them (a dict or list of tensors, a state dict, "
        ".npy, .npz); and folders with clr_embeds, perhaps normal_embeds, as FaceLift, Era3D, Wonder3D keep them.",
        examples=[
            "export/clr_embeds.safetensors clr_embeds.pt",
            "prompt_embeds.npy mine.pt",
            "FACELIFT/mvdiffusion/data/fixed_prompt_embeds_6view mine.safetensors",
            "Era3D/mvdiffusion/data/fixed_prompt_embeds_7view embeds_7view",
        ],
    )
    parser.add_argument("given", metavar="IN", help="Prompt file or folder.")
    parser.add_argument("output", metavar="OUT", help=".pt, .safetensors, or a new folder: from a folder, the other format.")
    parser.add_argument("--overwrite", action="store_true", help="Replace a file that is there.")
    return parser


def convert(given: argparse.Namespace, command: str) -> int:
    """Rewrite. Raises: InputError for what is no prompt, or cannot be written."""
    del command
    from train.prompts.convert import convert as rewrite

    for sentence in rewrite(Path(given.given), Path(given.output), overwrite=given.overwrite):
        print(sentence)
    return 0


# ---------------------------------------------------------------------------------------------------------------- common


def _text_options(parser: PlainParser, angle: str | None = ANGLE) -> None:
    """What texts are encoded with."""
    parser.add_argument(
        "--model", default="micro", help="Pipeline folder whose text encoder takes texts. Default: micro, the embedded toy."
    )
    parser.add_argument("--subject", default="mouse", help="Fills {subject} in templates. Default: %(default)s")
    parser.add_argument("--angle", default=angle, help=f"Fills {{angle}} in templates. Default: {ANGLE}")


def _open_all(given: argparse.Namespace) -> list["Source"]:
    """Files, those of folders, templates and texts, as they come. Raises: InputError for what is none of them."""
    from train.prompts.convert import found_in
    from train.prompts.sources import fill_in, open_encoder, open_file

    sources, encoder = [], None
    for name in given.prompts:
        is_file = name not in TEMPLATES and Path(name).is_file()
        if is_file or Path(name).suffix in (*PROMPT_SUFFIXES, *FOREIGN_SUFFIXES):
            sources.append(open_file(name))
            continue
        if Path(name).is_dir():
            sources += [open_file(file) for file in found_in(Path(name)).values()]
            continue
        if name not in TEMPLATES and "{" not in name:
            near = difflib.get_close_matches(name, TEMPLATES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"{name}: is no prompt file (.pt, .safetensors) and no template ({', '.join(TEMPLATES)}){hint}")
        encoder = encoder or open_encoder(given.model)
        texts = fill_in(name, subject=given.subject, angles=given.angle)
        sources.append(encoder.encode(name, texts, VIEWS))
    return sources


Command = tuple[Callable[[], PlainParser], Callable[[argparse.Namespace, str], int]]
COMMANDS: dict[str, Command] = {
    "show": (show_parser, show),
    "check": (check_parser, check),
    "make": (make_parser, make),
    "mix": (mix_parser, mix),
    "convert": (convert_parser, convert),
}

if __name__ == "__main__":
    sys.exit(main())
