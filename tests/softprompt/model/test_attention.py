"""Attention against a slow version, shared prompts, and maps of the cross-attention that change nothing."""

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from softprompt.model.adapted import predict
from softprompt.model.attention import (
    AttentionMaps,
    MultiViewAttnProcessor,
    SharedPromptAttnProcessor,
    attention_sides,
    watch_attention,
)
from softprompt.model.pipeline import Pipeline

GROUPS = torch.tensor([[0.0, 1, 1, 0, 0], [0, 0, 0, 1, 0]])


def slow_attention(attn: Attention, x: Tensor, views: int, kind: str) -> Tensor:
    """One picture and one head at a time."""
    results = []
    for n in range(len(x)):
        own = x[n]
        of_object = x[n - n % views : n - n % views + views]
        seen = {"sparse": torch.cat([of_object[0], own]), "full": torch.cat(list(of_object)), "single": own}[kind]
        projected = (m.chunk(attn.heads, dim=-1) for m in (attn.to_q(own), attn.to_k(seen), attn.to_v(seen)))
        heads = [(q @ k.T / q.shape[-1] ** 0.5).softmax(dim=-1) @ v for q, k, v in zip(*projected, strict=True)]
        results.append(attn.to_out[0](torch.cat(heads, dim=-1)))
    return torch.stack(results)


@pytest.mark.parametrize("kind", ["sparse", "full", "single"])
@torch.no_grad()
def test_attention_matches_a_slow_version(kind: str) -> None:
    torch.manual_seed(0)
    attn = Attention(query_dim=12, heads=3, dim_head=4, processor=MultiViewAttnProcessor(4, kind))
    x = 3 * torch.randn(8, 5, 12)
    torch.testing.assert_close(attn(x), slow_attention(attn, x, 4, kind), atol=1e-5, rtol=1e-5)


def test_a_batch_that_is_no_whole_number_of_objects_is_an_error() -> None:
    attn = Attention(query_dim=8, heads=2, dim_head=4, processor=MultiViewAttnProcessor(6, "sparse"))
    with pytest.raises(ValueError, match=r"a batch of 7 pictures is no multiple of the model's 6 views"):
        attn(torch.randn(7, 3, 8))


def test_a_shared_prompt_gives_the_results_of_a_prompt_for_each_picture(tiny: Pipeline) -> None:
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randn(6, 77, 1024, generator=generator)
    order = torch.tensor([0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 0, 1])
    sample, labels = torch.randn(12, 8, 8, 8, generator=generator), torch.randn(12, 64, generator=generator)
    outputs, gradients = [], []
    for shared in (True, False):
        learned = prompt.clone().requires_grad_()
        tokens, options = (learned, {"prompt_of": order}) if shared else (learned[order], None)
        out = tiny.unet(sample, 300, encoder_hidden_states=tokens, class_labels=labels, cross_attention_kwargs=options).sample
        out.square().mean().backward()
        outputs.append(out.detach())
        gradients.append(learned.grad)
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-4)


def inputs(pipeline: Pipeline) -> tuple[Tensor, ...]:
    """Inputs of two objects, one of them with its views rotated; the prompt requires a gradient."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    order = torch.stack([torch.arange(6), torch.arange(6).roll(-2)])
    shape = (2, 6, *pipeline.latent_shape)
    labels = noise(2, 6, pipeline.unet.config["projection_class_embeddings_input_dim"])
    prompt = noise(6, GROUPS.shape[1], pipeline.prompt_width).requires_grad_()
    return prompt, noise(*shape), noise(*shape), torch.tensor([10, 700]), labels, order


def slow_maps(pipeline: Pipeline, given: tuple[Tensor, ...], side: int) -> Tensor:
    """[2, N, heads, side, side]: every layer's softmax over tokens, from the layer's inputs."""
    seen: list[Tensor] = []
    order = given[-1].flatten()

    def look(layer, arguments, options, output):
        hidden, prompt = arguments[0], options["encoder_hidden_states"]
        if hidden.shape[1] != side**2:
            return
        query, key = layer.to_q(hidden).double(), layer.to_k(prompt).double()
        width = query.shape[-1] // layer.heads
        maps = torch.zeros(2, len(order), layer.heads, side, side, dtype=torch.float64)
        for n, view in enumerate(order.tolist()):
            for h in range(layer.heads):
                part = slice(h * width, (h + 1) * width)
                scores = query[n, :, part] @ key[view, :, part].T / width**0.5
                for k in range(2):
                    maps[k, n, h] = (scores.softmax(dim=-1) @ GROUPS[k].double()).reshape(side, side)
        seen.append(maps)

    layers = [m for name, m in pipeline.unet.named_modules() if name.endswith("attn2")]
    hooks = [layer.register_forward_hook(look, with_kwargs=True) for layer in layers]
    with torch.no_grad():
        predict(pipeline.unet, *given)
    for hook in hooks:
        hook.remove()
    return torch.stack(seen).mean(dim=0)


def test_the_maps_are_the_softmax_over_tokens_summed_by_group(micro_models: Pipeline) -> None:
    given = inputs(micro_models)
    assert attention_sides(micro_models.unet) == [16, 8]
    for side in (16, 8):
        with watch_attention(micro_models.unet, AttentionMaps(GROUPS, side)) as maps:
            predict(micro_models.unet, *given)
        found = maps.mean()
        torch.testing.assert_close(found.double(), slow_maps(micro_models, given, side), rtol=1e-4, atol=1e-5)
        assert found.requires_grad and found.min() >= 0 and found.sum(dim=0).max() <= 1


def test_watching_changes_nothing_and_ends_with_the_block(micro_models: Pipeline) -> None:
    given, unet = inputs(micro_models), micro_models.unet
    plain = predict(unet, *given)
    with watch_attention(unet, AttentionMaps(GROUPS, 8)) as maps:
        watched = predict(unet, *given)
        first = maps.mean()
        with torch.no_grad():
            predict(unet, -given[0], *given[1:])
        assert torch.equal(maps.mean(), first), "the first of several passes counts"
    assert torch.equal(plain, watched)
    processors = [p for p in unet.attn_processors.values() if isinstance(p, SharedPromptAttnProcessor)]
    assert processors and all(p.watcher is None for p in processors)


def test_the_gradient_is_the_same_with_gradient_checkpointing(micro: Pipeline) -> None:
    given = inputs(micro)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            micro.unet.train()
            micro.unet.enable_gradient_checkpointing()
        given[0].grad = None
        with watch_attention(micro.unet, AttentionMaps(GROUPS, 8)) as maps:
            out = predict(micro.unet, *given)
            (out.square().mean() + maps.mean().square().mean()).backward()
        gradients.append(given[0].grad)
    assert gradients[0] is not None and gradients[0].any()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-8)
