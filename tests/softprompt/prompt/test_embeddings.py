"""View prompts loaded, refused, saved and described."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from softprompt.errors import InputError
from softprompt.prompt.embeddings import check_prompt, describe_prompt, load_prompt, save_prompt
from softprompt.prompt.similarity import mean_pairwise_cosine, prompt_cosines
from softprompt.prompt.templates import VIEWS


def some_prompt(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape or (6, 77, 16), generator=torch.Generator().manual_seed(seed))


def spoilt(change: Callable[[Tensor], Any]) -> Tensor:
    prompt = some_prompt().half().float()
    change(prompt)
    return prompt


def saved(content: Any, path: Path) -> Path:
    save_file({"whatever": content}, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


def test_facelift_s_prompt_is_read_and_its_closest_views_are_known(facelift: Path) -> None:
    path = facelift / "clr_embeds.pt"
    prompt = load_prompt(path, width=1024)
    assert prompt.shape == (6, 77, 1024) and prompt.dtype == torch.float32
    assert torch.equal(prompt, torch.load(path, weights_only=True).float())
    assert describe_prompt(prompt)["closest_views"] == ["front_right", "front_left", pytest.approx(0.995, abs=1e-3)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_any_floating_type_becomes_float32(tmp_path: Path, dtype: torch.dtype, suffix: str) -> None:
    prompt = some_prompt().to(dtype)
    found = load_prompt(saved(prompt, tmp_path / f"p{suffix}"))
    assert found.dtype == torch.float32 and torch.equal(found, prompt.float())


def test_the_number_of_views_and_the_width_are_the_caller_s(tmp_path: Path) -> None:
    path = saved(some_prompt(4, 77, 8), tmp_path / "p.pt")
    assert load_prompt(path, num_views=4, width=8).shape == (4, 77, 8)
    with pytest.raises(InputError, match=r"has 4 views .*; the model has 6"):
        load_prompt(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (some_prompt(6, 77, 768), r"is 768 wide .*takes 16\. Likely it was made with another text encoder, CLIP ViT-L/14"),
        (some_prompt(6, 77, 2), r"is 2 wide .*takes 16\. Likely it was made with another text encoder; encode"),
        (some_prompt(5, 77, 16), r"has 5 views \(\[5, 77, 16\] float32\); the model has 6"),
        (some_prompt(6, 76, 16), r"has 76 tokens a view .*; expected 77: encode with padding='max_length'"),
        (some_prompt(77, 16), r"holds a tensor \[77, 16\] float32; expected floating-point \[6, 77, 16\]"),
        (some_prompt().long(), r"holds a tensor \[6, 77, 16\] int64; expected floating-point"),
        (spoilt(lambda p: p[2, 5, 3].fill_(torch.nan)), r"NaN or infinite values in view right;"),
        (spoilt(lambda p: p[0, 5, 3].fill_(-torch.inf)), r"NaN or infinite values in view front;"),
        (torch.zeros(6, 77, 16), r"all zero in view front, front_right, .*placeholder"),
        (spoilt(lambda p: p[3].zero_()), r"all zero in view back; the file is a placeholder"),
        (spoilt(lambda p: p[5].copy_(p[1])), r"views front_right and front_left are identical"),
        ({"prompt_embeds": some_prompt(6, 77, 768)}, r"is 768 wide .*own: python -m train\.prompts make --text TEXT --model"),
    ],
)
def test_a_tensor_that_is_no_prompt_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = saved(content, tmp_path / "p.pt")
    with pytest.raises(InputError, match=message) as refused:
        load_prompt(path, width=16)
    assert str(refused.value).startswith(f"{path}: ") and "\n" not in str(refused.value)


def test_the_prompt_of_the_wrong_clip_is_refused_with_the_cause(facelift: Path) -> None:
    with pytest.raises(ValueError, match=r"mouse_prompt_embeds_768\.pt: is 768 wide .* takes 1024\. Likely .*CLIP ViT-L/14"):
        load_prompt(facelift / "mouse_prompt_embeds_768.pt", width=1024)


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_a_parameter_is_read_without_its_gradient_and_without_a_warning(tmp_path: Path, suffix: str) -> None:
    path = saved(torch.nn.Parameter(some_prompt()), tmp_path / f"p{suffix}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompt = load_prompt(path)
        describe_prompt(prompt)
    assert torch.equal(prompt, some_prompt()) and not prompt.requires_grad and type(prompt) is Tensor


def test_a_prompt_of_another_program_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    path = saved({"prompt_embeds": some_prompt()}, tmp_path / "my p.pt")
    with pytest.raises(InputError) as refused:
        load_prompt(path, width=16)
    found, _, command = str(refused.value).partition("; convert it with: ")
    assert found == (
        f"{path}: holds a dict with 'prompt_embeds' [6, 77, 16] float32; expected one bare tensor [6, 77, 16]; likely another "
        f"program wrote it"
    )
    assert command == f"python -m train.prompts convert '{path}' '{tmp_path / 'my p_converted.pt'}'"


def test_a_saved_prompt_is_what_facelift_loads(tmp_path: Path) -> None:
    prompt = 30 * some_prompt().requires_grad_()
    sidecar = save_prompt(prompt, tmp_path / "new" / "clr_embeds.pt", metadata={"steps": 12})
    stored = torch.load(tmp_path / "new" / "clr_embeds.pt", weights_only=True)
    assert type(stored) is Tensor and stored.dtype == torch.float16 and not stored.requires_grad
    assert torch.equal(stored, prompt.detach().half())
    assert torch.equal(load_prompt(tmp_path / "new" / "clr_embeds.pt"), stored.float())
    assert sidecar == tmp_path / "new" / "clr_embeds.json"
    assert sorted(p.name for p in sidecar.parent.iterdir()) == ["clr_embeds.json", "clr_embeds.pt"]


def test_one_view_s_storage_does_not_carry_a_larger_tensor_along(tmp_path: Path) -> None:
    save_prompt(some_prompt(12, 77, 16)[::2].half().float(), tmp_path / "p.pt")
    assert (tmp_path / "p.pt").stat().st_size < 6 * 77 * 16 * 2 + 3000


def test_safetensors_keep_float32_which_holds_what_float16_cannot(tmp_path: Path) -> None:
    large = spoilt(lambda p: p[1, 2, 3].fill_(1e5))
    save_prompt(large, tmp_path / "p.safetensors")
    assert load_file(tmp_path / "p.safetensors").keys() == {"prompt"}
    assert torch.equal(load_prompt(tmp_path / "p.safetensors"), large)


def test_the_json_beside_it_describes_it(tmp_path: Path) -> None:
    prompt = 30 * some_prompt()
    described = json.loads(save_prompt(prompt, tmp_path / "p.pt", metadata={"steps": 12, "origin": "a run"}).read_text())
    assert described["file"] == "p.pt" and described["steps"] == 12 and described["origin"] == "a run"
    assert described["shape"] == [6, 77, 16] and described["dtype"] == "float16" and described["views"] == list(VIEWS)
    norms = prompt.norm(dim=-1)
    expected = {"first": float(norms[:, 0].mean()), "others": float(norms[:, 1:].mean()), "max": float(norms.max())}
    assert described["token_norms"] == pytest.approx(expected, abs=1e-4)
    torch.testing.assert_close(torch.tensor(described["view_cosines"]), prompt_cosines(prompt), atol=1e-5, rtol=0)
    assert described["mean_view_cosine"] == pytest.approx(mean_pairwise_cosine(prompt), abs=1e-5)
    error = (prompt.half().float() - prompt).abs()
    assert 0 < described["rounding_error"]["max"] == pytest.approx(float(error.max()))
    assert described["rounding_error"]["mean"] == pytest.approx(float(error.mean()))


def test_an_earlier_prompt_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "p.pt"
    save_prompt(some_prompt(6, 77, 64), path, metadata={"old": True})
    save_prompt(some_prompt(seed=1), path)
    assert torch.equal(load_prompt(path), some_prompt(seed=1).half().float())
    assert "old" not in json.loads((tmp_path / "p.json").read_text())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.json", "p.pt"]


@pytest.mark.parametrize(
    ("prompt", "name", "options", "message"),
    [
        (
            spoilt(lambda p: p[0, 0].fill_(torch.nan)),
            "p.pt",
            {},
            r"prompt to be saved as .*p\.pt: NaN or infinite values in view",
        ),
        (some_prompt(6, 76, 16), "p.pt", {}, r"has 76 tokens"),
        (spoilt(lambda p: p[1, 2, 3].fill_(1e5)), "p.pt", {}, r"prompt rounded to float16 for .*: NaN .* in view front_right"),
        (
            spoilt(lambda p: p[4].copy_(p[2] * (1 + 1e-6))),
            "p.pt",
            {},
            r"prompt rounded to float16 for .*: views right and left are identical",
        ),
        (some_prompt(), "p.bin", {}, r"p\.bin: a prompt is saved as \.pt \(FaceLift's float16\) or \.safetensors \(float32\)"),
        (some_prompt(), "p.pt", {"metadata": {"tensor": torch.ones(1)}}, r"not JSON serializable"),
    ],
)
def test_what_cannot_be_saved_leaves_the_folder_as_it_was(
    tmp_path: Path, prompt: Tensor, name: str, options: dict[str, Any], message: str
) -> None:
    save_prompt(some_prompt(), tmp_path / "p.pt")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(TypeError if options else InputError, match=message):
        save_prompt(prompt, tmp_path / name, **options)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_check_prompt_returns_a_good_prompt_in_float32() -> None:
    assert torch.equal(check_prompt(some_prompt().half(), width=16), some_prompt().half().float())
