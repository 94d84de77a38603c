"""Reads prompts from prompt files, templates and texts, with their origin where it is known."""

import difflib
import filecmp
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.utils import logging

from softprompt.errors import InputError, base_of
from softprompt.files import read_json
from softprompt.micro import MICRO_MODEL
from softprompt.model.loading import load_text_encoder
from softprompt.prompt.embeddings import check_prompt, refuse_foreign
from softprompt.prompt.encoding import encode_texts
from softprompt.prompt.prompt_files import read_prompt_file
from softprompt.prompt.templates import FOREIGN_SUFFIXES, PROMPT_SUFFIXES, TEMPLATES, VIEWS, Template, view_names

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

TOY = "the embedded toy's text encoder"
FOLDER_FILES = {"clr_embeds": "of color pictures", "normal_embeds": "of normal maps"}
"""Prompt files in folders of other projects. FaceLift reads only the first; Era3D and Wonder3D both."""


@dataclass(frozen=True)
class Source:
    """A prompt and what is known about it."""

    name: str
    """Name on the command line."""
    prompt: Tensor
    """[V, T, D], float32."""
    dtype: str
    """dtype in the file; float32 for an encoded text."""
    views: tuple[str, ...]
    words: tuple[int, ...] | None = None
    """Number of tokens of each view's text, with start and end token; the rest is padding. None: not known."""
    texts: tuple[str, ...] = ()
    """One a view; empty if not known."""
    toy: bool | None = None
    """Whether the embedded model's text encoder made it; None: not known."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """From the JSON beside the file."""
    found: str = ""
    """The form in which a file of another program holds it."""

    @property
    def steps(self) -> int:
        """Training steps according to the JSON beside the file; 0: none, or not known."""
        steps = self.metadata.get("steps")
        return steps if isinstance(steps, int) else 0

    @property
    def shape(self) -> str:
        """Shape and dtype as text."""
        views, tokens, width = self.prompt.shape
        return f"{views} views x {tokens} tokens x {width}, {self.dtype}"


@dataclass(frozen=True)
class Encoder:
    """Tokenizer and text encoder of a pipeline folder."""

    folder: Path
    tokenizer: "CLIPTokenizer"
    model: "CLIPTextModel"

    @property
    def name(self) -> str:
        """Name on the command line."""
        return "micro" if self.folder == MICRO_MODEL else str(self.folder)

    @property
    def is_toy(self) -> bool:
        """Whether it is the embedded model's text encoder."""
        return has_toy_encoder(self.folder)

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Texts to embeddings [N, T, D]. Prints a warning for each text that is longer than a prompt."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            embeddings = encode_texts(texts, self.tokenizer, self.model)
        for warning in caught:
            if "is cut to" in str(warning.message):
                print(f"warning    {warning.message}")
        return embeddings

    def encode(self, name: str, texts: Sequence[str], views: Sequence[str]) -> Source:
        """Texts, one a view, to a prompt. Raises: InputError if two views get the same prompt."""
        prompt = self.embed(texts)
        check_prompt(prompt, num_views=len(texts), origin=f"{name!r} encoded by {self.name}")
        counts = tuple(min(len(ids), prompt.shape[1]) for ids in self.tokenizer(list(texts)).input_ids)
        return Source(name, prompt, "float32", tuple(views), counts, tuple(texts), self.is_toy)


def open_encoder(model: str) -> Encoder:
    """Load the text encoder of a pipeline folder, or of `micro`. Raises: InputError naming what is missing."""
    logging.disable_progress_bar()
    folder = model_folder(model)
    return Encoder(folder, *load_text_encoder(folder))


def model_folder(model: str) -> Path:
    """The pipeline folder; that of the embedded model for `micro`. Raises: InputError if there is none."""
    folder = MICRO_MODEL if model == "micro" else Path(model)
    if not folder.is_dir():
        raise InputError(
            f"--model {model}: no such folder{base_of(model)}; expected a FaceLift pipeline folder (pipeckpts), or micro"
        )
    return folder


def has_toy_encoder(folder: Path) -> bool:
    """Whether a pipeline folder's text encoder is the embedded model's, byte for byte."""
    weights = "text_encoder/model.safetensors"
    return (folder / weights).is_file() and filecmp.cmp(folder / weights, MICRO_MODEL / weights, shallow=False)


def model_takes(folder: Path) -> tuple[int, int]:
    """(V, D): number of views and width of the prompts that a pipeline's UNet takes, from its configuration.

    Raises: InputError if the configuration is missing or lacks them.
    """
    file = folder / "unet" / "config.json"
    config = read_json(file, what="the UNet's configuration")
    taken = {"num_views": len(VIEWS), "cross_attention_dim": None} | config
    for name in ("num_views", "cross_attention_dim"):
        if not isinstance(taken[name], int) or taken[name] < 1:
            raise InputError(f"{file}: {name} is {taken[name]!r}; expected a whole number; likely no UNet of FaceLift's family")
    return taken["num_views"], taken["cross_attention_dim"]


