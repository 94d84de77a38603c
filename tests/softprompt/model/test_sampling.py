"""Six views from one picture: FaceLift's own numbers, noise of each object's own, annealed guidance."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file
from torch import Tensor

from softprompt.micro import MICRO_MODEL
from softprompt.model.adapted import adapters_off, add_lora
from softprompt.model.conditioning import class_labels, image_embeddings, input_latents
from softprompt.model.loading import load_unet
from softprompt.model.pipeline import Pipeline
from softprompt.model.sampling import RISES, Annealed, Rise, decode_latents, sample_latents, sample_views, with_guidance
from tests.models import perturb

FAST = {"steps": 2, "guidance_scale": 2.0, "eta": 0.0}


@pytest.fixture(scope="session")
def golden(facelift: Path) -> dict[str, Tensor]:
    return load_file(facelift / "tiny" / "sampling.safetensors")


def some_pictures(count: int, size: int = 64) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def some_prompt(seed: int = 0) -> Tensor:
    return torch.randn(6, 77, 1024, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("guidance", [1, 3])
def test_latents_match_facelift_s_pipeline(tiny_models: Pipeline, golden: dict[str, Tensor], guidance: int) -> None:
    noise = {name: golden[name] for name in ("latents", "embed_noise")}
    options = {"steps": 5, "guidance_scale": float(guidance), "eta": 0.0}
    found = sample_latents(tiny_models, golden["prompt"], golden["image"], **options, **noise)
    torch.testing.assert_close(found, golden[f"output_guidance{guidance}"][None], atol=1e-4, rtol=0)


def test_views_are_pictures_of_every_object(micro_models: Pipeline) -> None:
    views = sample_views(micro_models, some_prompt(), some_pictures(2), **FAST)
    assert views.shape == (2, 6, 3, 64, 64) and views.dtype == torch.float32
    assert views.min() >= 0 and views.max() <= 1 and views.std() > 0.01
    one = sample_views(micro_models, some_prompt(), some_pictures(2)[0], **FAST)
    assert one.shape == (1, 6, 3, 64, 64)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_views_do_not_depend_on_what_else_is_in_the_batch(micro_models: Pipeline, eta: float) -> None:
    pictures, options = some_pictures(3), FAST | {"eta": eta}
    together = sample_views(micro_models, some_prompt(), pictures, **options)
    alone = torch.cat([sample_views(micro_models, some_prompt(), picture, **options) for picture in pictures])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    assert (together[0] - together[1]).abs().max() > 0.01, "the picture makes no difference"


def test_each_object_may_have_a_prompt_of_its_own(micro_models: Pipeline) -> None:
    pictures, prompts = some_pictures(1).expand(2, -1, -1, -1), torch.stack([some_prompt(0), some_prompt(1)])
    together = sample_views(micro_models, prompts, pictures, **FAST)
    alone = torch.cat([sample_views(micro_models, prompt, pictures[0], **FAST) for prompt in prompts])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


def test_the_seed_alone_decides_the_noise(micro_models: Pipeline) -> None:
    def sample(seed: int, elsewhere: int) -> Tensor:
        torch.manual_seed(elsewhere)
        return sample_views(micro_models, some_prompt(), some_pictures(1), **FAST | {"eta": 1.0}, seed=seed)

    first = sample(3, elsewhere=1)
    assert torch.equal(first, sample(3, elsewhere=2))
    assert (first - sample(4, elsewhere=1)).abs().max() > 0.01
    deterministic = sample_views(micro_models, some_prompt(), some_pictures(1), **FAST, seed=3)
    assert (first - deterministic).abs().max() > 0.01, "eta adds noise of its own"


def test_guidance_at_scale_one_is_none_and_at_zero_ignores_the_picture() -> None:
    without, with_picture = torch.randn(2, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(with_guidance(without, with_picture, 1.0), with_picture)
    assert torch.equal(with_guidance(without, with_picture, 0.0), without)
    assert torch.allclose(with_guidance(without, with_picture, 3.0), 3 * with_picture - 2 * without)


def test_guidance_drops_the_picture_and_not_the_prompt(micro_models: Pipeline) -> None:
    calls = []
    unet = micro_models.unet
    hook = unet.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args[0], kwargs)), with_kwargs=True)
    try:
        sample_views(micro_models, some_prompt(), some_pictures(2), **FAST)
    finally:
        hook.remove()
    for sample, kwargs in calls:
        assert len(sample) == 24 and torch.equal(sample[:12, :4], sample[12:, :4])
        assert not sample[:12, 4:].any() and sample[12:, 4:].any()
        labels, prompt_of = kwargs["class_labels"], kwargs["cross_attention_kwargs"]["prompt_of"]
        assert not labels[:12].any() and labels[12:].any()
        assert prompt_of.tolist() == [0, 1, 2, 3, 4, 5] * 4


def test_a_bfloat16_unet_gives_float32_views_near_those_of_float32(tiny_models: Pipeline, tiny_folder: Path) -> None:
    half = replace(tiny_models, unet=load_unet(tiny_folder / "unet", dtype=torch.bfloat16))
    pictures, options = some_pictures(1, size=32), {"steps": 3, "guidance_scale": 3.0, "eta": 1.0}
    found, expected = (sample_views(p, some_prompt(), pictures, **options) for p in (half, tiny_models))
    assert found.dtype == torch.float32 and found.isfinite().all()
    difference = (found - expected).abs()
    assert difference.mean() < 0.02 and difference.max() > 0


def test_decoding_is_the_vae_s_one_picture_at_a_time(micro_models: Pipeline) -> None:
    latents = torch.randn(2, 6, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    found = decode_latents(micro_models, latents)
    scale = micro_models.vae.config.scaling_factor
    with torch.no_grad():
        expected = micro_models.vae.decode(latents[1, 4][None] / scale).sample[0] / 2 + 0.5
    torch.testing.assert_close(found[1, 4], expected.clamp(0, 1), atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def adapted(micro_models: Pipeline) -> Pipeline:
    """The packaged pipeline with a LoRA that changes what it samples."""
    unet = load_unet(MICRO_MODEL / "unet")
    add_lora(unet, rank=2, alpha=4.0, targets=["to_q", "to_k", "to_v"])
    perturb(parameter for name, parameter in unet.named_parameters() if ".lora_" in name)
    return replace(micro_models, unet=unet)


@pytest.mark.parametrize(
    ("rise", "expected"),
    [
        ("linear", [0, 0.2, 0.4, 0.6, 0.8]),
        ("square", [0, 0.04, 0.16, 0.36, 0.64]),
        ("fourth", [0, 0.0016, 0.0256, 0.1296, 0.4096]),
        ("step", [0, 0, 0, 1, 1]),
    ],
)
def test_weights_rise_from_the_noisiest_step(rise: Rise, expected: list[float]) -> None:
    assert [RISES[rise](step / 5) for step in range(5)] == pytest.approx(expected)
    assert tuple(RISES) == get_args(Rise)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_with_a_weight_of_1_or_0_the_views_are_those_of_one_model_bit_for_bit(adapted: Pipeline, eta: float) -> None:
    start, learned, picture, options = some_prompt(0), some_prompt(1), some_pictures(1), FAST | {"eta": eta}
    plain = sample_views(adapted, learned, picture, **options)
    with adapters_off(adapted.unet):
        pretrained = sample_views(adapted, start, picture, **options)
    assert (plain - pretrained).abs().max() > 0.01
    calls: list[int] = []
    hook = adapted.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    for weight, expected in ((1.0, plain), (0.0, pretrained)):
        found = sample_views(adapted, learned, picture, **options, annealed=Annealed(start, lambda _, w=weight: w))
        assert torch.equal(found, expected)
    hook.remove()
    assert len(calls) == 2 * FAST["steps"], "nothing is predicted that is not used"


def mixed_by_hand(
    pipeline: Pipeline, learned: Tensor, start: Tensor, picture: Tensor, z: Tensor, noise: Tensor, weights: list[float]
) -> Tensor:
    """DDIM without noise of its own, with guidance 2, as the paper mixes: eps of the two models, each guided by itself."""
    labels = class_labels(pipeline, image_embeddings(pipeline, picture).expand(6, -1), noise)
    given = input_latents(pipeline, picture).expand(6, -1, -1, -1)
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(len(weights))
    alphabar = scheduler.alphas_cumprod
    for t, w in zip(scheduler.timesteps, weights, strict=True):
        eps = torch.zeros_like(z)
        a, s = alphabar[t] ** 0.5, (1 - alphabar[t]) ** 0.5
        for share, prompt, is_pretrained in ((1 - w, start, True), (w, learned, False)):
            with adapters_off(pipeline.unet) if is_pretrained else nullcontext():
                unguided, guided = (
                    pipeline.unet(
                        torch.cat([z, seen * given], dim=1),
                        t,
                        encoder_hidden_states=prompt,
                        class_labels=seen * labels,
                        cross_attention_kwargs={"prompt_of": torch.arange(6)},
                    ).sample
                    for seen in (0, 1)
                )
            v = unguided + 2.0 * (guided - unguided)
            eps += share * (a * v + s * z)
        before = t - 1000 // len(weights)
        a_before = (alphabar[before] if before >= 0 else scheduler.final_alpha_cumprod) ** 0.5
        z = a_before * (z - s * eps) / a + (1 - a_before**2) ** 0.5 * eps
    return z


@torch.no_grad()
@pytest.mark.parametrize("rise", ["square", "step"])
def test_annealed_latents_are_those_of_a_loop_by_hand(adapted: Pipeline, rise: Rise) -> None:
    start, learned, picture = some_prompt(0), some_prompt(1), some_pictures(1)
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(6, *adapted.latent_shape, generator=generator)
    noise = torch.randn(6, adapted.unet.config["projection_class_embeddings_input_dim"] // 2, generator=generator)

    def sample(annealed: Annealed | None) -> Tensor:
        options = FAST | {"steps": 3, "latents": z, "embed_noise": noise, "annealed": annealed}
        return sample_latents(adapted, learned, picture, **options)[0]

    found = sample(Annealed(start, RISES[rise]))
    expected = mixed_by_hand(adapted, learned, start, picture, z, noise, [RISES[rise](step / 3) for step in range(3)])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert (found - sample(None)).abs().max() > 0.1


def test_a_pretrained_prompt_of_another_shape_is_refused_before_it_is_needed(adapted: Pipeline) -> None:
    annealed = Annealed(some_prompt()[:5], lambda _: 1.0)
    with pytest.raises(ValueError, match=r"prompt is \[5, 77, 1024\]; expected \[6, T, D\]"):
        sample_views(adapted, some_prompt(), some_pictures(1), **FAST, annealed=annealed)
