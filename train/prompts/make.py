"""Texts => a prompt, after a look at whether this text encoder is the one that FaceLift's own prompts were made with."""

import copy
from collections.abc import Sequence

from torch import Tensor

from softprompt.errors import InputError
from softprompt.prompt.templates import VIEWS
from train.prompts.sources import TOY, Encoder, Source, fill_in

SAME = 0.01
"""Largest distance of a token to the reference's, of its norm, at which the two are the same text: FaceLift's was encoded in
float16, layer by layer. Another padding token or encoder is at 0.2 and more."""


def reproduce(encoder: Encoder, reference: Source) -> str:
    """Encode FaceLift's six texts and compare them with a file that was made of them.

    Returns: by how much they differ, in a sentence. Raises: InputError saying why they are not the same.
    """
    texts = fill_in("facelift", subject="", angles="")
    made = encoder.encode("facelift", texts, VIEWS).prompt
    origin = f"--reference {reference.name}"
    if made.shape != reference.prompt.shape:
        raise InputError(
            f"{origin}: is {list(reference.prompt.shape)}; FaceLift's six texts come out of {encoder.name} as "
            f"{list(made.shape)}; likely it was made with another text encoder"
        )
    distance = furthest(made, reference.prompt)
    if distance <= SAME:
        largest = float((made - reference.prompt).abs().max())
        return f"{reference.name} is reproduced from FaceLift's six texts: no number differs by more than {largest:.1g}"
    said = f"{origin}: is not what {encoder.name} makes of FaceLift's six texts (a token differs by {distance:.0%} of its norm)"
    if encoder.is_toy:
        raise InputError(
            f"{said}; that is {TOY}, whose prompts fit the embedded model alone; give FaceLift's pipeline as --model"
        )
    for padding in _other_paddings(encoder):
        tokenizer = copy.deepcopy(encoder.tokenizer)
        tokenizer.pad_token = padding
        padded = Encoder(encoder.folder, tokenizer, encoder.model).encode("facelift", texts, VIEWS).prompt
        if furthest(padded, reference.prompt) <= SAME:
            raise InputError(
                f"{said}; it is, with the padding token {padding!r} in place of {encoder.tokenizer.pad_token!r}: set pad_token "
                f"in {encoder.folder / 'tokenizer'}"
            )
    raise InputError(f"{said}, whatever the padding token; likely it was made with another text encoder, or of other texts")


def furthest(made: Tensor, reference: Tensor) -> float:
    """The largest distance of a token to the reference's, of that one's norm. Both: [V, T, D]."""
    return float(((made - reference).norm(dim=-1) / reference.norm(dim=-1)).max())


def whose(encoder: Encoder) -> str:
    """Which text encoder a prompt was made with, and what it is good for."""
    if encoder.is_toy:
        return f"{TOY} ({encoder.name}); the file fits the embedded model alone"
    return f"that of {encoder.name}"


def metadata(source: Source, *, model: str, text: str) -> dict[str, object]:
    """For the JSON beside the file."""
    return {
        "origin": "made from texts",
        "text": text,
        "texts": list(source.texts),
        "text_tokens": list(source.words or ()),
        "model": model,
        "toy_encoder": source.toy,
    }


def _other_paddings(encoder: Encoder) -> Sequence[str]:
    """Those of Stable Diffusion 2 ("!", number 0) and 1 (the end of a text), but for the tokenizer's own."""
    tokenizer = encoder.tokenizer
    return [t for t in (tokenizer.convert_ids_to_tokens(0), tokenizer.eos_token) if t != tokenizer.pad_token]
