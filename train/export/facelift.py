"""Puts an export where FaceLift's own code looks, and takes it away again.

The original of each place is kept beside it: as NAME.original, or, where there was nothing, as an empty NAME.no-original. It is
there before anything of ours takes the place, and goes last, so whatever is killed can be done again, or undone.
"""

import filecmp
import os
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path

from softprompt.errors import InputError, RunError
from softprompt.files import folder_size, lack_of_space, new_folder, read_json, remove_folder
from train.options.groups import MICRO
from train.state.folder import read_description

FACELIFT_PROMPT = "mvdiffusion/data/fixed_prompt_embeds_6view/clr_embeds.pt"
"""Where FaceLift's training and inference look for the prompt; the path is written into its code."""
FACELIFT_MODEL = "checkpoints/mvdiffusion/pipeckpts"
"""Where FaceLift's inference looks for the pipeline folder."""
CHECK_XFORMERS = 'python -c "import xformers.ops"'
"""Command for FaceLift's environment: it ends without an error where sparse attention can work."""
_ITS_OWN = ("inference.py", "mvdiffusion")
"""Names that identify FaceLift's repository."""
_WEIGHTS = "checkpoints/gslrm"
"""Where this folder is missing, FaceLift's inference first downloads all its weights, and overwrites FACELIFT_MODEL."""


def put_in(facelift: Path, export: Path, *, with_pipeline: bool) -> list[str]:
    """Put an export's prompt, and where asked for its merged pipeline folder, into FaceLift's repository.

    Without it the pipeline folder is FaceLift's own again, where an earlier call put another there: a prompt belongs to a
    model. Each copy is compared with its original before it takes its place.
    Returns: the changes, then warnings, in lines.
    Raises: InputError where `facelift` is not FaceLift's repository, or the export lacks a wanted part or does not fit.
    """
    refuse_another_folder(facelift)
    wanted = {FACELIFT_PROMPT: export / "clr_embeds.pt"}
    if with_pipeline:
        wanted[FACELIFT_MODEL] = export / "pipeckpts"
    warnings = _check(facelift, export, wanted)
    _clean(facelift)
    staged: dict[str, Path] = {}
    lines = []
    try:
        for place, ours in wanted.items():  # what takes time comes first
            staged[place] = _staged(facelift, place, ours)
        for place, copy in staged.items():
            lines.append(f"put in     {facelift / place}; {_set_aside(facelift, place)}")
            if copy.is_dir():  # which takes the place of none that holds something
                _take_away(facelift / place)
            os.replace(copy, facelift / place)
    finally:
        for copy in staged.values():
            _take_away(copy.parent)
    if not with_pipeline and _was_put_in(facelift, FACELIFT_MODEL):
        _put_back(facelift, FACELIFT_MODEL)
        lines.append(
            f"put back   {facelift / FACELIFT_MODEL}: it belonged to an earlier prompt (--pipeline puts this one's in)"
        )
    return [*lines, *warnings]


def undo(facelift: Path) -> list[str]:
    """Put back what was there before `put_in`, however often it was called. Returns: the changes, in lines.

    Raises: InputError where nothing was put in, or `facelift` is not FaceLift's repository.
    """
    refuse_another_folder(facelift)
    found = [place for place in (FACELIFT_PROMPT, FACELIFT_MODEL) if _was_put_in(facelift, place)]
    cleaned = _clean(facelift)
    if not found and not cleaned:
        raise InputError(
            f"--undo: {facelift} holds nothing that --into put there (no {Path(FACELIFT_PROMPT).name}.original or "
            f".no-original); likely it was undone already"
        )
    return [f"put back   {_put_back(facelift, place)}" for place in found] or ["removed the partial copies of a killed --into"]


def refuse_another_folder(facelift: Path) -> None:
    """Raises: InputError where a folder is not FaceLift's repository."""
    missing = [name for name in _ITS_OWN if not (facelift / name).exists()]
    if missing:
        raise InputError(
            f"{facelift}: is not FaceLift's repository, it has no {' and no '.join(missing)}; expected a clone of "
            f"github.com/weijielyu/FaceLift, or a fork"
        )


