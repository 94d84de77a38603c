"""The adapted model: the pretrained model is inside it bit for bit, and only prompt and LoRA train."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from softprompt.errors import InputError
from softprompt.micro import MICRO_MODEL
from softprompt.model.adapted import AdaptedModel, adapters_off, add_lora, predict
from softprompt.model.loading import load_unet
from softprompt.model.pipeline import Pipeline
from softprompt.objectives.losses import denoising_loss, kl_to_reference, kl_weights
from softprompt.prompt.soft_prompt import SoftPrompt
from tests.models import perturb

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def waypoints(count: int = 2) -> Tensor:
    return torch.randn(count, 6, 77, 1024, generator=torch.Generator().manual_seed(0))


def inputs(pipeline: Pipeline, b: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
    """noisy, given, timesteps, labels, order."""
    generator = torch.Generator().manual_seed(seed)
    noisy, given = torch.randn(2, b, 6, *pipeline.latent_shape, generator=generator)
    labels = torch.randn(b, 6, pipeline.unet.config["projection_class_embeddings_input_dim"], generator=generator)
    return noisy, given, torch.arange(b) * 400 + 100, labels, torch.arange(6).expand(b, 6)


def adapted(pipeline: Pipeline, **options: float) -> AdaptedModel:
    add_lora(pipeline.unet, rank=2, alpha=4.0, targets=TARGETS, **options)
    return AdaptedModel(pipeline.unet, SoftPrompt(waypoints())).train()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_is_exactly_zero_before_the_first_step(micro: Pipeline, dtype: torch.dtype) -> None:
    micro = replace(micro, unet=load_unet(MICRO_MODEL / "unet", dtype=dtype))
    model, batch = adapted(micro), inputs(micro)
    difference = model(*batch, 0.0) - model.reference(*batch)
    assert not difference.any()
    weights = kl_weights(micro.scheduler.alphas_cumprod, batch[2])
    perturb([model.prompt.learned])
    assert (kl_to_reference(model(*batch, 0.0), model.reference(*batch), weights) > 0).all()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_is_the_pretrained_model_bit_for_bit(micro: Pipeline, dtype: torch.dtype) -> None:
    micro = replace(micro, unet=load_unet(MICRO_MODEL / "unet", dtype=dtype))
    batch = inputs(micro)
    pretrained = predict(micro.unet, waypoints()[0], *batch)
    model = adapted(micro)
    perturb(model.all_trainable().values())
    before = model(*batch, 1.0)
    assert (before - pretrained).abs().max() > 0.1, "the adapted model is the pretrained one"
    assert torch.equal(model.reference(*batch), pretrained)
    assert torch.equal(model(*batch, 1.0), before), "the adapters are on again"
    dropping = adapted(replace(micro, unet=load_unet(MICRO_MODEL / "unet", dtype=dtype)), dropout=0.5)
    perturb(dropping.all_trainable().values())
    assert torch.equal(dropping.reference(*batch), pretrained)


def test_the_reference_has_no_gradient(micro: Pipeline) -> None:
    model, batch = adapted(micro), inputs(micro, b=1)
    assert not model.reference(*batch).requires_grad
    assert model(*batch, 0.0).requires_grad


def test_adapters_off_leaves_requires_grad_as_it_was(micro: Pipeline) -> None:
    add_lora(micro.unet, rank=2, alpha=2.0, targets=TARGETS)
    frozen = [p for name, p in micro.unet.named_parameters() if ".lora_" in name and "down_blocks" in name]
    for parameter in frozen:
        parameter.requires_grad_(False)
    before = {name: p.requires_grad for name, p in micro.unet.named_parameters()}
    assert frozen and any(before.values())
    with adapters_off(micro.unet):
        pass
    assert {name: p.requires_grad for name, p in micro.unet.named_parameters()} == before
    with pytest.raises(RuntimeError, match="inside"), adapters_off(micro.unet):
        raise RuntimeError("inside")
    assert {name: p.requires_grad for name, p in micro.unet.named_parameters()} == before


@torch.no_grad()
def test_adapters_stay_off_until_the_outermost_block_ends(micro: Pipeline) -> None:
    model, batch = adapted(micro), inputs(micro, b=1)
    perturb(model.trainable()["lora"].values())
    on = model(*batch, 0.0)
    with adapters_off(micro.unet):
        off = model(*batch, 0.0)
        with adapters_off(micro.unet):
            assert torch.equal(model(*batch, 0.0), off)
        assert torch.equal(model(*batch, 0.0), off) and not torch.equal(off, on)
    assert torch.equal(model(*batch, 0.0), on)


@torch.no_grad()
def test_adapters_off_without_a_lora_is_the_model_itself(micro_models: Pipeline) -> None:
    model, batch = AdaptedModel(micro_models.unet, SoftPrompt(waypoints())), inputs(micro_models, b=1)
    perturb([model.prompt.learned])
    assert torch.equal(model.reference(*batch), predict(micro_models.unet, waypoints()[0], *batch))


@torch.no_grad()
def test_each_object_s_prompt_is_taken_in_its_own_order(micro_models: Pipeline) -> None:
    unet = micro_models.unet
    noisy, given, timesteps, labels, _ = inputs(micro_models)
    prompt = waypoints()[0]
    orders = torch.tensor([[0, 1, 2, 3, 4, 5], [2, 3, 4, 5, 0, 1]])
    together = predict(unet, prompt, noisy, given, timesteps, labels, orders)
    for b in range(2):
        one = [x[b : b + 1] for x in (noisy, given, timesteps, labels)]
        alone = predict(unet, prompt[orders[b]], *one, torch.arange(6)[None])
        torch.testing.assert_close(together[b : b + 1], alone, atol=1e-4, rtol=0)
    in_order = predict(unet, prompt, noisy, given, timesteps, labels, torch.arange(6).expand(2, 6))
    assert (together[1] - in_order[1]).abs().max() > 1e-2


@torch.no_grad()
def test_the_adapted_model_uses_the_prompt_at_its_position(micro: Pipeline) -> None:
    model, batch = adapted(micro), inputs(micro, b=1)
    perturb([model.prompt.learned])
    for position in (0.0, 0.7):
        expected = predict(micro.unet, model.prompt(position), *batch)
        assert torch.equal(model(*batch, position), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_everything_trained_is_float32_on_a_unet_of_any_type(dtype: torch.dtype) -> None:
    unet = load_unet(MICRO_MODEL / "unet", dtype=dtype)
    add_lora(unet, rank=2, alpha=2.0, targets=TARGETS)
    model = AdaptedModel(unet, SoftPrompt(waypoints().half()))
    groups = model.trainable()
    assert set(groups) == {"prompt", "lora"} and set(groups["prompt"]) == {"prompt.learned"}
    assert all(".lora_" in name for name in groups["lora"])
    assert {p.dtype for group in groups.values() for p in group.values()} == {torch.float32}
    assert {p.dtype for p in unet.parameters() if not p.requires_grad} == {dtype}
    lora = [name for name, _ in unet.named_parameters() if ".lora_" in name]
    assert len(groups["lora"]) == len(lora) == 2 * 8 * len([n for n in unet.attn_processors if ".attn1." in n])


def test_a_frozen_group_is_not_listed(micro_models: Pipeline) -> None:
    alone = AdaptedModel(micro_models.unet, SoftPrompt(waypoints()))
    assert set(alone.trainable()) == {"prompt"}
    alone.prompt.requires_grad_(False)
    assert alone.trainable() == {}


@pytest.mark.parametrize("seed", [0, 1])
def test_a_fresh_lora_changes_nothing_and_depends_on_its_seed_alone(micro: Pipeline, seed: int) -> None:
    torch.manual_seed(seed + 5)
    expected = torch.rand(())
    torch.manual_seed(seed + 5)
    add_lora(micro.unet, rank=2, alpha=2.0, targets=["to_q"], seed=seed)
    assert torch.equal(torch.rand(()), expected), "the global generator was moved"
    other = load_unet(MICRO_MODEL / "unet")
    add_lora(other, rank=2, alpha=2.0, targets=["to_q"], seed=0)
    ours, theirs = ({n: p for n, p in u.named_parameters() if ".lora_" in n} for u in (micro.unet, other))
    assert all(not p.any() for name, p in ours.items() if ".lora_B" in name)
    assert torch.equal(torch.cat([p.flatten() for p in ours.values()]), torch.cat([p.flatten() for p in theirs.values()])) == (
        seed == 0
    )


def loss_of(model: AdaptedModel, pipeline: Pipeline, batch: tuple[Tensor, ...]) -> Tensor:
    """Denoising and KL, as a step of the main job."""
    prediction = model(*batch, 0.3)
    weights = kl_weights(pipeline.scheduler.alphas_cumprod, batch[2])
    kl = kl_to_reference(prediction, model.reference(*batch), weights).mean()
    return denoising_loss(prediction, batch[0], torch.ones(len(batch[0]))) + 0.1 * kl


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_after_a_few_steps_prompt_and_lora_have_moved_and_nothing_else(
    tiny: Pipeline, tiny_folder: Path, checkpointing: bool, dtype: torch.dtype
) -> None:
    tiny = replace(tiny, unet=load_unet(tiny_folder / "unet", dtype=dtype))
    model = adapted(tiny)
    if checkpointing:
        tiny.unet.enable_gradient_checkpointing()
    assert tiny.unet.is_gradient_checkpointing == checkpointing
    before = {name: x.detach().clone() for name, x in model.state_dict().items()}
    trained = model.all_trainable()
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0)
    for step in range(3):
        loss_of(model, tiny, inputs(tiny, seed=step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == trained.keys()
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert all(p.isfinite().all() for p in trained.values())


def gradients(unet: UNet2DConditionModel, pipeline: Pipeline, checkpointing: bool) -> dict[str, Tensor]:
    model = adapted(replace(pipeline, unet=unet))
    perturb(model.all_trainable().values())
    if checkpointing:
        unet.enable_gradient_checkpointing()
    loss_of(model, pipeline, inputs(pipeline)).backward()
    return {name: p.grad for name, p in model.all_trainable().items()}


def test_gradient_checkpointing_gives_the_same_gradients(tiny_models: Pipeline, tiny_folder: Path) -> None:
    plain, checkpointed = (gradients(load_unet(tiny_folder / "unet"), tiny_models, c) for c in (False, True))
    for name, gradient in plain.items():
        assert gradient.any(), name
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("targets", [["to_moon"], ["to_q", "to_moon"], []])
def test_an_unknown_lora_target_is_refused(micro: Pipeline, targets: list[str]) -> None:
    with pytest.raises(InputError, match=r"lora\.targets: (no layer of the UNet .*to_moon|is empty)"):
        add_lora(micro.unet, rank=2, alpha=2.0, targets=targets)
    assert not any(".lora_" in name for name, _ in micro.unet.named_parameters())
