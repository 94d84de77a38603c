"""The UNet's conditions: FaceLift's class labels, the input's latents, and which of them are dropped."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from softprompt.data.batch import keep_conditions
from softprompt.model.conditioning import class_labels, encode_views, image_embeddings, input_latents
from softprompt.model.pipeline import Pipeline


def some_pictures(count: int = 6) -> torch.Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_class_labels_match_facelift_s(tiny_models: Pipeline, facelift: Path) -> None:
    golden = load_file(facelift / "tiny" / "training_step.safetensors")
    found = class_labels(tiny_models, golden["image_embeds"], golden["embed_noise"])
    torch.testing.assert_close(found, golden["class_labels"], atol=1e-4, rtol=0)


def test_class_labels_end_in_the_sinusoid_of_level_0(micro_models: Pipeline) -> None:
    width = micro_models.image_encoder.config.projection_dim
    labels = class_labels(micro_models, torch.randn(2, width), torch.randn(2, width))
    assert labels.shape == (2, 2 * width)
    assert torch.equal(labels[:, width : 3 * width // 2], torch.ones(2, width // 2)), "cosines of 0 come first"
    assert not labels[:, 3 * width // 2 :].any()


@pytest.mark.parametrize(
    ("p", "keeps_labels", "keeps_latents"),
    [
        (0.0, False, True),
        (0.0499, False, True),
        (0.05, False, False),  # the rate r
        (0.0999, False, False),
        (0.1, True, False),  # 2r
        (0.1499, True, False),
        (0.1501, True, True),  # past 3r
        (0.9999, True, True),
    ],
)
def test_conditions_are_dropped_as_facelift_does_it(p: float, keeps_labels: bool, keeps_latents: bool) -> None:
    labels, latents = keep_conditions(torch.tensor([p]), 0.05)
    assert (labels.item(), latents.item()) == (keeps_labels, keeps_latents)
    assert all(kept.item() for kept in keep_conditions(torch.tensor([p]), 0.0)), "a rate of zero drops nothing"


def test_views_are_encoded_to_a_posterior_and_an_embedding_each(micro_models: Pipeline) -> None:
    pictures = some_pictures()
    encoded = encode_views(micro_models, pictures)
    with torch.no_grad():
        posterior = micro_models.vae.encode(pictures * 2 - 1).latent_dist
    torch.testing.assert_close(encoded.mean, posterior.mean)
    torch.testing.assert_close(encoded.std, posterior.std)
    assert encoded.mean.shape == encoded.std.shape == (6, 4, 16, 16)
    assert encoded.embeds.shape == (6, micro_models.image_encoder.config.projection_dim)
    for x in (encoded.mean, encoded.std, encoded.embeds):
        assert x.dtype == torch.float32 and not x.requires_grad


def test_latents_of_an_input_picture_are_the_scaled_mean(micro_models: Pipeline) -> None:
    pictures = some_pictures(3)
    expected = encode_views(micro_models, pictures).mean * micro_models.vae.config.scaling_factor
    torch.testing.assert_close(input_latents(micro_models, pictures), expected)


def test_embeddings_are_those_of_the_png(micro_models: Pipeline) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    pictures = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    features = micro_models.feature_extractor(images=[Image.fromarray(p) for p in pixels], return_tensors="pt")
    with torch.no_grad():
        expected = micro_models.image_encoder(features.pixel_values).image_embeds
    torch.testing.assert_close(image_embeddings(micro_models, pictures), expected)
