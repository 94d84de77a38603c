"""Texts encoded as FaceLift does, and waypoints from files, templates and texts."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from softprompt.errors import InputError
from softprompt.micro import MICRO_MODEL
from softprompt.model.loading import load_text_encoder
from softprompt.prompt.encoding import encode_texts, load_waypoints
from softprompt.prompt.templates import view_texts

PROMPT = torch.randn(6, 77, 1024, generator=torch.Generator().manual_seed(0))


def saved(content: Tensor, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def waypoints(*specs: Any, **options: Any) -> Tensor:
    fields = {"folder": MICRO_MODEL, "subject": "mouse", "angle": "from above", "num_views": 6, "width": 1024}
    return load_waypoints([str(spec) for spec in specs], **fields | options)


def test_texts_are_padded_to_77_tokens_and_the_first_output_is_taken() -> None:
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


def test_a_text_that_is_too_long_is_cut_with_a_warning() -> None:
    encoders = load_text_encoder(MICRO_MODEL)
    with pytest.warns(UserWarning, match=r"text of 92 tokens is cut to 77: 'mouse mouse"):
        prompt = encode_texts(["mouse " * 90, "a mouse"], *encoders)
    assert prompt.shape == (2, 77, 1024)
    torch.testing.assert_close(prompt[1], encode_texts(["a mouse"], *encoders)[0], atol=1e-4, rtol=1e-4)


def test_a_waypoint_is_a_file_a_template_or_a_text(tmp_path: Path) -> None:
    found = waypoints(saved(PROMPT, tmp_path / "p.pt"), "realistic", "a {subject} seen from the {view}", subject="cat")
    assert found.shape == (3, 6, 77, 1024) and found.dtype == torch.float32
    encoders = load_text_encoder(MICRO_MODEL)
    assert torch.equal(found[0], PROMPT)
    assert torch.equal(found[1], encode_texts(view_texts("realistic", subject="cat", angle="from above"), *encoders))
    assert torch.equal(found[2], encode_texts(view_texts("a cat seen from the {view}"), *encoders))
    for name in ("p.pth", "p"):  # a prompt file by its content
        assert torch.equal(waypoints(saved(PROMPT, tmp_path / name))[0], PROMPT)


def test_files_alone_need_no_text_encoder(tmp_path: Path) -> None:
    path = saved(PROMPT, tmp_path / "p.pt")
    assert torch.equal(waypoints(path, path, folder=tmp_path / "nowhere")[1], PROMPT)
    with pytest.raises(InputError, match=r"cannot encode text, missing tokenizer/vocab\.json"):
        waypoints(path, "realistic", folder=tmp_path / "nowhere")


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
        ("realistic", {"num_views": 4}, r"'realistic' makes 6 views and the model has 4; expected a prompt file of 4 views"),
        ("realistic", {"width": 768}, r"'realistic' encoded by .* is 1024 wide .*takes 768"),
        ("nowhere.pt", {}, r"nowhere\.pt: no such prompt file"),
        ("narrow.pt", {}, r"narrow\.pt: is 768 wide .* takes 1024"),
        ("n.npy", {}, r"n\.npy: holds a NumPy array .*; convert it with: python -m train\.prompts convert "),
        ("run", {}, r"run is a folder; expected the prompt file in it: run/export/clr_embeds\.pt$"),
    ],
)
def test_a_waypoint_that_cannot_be_used_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(PROMPT[..., :768].clone(), Path("narrow.pt"))
    np.save("n.npy", PROMPT.numpy())
    saved(PROMPT, Path("run/export/clr_embeds.pt"))
    with pytest.raises(InputError, match=message):
        waypoints(spec, **options)
