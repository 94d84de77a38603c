"""Ways to damage a file, each a function of its bytes and a random generator; and limits on the time and memory of a reader."""

import json
import math
import re
import resource
import signal
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from random import Random
from types import FrameType
from typing import Any

from tests.pictures import png_chunk

Mutator = Callable[[bytes, Random], bytes]
SECONDS = 5
"""The longest that a reader may take for one file."""
MEGABYTES = 400
"""The most by which a reader may raise the peak memory of the process, over all its files."""


# ------------------------------------------------------------------------------------------------------------- any bytes


def flip_bits(content: bytes, rng: Random) -> bytes:
    spoiled = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        if spoiled:
            spoiled[rng.randrange(len(spoiled))] ^= 1 << rng.randrange(8)
    return bytes(spoiled)


def truncate(content: bytes, rng: Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def cut_the_start_off(content: bytes, rng: Random) -> bytes:
    return content[rng.randrange(len(content) + 1) :]


def _slice(content: bytes, rng: Random) -> tuple[int, int]:
    start = rng.randrange(len(content) + 1)
    return start, min(len(content), start + rng.choice([1, 4, 16, 64, 512]))


def duplicate_a_slice(content: bytes, rng: Random) -> bytes:
    start, end = _slice(content, rng)
    return content[:end] + content[start:end] * rng.choice([1, 2, 20]) + content[end:]


def copy_a_slice_over_another(content: bytes, rng: Random) -> bytes:
    start, end = _slice(content, rng)
    target = rng.randrange(len(content) + 1)
    return (content[:target] + content[start:end] + content[target + end - start :])[: len(content)]


def insert_bytes(content: bytes, rng: Random) -> bytes:
    place = rng.randrange(len(content) + 1)
    return content[:place] + rng.randbytes(rng.choice([1, 3, 16, 200])) + content[place:]


def zero_a_range(content: bytes, rng: Random) -> bytes:
    start, end = _slice(content, rng)
    return content[:start] + bytes(end - start) + content[end:]


def swap_bytes_of_the_header(content: bytes, rng: Random) -> bytes:
    spoiled = bytearray(content)
    if len(spoiled) > 1:
        a, b = (rng.randrange(min(64, len(spoiled))) for _ in range(2))
        spoiled[a], spoiled[b] = spoiled[b], spoiled[a]
    return bytes(spoiled)


def claim_a_huge_size(content: bytes, rng: Random) -> bytes:
    """Replace 4 or 8 bytes near the start or the end, where headers are, with a size of gigabytes."""
    size = struct.pack(
        rng.choice("<>") + rng.choice("IQ"), rng.choice([2**31 - 1, 2**31, 2**32 - 1, 10**9, 3 * 10**9])
    )  # what a program in a hurry would allocate
    near = rng.randrange(min(200, len(content)) + 1)
    place = near if rng.random() < 0.7 else max(0, len(content) - near)
    return (content[:place] + size + content[place + len(size) :])[: max(len(content), len(size))]


def splice(other: bytes) -> Mutator:
    """Join the start of the file and the end of another."""

    def spliced(content: bytes, rng: Random) -> bytes:
        return content[: rng.randrange(len(content) + 1)] + other[rng.randrange(len(other) + 1) :]

    return spliced


def empty(content: bytes, rng: Random) -> bytes:
    del content, rng
    return b""


BYTES: tuple[Mutator, ...] = (
    flip_bits,
    flip_bits,
    truncate,
    cut_the_start_off,
    duplicate_a_slice,
    copy_a_slice_over_another,
    insert_bytes,
    zero_a_range,
    swap_bytes_of_the_header,
    claim_a_huge_size,
)


# ------------------------------------------------------------------------------------------------------------------ texts


def other_encoding(content: bytes, rng: Random) -> bytes:
    text = content.decode("utf-8", "replace")
    return rng.choice(
        [
            b"\xef\xbb\xbf" + content,
            text.encode("utf-16"),
            text.encode("utf-32-le"),
            ("ä" + text + "é").encode("latin-1", "replace"),
            content.replace(b"\n", b"\r\n"),
            content.replace(b"\n", b"\r"),
            content.replace(b" ", b"\t"),
            content + "\u2028\u0085\x0b\x0c".encode(),
        ]
    )


def put_a_nul(content: bytes, rng: Random) -> bytes:
    place = rng.randrange(len(content) + 1)
    return content[:place] + rng.choice([b"\0", b"\x1b[2J", b"\x7f", b"\xed\xa0\x80", b"\xff\xfe"]) + content[place:]


def replace_a_word(words: Sequence[str]) -> Mutator:
    """Replace a word or number with one of `words`."""

    def replaced(content: bytes, rng: Random) -> bytes:
        found = list(re.finditer(rb"[\w.\-]+", content))
        if not found:
            return rng.choice(words).encode()
        word = rng.choice(found)
        return content[: word.start()] + rng.choice(words).encode() + content[word.end() :]

    return replaced


def swap_lines(content: bytes, rng: Random) -> bytes:
    lines = content.splitlines(keepends=True)
    rng.shuffle(lines)
    return b"".join(lines)


def repeat_a_line(content: bytes, rng: Random) -> bytes:
    lines = content.splitlines(keepends=True) or [b"\n"]
    place = rng.randrange(len(lines))
    return b"".join(lines[: place + 1] + [lines[place]] * rng.choice([1, 3]) + lines[place + 1 :])


TEXT: tuple[Mutator, ...] = (other_encoding, put_a_nul, swap_lines, repeat_a_line)

YAML_WORDS = (
    "{a: *a} yes no on off ~ .nan .inf -.inf 1e999 0x1F 0o17 0b1 1_000 2024-02-30 2024-01-01 2024-01-01T25:00:00Z 12:30:45 "
    "!!python/object/apply:os.system !!python/name:os.system !!binary !!timestamp !!int !!float !!bool !!set !!omap !!null & "
    "* &a *a &a_[*a] << {} [] [[]] {{}} ? : - | > ' \" % @ ` # --- ... null true -1 0 99999999999999999999999"
).split()
YAML_WORDS += [
    "9" * 5000,
    "0x" + "F" * 5000,
    "[" * 3000,
    "{a: " * 500,
    "!!int ''",
    "!!timestamp x",
    "!!bool x",
    "!!float x",
    "&a [*a]",
    "{? [a] : b}",
]

JSON_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**30, 0.5, -0.5, 1e308, math.nan, math.inf, "", "x", "\u2028\n", "../../x",
    [], [0], [None], ["x"], [[]], {}, {"x": 1}, {"": None}, [10**12], [1] * 50,
)  # fmt: skip


