"""Properties that hold for any input; hypothesis searches for counterexamples."""

import contextlib
import io
from dataclasses import replace
from itertools import cycle, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import torch
from hypothesis import Phase, assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from softprompt.data.samples import _unique_names
from softprompt.data.storage import ShardStore, key_of
from softprompt.errors import InputError
from softprompt.prompt.curriculum import learning_rate_factor, position_at
from softprompt.prompt.embeddings import load_prompt, save_prompt
from softprompt.prompt.soft_prompt import SoftPrompt, point_on_path
from tests.fuzz.mutations import YAML_WORDS, time_limit
from tests.fuzz.readers import prompt, put_state
from train.batches import object_at
from train.cli import option_kinds
from train.options.command_line import parse
from train.options.config import Config, to_yaml
from train.state.checkpoint import verify

settings.register_profile("fuzz", deadline=None, derandomize=True, max_examples=100, phases=[Phase.explicit, Phase.generate])
settings.load_profile("fuzz")


# ------------------------------------------------------------------------------------------------------------- options

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12) | st.sampled_from(
    "null ~ yes off true 1e5 1_000 0x1F .inf 12:30:45 2024-01-01 *a &a << {a} [a #no = - ? | > ! % @".split()
)


def is_null(value: Any) -> bool:
    """Whether a text is one of YAML's words for null, or a comment alone."""
    return isinstance(value, str) and (value.strip() in ("null", "Null", "NULL", "~") or value.lstrip().startswith("#"))


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Values for an option of this type, most of them valid."""
    if get_origin(kind) in (Union, UnionType):
        # What is null in YAML is null to the options' reader: no file of such a name can be given.
        return st.one_of([values(part).filter(lambda value: not is_null(value)) for part in get_args(kind)])
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if get_origin(kind) is list:
        numbers = get_args(kind)[0] in (int, float)
        return st.lists(values(get_args(kind)[0]), max_size=4, unique=numbers).map(lambda v: sorted(v) if numbers else v)
    return {
        type(None): st.none(),
        bool: st.booleans(),
        int: st.integers(0, 12) | st.integers(-(2**40), 2**40),
        float: st.floats(0, 1) | st.floats() | st.integers(0, 100).map(float),
        str: texts,
    }[kind]


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """The default configuration with random options changed."""
    config = Config()
    kinds = get_type_hints(Config)
    for name in draw(st.lists(st.sampled_from(sorted(option_kinds(Config))), max_size=12, unique=True)):
        group, _, inner = name.rpartition(".")
        kind = get_type_hints(kinds[group])[inner] if group else kinds[name]
        value = draw(values(kind))
        with contextlib.suppress(InputError):  # the others stay
            changed = replace(getattr(config, group), **{inner: value}) if group else value
            config = replace(config, **{group or name: changed})
    return config


@settings(max_examples=30)
@given(configs())
def test_a_configuration_comes_back_from_its_yaml(config: Config) -> None:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(to_yaml(config), encoding="utf-8")
        assert parse(["--config", str(file)]).config == config


def refusal_of(argv: list[str]) -> str | None:
    """The error message for a command line; None if it is accepted."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), time_limit():
            parse(argv)
    except InputError as error:
        return str(error)
    except SystemExit as end:
        assert end.code == 2
        return said.getvalue().removesuffix("\n")
    return None


@settings(max_examples=30)
@given(
    st.sampled_from(sorted(option_kinds(Config))),
    texts | st.floats().map(str) | st.integers().map(str) | st.sampled_from(YAML_WORDS) | st.lists(st.floats()).map(str),
)
@example("train.steps", "1000000000000")
@example("lora.train_from", ".inf")
@example("curriculum.at", "[0, .inf]")
@example("curriculum.at", "&a [*a]")
@example("lora.rank", "0x" + "F" * 6000)
@example("lora.targets", "[" * 3000)
@example("prompt.train_from", "1e999")
def test_any_value_of_an_option_is_taken_or_refused_by_name(name: str, value: str) -> None:
    said = refusal_of([f"--{name}={value}"])
    if said is not None:
        assert "\n" not in said and any(part in said for part in name.split(".")), said


def test_numbers_without_an_end_are_no_options() -> None:
    numbers = [name for name, kind in option_kinds(Config).items() if "a number" in kind.split(" or ")]
    for name, value in zip(numbers, cycle([".inf", "-.inf", ".nan"]), strict=False):
        assert name.rpartition(".")[2] in (refusal_of([f"--{name}={value}"]) or ""), name


# -------------------------------------------------------------------------------------------------------------- prompts


@settings(max_examples=40)
@given(
    st.integers(0, 2**31), st.floats(1e-2, 1e3), st.sampled_from([".pt", ".safetensors"]), st.integers(2, 7), st.integers(1, 9)
)
def test_a_saved_prompt_comes_back(seed: int, scale: float, suffix: str, views: int, width: int) -> None:
    original = torch.randn(views, 77, width, generator=torch.Generator().manual_seed(seed)) * scale
    with TemporaryDirectory() as folder:
        save_prompt(original, Path(folder) / f"p{suffix}")
        found = load_prompt(Path(folder) / f"p{suffix}", num_views=views, width=width)
    assert torch.equal(found, original.half().float() if suffix == ".pt" else original)


waypoints = st.integers(1, 4).map(lambda count: torch.stack([prompt(seed, 3) for seed in range(count)]))