def how_to_use(export: Path) -> list[str]:
    """The exact commands that put an export to use, as lines."""
    command, has_lora = f"python -m train.export {shlex.quote(str(export))}", (export / "lora").is_dir()
    lines = [
        "use it in FaceLift (FACELIFT is its repository; --undo FACELIFT puts back what was there):",
        f"  {into_facelift(export)}",
    ]
    if has_lora:
        lines.append("the LoRA in diffusers:")
        lines.append(
            f'  unet.load_lora_adapter("{export / "lora"}", prefix="unet", weight_name="pytorch_lora_weights.safetensors")'
        )
    if not (export / "README.md").is_file():
        lines.append(f"a model card{', and the LoRA for peft and kohya' if has_lora else ''}:")
        lines.append(f"  {command} --output FOLDER{' --lora peft kohya' if has_lora else ''}")
    return lines


def into_facelift(export: Path) -> str:
    """The command that puts an export into FaceLift, all that belongs together: FaceLift reads no LoRA, so it is merged."""
    command = f"python -m train.export {shlex.quote(str(export))}"
    if (export / "pipeckpts").is_dir():
        return f"{command} --into FACELIFT --pipeline"
    return (
        f"{command} --pipeline --output FOLDER --into FACELIFT" if (export / "lora").is_dir() else f"{command} --into FACELIFT"
    )


def _check(facelift: Path, export: Path, wanted: Mapping[str, Path]) -> list[str]:
    """Check that an export can be put in. Returns: warnings, in lines. Raises: InputError."""
    from softprompt.prompt.embeddings import load_prompt  # torch, which --undo should not wait for

    prompt, warnings = load_prompt(wanted[FACELIFT_PROMPT]), []
    model, theirs = read_description(export).get("model"), None
    if FACELIFT_MODEL in wanted:
        config = wanted[FACELIFT_MODEL] / "unet" / "config.json"
        if not config.is_file():
            raise InputError(
                f"--pipeline: {export} holds no pipeckpts; write one first, and put that in: python -m train.export "
                f"{shlex.quote(str(export))} --pipeline --output FOLDER --into {shlex.quote(str(facelift))}"
            )
        if not (facelift / _WEIGHTS).exists():
            warnings.append(
                f"WARNING    {facelift / _WEIGHTS} is not there: FaceLift's inference will download its weights, its own "
                f"pipeline folder over this one. Let it do so first: --undo, run its inference once, then --into again"
            )
        size = folder_size(wanted[FACELIFT_MODEL])
        if (disk := lack_of_space(facelift, size)) is not None:
            raise InputError(f"--into: {disk}; the pipeline folder takes {size / 1e9:.1f} GB")
    else:
        theirs = facelift / FACELIFT_MODEL
        original = theirs.with_name(f"{theirs.name}.original")
        config = (original if original.exists() else theirs) / "unet" / "config.json"
        if (export / "lora").is_dir():
            warnings.append(
                "WARNING    the LoRA is not in it: FaceLift reads none. The prompt was learned with it and does not give the "
                "same views alone; --pipeline puts the model with the LoRA merged there too"
            )
        if model == MICRO:
            warnings.append("WARNING    the prompt was learned with the embedded micro model; FaceLift's own does not know it")
    unet = read_json(config, what="a UNet's configuration") if config.is_file() else {}
    takes = unet.get("cross_attention_dim")
    if unet and takes != prompt.shape[2]:
        cause = "its files are of two exports" if FACELIFT_MODEL in wanted else "it was trained from another model (--pipeline)"
        raise InputError(f"{export}: its prompt is {prompt.shape[2]} wide; {config} takes {takes}; likely {cause}")
    # Source: FaceLift, mvdiffusion/models/transformer_mv2d_image.py: of two processors only that of xformers knows the flag.
    if unet.get("sparse_mv_attention", True) and unet.get("multiview_attention", True):
        warnings.append(
            f"mind       FaceLift attends as it was trained to with xformers alone; without it the same files give other "
            f"views. In its environment this ends without an error: {CHECK_XFORMERS}; and no line of its log says "
            f"\"['sparse_mv_attention'] are not expected by MVAttnProcessor\""
        )
    return warnings


