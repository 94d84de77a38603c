"""Prompt files between formats, and the folders in which FaceLift, Era3D and Wonder3D keep theirs."""

from pathlib import Path

from softprompt.errors import InputError
from softprompt.files import new_folder
from train.prompts.sources import SUFFIXES, Source, kept_metadata, open_file, refuse_output, write

NAMES = {"clr_embeds": "of color pictures", "normal_embeds": "of normal maps"}
"""The files of such a folder. FaceLift reads the first alone; Era3D and Wonder3D both."""


def convert(given: Path, output: Path, *, overwrite: bool) -> list[str]:
    """Rewrite a prompt file, of this project or of another program, or a folder of them; a name without suffix is a folder's.

    Returns: what was found and written, a sentence each. Raises: InputError where nothing can be converted, or written.
    """
    if given.is_dir():
        files = found_in(given)
        sources = {name: open_file(file) for name, file in files.items()}
        said = [f"found      {files[name].name} {NAMES[name]}: {source.shape}" for name, source in sources.items()]
        if output.suffix in SUFFIXES:
            only = next(iter(sources))
            left = [file.name for name, file in files.items() if name != only]
            said += [f"left out   {', '.join(left)}: a folder as OUT takes both"] if left else []
            return [*said, _convert_file(sources[only], files[only], output, overwrite)]
        return [*said, *_convert_folder(sources, files, output)]
    source = open_file(given, any_kind=True)
    if output.suffix not in SUFFIXES:  # a folder such as FaceLift's, whose code asks for this name
        _refuse_odd_suffix(output)
        output = output / "clr_embeds.pt"
    found = f"{source.found}: " if source.found else ""
    return [f"found      {given}: {found}{source.shape}", _convert_file(source, given, output, overwrite)]


def found_in(folder: Path) -> dict[str, Path]:
    """The prompt files of a folder, by name; float32 where there are both formats.

    Raises: InputError when there is none.
    """
    there = [(name, folder / f"{name}{suffix}") for name in NAMES for suffix in SUFFIXES]
    found = {name: file for name, file in there if file.is_file()}  # .safetensors comes last, and stays
    if not found:
        inside = ", ".join(sorted(file.name for file in folder.iterdir())[:5]) or "nothing"
        raise InputError(
            f"{folder}: holds no clr_embeds.pt or .safetensors (but {inside}); expected a folder such as FaceLift's "
            f"fixed_prompt_embeds_6view, or a prompt file"
        )
    return found


def _convert_file(source: Source, given: Path, output: Path, overwrite: bool) -> str:
    if output.resolve() == given.resolve():
        raise InputError(f"{output}: is the file that is given; expected another name or suffix for OUT")
    refuse_output(output, overwrite=overwrite, beside=given if source.metadata else None)
    said = f"written    {write(source.prompt, output, source.views, kept_metadata(given, source.prompt))}"
    rounded = float((source.prompt.half().float() - source.prompt).abs().max())
    lost = f"; rounding to float16 changes a number by {rounded:.1e} at most"
    return said + (lost if output.suffix == ".pt" and rounded else "")


def _convert_folder(sources: dict[str, Source], files: dict[str, Path], output: Path) -> list[str]:
    _refuse_odd_suffix(output)
    said = []
    try:
        with new_folder(output) as partial:
            for name, source in sources.items():
                suffix = next(s for s in SUFFIXES if s != files[name].suffix)
                write(source.prompt, partial / f"{name}{suffix}", source.views, kept_metadata(files[name], source.prompt))
                said.append(f"written    {output / name}{suffix} and .json")
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error}); likely read-only, or its disk is full") from error
    return said


def _refuse_odd_suffix(output: Path) -> None:
    if output.suffix:
        raise InputError(f"{output}: ends in {output.suffix}; expected .pt, .safetensors, or the name of a folder")
