"""Random draws for an object, their order, and batches of several objects."""

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from softprompt.data.batch import Draw, EncodedViews, draw, rotate_views, seeded, view_order
from softprompt.model.conditioning import class_labels, make_batch
from softprompt.model.pipeline import Pipeline


def encoded(pipeline: Pipeline, seed: int = 0) -> EncodedViews:
    generator = torch.Generator().manual_seed(seed)
    mean, std = torch.randn(2, 6, *pipeline.latent_shape, generator=generator)
    return EncodedViews(mean, std.abs(), torch.randn(6, pipeline.image_encoder.config.projection_dim, generator=generator))


def drawn(pipeline: Pipeline, seed: int = 0, **options: object) -> Draw:
    return draw(seeded("test", seed), encoded=encoded(pipeline), num_timesteps=1000, **options)


def differing(a: Draw, b: Draw) -> set[str]:
    pairs = {f.name: (getattr(a, f.name), getattr(b, f.name)) for f in fields(Draw)}
    return {name for name, (x, y) in pairs.items() if not (torch.equal(x, y) if isinstance(x, Tensor) else x == y)}


def test_draws_come_from_the_generator_alone_in_a_fixed_order(micro_models: Pipeline) -> None:
    found = drawn(micro_models, references=(0, 2, 5), drop_rate=0.3)
    torch.manual_seed(99)
    assert not differing(found, drawn(micro_models, references=(0, 2, 5), drop_rate=0.3))
    generator = seeded("test", 0)
    assert found.timestep == int(torch.randint(1000, (), generator=generator))
    assert found.reference == (0, 2, 5)[int(torch.randint(3, (), generator=generator))]
    p = float(torch.rand((), generator=generator))
    assert (found.keep_label, found.keep_latents) == (not p < 0.6, not 0.3 <= p < 0.9)
    latents, embeds = encoded(micro_models).mean.shape, encoded(micro_models).embeds.shape
    for noise, shape in [(found.target_noise, latents), (found.noise, latents), (found.label_noise, embeds)]:
        assert torch.equal(noise, torch.randn(shape, generator=generator))


def test_another_key_draws_something_else(micro_models: Pipeline) -> None:
    noises = {"target_noise", "noise", "label_noise"}
    assert differing(drawn(micro_models, 0), drawn(micro_models, 1)) >= noises
    keys = [(1, 23), (12, 3), (1, 2, 3), (123,), ("1", "23", "")]
    assert len({float(torch.rand((), generator=seeded(*key))) for key in keys}) == len(keys)
    assert seeded(7, "val").initial_seed() == seeded(7, "val").initial_seed()


def test_a_fixed_timestep_changes_no_other_draw(micro_models: Pipeline) -> None:
    options = {"references": (0, 1, 2, 3), "drop_rate": 0.1}
    free, fixed = drawn(micro_models, **options), drawn(micro_models, **options, timestep=123)
    assert fixed.timestep == 123 and differing(free, fixed) == {"timestep"}


def test_timesteps_cover_the_whole_schedule(micro_models: Pipeline) -> None:
    small = encoded(micro_models)
    steps = {draw(seeded(i), encoded=small, num_timesteps=4).timestep for i in range(60)}
    assert steps == {0, 1, 2, 3}


def test_every_reference_asked_for_is_drawn_and_no_other(micro_models: Pipeline) -> None:
    assert {drawn(micro_models, seed, references=(1, 4)).reference for seed in range(30)} == {1, 4}
    assert {drawn(micro_models, seed).reference for seed in range(30)} == {0}


def test_conditions_are_kept_unless_a_rate_is_given(micro_models: Pipeline) -> None:
    draws = [drawn(micro_models, seed) for seed in range(30)]
    assert all(d.keep_label and d.keep_latents for d in draws)
    draws = [drawn(micro_models, seed, drop_rate=1 / 3) for seed in range(30)]
    assert {(d.keep_label, d.keep_latents) for d in draws} == {(False, True), (False, False), (True, False)}


@pytest.mark.parametrize("reference", [0, 1, 5])
def test_the_reference_comes_first_and_its_prompt_with_it(micro_models: Pipeline, reference: int) -> None:
    one, turn = encoded(micro_models), drawn(micro_models, references=(reference,))
    batch = make_batch(micro_models, [one], [turn])
    scale = micro_models.vae.config.scaling_factor
    order = [(reference + slot) % 6 for slot in range(6)]
    assert batch.order.tolist() == [order]
    for slot, view in enumerate(order):
        target = (one.mean[view] + one.std[view] * turn.target_noise[view]) * scale
        torch.testing.assert_close(batch.latents[0, slot], target)
        torch.testing.assert_close(batch.given[0, slot], one.mean[reference] * scale)
    expected = class_labels(micro_models, one.embeds[reference].expand(6, -1), turn.label_noise)
    torch.testing.assert_close(batch.labels[0], expected)


def test_objects_are_put_together_each_with_its_own_draws(micro_models: Pipeline) -> None:
    objects = [encoded(micro_models, seed) for seed in (0, 1)]
    turns = [drawn(micro_models, 0, references=(2,)), drawn(micro_models, 1, references=(4,))]
    together = make_batch(micro_models, objects, turns)
    alone = [make_batch(micro_models, [o], [t]) for o, t in zip(objects, turns, strict=True)]
    for field in fields(together):
        torch.testing.assert_close(getattr(together, field.name), torch.cat([getattr(a, field.name) for a in alone]))
    assert together.timesteps.tolist() == [t.timestep for t in turns]


def test_the_timestep_is_shared_by_an_object_s_views_and_the_noise_is_not(micro_models: Pipeline) -> None:
    batch = make_batch(micro_models, [encoded(micro_models)] * 2, [drawn(micro_models, seed) for seed in (0, 1)])
    assert batch.timesteps.shape == (2,)
    noise = batch.noise.flatten(0, 1).flatten(1)
    assert (torch.cdist(noise, noise) + 1e9 * torch.eye(12)).min() > 1, "two views have the same noise"


@pytest.mark.parametrize(("keep_label", "keep_latents"), [(True, True), (True, False), (False, True), (False, False)])
def test_a_dropped_condition_is_zero_and_everything_else_is_as_it_was(
    micro_models: Pipeline, keep_label: bool, keep_latents: bool
) -> None:
    objects = [encoded(micro_models, seed) for seed in (0, 1)]
    whole = [drawn(micro_models, seed) for seed in (0, 1)]
    full = make_batch(micro_models, objects, whole)
    found = make_batch(micro_models, objects, [replace(whole[0], keep_label=keep_label, keep_latents=keep_latents), whole[1]])
    assert full.labels.abs().amax(dim=2).all() and full.given.abs().amax(dim=(2, 3, 4)).all()
    assert torch.equal(found.labels[0], full.labels[0] * keep_label)
    assert torch.equal(found.given[0], full.given[0] * keep_latents)
    for name in ("latents", "noise", "timesteps", "order"):
        assert torch.equal(getattr(found, name), getattr(full, name)), name
    assert torch.equal(found.labels[1], full.labels[1]) and torch.equal(found.given[1], full.given[1])


@pytest.mark.parametrize("reference", range(6))
def test_rotating_puts_the_reference_first_and_keeps_the_ring(reference):
    order = view_order(reference, 6)
    assert order.dtype == torch.int64
    assert order.tolist() == [*range(reference, 6), *range(reference)]
    x = torch.arange(12).reshape(6, 2)
    assert torch.equal(rotate_views(x, reference), torch.roll(x, -reference, dims=0))
