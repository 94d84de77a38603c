"""Prompt files and templates => prompts, with what is known of where they come from."""

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
from softprompt.prompt.embeddings import check_prompt, refuse_foreign, save_prompt
from softprompt.prompt.encoding import encode_texts
from softprompt.prompt.prompt_files import read_prompt_file
from softprompt.prompt.similarity import closest_pair
from softprompt.prompt.templates import PROMPT_SUFFIXES, TEMPLATES, VIEWS, Template, view_names
from train.cli import suggestion

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

SUFFIXES = PROMPT_SUFFIXES
TOY = "the embedded toy's text encoder"


@dataclass(frozen=True)
class Source:
    """A prompt and what is known of it."""

    name: str
    """As it was given."""
    prompt: Tensor
    """[V, T, D], float32."""
    dtype: str
    """As it is stored, or float32 for what was just encoded."""
    views: tuple[str, ...]
    words: tuple[int, ...] | None = None
    """Tokens of each view's text, start and end token with them; the rest is padding. None: the text is not known."""
    texts: tuple[str, ...] = ()
    """One a view, where they are known."""
    toy: bool | None = None
    """Whether the embedded model's text encoder made it; None: not known."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Of the JSON beside the file."""
    found: str = ""
    """What it lay in, of a file that another program wrote."""

    @property
    def steps(self) -> int:
        """That it was trained for, as the JSON beside it says; 0: none, or not known."""
        steps = self.metadata.get("steps")
        return steps if isinstance(steps, int) else 0

    @property
    def shape(self) -> str:
        """In words."""
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
        """As it is given on the command line."""
        return "micro" if self.folder == MICRO_MODEL else str(self.folder)

    @property
    def is_toy(self) -> bool:
        """Whether it is the embedded model's."""
        return has_toy_encoder(self.folder)

    def encode(self, name: str, texts: Sequence[str], views: Sequence[str], *, is_cut: list[str] | None = None) -> Source:
        """Texts, one a view, to a prompt. is_cut: is given a sentence for each text that is longer than a prompt.

        Raises: InputError when two views come out the same.
        """
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            prompt = encode_texts(texts, self.tokenizer, self.model)
        if is_cut is not None:
            is_cut += [str(w.message) for w in warned if "is cut to" in str(w.message)]
        check_prompt(prompt, num_views=len(texts), origin=f"{name!r} encoded by {self.name}")
        counts = tuple(min(len(ids), prompt.shape[1]) for ids in self.tokenizer(list(texts)).input_ids)
        return Source(name, prompt, "float32", tuple(views), counts, tuple(texts), self.is_toy)


def open_encoder(model: str) -> Encoder:
    """The encoder of a pipeline folder, or of the embedded model. Raises: InputError naming what is missing."""
    logging.disable_progress_bar()
    folder = model_folder(model)
    return Encoder(folder, *load_text_encoder(folder))


def model_folder(model: str) -> Path:
    """`micro` is the embedded model. Raises: InputError when there is no such folder."""
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
    """(V, D): how many views, and how wide a prompt, the UNet of a pipeline folder takes; no weight is read.

    Raises: InputError when its configuration is missing or does not say.
    """
    file = folder / "unet" / "config.json"
    config = read_json(file, what="the UNet's configuration")
    taken = {"num_views": len(VIEWS), "cross_attention_dim": None} | config
    for name in ("num_views", "cross_attention_dim"):
        if not isinstance(taken[name], int) or taken[name] < 1:
            raise InputError(f"{file}: {name} is {taken[name]!r}; expected a whole number; likely no UNet of FaceLift's family")
    return taken["num_views"], taken["cross_attention_dim"]


def fill_in(text: str, *, subject: str, angles: str | Sequence[str], views: Sequence[str] = VIEWS) -> list[str]:
    """The texts of a template's name, or of a text with {view}, one a view.

    angles: for {angle}, one for all views or one each. Raises: InputError for what is neither.
    """
    if text not in TEMPLATES and "{" not in text:
        raise InputError(
            f"--text {text!r}: is no template ({', '.join(TEMPLATES)}) and no text with {{view}}"
            f"{suggestion(text, list(TEMPLATES)).removesuffix('; --help lists the options')}"
        )
    template = TEMPLATES.get(text, Template(text))
    each = [angles] * len(views) if isinstance(angles, str) else angles
    return [template.texts(subject=subject, angle=angle, views=(view,))[0] for view, angle in zip(views, each, strict=True)]


