"""An objective measured on held-out objects, at fixed noise and timesteps: the same in every run and at every evaluation."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from softprompt.data.batch import draw, seeded, spread_timesteps
from softprompt.model.conditioning import make_batch
from train.objectives.terms import Scene, Term

if TYPE_CHECKING:
    from train.setup import Job

OBJECTS = 4
"""Held-out objects that are looked at, at most; those that are compared with each other are in one batch."""


def measure_on_held_out(term: Term, job: "Job", position: float) -> dict[str, float]:
    """A term that reads the step's prediction: means of its loss and of all that it logs, by their names."""
    totals: dict[str, float] = {}
    scenes = 0
    for scene in held_out_scenes(job, position):
        with term.around(scene):
            predict(scene)
            loss = sum(float(part) for part in term.losses(scene))
        for name, value in {term.name: loss, **scene.series}.items():
            totals[name] = totals.get(name, 0.0) + float(value)
        scenes += 1
    return {name: total / scenes for name, total in totals.items()}


def held_out_scenes(job: "Job", position: float) -> Iterator[Scene]:
    """The first held-out objects, all at one of the validation's timesteps after the other."""
    config, length = job.config, len(job.pipeline.scheduler.alphas_cumprod)
    for timestep in spread_timesteps(config.monitor.validation_timesteps, length):
        encoded, draws = [], []
        for index in range(min(OBJECTS, len(job.held_out))):
            generator = seeded("held_out", index, timestep)
            encoded.append(job.held_out.get(index, generator))
            draws.append(
                draw(
                    generator,
                    encoded=encoded[-1],
                    num_timesteps=length,
                    references=[config.data.first_reference],
                    timestep=timestep,
                )
            )
        yield Scene(job, None, make_batch(job.pipeline, encoded, draws), step=0, position=position)


def predict(scene: Scene) -> None:
    """Give a scene its prediction, by the model as it is."""
    with scene.job.accelerator.autocast():
        scene.prediction = scene.job.adapted(*scene.inputs, scene.position)
