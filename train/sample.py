"""Six views of pictures, with what a run exported: `python -m train.sample`.

The views are those of the training previews at the same seed and settings. A preview is computed in a batch, so a pixel may
differ by one level of 255.
"""

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import yaml

from softprompt.errors import InputError, base_of
from softprompt.files import new_folder, refuse_taken, writing_to
from train.cli import Parser, run_command
from train.options.checks import FROM_1, UNIT, Checked, option
from train.options.groups import MICRO

if TYPE_CHECKING:
    from torch import Tensor

    from softprompt.model.pipeline import Pipeline
    from softprompt.model.sampling import Annealed

STRENGTHS = (0.0, 0.5, 1.0)
"""Strengths of prompt and LoRA in a grid."""
POSITIONS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""On the path from the pretrained prompt to the given one."""


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Options of the command."""

    pictures: list[str]
    """Pictures of the object, seen as view 0, on transparency (PNG, JPEG, WebP or TIFF), or folders of them: one, several after
    each other (a.png b.png), a pattern in quotes ('mice/*.png'), or a list ('[a.png, b.png]')."""
    model: str = MICRO
    """FaceLift pipeline folder (pipeckpts), or `micro`."""
    unet: str | None = None
    """Folder of the UNet to use instead of that in `model`; null: that in `model`."""
    export: str | None = None
    """Export folder of a run: its prompt and LoRA; null: the pretrained model."""
    prompt: str | None = None
    """Prompt file, template or text with {view} instead of the export's."""
    pretrained: str = "facelift"
    """The prompt that the model was pretrained with, for strengths below 1: file, template or text with {view}."""
    subject: str = "mouse"
    """Value of {subject} in templates."""
    angle: str = "from above at an angle"
    """Value of {angle} in templates."""
    prompt_strength: float = 1.0
    """0 is the pretrained prompt, 1 the learned one, anything else a point of the line through both."""
    lora_strength: float = 1.0
    """0 is the pretrained model, 1 the adapted one."""
    rise: Literal["none", "linear", "square", "fourth", "step"] = "none"
    """How the adaptation rises along the sampling steps, from the pretrained model at the noisiest: with the share of the
    steps that are done, its square, its fourth power, or all at once when it is 0.6. Layout and shape stay nearer to the
    pretrained model's; sampling takes up to twice as long."""
    rows: Literal["one", "strengths", "path", "ablation", "rises"] = "one"
    """Rows sampled of a picture: `one`, the strengths above; `strengths`, each pair of 0, 1/2 and 1; `path`, the pretrained
    UNet under prompts between the pretrained and the given one; `ablation`, prompt and LoRA each alone, both, and both with
    the prompts handed on to the next view; `rises`, the pretrained model, and the strengths above with each `rise`."""
    guidance_scale: float = 3.0
    """1 is none. The default, and that of steps and eta, are of FaceLift's inference; a run's previews have those of its
    `monitor` options."""
    steps: int = option(50, FROM_1)
    """DDIM steps."""
    eta: float = option(1.0, UNIT)
    """0 is deterministic DDIM, 1 as noisy as DDPM."""
    seed: int = 0
    """Seed of all noise."""
    background: Literal["white", "black", "gray"] = "white"
    """Behind the object."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the UNet; auto: bf16 or fp16 on CUDA, fp32 on a CPU."""
    output: str = "views"
    """Folder, new or empty: NAME/cam_000.png ..., NAME.png (all rows) and NAME.gif (the views in turn); of several rows the
    views are those at full strength."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.pictures:
            raise InputError("pictures: is empty; expected pictures, or folders of them")
        if self.rows == "rises" and self.rise != "none":
            raise InputError(f"rise: is {self.rise}, and rows is rises, which are all of them; give one of the two")
        if self.prompt is None and self.export is None and (self.rows != "one" or self.rise != "none"):
            given = f"rise: is {self.rise}" if self.rows == "one" else f"rows: is {self.rows}"
            raise InputError(f"{given}, between the pretrained model and an adapted one; give --export or --prompt")


@dataclass(frozen=True)
class Case:
    """Model and prompt of one row."""

    label: str
    prompt: "Tensor"
    """[V, T, D]."""
    lora: float
    """Strength of the LoRA."""
    shown: bool = True
    """Whether to also write its views one by one."""
    annealed: "Annealed | None" = None
    """How it rises from the pretrained model; None: it is the same in all steps."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns: 0 done, 2 bad input, 130 interrupted."""
    parser = Parser(
        prog="python -m train.sample",
        description=__doc__,
        epilog="Examples: python -m train.sample --pictures mouse.png --export runs/micro-001/export | python -m train.sample "
        "--pictures mice/ --model PIPECKPTS --export RUN/export --rows ablation | python -m train.sample --pictures a.png "
        "b.png --prompt realistic --rows path | python -m train.sample --pictures 'mice/*.png'",
    )
    parser.add_class_arguments(Options, None)

    def command() -> int:
        words = _as_list(sys.argv[1:] if argv is None else argv)
        return _sample(Options(**parser.parse_args(words).as_dict()))

    return run_command(command, interrupted="interrupted; nothing was written")