def read_phrases(given: Sequence[str], *, subject: str, angle: str) -> list[str]:
    """Templates, texts with {view}, plain texts, and files (.txt) of one such a line, as texts; each once.

    Raises: InputError for a file that cannot be read, a text that cannot be filled in, or fewer than two texts.
    """
    lines: list[str] = []
    for one in given:
        if not one.endswith(".txt"):
            lines.append(one)
            continue
        try:
            lines += [line.strip() for line in Path(one).read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--phrases {one}: cannot be read ({error}); expected a text file, one phrase a line") from error
    texts = [
        text
        for line in lines
        for text in (fill_in(line, subject=subject, angles=angle) if line in TEMPLATES or "{" in line else [line])
    ]
    found = list(dict.fromkeys(texts))
    if len(found) < 2:
        raise InputError(f"--phrases: are {len(found)}; expected two or more, to tell which of them a view is nearest to")
    return found


def open_file(path: str | Path, *, any_kind: bool = False) -> Source:
    """A prompt file of any number of views and any width, and what the JSON beside it says.

    any_kind: also as other programs write it.
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
    named, texts = (_listed(beside, name, str, views) for name in ("views", "texts"))
    counted = _listed(beside, "text_tokens", int, views)
    return Source(
        str(path),
        prompt,
        str(stored.dtype).removeprefix("torch."),
        tuple(named or view_names(views)),
        tuple(counted) if counted else None,
        tuple(texts),
        beside["toy_encoder"] if isinstance(beside.get("toy_encoder"), bool) else None,
        beside,
        "" if content.is_bare else content.found,
    )


def described(path: Path, prompt: Tensor) -> dict[str, Any]:
    """The JSON beside a prompt file, as `save_prompt` writes it; empty where there is none, or it is of something else."""
    file = path.with_suffix(".json")
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) and content.get("shape") == list(prompt.shape) else {}


def _listed(content: Mapping[str, Any], name: str, kind: type, length: int) -> list[Any]:
    """What a JSON lists under a name, one of a kind for each view; empty where it is anything else."""
    value = content.get(name)
    return value if isinstance(value, list) and len(value) == length and all(isinstance(v, kind) for v in value) else []


KINDS = {".pt": "float16, what FaceLift loads", ".safetensors": "float32"}


def refuse_output(path: Path, *, overwrite: bool, beside: Path | None = None) -> None:
    """Before any work is done. beside: a prompt file whose JSON may be replaced, since it describes the same prompt.

    Raises: InputError where a prompt cannot be written under that name, or something lies there.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: a prompt is saved as .pt (FaceLift's float16) or .safetensors (float32)")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; expected the name of a file")
    sidecar = path.with_suffix(".json")
    shared = beside is not None and beside.with_suffix(".json").resolve() == sidecar.resolve()
    taken = [file for file in (path, sidecar) if file.exists() and not (shared and file is sidecar)]
    if taken and not overwrite:
        raise InputError(f"{taken[0]}: exists already; choose another --output, or replace it with --overwrite")


def write(prompt: Tensor, path: Path, views: tuple[str, ...], metadata: Mapping[str, Any]) -> str:
    """Write a prompt and the JSON beside it. Returns: what was written, in a sentence.

    prompt: [V, T, D]. Raises: InputError when it cannot be written.
    """
    a, b, cosine = closest_pair(prompt, views)
    named = {"views": list(views), "closest_views": [a, b, round(cosine, 6)]}
    try:
        sidecar = save_prompt(prompt, path, metadata={**metadata, **named})
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error}); likely read-only, or its disk is full") from error
    return f"{path} ({KINDS[path.suffix]}) and {sidecar.name}; closest {a} and {b}, cosine {cosine:.3f}"


def kept_metadata(path: Path, prompt: Tensor) -> dict[str, Any]:
    """What the JSON beside a prompt file says that still holds of a copy in the other format."""
    measured = ("file", "shape", "dtype", "token_norms", "view_cosines", "mean_view_cosine", "rounding_error")
    return {key: value for key, value in described(path, prompt).items() if key not in measured}
