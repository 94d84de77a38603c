"""Thousands of damaged files: each gives a right result or an error of one line, quickly and with little memory."""

import io
import traceback
from contextlib import redirect_stderr
from pathlib import Path
from random import Random

import pytest

from tests.fuzz.mutations import MEGABYTES, peak_megabytes, time_limit
from tests.fuzz.readers import READERS, REPOSITORY, Reader


def put(reader: Reader, content: bytes) -> None:
    reader.file.write_bytes(content) if reader.write is None else reader.write(content)


def wrong_with(reader: Reader, content: bytes) -> str | None:
    """What is wrong with a reader's answer to a file; None if nothing is."""
    put(reader, content)
    said = io.StringIO()
    try:
        with time_limit(), redirect_stderr(said):
            reader.read()
    except reader.refuses as error:
        line = said.getvalue().removesuffix("\n") if isinstance(error, SystemExit) else str(error)
        return None if line and line.isprintable() else f"is not one line: {line!r}"
    except BaseException as error:  # whatever it is, it is what is looked for
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
        ours = [f for f in frames if f.filename.startswith(str(REPOSITORY))]
        return f"{type(error).__name__}: {str(error)[:300]!r} at {Path(ours[-1].filename).name}:{ours[-1].lineno}"
    return None


@pytest.mark.parametrize("name", READERS)
def test_a_spoiled_file_gives_a_right_result_or_one_line(name: str, tmp_path: Path) -> None:
    make, count = READERS[name]
    reader, tried, failures = make(tmp_path), set(), []
    for sound in reader.sound:  # else what is spoiled might be refused for another reason
        put(reader, sound)
        reader.read()
    before = peak_megabytes()
    for number in range(20 * count):  # some mutations change nothing, or what another one has
        rng = Random(f"{name} {number}")
        sound = reader.sound[number % len(reader.sound)]
        mutate = rng.choice(reader.mutators)
        content = mutate(sound, rng)
        if content == sound or content in tried:
            continue
        tried.add(content)
        if wrong := wrong_with(reader, content):
            failures.append(f"{number} {mutate.__name__}: {wrong}")
        if len(tried) == count:
            break
    assert not failures, f"{len(failures)} of {len(tried)}:\n" + "\n".join(failures[:20])
    assert len(tried) == count
    assert peak_megabytes() - before < MEGABYTES


def test_five_thousand_spoiled_files_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    total = sum(count for _, count in READERS.values())
    with capsys.disabled():
        print(f"\n{total} spoiled files: {', '.join(f'{count} {name}' for name, (_, count) in READERS.items())}")
    assert total >= 5000