def _staged(facelift: Path, place: str, ours: Path) -> Path:
    """A copy of a file or folder, whole and on the disk that its place is on. Raises: RunError where it is another."""
    target = facelift / place
    above = next(folder for folder in target.parents if folder.is_dir())
    stage = above / f".{target.name}.partial-into"
    with new_folder(stage) as partial:
        copy = partial / target.name
        shutil.copytree(ours, copy) if ours.is_dir() else shutil.copyfile(ours, copy)
        if differing := _differing(ours, copy):
            raise RunError(f"{facelift}: {differing[0]} was read back another than {ours}; likely the disk is failing")
    return stage / target.name


def _differing(ours: Path, copy: Path) -> list[Path]:
    """Files that differ between the two."""
    if ours.is_file():
        return [] if filecmp.cmp(ours, copy, shallow=False) else [ours]
    names = {file.relative_to(folder) for folder in (ours, copy) for file in folder.rglob("*") if not file.is_dir()}
    return [copy / n for n in sorted(names) if not ((copy / n).is_file() and filecmp.cmp(ours / n, copy / n, shallow=False))]


def _set_aside(facelift: Path, place: str) -> str:
    """Keep the original of a place, unless an earlier call did. Returns: a description of what is kept."""
    target = facelift / place
    original = _original(target)
    if not os.path.lexists(original) and _missing(facelift, target) is None:
        if os.path.lexists(target):
            os.replace(target, original)
        else:
            topmost = [path for path in _up_to(facelift, target) if not os.path.lexists(path)][-1]
            _no_original(topmost).touch()
    target.parent.mkdir(parents=True, exist_ok=True)
    return f"the original is beside it, {original.name}" if os.path.lexists(original) else "there was none before"


def _clean(facelift: Path) -> bool:
    """Remove the partial copies of a killed call. Returns: whether there were any."""
    targets = [facelift / place for place in (FACELIFT_PROMPT, FACELIFT_MODEL)]
    folders = [(target.name, folder) for target in targets for folder in (facelift, *_up_to(facelift, target.parent))]
    left_over = [path for name, folder in folders for path in folder.glob(f".*{name}.partial-*")]
    for path in left_over:
        _take_away(path)
    return bool(left_over)


def _was_put_in(facelift: Path, place: str) -> bool:
    target = facelift / place
    return os.path.lexists(_original(target)) or _missing(facelift, target) is not None


def _put_back(facelift: Path, place: str) -> str:
    """Restore a place. Returns: a description of the change."""
    target = facelift / place
    original = _original(target)
    if os.path.lexists(original):
        if target.is_dir() or original.is_dir():  # else the one file takes the place of the other at once
            _take_away(target)
        os.replace(original, target)
        return f"{target}"
    topmost = _missing(facelift, target)
    assert topmost is not None, "only what was put in is put back"
    _take_away(target)
    for folder in _up_to(facelift, target.parent):
        if not folder.is_relative_to(topmost) or (folder.is_dir() and any(folder.iterdir())):
            break
        if folder.is_dir():
            folder.rmdir()
    _no_original(topmost).unlink()
    return f"{target}: taken away; there was none before"


def _missing(facelift: Path, target: Path) -> Path | None:
    """The topmost of a place and its folders that `put_in` made; None where all existed before, or nothing was put in."""
    return next((path for path in _up_to(facelift, target) if _no_original(path).exists()), None)


def _up_to(facelift: Path, path: Path) -> list[Path]:
    """A path and its folders, up to but without FaceLift's."""
    return [one for one in (path, *path.parents) if one != facelift and one.is_relative_to(facelift)]


def _original(target: Path) -> Path:
    return target.with_name(f"{target.name}.original")


def _no_original(path: Path) -> Path:
    return path.with_name(f"{path.name}.no-original")


def _take_away(path: Path) -> None:
    """Remove a file, link or folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        remove_folder(path)
    else:
        path.unlink(missing_ok=True)