def _as_list(argv: Sequence[str]) -> list[str]:
    """A command line in which what follows each `--pictures`, as a shell leaves it, is one list as the parser reads it."""
    others: list[str] = []
    given: list[str] = []
    was_given = reads = False
    for word in argv:
        name, _, value = word.partition("=")
        if word.startswith("--") or word == "-h":
            reads = name == "--pictures"
            was_given |= reads
            if reads and value:
                given += _listed(value)
        elif reads:
            given += _listed(word)
        if not reads:
            others.append(word)
    return [*others, f"--pictures={json.dumps(given)}"] if was_given else others


def _listed(word: str) -> list[str]:
    """The pictures in a word: those of a list as YAML has it ('[a.png, b.png]'), or the word as it is."""
    if not (word.startswith("[") and word.endswith("]")) or Path(word).exists():
        return [word]
    try:
        listed = yaml.load(word, yaml.BaseLoader)
    except yaml.YAMLError:
        return [word]
    return [str(one) for one in listed]


def _sample(options: Options) -> int:
    import torch
    from tqdm import tqdm

    from softprompt.data.pictures import BACKGROUNDS, composite, load_picture
    from softprompt.model.loading import load_pipeline
    from train.build import pipeline_folder
    from train.device import choose_device, choose_precision, dtype_of, quiet_libraries
    from train.export.read import open_lora

    quiet_libraries(True)
    files = find_pictures(options.pictures)
    refuse_taken(Path(options.output))  # before anything long
    if options.export is not None:
        _refuse_another_model(options.model, options.unet, Path(options.export))
    precision, note = choose_precision(options.device, options.precision, group="")
    pipeline = load_pipeline(pipeline_folder(options.model), unet=options.unet, dtype=dtype_of(precision))
    pipeline = pipeline.to(choose_device(options.device))
    longest = len(pipeline.scheduler.alphas_cumprod)
    if options.steps > longest:
        raise InputError(f"steps: is {options.steps}; the model was trained with {longest} timesteps, expected as many at most")
    cases = make_cases(options, pipeline)
    if options.export is not None:
        pipeline = open_lora(pipeline, Path(options.export), dtype_of(precision))
    pipeline.unet.eval()
    loaded = {name: load_picture(file, pipeline.picture_size) for name, file in files.items()}
    opaque = [name for name, picture in loaded.items() if bool((picture[3] == 255).all())]
    print("\n".join([note, *(f"weights    {note}" for note in pipeline.notes)]))
    if opaque:
        print(
            f"WARNING    {len(opaque)} pictures have no transparency, e.g. {opaque[0]}: their background is taken for part of "
            f"the object. Remove the background first, as for training"
        )
    colour = torch.tensor(BACKGROUNDS[options.background])
    with writing_to(f"output: {options.output}"), new_folder(options.output) as partial:
        for name, picture in tqdm(loaded.items(), unit="picture", delay=2, disable=not sys.stderr.isatty()):
            given = composite(picture, colour)
            _write(partial, name, given, cases, [sample(pipeline, case, given, options) for case in cases])
    print(f"made       {options.output}: {', '.join(files)}; {len(cases)} x {pipeline.num_views} views each")
    return 0


