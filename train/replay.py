"""Do a step again whose numbers were not finite, and say where it comes from: `python -m train.replay INCIDENT`.

Each of its samples by itself, with the weights, noise and timestep that it had, then the other objectives on each batch; LoRA
dropout and the separation are left out.
"""

import dataclasses
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
    """Of each sample, in the incident's order, with the KL where the step held it."""
    objectives: list[tuple[str, float]] = field(default_factory=list)
    """What each batch of training objects gives for each of their series."""
    norms: dict[str, float] = field(default_factory=dict)
    """Of the gradients, by group, of all that."""
    first_layer: str | None = None


def _do_again(config: "Config", folder: Path, incident: dict[str, Any]) -> _Found:
    import torch
    from diffusers.training_utils import EMAModel

    from train.batches import Batches, Wanted, kl_domains
    from train.loop import make_schedule
    from train.objectives.terms import Scene
    from train.setup import make_accelerator, prepare
    from train.state.checkpoint import DamagedError, Parts, read_state, restore
    from train.step import losses, other_objectives

    job = prepare(config, make_accelerator(config), resumed=True)
    ema = None if config.train.ema_decay is None else EMAModel(job.adapted.all_trainable().values())
    try:
        state = read_state(folder)
    except DamagedError as error:
        raise InputError(f"{folder}: {error}") from error
    schedule = make_schedule(config, job.optimizer)
    restore(state, Parts(job.adapted, job.optimizer, schedule, ema, scaler=None, objectives=job.objectives))
    if job.objectives.begins(incident["step"]):  # what they made for that step is in the run's folder
        job.objectives.begin(job, folder.parents[1], incident["step"], incident["position"], stopped=lambda: False)
    found = _Found()

    def watch(name: str) -> Any:
        def look(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            del module, inputs
            tensors = [t for t in (output if isinstance(output, tuple) else [output]) if isinstance(t, torch.Tensor)]
            if found.first_layer is None and not all(bool(t.isfinite().all()) for t in tensors):
                found.first_layer = name

        return look

    for name, module in job.adapted.named_modules():
        if not list(module.children()):
            module.register_forward_hook(watch(name))
    replay = None if job.original is None else job.original.replay
    # Shared out as it was: the run may have been resumed with another batch size since.
    split = {name: incident[name] for name in ("batch_size", "accumulation")}
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **split))
    domains = kl_domains(config, incident["step"])
    kl_share = incident["kl_weight"] * config.kl.every / max(1, len(domains))
    for batch in incident["batches"]:
        job.batches = batches = Batches(
            config, job.pipeline, job.train, replay, process=batch["process"], processes=incident["processes"]
        )
        wanted = Wanted(incident["step"], batch["part"], incident["lowest_timestep"], batch["domain"] == "original")
        if batches.names(wanted) != batch["samples"]:
            raise InputError(f"{folder}: its samples are not those of data.train any more; give the data as it was")
        made = batches.make(wanted)
        for index in range(len(made.timesteps)):
            scene = Scene(job, wanted, made.only(index), incident["step"], incident["position"])
            fit, kl = losses(scene, with_kl=batch["domain"] in domains)
            total = kl_share * kl.mean() + (config.loss.weight * fit if batch["domain"] == "new" else 0)
            found.losses.append(float(total.detach()))
            total.backward()  # without fp16's scaler, so that the norms are the gradients' own
        if batch["domain"] == "new":
            scene = Scene(job, wanted, made, incident["step"], incident["position"])
            found.objectives += other_objectives(scene).items()
    for group, parameters in job.adapted.trainable().items():
        gradients = [p.grad.norm() for p in parameters.values() if p.grad is not None]
        found.norms[group] = float(torch.stack(gradients).norm()) if gradients else 0.0
    return found


if __name__ == "__main__":
    sys.exit(main())
