"""Maps of the cross-attention: what they show, and that nothing changes for it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from softprompt.micro import MICRO_MODEL
from softprompt.model.adapted import predict
from softprompt.model.attention import AttentionMaps, SharedPromptAttnProcessor, attention_sides, watch_attention
from softprompt.model.loading import load_unet
from softprompt.model.pipeline import Pipeline

GROUPS = torch.tensor([[0.0, 1, 1, 0, 0], [0, 0, 0, 1, 0]])


@pytest.fixture
def micro(micro_models: Pipeline) -> Pipeline:
    """The packaged pipeline with a UNet of the test's own."""
    return replace(micro_models, unet=load_unet(MICRO_MODEL / "unet"))


def inputs(pipeline: Pipeline) -> tuple[Tensor, ...]:
    """Of two objects, one of them with its views turned; the prompt requires a gradient."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    order = torch.stack([torch.arange(6), torch.arange(6).roll(-2)])
    shape = (2, 6, *pipeline.latent_shape)
    labels = noise(2, 6, pipeline.unet.config["projection_class_embeddings_input_dim"])
    prompt = noise(6, GROUPS.shape[1], pipeline.prompt_width).requires_grad_()
    return prompt, noise(*shape), noise(*shape), torch.tensor([10, 700]), labels, order


def slow_maps(pipeline: Pipeline, given: tuple[Tensor, ...], side: int) -> Tensor:
    """[2, N, heads, side, side]: every layer's softmax over tokens, from what went into it."""
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


def test_the_maps_are_the_softmax_over_tokens_summed_by_group(micro: Pipeline) -> None:
    given = inputs(micro)
    assert attention_sides(micro.unet) == [16, 8]
    for side in (16, 8):
        with watch_attention(micro.unet, AttentionMaps(GROUPS, side)) as maps:
            predict(micro.unet, *given)
        found = maps.mean()
        torch.testing.assert_close(found.double(), slow_maps(micro, given, side), rtol=1e-4, atol=1e-5)
        assert found.requires_grad and found.min() >= 0 and found.sum(dim=0).max() <= 1


def test_to_look_changes_nothing_and_afterwards_nobody_looks(micro: Pipeline) -> None:
    given = inputs(micro)
    plain = predict(micro.unet, *given)
    with watch_attention(micro.unet, AttentionMaps(GROUPS, 8)):
        watched = predict(micro.unet, *given)
    assert torch.equal(plain, watched)
    processors = [p for p in micro.unet.attn_processors.values() if isinstance(p, SharedPromptAttnProcessor)]
    assert processors and all(p.watcher is None for p in processors)


def test_of_several_passes_the_first_counts(micro: Pipeline) -> None:
    given = inputs(micro)
    with watch_attention(micro.unet, AttentionMaps(GROUPS, 8)) as maps:
        predict(micro.unet, *given)
        first = maps.mean()
        with torch.no_grad():
            predict(micro.unet, -given[0], *given[1:])
    assert torch.equal(maps.mean(), first)


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