def _refuse_another_model(model: str, unet: str | None, export: Path) -> None:
    """Raises: InputError where an export belongs to another model or UNet, or the folder is no export.

    Without --model the embedded model would be used, whose prompts have the same shape as FaceLift's.
    """
    from train.export.read import refuse_another_unet
    from train.state.folder import DESCRIPTION, exported_prompt, read_description

    exported_prompt(export, option="export")
    if not (export / DESCRIPTION).is_file():
        return
    description = read_description(export)
    trained_from = description.get("model", MICRO)
    if model == MICRO and trained_from != MICRO:
        raise InputError(f"model: is {MICRO}; {export} was trained from {trained_from}: give that with --model")
    refuse_another_unet(unet, description.get("unet"), export)


def find_pictures(given: Sequence[str]) -> dict[str, Path]:
    """The pictures that are given, in the folders that are given, or that a pattern (mice/*.png) finds, by a name of their own.

    Raises: InputError.
    """
    from softprompt.data.decode import WANTED

    found: list[Path] = []
    for one in map(Path, given):
        inside = [one]
        if one.is_dir():
            inside = sorted(path for path in one.iterdir() if _is_picture(path))
        elif not one.exists() and any(sign in str(one) for sign in "*?["):
            inside = sorted(path for path in map(Path, glob(str(one), recursive=True)) if _is_picture(path))
        elif not one.exists():
            raise InputError(
                f"pictures: {one}: not found{base_of(one)}; expected {WANTED}, or a folder of them; likely a typing mistake"
            )
        if not inside:
            within = next(one.rglob("cam_000.*"), None) if one.is_dir() else None
            hint = f"; of a folder of samples, give the view that is given: {within}" if within else ""
            raise InputError(f"pictures: {one} holds no picture; expected some of objects, each seen as view 0{hint}")
        found += [path for path in inside if path not in found]  # a folder, and one in it
    names = [path.stem for path in found]
    twins = {name for name in names if names.count(name) > 1}
    # cam_000.png of two objects: the folder tells them apart.
    named = [f"{path.absolute().parent.name}_{path.stem}" if path.stem in twins else path.stem for path in found]
    for index, name in enumerate(named):
        if name in named[:index]:
            raise InputError(f"pictures: {found[index]} and {found[named.index(name)]} would both be written as {name}")
    return dict(zip(named, found, strict=True))


def _is_picture(path: Path) -> bool:
    """Whether a file is a picture, by its name; hidden files are not."""
    from softprompt.data.decode import SUFFIXES

    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def make_cases(options: Options, pipeline: "Pipeline") -> list[Case]:
    """The rows that the options ask for. Raises: InputError for a prompt that does not fit the model."""
    import torch

    from softprompt.model.sampling import RISES, Annealed
    from softprompt.prompt.embeddings import load_prompt
    from softprompt.prompt.encoding import load_waypoints
    from train.state.folder import exported_prompt

    views, width = pipeline.num_views, pipeline.prompt_width

    def prompt_of(option: Literal["prompt", "pretrained"]) -> "Tensor":
        return load_waypoints(
            [getattr(options, option)],
            folder=pipeline.folder,
            subject=options.subject,
            angle=options.angle,
            num_views=views,
            width=width,
            option=option,
        )[0]

    export = None if options.export is None else Path(options.export)
    learned = None
    if options.prompt is not None:
        learned = prompt_of("prompt")
    elif export is not None:
        learned = load_prompt(exported_prompt(export, option="export"), num_views=views, width=width)
    unmixed = options.rows == "one" and options.prompt_strength == 1 and options.rise == "none"
    start = learned if learned is not None and unmixed else prompt_of("pretrained")
    cases = _rows(options, start, start if learned is None else learned)
    if options.rise == "none":
        return cases
    annealed = Annealed(start, RISES[options.rise])
    # The pretrained model has nothing that could rise.
    return [c if c.lora == 0 and torch.equal(c.prompt, start) else replace(c, annealed=annealed) for c in cases]