def deep_nesting(content: bytes, rng: Random) -> bytes:
    depth = rng.choice([100, 990, 5000, 100_000])
    opened, closed = rng.choice([(b"[", b"]"), (b'{"a":', b"}")])
    nested = opened * depth + (b"1" + closed * depth if rng.random() < 0.5 else b"")
    place = content.find(b":") + 1
    return nested if rng.random() < 0.5 else content[:place] + nested + content[place:]


def change_json(content: bytes, rng: Random) -> bytes:
    """Change, remove or rename a value anywhere in a JSON document."""
    text = content.decode("utf-8", "replace")
    try:
        return json.dumps(changed(json.loads(text), rng)).encode()
    except ValueError:
        return content


def changed(value: Any, rng: Random) -> Any:
    """A copy of a value with one change in it."""
    inside = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not inside or rng.random() < 0.05:
        return rng.choice(JSON_VALUES)
    key, copy = rng.choice(inside), value.copy()
    fate = rng.random()
    if fate < 0.15:
        del copy[key]
    elif fate < 0.25 and isinstance(copy, dict):
        copy[rng.choice(["x", "", "../x", "_class_name", "__init__"])] = copy.pop(key)
    else:
        copy[key] = changed(copy[key], rng)
    return copy


JSON: tuple[Mutator, ...] = (*BYTES, *TEXT, deep_nesting, *[change_json] * 12)
YAML: tuple[Mutator, ...] = (*BYTES, *TEXT, deep_nesting, *[replace_a_word(YAML_WORDS)] * 12, empty)


# ------------------------------------------------------------------------------------------------- formats with a header


def change_safetensors_header(content: bytes, rng: Random) -> bytes:
    """Change a tensor's name, dtype, shape or offsets; the header's length is adjusted."""
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(changed(json.loads(content[8 : 8 + length]), rng)).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def rename_safetensors_parts(content: bytes, rng: Random) -> bytes:
    """Swap the dtypes, shapes or offsets of two tensors."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    a, b = rng.choice(names), rng.choice(names)
    part = rng.choice(["dtype", "shape", "data_offsets"])
    header[a][part], header[b][part] = header[b][part], header[a][part]
    if rng.random() < 0.3:
        header[a]["dtype"] = rng.choice(["F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "U64", "C64", "F4"])
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


SAFETENSORS: tuple[Mutator, ...] = (*BYTES, *[change_safetensors_header] * 4, *[rename_safetensors_parts] * 3)


def change_png_chunk(content: bytes, rng: Random) -> bytes:
    """Damage, remove or repeat one chunk and correct its checksum, so that decoders accept it."""
    chunks, place = [], 8
    while place + 12 <= len(content):
        length = int.from_bytes(content[place : place + 4], "big")
        chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + length]))
        place += 12 + length
    chosen = rng.randrange(len(chunks))
    kind, body = chunks[chosen]
    fate = rng.random()
    if fate < 0.1:
        del chunks[chosen]
    elif fate < 0.2:
        chunks.insert(rng.randrange(len(chunks)), (kind, body))
    elif fate < 0.5:
        kind = rng.choice(
            [b"tRNS", b"PLTE", b"gAMA", b"zTXt", b"iTXt", b"iCCP", b"acTL", b"fcTL", b"fdAT", b"pHYs", b"eXIf", b"cHRM"]
        )
        chunks.insert(rng.randrange(1, len(chunks) + 1), (kind, rng.randbytes(rng.choice([0, 1, 3, 4, 8, 26, 64]))))
    elif kind == b"IHDR" and fate < 0.8:
        width, height = (rng.choice([0, 1, 7, 64, 5000, 2**31 - 1, 2**32 - 1]) for _ in range(2))
        depth, colour = rng.choice([0, 1, 2, 4, 8, 16, 32]), rng.choice([0, 2, 3, 4, 6, 7])
        chunks[chosen] = (kind, struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, rng.choice([0, 1])))
    else:
        chunks[chosen] = (kind, rng.choice(BYTES)(body, rng))
    return content[:8] + b"".join(png_chunk(kind, body) for kind, body in chunks)


PNG: tuple[Mutator, ...] = (*BYTES, *[change_png_chunk] * 12)


# --------------------------------------------------------------------------------------------------------------- watching


class TooSlow(BaseException):
    """A BaseException, so that no reader catches it."""


@contextmanager
def time_limit(seconds: float = SECONDS) -> Iterator[None]:
    """Raise TooSlow in the block after so many seconds of this process's CPU time, whatever else the machine does."""

    def end(number: int, frame: FrameType | None) -> None:
        raise TooSlow(f"more than {seconds} s")

    before = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def peak_megabytes() -> float:
    """The peak memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