@given(waypoints, st.floats(0, 1), st.sampled_from(["lerp", "slerp"]))
def test_the_path_goes_through_its_waypoints(points: Tensor, share: float, interpolation: Any) -> None:
    last = len(points) - 1
    for i, point in enumerate(points):
        assert torch.equal(point_on_path(points, i, interpolation), point)
    position = share * last
    floor, part = int(position), position - int(position)
    found = point_on_path(points, position, interpolation)
    assert found.isfinite().all()
    if interpolation == "lerp" and part:
        torch.testing.assert_close(found, points[floor] + part * (points[floor + 1] - points[floor]), atol=1e-5, rtol=1e-5)


@given(waypoints, st.floats(0, 1), st.sampled_from(["keep", "fade"]), st.sampled_from(["lerp", "slerp"]), st.integers(9, 99))
def test_a_prompt_that_begins_at_an_embedding_is_that_embedding(
    points: Tensor, where: float, carry: Any, interpolation: Any, seed: int
) -> None:
    soft = SoftPrompt(points, carry=carry, interpolation=interpolation)
    position = where * soft.last_position
    share = soft.share(position)
    if share == 0:
        with pytest.raises(ValueError, match="nothing of P is in E"):
            soft.begin_at(prompt(seed, 3), position)
        return
    assume(share > 1e-3)  # what is divided by it and multiplied again loses its last digits
    soft.begin_at(prompt(seed, 3), position)
    torch.testing.assert_close(soft(position), prompt(seed, 3), atol=1e-5 / share, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------ schedules


@given(st.data(), st.sampled_from(["constant", "linear", "cosine"]))
def test_the_share_of_a_learning_rate_is_in_its_window_and_range(data: st.DataObject, schedule: Any) -> None:
    first = data.draw(st.integers(0, 50))
    end = data.draw(st.integers(first + 1, 120))
    warmup = data.draw(st.integers(0, 60))
    factors = [learning_rate_factor(step, first=first, end=end, warmup=warmup, schedule=schedule) for step in range(130)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert not any(factors[:first]) and not any(factors[end:])
    inside = factors[first:end]
    assert inside[:warmup] == sorted(inside[:warmup]) and inside[warmup:] == sorted(inside[warmup:], reverse=True)
    assert warmup >= len(inside) or inside[warmup] == 1


@given(st.data(), st.sampled_from(["linear", "cosine", "step"]), st.booleans())
def test_positions_are_met_at_their_points_and_stay_between_them(data: st.DataObject, easing: Any, rising: bool) -> None:
    at = sorted(data.draw(st.sets(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=5)))
    positions = data.draw(st.lists(st.floats(0, 9), min_size=len(at), max_size=len(at)))
    positions = sorted(positions) if rising else positions
    for when, position in zip(at, positions, strict=True):
        assert position_at(when, at, positions, easing) == position
    steps = sorted(data.draw(st.lists(st.floats(0, 2e6), max_size=20)))
    found = [position_at(step, at, positions, easing) for step in steps]
    assert all(min(positions) - 1e-9 <= s <= max(positions) + 1e-9 for s in found)
    if rising:
        assert all(a <= b + 1e-9 for a, b in pairwise(found))


# ----------------------------------------------------------------------------------------------------------------- data


@given(st.integers(1, 40), st.integers(0, 5), st.integers(0, 2**31))
def test_each_epoch_is_a_permutation_of_the_objects(count: int, epoch: int, seed: int) -> None:
    order = [object_at(epoch * count + place, count, seed) for place in range(count)]
    assert sorted(order) == list(range(count))


folders = st.lists(st.sampled_from(["a", "b", "a.b", "mouse", " ", "é", "a__b"]), min_size=1, max_size=4).map("/".join)


@given(st.lists(folders.map("/".__add__), min_size=1, max_size=12, unique=True))
def test_names_of_samples_are_unique_ends_of_their_places(locations: list[str]) -> None:
    with time_limit():
        names = _unique_names(locations)
    assert len(set(names)) == len(names)
    assert all(f"/{location}".endswith(name) for location, name in zip(locations, names, strict=True))


@settings(max_examples=60)
@given(
    st.data(), st.lists(st.integers(0, 30), min_size=1, max_size=12, unique=True), st.sampled_from([torch.float32, torch.int64])
)
def test_rows_come_back_however_they_were_written(data: st.DataObject, numbers: list[int], dtype: torch.dtype) -> None:
    rows = {n: torch.arange(n, n + 6).reshape(2, 3).to(dtype) for n in numbers}
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(numbers) - 1)), max_size=3)))
    parts = [numbers[a:b] for a, b in pairwise([0, *cuts, len(numbers)]) if numbers[a:b]]
    with TemporaryDirectory() as folder:
        writer = ShardStore(Path(folder))
        for part in parts:
            writer.write([key_of(n) for n in part], {"x": torch.stack([rows[n] for n in part]), "n": torch.tensor(part)})
        wanted = data.draw(st.lists(st.sampled_from(numbers), min_size=1, max_size=20))
        for store in (writer, ShardStore(Path(folder))):
            found = store.read([key_of(n) for n in wanted])
            assert found is not None and found["n"].tolist() == wanted
            assert torch.equal(found["x"], torch.stack([rows[n] for n in wanted])) and found["x"].dtype == dtype
            assert store.read([key_of(n) for n in [*wanted, 31]]) is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(), st.lists, max_leaves=9
)


@settings(max_examples=60)
@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_progress_comes_back_from_the_manifest_of_a_checkpoint(progress: dict[str, Any]) -> None:
    with TemporaryDirectory() as folder:
        put_state(Path(folder), b"state", progress)
        assert verify(Path(folder)) == progress
