"""View prompts in and out of files, refused, encoded and described."""

import io
import itertools
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from softprompt.errors import InputError
from softprompt.micro import MICRO_MODEL
from softprompt.model.loading import load_text_encoder
from softprompt.prompt.embeddings import check_prompt, describe_prompt, load_prompt, save_prompt
from softprompt.prompt.encoding import encode_texts, load_waypoints
from softprompt.prompt.similarity import closest_pair, mean_pairwise_cosine, prompt_cosines
from softprompt.prompt.templates import view_texts


def some_prompt(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape or (6, 77, 16), generator=torch.Generator().manual_seed(seed))


def spoilt(change: Callable[[Tensor], Any]) -> Tensor:
    prompt = some_prompt()
    change(prompt)
    return prompt


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


# ----------------------------------------------------------------------------------------------------------- cosines


def test_prompt_cosines_match_a_loop():
    prompt = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    cosines = prompt_cosines(prompt)
    assert cosines.shape == (6, 6) and cosines.dtype == torch.float32 and not cosines.requires_grad
    pairs = []
    for i, j in itertools.product(range(6), repeat=2):
        a, b = prompt[i].detach().flatten(), prompt[j].detach().flatten()
        expected = float((a * b).sum() / (a.norm() * b.norm()))
        assert float(cosines[i, j]) == pytest.approx(expected, abs=1e-5)
        if i != j:
            pairs.append(expected)
    assert mean_pairwise_cosine(prompt) == pytest.approx(sum(pairs) / 30, abs=1e-5)


def test_closest_pair_names_the_two_views_most_alike():
    prompt = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
    prompt[1] = 2 * prompt[3] + 0.01 * prompt[0]
    first, second, cosine = closest_pair(prompt, ("front", "right", "back", "left"))
    assert (first, second) == ("right", "left")
    assert cosine == pytest.approx(1, abs=1e-3) and cosine < 1


def test_one_prompt_for_all_views_has_cosine_one():
    prompt = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0)).expand(6, -1, -1).half()
    assert mean_pairwise_cosine(prompt) == pytest.approx(1)
    assert closest_pair(prompt, [*"abcdef"]) == ("a", "b", pytest.approx(1))


# ----------------------------------------------------------------------------------------------------------- loading


