"""Writes prompt files, and converts them between formats and from the folders of FaceLift, Era3D and Wonder3D."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from softprompt.errors import InputError
from softprompt.files import new_folder, writing_to
from softprompt.prompt.embeddings import save_prompt
from softprompt.prompt.similarity import closest_pair
from softprompt.prompt.templates import PROMPT_SUFFIXES
from train.prompts.sources import FOLDER_FILES, Source, described, files_in, open_file

FORMATS = {".pt": "float16, what FaceLift loads", ".safetensors": "float32"}


def refuse_output(path: Path, *, overwrite: bool, beside: Path | None = None) -> None:
    """Check that a prompt can be written, before any work is done.

    beside: a prompt file whose JSON may be replaced, since it describes the same prompt.
    Raises: InputError for a name that cannot be a prompt's, or if the file exists.
    """
    if path.suffix not in PROMPT_SUFFIXES:
        raise InputError(f"{path}: a prompt is saved as .pt (FaceLift's float16) or .safetensors (float32)")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; expected the name of a file")
    sidecar = path.with_suffix(".json")
    shared = beside is not None and beside.with_suffix(".json").resolve() == sidecar.resolve()
    taken = [file for file in (path, sidecar) if file.exists() and not (shared and file is sidecar)]
    if taken and not overwrite:
        raise InputError(f"{taken[0]}: exists already; choose another --output, or replace it with --overwrite")


def write(prompt: Tensor, path: Path, views: tuple[str, ...], metadata: Mapping[str, Any]) -> str:
    """Write a prompt and the JSON beside it.

    prompt: [V, T, D]. Returns: a description of the written files. Raises: InputError if it cannot be written.
    """
    a, b, cosine = closest_pair(prompt, views)
    named = {"views": list(views), "closest_views": [a, b, round(cosine, 6)]}
    with writing_to(path):
        sidecar = save_prompt(prompt, path, metadata={**metadata, **named})
    return f"{path} ({FORMATS[path.suffix]}) and {sidecar.name}; closest {a} and {b}, cosine {cosine:.3f}"


def convert(given: Path, output: Path, *, overwrite: bool) -> list[str]:
    """Rewrite a prompt file, of this project or of another program, or a folder of them.

    output: a prompt file, or without suffix a folder.
    Returns: lines about the files found and written. Raises: InputError if nothing can be converted, or written.
    """
    if output.suffix and output.suffix not in PROMPT_SUFFIXES:
        raise InputError(f"{output}: ends in {output.suffix}; expected .pt, .safetensors, or the name of a folder")
    if not given.is_dir():
        source = open_file(given, any_kind=True)
        found = f"{source.found}: " if source.found else ""
        file = output if output.suffix else output / "clr_embeds.pt"  # the name that FaceLift's code reads
        return [f"found      {given}: {found}{source.shape}", _convert_file(source, given, file, overwrite)]
    files = files_in(given)
    sources = {name: open_file(file) for name, file in files.items()}
    lines = [f"found      {files[name].name} {FOLDER_FILES[name]}: {source.shape}" for name, source in sources.items()]
    if not output.suffix:
        return [*lines, *_convert_folder(sources, files, output)]
    first, *left = sources
    lines += [f"left out   {', '.join(files[name].name for name in left)}: a folder as OUT takes both"] if left else []
    return [*lines, _convert_file(sources[first], files[first], output, overwrite)]


def _convert_file(source: Source, given: Path, output: Path, overwrite: bool) -> str:
    if output.resolve() == given.resolve():
        raise InputError(f"{output}: is the input file; expected another name or suffix for OUT")
    refuse_output(output, overwrite=overwrite, beside=given if source.metadata else None)
    line = f"written    {write(source.prompt, output, source.views, _kept_metadata(given, source.prompt))}"
    rounded = float((source.prompt.half().float() - source.prompt).abs().max())
    lost = f"; rounding to float16 changes a number by {rounded:.1e} at most"
    return line + (lost if output.suffix == ".pt" and rounded else "")


def _convert_folder(sources: dict[str, Source], files: dict[str, Path], output: Path) -> list[str]:
    lines = []
    with writing_to(output), new_folder(output) as partial:
        for name, source in sources.items():
            suffix = next(s for s in PROMPT_SUFFIXES if s != files[name].suffix)
            write(source.prompt, partial / f"{name}{suffix}", source.views, _kept_metadata(files[name], source.prompt))
            lines.append(f"written    {output / name}{suffix} and .json")
    return lines


def _kept_metadata(path: Path, prompt: Tensor) -> dict[str, Any]:
    """The part of the JSON beside a prompt file that also holds for a copy in the other format."""
    measured = ("file", "shape", "dtype", "token_norms", "view_cosines", "mean_view_cosine", "rounding_error")
    return {key: value for key, value in described(path, prompt).items() if key not in measured}
