"""Objectives evaluated on held-out objects, at fixed noise and timesteps: the same in every run and at every evaluation."""

from collections.abc import Iterator

from softprompt.data.batch import draw, seeded
from softprompt.model.conditioning import make_batch
from train.objectives.terms import Context, StepBatch, Term

OBJECTS = 4
"""Most held-out objects that are evaluated; a term that compares objects has them in one batch."""


def evaluate_on_held_out(term: Term, context: Context, position: float) -> dict[str, float]:
    """Means of the loss and of all logged values, by name, of a term that reads the prediction."""
    totals: dict[str, float] = {}
    batches = 0
    for batch in held_out_batches(context, position):
        with term.around(batch):
            with context.accelerator.autocast():
                batch.prediction = context.adapted(*batch.inputs, position)
            loss = sum(float(part) for part in term.losses(batch))
        for name, value in {term.name: loss, **batch.series}.items():
            totals[name] = totals.get(name, 0.0) + float(value)
        batches += 1
    return {name: total / batches for name, total in totals.items()}


def held_out_batches(context: Context, position: float) -> Iterator[StepBatch]:
    """The first held-out objects, in one batch for each of the validation's timesteps."""
    length = len(context.pipeline.scheduler.alphas_cumprod)
    for timestep in context.held_out_timesteps:
        encoded, draws = [], []
        for index in range(min(OBJECTS, len(context.held_out))):
            generator = seeded("held_out", index, timestep)
            encoded.append(context.held_out.get(index, generator))
            draws.append(
                draw(
                    generator,
                    encoded=encoded[-1],
                    num_timesteps=length,
                    references=[context.reference_view],
                    timestep=timestep,
                )
            )
        yield StepBatch(context, make_batch(context.pipeline, encoded, draws), step=0, position=position)