def test_facelift_s_prompt_is_read_and_its_closest_views_are_known(facelift: Path):
    path = facelift / "clr_embeds.pt"
    prompt = load_prompt(path, width=1024)
    assert prompt.shape == (6, 77, 1024) and prompt.dtype == torch.float32
    assert torch.equal(prompt, torch.load(path, weights_only=True).float())
    described = describe_prompt(prompt)
    assert described["closest_views"][:2] == ["front_right", "front_left"]
    assert described["closest_views"][2] == pytest.approx(0.995, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_any_floating_type_becomes_float32(tmp_path: Path, dtype: torch.dtype, suffix: str):
    prompt, path = some_prompt().to(dtype), tmp_path / f"p{suffix}"
    save_file({"whatever": prompt}, path) if suffix == ".safetensors" else torch.save(prompt, path)
    found = load_prompt(path)
    assert found.dtype == torch.float32 and torch.equal(found, prompt.float())


def test_the_number_of_views_and_the_width_are_the_caller_s(tmp_path: Path):
    path = saved(some_prompt(4, 77, 8), tmp_path / "p.pt")
    assert load_prompt(path, num_views=4, width=8).shape == (4, 77, 8)
    with pytest.raises(InputError, match=r"has 4 views .*; the model has 6"):
        load_prompt(path)


BAD_PROMPTS = {
    "768 wide": (
        some_prompt(6, 77, 768),
        r"is 768 wide .*takes 16\. Likely it was made with another text encoder, CLIP ViT-L/14",
    ),
    "2 wide": (some_prompt(6, 77, 2), r"is 2 wide .*takes 16\. Likely it was made with another text encoder; encode"),
    "five views": (some_prompt(5, 77, 16), r"has 5 views \(\[5, 77, 16\] float32\); the model has 6"),
    "76 tokens": (some_prompt(6, 76, 16), r"has 76 tokens a view .*; expected 77: encode with padding='max_length'"),
    "one view": (some_prompt(77, 16), r"holds a tensor \[77, 16\] float32; expected floating-point \[6, 77, 16\]"),
    "integers": (some_prompt().long(), r"holds a tensor \[6, 77, 16\] int64; expected floating-point"),
    "NaN": (spoilt(lambda p: p[2, 5, 3].fill_(torch.nan)), r"NaN or infinite values in view right;"),
    "infinite": (spoilt(lambda p: p[0, 5, 3].fill_(-torch.inf)), r"NaN or infinite values in view front;"),
    "all zero": (torch.zeros(6, 77, 16), r"all zero in view front, front_right, .*placeholder"),
    "one view zero": (spoilt(lambda p: p[3].zero_()), r"all zero in view back; the file is a placeholder"),
    "two views identical": (spoilt(lambda p: p[5].copy_(p[1])), r"views front_right and front_left are identical"),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_a_tensor_that_is_no_prompt_is_refused(tmp_path: Path, name: str, suffix: str):
    content, message = BAD_PROMPTS[name]
    path = tmp_path / f"p{suffix}"
    save_file({"p": content}, path) if suffix == ".safetensors" else torch.save(content, path)
    with pytest.raises(InputError, match=message) as refused:
        load_prompt(path, width=16)
    assert str(refused.value).startswith(f"{path}: ") and "\n" not in str(refused.value)


def test_the_prompt_of_the_wrong_clip_is_refused_with_the_cause(facelift: Path):
    with pytest.raises(ValueError, match=r"mouse_prompt_embeds_768\.pt: is 768 wide .* takes 1024\. Likely .*CLIP ViT-L/14"):
        load_prompt(facelift / "mouse_prompt_embeds_768.pt", width=1024)


class Hostile:
    """Pickled, it touches a file when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def whole_file(prompt: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(prompt, buffer)
    return buffer.getvalue()


BAD_FILES = {
    "a string": (whole_file("a cat"), r"holds a str; expected one bare tensor \[6, 77, D\]"),
    "a list": (pickle.dumps([1, 2], protocol=2), r"p\.pt: (is no plain tensor file|cannot be read|holds a list)"),
    "a state": (
        whole_file({"prompt": some_prompt()}),
        r"holds a dict with 'prompt' \[6, 77, 16\] float32; expected one bare tensor",
    ),
    "an object": (whole_file(Path("x")), r"is no plain tensor file \(it holds pickled objects other than tensors"),
    "cut short": (whole_file(some_prompt())[:9000], r"p\.pt: cannot be read as a prompt file"),
    "empty": (b"", r"p\.pt: cannot be read as a prompt file"),
    "no torch file": (b"\x89PNG\r\n\x1a\n" + bytes(100), r"p\.pt: (is no plain tensor file|cannot be read)"),
    "text": (b"hello world", r"p\.pt: (is no plain tensor file|cannot be read)"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_holds_no_tensor_is_refused(tmp_path: Path, name: str):
    content, message = BAD_FILES[name]
    (tmp_path / "p.pt").write_bytes(content)
    with pytest.raises(InputError, match=message) as refused:
        load_prompt(tmp_path / "p.pt")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", r"cannot be read"), (b"hello world, this is no header", r"cannot be read"), (None, r"holds a dict with keys a, b")],
)
def test_a_safetensors_file_that_holds_no_single_tensor_is_refused(tmp_path: Path, content: bytes | None, message: str):
    path = tmp_path / "p.safetensors"
    save_file({"a": some_prompt(), "b": some_prompt()}, path) if content is None else path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_prompt(path)


def plain_pickle(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


def unsafe_load(path: Path) -> None:
    torch.load(path, weights_only=False)


@pytest.mark.parametrize(("save", "read"), [(torch.save, unsafe_load), (plain_pickle, lambda p: pickle.loads(p.read_bytes()))])
def test_code_in_a_hostile_pickle_is_not_run(tmp_path: Path, save: Callable[[Any, Path], None], read: Callable[[Path], Any]):
    marker, path = tmp_path / "ran", tmp_path / "p.pt"
    save(Hostile(marker), path)
    with pytest.raises(InputError, match=r"p\.pt: is no plain tensor file"):
        load_prompt(path)
    assert not marker.exists()
    read(path)
    assert marker.exists(), "the trap does not work, so this test shows nothing"


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_a_parameter_is_read_without_its_gradient_and_without_a_word(tmp_path: Path, suffix: str):
    path = saved(torch.nn.Parameter(some_prompt()), tmp_path / f"p{suffix}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompt = load_prompt(path)
        describe_prompt(prompt)
    assert torch.equal(prompt, some_prompt()) and not prompt.requires_grad and type(prompt) is Tensor


def test_a_prompt_of_another_program_is_refused_with_the_command_that_converts_it(tmp_path: Path):
    path = saved({"prompt_embeds": some_prompt()}, tmp_path / "my p.pt")
    with pytest.raises(InputError) as refused:
        load_prompt(path, width=16)
    found, _, command = str(refused.value).partition("; convert it with: ")
    assert found == (
        f"{path}: holds a dict with 'prompt_embeds' [6, 77, 16] float32; expected one bare tensor [6, 77, 16]; likely another "
        f"program wrote it"
    )
    assert command == f"python -m train.prompts convert '{path}' '{tmp_path / 'my p_converted.pt'}'"


def test_of_a_foreign_prompt_that_does_not_fit_the_cause_comes_first(tmp_path: Path):
    path = saved({"prompt_embeds": some_prompt(6, 77, 768)}, tmp_path / "p.pt")
    with pytest.raises(InputError, match=r"is 768 wide .*takes 16\. .*own: python -m train\.prompts make --text TEXT --model"):
        load_prompt(path, width=16)


@pytest.mark.parametrize("name", ["nowhere.pt", "nowhere.safetensors", "folder.pt"])
def test_a_missing_file_is_never_replaced_by_zeros(tmp_path: Path, name: str):
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(InputError, match=rf"{name}: no such prompt file; expected a \.pt or \.safetensors file"):
        load_prompt(tmp_path / name)


# ------------------------------------------------------------------------------------------------------------ saving


def test_a_saved_prompt_is_what_facelift_loads(tmp_path: Path):
    prompt = 30 * some_prompt().requires_grad_()
    sidecar = save_prompt(prompt, tmp_path / "new" / "clr_embeds.pt", metadata={"steps": 12})
    stored = torch.load(tmp_path / "new" / "clr_embeds.pt", weights_only=True)
    assert type(stored) is Tensor and stored.dtype == torch.float16 and not stored.requires_grad
    assert torch.equal(stored, prompt.detach().half())
    assert torch.equal(load_prompt(tmp_path / "new" / "clr_embeds.pt"), stored.float())
    assert sidecar == tmp_path / "new" / "clr_embeds.json"
    assert sorted(p.name for p in sidecar.parent.iterdir()) == ["clr_embeds.json", "clr_embeds.pt"]


def test_one_view_s_storage_does_not_carry_a_larger_tensor_along(tmp_path: Path):
    save_prompt(some_prompt(12, 77, 16)[::2].half().float(), tmp_path / "p.pt")
    assert (tmp_path / "p.pt").stat().st_size < 6 * 77 * 16 * 2 + 3000


def test_safetensors_keep_float32(tmp_path: Path):
    save_prompt(some_prompt(), tmp_path / "p.safetensors")
    assert load_file(tmp_path / "p.safetensors").keys() == {"prompt"}
    assert torch.equal(load_prompt(tmp_path / "p.safetensors"), some_prompt())


def test_the_json_beside_it_says_what_it_is(tmp_path: Path):
    prompt = 30 * some_prompt()
    described = json.loads(save_prompt(prompt, tmp_path / "p.pt", metadata={"steps": 12, "origin": "a run"}).read_text())
    assert described["file"] == "p.pt" and described["steps"] == 12 and described["origin"] == "a run"
    assert described["shape"] == [6, 77, 16] and described["dtype"] == "float16"
    assert described["views"] == ["front", "front_right", "right", "back", "left", "front_left"]
    norms = prompt.norm(dim=-1)
    expected = {"first": float(norms[:, 0].mean()), "others": float(norms[:, 1:].mean()), "max": float(norms.max())}
    assert described["token_norms"] == pytest.approx(expected, abs=1e-4)
    for row, expected_row in zip(described["view_cosines"], prompt_cosines(prompt).tolist(), strict=True):
        assert row == pytest.approx(expected_row, abs=1e-5)
    assert described["mean_view_cosine"] == pytest.approx(mean_pairwise_cosine(prompt), abs=1e-5)
    error = (prompt.half().float() - prompt).abs()
    assert 0 < described["rounding_error"]["max"] == pytest.approx(float(error.max()))
    assert described["rounding_error"]["mean"] == pytest.approx(float(error.mean()))


def test_an_earlier_prompt_is_replaced_whole(tmp_path: Path):
    path = tmp_path / "p.pt"
    save_prompt(some_prompt(6, 77, 64), path, metadata={"old": True})
    save_prompt(some_prompt(seed=1), path)
    assert torch.equal(load_prompt(path), some_prompt(seed=1).half().float())
    assert "old" not in json.loads((tmp_path / "p.json").read_text())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.json", "p.pt"]


def overflowing() -> Tensor:
    return spoilt(lambda p: p[1, 2, 3].fill_(1e5))


def merging() -> Tensor:
    """Two views that float16 cannot tell apart."""
    prompt = some_prompt().half().float()
    prompt[4] = prompt[2] * (1 + 1e-6)
    return prompt


@pytest.mark.parametrize(
    ("prompt", "name", "message"),
    [
        (
            spoilt(lambda p: p[0, 0].fill_(torch.nan)),
            "p.pt",
            r"prompt to be saved as .*p\.pt: NaN or infinite values in view front",
        ),
        (some_prompt(6, 76, 16), "p.pt", r"has 76 tokens"),
        (overflowing(), "p.pt", r"prompt rounded to float16 for .*: NaN or infinite values in view front_right"),
        (merging(), "p.pt", r"prompt rounded to float16 for .*: views right and left are identical"),
        (some_prompt(), "p.bin", r"p\.bin: a prompt is saved as \.pt \(FaceLift's float16\) or \.safetensors \(float32\)"),
    ],
)
def test_what_cannot_be_saved_leaves_the_folder_as_it_was(tmp_path: Path, prompt: Tensor, name: str, message: str):
    save_prompt(some_prompt(), tmp_path / "p.pt")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(InputError, match=message):
        save_prompt(prompt, tmp_path / name)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_metadata_that_is_no_json_leaves_the_folder_as_it_was(tmp_path: Path):
    with pytest.raises(TypeError, match=r"not JSON serializable"):
        save_prompt(some_prompt(), tmp_path / "p.pt", metadata={"tensor": torch.ones(1)})
    assert not list(tmp_path.iterdir())


def test_float32_has_room_for_what_float16_has_not(tmp_path: Path):
    save_prompt(overflowing(), tmp_path / "p.safetensors")
    assert torch.equal(load_prompt(tmp_path / "p.safetensors"), overflowing())


def test_check_prompt_gives_back_a_good_prompt_in_float32():
    assert torch.equal(check_prompt(some_prompt().half(), width=16), some_prompt().half().float())


# ---------------------------------------------------------------------------------------------------------- encoding


def test_texts_are_padded_to_77_tokens_and_the_first_output_is_taken():
    tokenizer, text_encoder = load_text_encoder(MICRO_MODEL)
    texts = view_texts("facelift")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompt = encode_texts(texts, tokenizer, text_encoder)
    assert prompt.shape == (6, 77, 1024) and prompt.dtype == torch.float32 and not prompt.requires_grad
    for text, found in zip(texts, prompt, strict=True):
        ids = tokenizer(text).input_ids
        ids = torch.tensor([ids + [tokenizer.pad_token_id] * (77 - len(ids))])
        with torch.no_grad():
            torch.testing.assert_close(found, text_encoder(ids).last_hidden_state[0], atol=1e-4, rtol=1e-4)


def test_a_text_that_is_too_long_is_cut_with_a_warning():
    encoders = load_text_encoder(MICRO_MODEL)
    long = "mouse " * 90
    with pytest.warns(UserWarning, match=r"text of 92 tokens is cut to 77: 'mouse mouse"):
        prompt = encode_texts([long, "a mouse"], *encoders)
    assert prompt.shape == (2, 77, 1024)
    torch.testing.assert_close(prompt[1], encode_texts(["a mouse"], *encoders)[0], atol=1e-4, rtol=1e-4)


# --------------------------------------------------------------------------------------------------------- waypoints


def waypoints(*specs: Any, **options: Any) -> Tensor:
    fields = {"folder": MICRO_MODEL, "subject": "mouse", "angle": "from above", "num_views": 6, "width": 1024}
    return load_waypoints([str(spec) for spec in specs], **fields | options)


def test_a_waypoint_is_a_file_a_template_or_a_text(tmp_path: Path):
    path = saved(some_prompt(6, 77, 1024), tmp_path / "p.pt")
    found = waypoints(path, "realistic", "a {subject} seen from the {view}", subject="cat")
    assert found.shape == (3, 6, 77, 1024) and found.dtype == torch.float32
    encoders = load_text_encoder(MICRO_MODEL)
    assert torch.equal(found[0], some_prompt(6, 77, 1024))
    expected = encode_texts(view_texts("realistic", subject="cat", angle="from above"), *encoders)
    assert torch.equal(found[1], expected)
    assert torch.equal(found[2], encode_texts(view_texts("a cat seen from the {view}"), *encoders))


def test_files_alone_need_no_text_encoder(tmp_path: Path):
    path = saved(some_prompt(), tmp_path / "p.pt")
    assert torch.equal(waypoints(path, path, folder=tmp_path / "nowhere", width=16)[1], some_prompt())
    with pytest.raises(InputError, match=r"cannot encode text, missing tokenizer/vocab\.json"):
        waypoints(path, "realistic", folder=tmp_path / "nowhere", width=16)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("realstic", {}, r"prompt\.waypoints: 'realstic' is no prompt file .*; did you mean 'realistic'\?"),
        (
            "zzz",
            {},
            r"'zzz' is no prompt file \(\.pt, \.safetensors\), no template \(facelift, .*\) and no text with \{view\}$",
        ),
        pytest.param("a mouse " * 90, {}, r"no text with \{view\}$", id="longer than the name of a file"),
        ("a {veiw} view", {}, r"has no \{view\}"),
        ("realistic", {"num_views": 4}, r"'realistic' makes 6 views and the model has 4; give a prompt file of 4 views"),
        ("realistic", {"width": 768}, r"'realistic' encoded by .* is 1024 wide .*takes 768"),
        ("nowhere.pt", {}, r"nowhere\.pt: no such prompt file"),
    ],
)
def test_a_waypoint_that_is_none_of_them_is_refused(spec: str, options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        waypoints(spec, **options)


def test_a_file_of_another_width_than_the_unet_is_refused(tmp_path: Path):
    path = saved(some_prompt(6, 77, 768), tmp_path / "p.pt")
    with pytest.raises(InputError, match=r"p\.pt: is 768 wide .* takes 1024"):
        waypoints(path)


def test_a_waypoint_of_another_program_or_in_a_folder_is_refused_with_the_way_out(tmp_path: Path):
    for name in ("p.pth", "p"):
        saved(some_prompt(6, 77, 1024), tmp_path / name)
        assert torch.equal(waypoints(tmp_path / name)[0], some_prompt(6, 77, 1024))
    np.save(tmp_path / "n.npy", some_prompt(6, 77, 1024).numpy())
    with pytest.raises(InputError, match=r"n\.npy: holds a NumPy array .*; convert it with: python -m train\.prompts convert "):
        waypoints(tmp_path / "n.npy")
    (tmp_path / "run" / "export").mkdir(parents=True)
    saved(some_prompt(6, 77, 1024), tmp_path / "run" / "export" / "clr_embeds.pt")
    with pytest.raises(InputError, match=r"run is a folder; expected the prompt file in it: .*run/export/clr_embeds\.pt$"):
        waypoints(tmp_path / "run")