def _rows(options: Options, start: "Tensor", learned: "Tensor") -> list[Case]:
    """start, learned: [V, T, D]."""
    import torch

    from softprompt.model.sampling import RISES, Annealed
    from softprompt.prompt.soft_prompt import point_on_path

    path = torch.stack([start, learned])
    given = learned if options.prompt_strength == 1 else start + options.prompt_strength * (learned - start)
    views = Case("views", given, options.lora_strength)
    if options.rows == "one":
        return [views]
    if options.rows == "path":
        return [Case(f"at {s:g}", point_on_path(path, s), 0.0, s == 1) for s in POSITIONS]
    if options.rows == "strengths":
        pairs = [(p, lora) for p in STRENGTHS for lora in STRENGTHS]
        return [Case(f"p {p:g} lora {lora:g}", point_on_path(path, p), lora, (p, lora) == (1, 1)) for p, lora in pairs]
    pretrained = Case("pretrained", start, 0.0, False)
    if options.rows == "rises":
        rising = {f"rise {name}": Annealed(start, weight) for name, weight in RISES.items()}
        return [
            pretrained,
            replace(views, label="rise none"),
            *(replace(views, label=label, shown=False, annealed=annealed) for label, annealed in rising.items()),
        ]
    return [
        pretrained,
        Case("prompt alone", learned, 0.0, False),
        Case("LoRA alone", start, 1.0, False),
        Case("both", learned, 1.0, True),
        Case("shifted prompts", learned.roll(-1, dims=0), 1.0, False),
    ]


def sample(pipeline: "Pipeline", case: Case, picture: "Tensor", options: Options) -> "Tensor":
    """[V, 3, S, S] in [0, 1] of one picture, [3, S, S] in [0, 1]."""
    from softprompt.model.adapted import adapters_off
    from softprompt.model.sampling import sample_views
    from train.export.write import has_lora

    if has_lora(pipeline.unet) and case.lora != 0:
        pipeline.unet.set_adapters(["default"], weights=[case.lora])
    with adapters_off(pipeline.unet) if case.lora == 0 else nullcontext():
        return sample_views(
            pipeline,
            case.prompt,
            picture,
            steps=options.steps,
            guidance_scale=options.guidance_scale,
            eta=options.eta,
            seed=options.seed,
            annealed=case.annealed,
        )[0]


def _write(folder: Path, name: str, given: "Tensor", cases: Sequence[Case], rows: Sequence["Tensor"]) -> None:
    """The views of the case that is shown one by one and in turn; all rows as one picture."""
    from einops import rearrange
    from PIL import Image

    from softprompt.data.samples import picture_name
    from softprompt.prompt.templates import view_names
    from train.log.grids import preview_grid

    views = next(row for case, row in zip(cases, rows, strict=True) if case.shown)
    pixels = rearrange((views.clamp(0, 1) * 255).round().byte().cpu(), "v c h w -> v h w c").numpy()
    frames = [Image.fromarray(view) for view in pixels]
    (folder / name).mkdir()
    for number, frame in enumerate(frames):
        frame.save(folder / name / picture_name(number))
    frames[0].save(folder / f"{name}.gif", save_all=True, append_images=frames[1:], duration=400, loop=0)
    labelled = [(case.label, row[None]) for case, row in zip(cases, rows, strict=True)]
    preview_grid(labelled, given[None], view_names(len(views))).save(folder / f"{name}.png")


if __name__ == "__main__":
    sys.exit(main())
