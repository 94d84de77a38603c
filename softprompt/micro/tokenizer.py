"""The micro model's CLIP tokenizer: words of the prompt templates are one token each, other ASCII text is spelled."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

from softprompt.files import write_json

WORDS = """
    a an the of in on at to by from with and above below level angle high low camera elevated multi view views image
    picture photo photograph rendering render rendered model models color colour map front back left right side top
    bottom mouse mice rat cat cats dog head heads face person animal fur tail ear ears eye eyes nose small white black
    gray grey brown light dark
""".split()
"""Words that are single tokens; 3d is two, since CLIP takes digits one by one."""

START, END, PAD = "<|startoftext|>", "<|endoftext|>", "!"
_END_OF_WORD = "</w>"
_LENGTH = 77


def write_tokenizer(folder: Path, tokens: int = 0) -> None:
    """Write the files of a `tokenizer` folder, as Stable Diffusion 2.x has them. tokens: at least, padded with unused ones."""
    merges = learn_merges(WORDS)
    characters = [chr(code) for code in range(ord("!"), ord("~") + 1)]  # so that PAD has id 0
    names = characters + [c + _END_OF_WORD for c in characters] + [a + b for a, b in merges] + [START, END]
    names += [f"<unused_{number}>" for number in range(len(names), tokens)]
    ids = {token: i for i, token in enumerate(names)}
    write_json(folder / "vocab.json", ids)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    specials = {
        "bos_token": _special(START, normalized=True),
        "eos_token": _special(END, normalized=True),
        "pad_token": PAD,
        "unk_token": _special(END, normalized=True),
    }
    write_json(folder / "special_tokens_map.json", specials)
    added = {ids[PAD]: (PAD, False), ids[START]: (START, True), ids[END]: (END, True)}
    write_json(
        folder / "tokenizer_config.json",
        {
            "added_tokens_decoder": {str(i): _special(t, normalized=n) | {"special": True} for i, (t, n) in added.items()},
            "bos_token": START,
            "clean_up_tokenization_spaces": False,
            "eos_token": END,
            "errors": "replace",
            "model_max_length": _LENGTH,
            "pad_token": PAD,
            "tokenizer_class": "CLIPTokenizer",
            "unk_token": END,
        },
    )


def _special(token: str, *, normalized: bool) -> dict[str, str | bool]:
    return {"content": token, "lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges after which each of the words is one token: the commonest pair first, ties by alphabet.

    Source: Sennrich et al. 1508.07909, algorithm 1, run to the end.
    """
    spelled = [[*word[:-1], word[-1] + _END_OF_WORD] for word in sorted(set(words))]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for symbols in spelled for pair in pairwise(symbols)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = [_merge(symbols, best) for symbols in spelled]
    return merges


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged
