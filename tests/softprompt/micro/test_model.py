"""The embedded micro pipeline keeps its promises."""

import json
import re

import pytest
from torch import Tensor

from softprompt.micro import MICRO_MODEL
from softprompt.micro.tokenizer import WORDS, learn_merges
from softprompt.model.loading import load_text_encoder
from softprompt.model.pipeline import Pipeline
from softprompt.model.sampling import sample_views
from softprompt.prompt.embeddings import check_prompt
from softprompt.prompt.encoding import encode_texts
from softprompt.prompt.templates import TEMPLATES, view_texts
from train.micro.pretrain import fixed_noise_loss, given_picture, held_out

MEGABYTE = 1_000_000
HEADS_BOUND = 0.04


@pytest.fixture(scope="module")
def prompts() -> dict[str, Tensor]:
    encoders = load_text_encoder(MICRO_MODEL)
    return {name: encode_texts(view_texts(name), *encoders) for name in TEMPLATES}


def test_packaged_model_is_a_small_facelift(micro_models: Pipeline) -> None:
    assert sum(file.stat().st_size for file in MICRO_MODEL.rglob("*") if file.is_file()) < 20 * MEGABYTE
    assert micro_models.picture_size == 64 and micro_models.latent_shape == (4, 16, 16)
    assert micro_models.num_views == 6 and micro_models.prompt_width == 1024
    config = json.loads((MICRO_MODEL / "unet" / "config.json").read_text())
    assert config["_class_name"] == "UNetMV2DConditionModel"
    assert config["multiview_attention"] and config["sparse_mv_attention"] and not config["cd_attention_last"]
    index = json.loads((MICRO_MODEL / "model_index.json").read_text())
    assert {name for name, value in index.items() if isinstance(value, list)} == {
        folder.name for folder in MICRO_MODEL.iterdir() if folder.is_dir()
    }


def test_packaged_prompts_are_distinct_and_facelift_shaped(prompts: dict[str, Tensor]) -> None:
    for name, prompt in prompts.items():
        assert check_prompt(prompt, width=1024, origin=name).shape == (6, 77, 1024)


def test_template_words_are_single_tokens_and_ascii_is_spelled() -> None:
    tokenizer, text_encoder = load_text_encoder(MICRO_MODEL)
    assert tokenizer.pad_token == "!" and tokenizer.pad_token_id == 0
    assert len(tokenizer) == text_encoder.config.vocab_size
    for word in WORDS:
        assert len(tokenizer(word).input_ids) == 3, f"{word!r} is not one token between start and end"
    text = view_texts("facelift")[1]
    words = re.findall(r"[A-Za-z]+|\d|[^\w\s]|_", text)
    ids = tokenizer(text).input_ids
    assert tokenizer.convert_ids_to_tokens(ids[1:-1]) == [f"{word.lower()}</w>" for word in words]
    ascii_text = "".join(map(chr, range(ord(" "), ord("~") + 1)))
    spelled = tokenizer(ascii_text).input_ids[1:-1]
    assert tokenizer.eos_token_id not in spelled, "a printable character is unknown"
    assert tokenizer.decode(spelled).replace(" ", "") == ascii_text.lower().replace(" ", "")


def test_merges_make_every_word_whole() -> None:
    merges = learn_merges(["front", "from", "right"])
    assert {a + b for a, b in merges} >= {"front</w>", "from</w>", "right</w>"}


def test_packaged_model_knows_heads_and_not_mice(micro_models: Pipeline, prompts: dict[str, Tensor]) -> None:
    heads = fixed_noise_loss(micro_models, held_out("heads", 4), prompts["facelift"])
    mice = held_out("mice", 4)
    under_facelift = fixed_noise_loss(micro_models, mice, prompts["facelift"])
    under_realistic = fixed_noise_loss(micro_models, mice, prompts["realistic"])
    assert heads < HEADS_BOUND
    assert under_facelift > 1.5 * heads
    assert under_realistic < under_facelift


def test_packaged_model_turns_a_held_out_head(micro_models: Pipeline, prompts: dict[str, Tensor]) -> None:
    true = given_picture(held_out("heads", 1), 0)
    sampled = sample_views(micro_models, prompts["facelift"], true[0], steps=12, guidance_scale=1.0, eta=0.0)[0]
    errors = (sampled[:, None] - true[None]).square().mean(dim=(2, 3, 4))  # sampled view, true view
    for view in (0, 2, 3, 4):  # front, right, back, left: none can be taken for another
        assert errors[view].argmin() == view
    assert -10 * errors.diagonal().mean().log10() > 16