def fill_in(
    text: str, *, subject: str, angles: str | Sequence[str], views: Sequence[str] = VIEWS, problem: str = ""
) -> list[str]:
    """The texts of a template's name, or of a text with {view}, one a view.

    angles: for {angle}, one for all views or one each. problem: how an error begins, if not with --text.
    Raises: InputError for a text that is neither.
    """
    if text not in TEMPLATES and "{" not in text:
        near = difflib.get_close_matches(text, TEMPLATES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        problem = problem or f"--text {text!r}: is"
        raise InputError(f"{problem} no template ({', '.join(TEMPLATES)}) and no text with {{view}}{hint}")
    template = TEMPLATES.get(text, Template(text))
    each = [angles] * len(views) if isinstance(angles, str) else angles
    return [template.texts(subject=subject, angle=angle, views=(view,))[0] for view, angle in zip(views, each, strict=True)]


def read_phrases(given: Sequence[str], *, subject: str, angle: str) -> list[str]:
    """Templates, texts with or without {view}, and .txt files with one of these a line, as different texts.

    Raises: InputError for a file that cannot be read, a text that cannot be filled in, or fewer than two texts.
    """
    lines: list[str] = []
    for one in given:
        try:
            inside = Path(one).read_text(encoding="utf-8").splitlines() if one.endswith(".txt") else None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--phrases {one}: cannot be read ({error}); expected a text file, one phrase a line") from error
        lines += [one] if inside is None else filter(None, map(str.strip, inside))
    found: dict[str, None] = {}
    for line in lines:
        is_filled_in = line in TEMPLATES or "{" in line
        found |= dict.fromkeys(fill_in(line, subject=subject, angles=angle) if is_filled_in else [line])
    if len(found) < 2:
        raise InputError(f"--phrases: are {len(found)}; expected two or more, to find which of them a view is nearest to")
    return list(found)


def open_all(names: Sequence[str], *, model: str, subject: str, angle: str) -> list[Source]:
    """Files, those in folders, templates and texts, in this order. Raises: InputError for a name that is none of them."""
    sources, encoder = [], None
    for name in names:
        is_file = name not in TEMPLATES and Path(name).is_file()
        if is_file or Path(name).suffix in (*PROMPT_SUFFIXES, *FOREIGN_SUFFIXES):
            sources.append(open_file(name))
        elif Path(name).is_dir():
            sources += [open_file(file) for file in files_in(Path(name)).values()]
        else:
            problem = f"{name}: is no prompt file (.pt, .safetensors),"
            texts = fill_in(name, subject=subject, angles=angle, problem=problem)
            encoder = encoder or open_encoder(model)
            sources.append(encoder.encode(name, texts, VIEWS))
    return sources


def files_in(folder: Path) -> dict[str, Path]:
    """The prompt files of a folder, by name without suffix; float32 where both formats exist. Raises: InputError if none."""
    there = [(name, folder / f"{name}{suffix}") for name in FOLDER_FILES for suffix in PROMPT_SUFFIXES]
    found = {name: file for name, file in there if file.is_file()}  # .safetensors comes last, and stays
    if not found:
        inside = ", ".join(sorted(file.name for file in folder.iterdir())[:5]) or "nothing"
        raise InputError(
            f"{folder}: holds no clr_embeds.pt or .safetensors (but {inside}); expected a folder such as FaceLift's "
            f"fixed_prompt_embeds_6view, or a prompt file"
        )
    return found


def open_file(path: str | Path, *, any_kind: bool = False) -> Source:
    """A prompt file with any number of views and any width, and what the JSON beside it says.

    any_kind: accept the formats of other programs.
    Raises: InputError, as `load_prompt`, and for fewer than two views.
    """
    path = Path(path)
    content = read_prompt_file(path)
    stored = content.tensor
    views = stored.shape[0] if stored.ndim == 3 else len(VIEWS)
    prompt = check_prompt(stored, num_views=views, origin=str(path))
    if views < 2:
        raise InputError(f"{path}: has {views} view; expected 2 or more, one text embedding each; likely one view was cut out")
    if not any_kind:
        refuse_foreign(path, content, num_views=views)
    beside = described(path, prompt)
    named, texts, counts = (
        tuple(value) if isinstance(value, list) and len(value) == views and all(isinstance(v, kind) for v in value) else ()
        for value, kind in ((beside.get("views"), str), (beside.get("texts"), str), (beside.get("text_tokens"), int))
    )
    return Source(
        name=str(path),
        prompt=prompt,
        dtype=str(stored.dtype).removeprefix("torch."),
        views=named or view_names(views),
        words=counts or None,
        texts=texts,
        toy=beside["toy_encoder"] if isinstance(beside.get("toy_encoder"), bool) else None,
        metadata=beside,
        found="" if content.is_bare else content.found,
    )


def described(path: Path, prompt: Tensor) -> dict[str, Any]:
    """The JSON beside a prompt file, as `save_prompt` writes it; empty if there is none, or it describes another prompt."""
    try:
        content = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) and content.get("shape") == list(prompt.shape) else {}
