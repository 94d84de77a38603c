"""Repeat a step whose numbers were not finite, and find its sample and layer: `python -m train.replay INCIDENT`.

Each of its samples by itself, with the weights, noise and timestep that it had, then the other objectives on each batch; LoRA
dropout and the separation are left out.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt.errors import InputError
from train.cli import FAILED, PlainParser, run_command

if TYPE_CHECKING:
    from train.options.config import Config


def main(argv: Sequence[str] | None = None) -> int:
    """Returns: 0 where all is finite this time, 1 where it is not again, 2 for bad input."""
    parser = PlainParser(
        prog="python -m train.replay",
        description=__doc__,
        epilog="Options of train.softprompt may follow, to try a remedy: python -m train.replay RUN/incidents/step-000120 "
        "--train.precision bf16. Nothing is written, but for sets of views that an objective needs and RUN/samples lacks.",
    )
    parser.add_argument("incident", type=Path, help="Folder RUN/incidents/step-N that a run has left.")
    given, options = parser.parse_known_args(argv)
    return run_command(lambda: replay(given.incident, options), interrupted="interrupted")


def replay(folder: Path, options: Sequence[str]) -> int:
    """See `main`. Raises: InputError."""
    from train.options.command_line import parse
    from train.state.incidents import read_incident

    folder = folder.resolve()
    incident = read_incident(folder)
    step, batches = incident["step"], incident["batches"]
    config = parse(["--config", str(folder.parents[1] / "config.yaml"), *options]).config
    print(f"step {step} of {folder.parents[1]}: {incident['not_finite']} ({incident['precision']})\n")
    found = _do_again(config, folder, incident)
    print(f"{'sample':24s} {'domain':9s} {'timestep':>8s} {'reference':>9s} {'loss':>12s}")
    rows = [(b["domain"], *one) for b in batches for one in zip(b["samples"], b["timesteps"], b["references"], strict=True)]
    for (domain, name, timestep, reference), loss in zip(rows, found.losses, strict=True):
        print(f"{name:24s} {domain:9s} {timestep:8d} {reference:9d} {loss:12.5g}")
    if found.first_layer is not None:
        print(f"\nthe first layer whose output is not finite: {found.first_layer}")
    for name, value in found.objectives:
        print(f"objective/{name}: {value:.5g}")
    for name, norm in found.norms.items():
        print(f"gradient norm of {name}: {norm:.5g}")
    numbers = [*found.losses, *(value for _, value in found.objectives), *found.norms.values()]
    sound = found.first_layer is None and all(map(math.isfinite, numbers))
    print("all finite this time" if sound else "not finite again")
    return 0 if sound else FAILED


@dataclass
class _Found:
    losses: list[float] = field(default_factory=list)
    """Loss of each sample, in the incident's order, with the KL if the step had it."""
    objectives: list[tuple[str, float]] = field(default_factory=list)
    """Values of each batch of training objects, by series."""
    norms: dict[str, float] = field(default_factory=dict)
    """Gradient norm of each group."""
    first_layer: str | None = None


def _do_again(config: "Config", folder: Path, incident: dict[str, Any]) -> _Found:
    import torch
    from diffusers.training_utils import EMAModel

    from train.batches import Batches, Wanted
    from train.loop import make_schedule
    from train.setup import make_accelerator, prepare
    from train.state.checkpoint import DamagedError, Parts, read_state, restore
    from train.step import denoising_and_kl, objectives_alone, step_batch

    step, position = incident["step"], incident["position"]
    job = prepare(config, make_accelerator(config), resumed=True)
    trainer, adapted = job.trainer, job.adapted
    ema = None if config.train.ema_decay is None else EMAModel(adapted.all_trainable().values())
    try:
        state = read_state(folder)
    except DamagedError as error:
        raise InputError(f"{folder}: {error}") from error
    schedule = make_schedule(config, trainer.optimizer)
    restore(state, Parts(adapted, trainer.optimizer, schedule, ema, scaler=None, objectives=trainer.objectives))
    for term in trainer.objectives.begins(step):  # what they prepared for that step is in the run's folder
        term.begin(trainer.context, folder.parents[1], step, position, stopped=lambda: False)
    found = _Found()

    def watch(name: str) -> Any:
        def look(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            del module, inputs
            tensors = [t for t in (output if isinstance(output, tuple) else [output]) if isinstance(t, torch.Tensor)]
            if found.first_layer is None and not all(bool(t.isfinite().all()) for t in tensors):
                found.first_layer = name

        return look

    for name, module in adapted.named_modules():
        if not list(module.children()):
            module.register_forward_hook(watch(name))
    domains = trainer.kl_domains(step)
    kl_share = incident["kl_weight"] * config.kl.every / max(1, len(domains))
    for one in incident["batches"]:
        trainer.batches = Batches(
            job.pipeline,
            job.train,
            job.replay,
            seed=config.train.seed,
            batch_size=incident["batch_size"],  # the run may have been resumed with another one since
            accumulation=incident["accumulation"],
            references=trainer.context.references,
            drop_rate=trainer.context.drop_rate,
            process=one["process"],
            processes=incident["processes"],
        )
        wanted = Wanted(step, one["part"], incident["lowest_timestep"], one["domain"] == "original")
        if trainer.batches.names(wanted) != one["samples"]:
            raise InputError(f"{folder}: its samples are not those of data.train any more; give the data as it was")
        made = trainer.batches.make(wanted)
        for index in range(len(made.timesteps)):
            batch = step_batch(trainer, wanted, made.only(index), step, position)
            denoising, kl = denoising_and_kl(trainer, batch, with_kl=one["domain"] in domains)
            total = kl_share * kl.mean() + (config.loss.weight * denoising if one["domain"] == "new" else 0)
            found.losses.append(float(total.detach()))
            total.backward()  # without fp16's scaler, so that the norms are the gradients' own
        if one["domain"] == "new":
            found.objectives += objectives_alone(trainer, step_batch(trainer, wanted, made, step, position)).items()
    for group, parameters in adapted.trainable().items():
        gradients = [p.grad.norm() for p in parameters.values() if p.grad is not None]
        found.norms[group] = float(torch.stack(gradients).norm()) if gradients else 0.0
    return found


if __name__ == "__main__":
    sys.exit(main())
