"""Reads from a run's folder what its report shows."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from softprompt.errors import InputError, no_folder
from softprompt.prompt.embeddings import load_prompt
from train.log.series import is_ablation, is_evaluation, read_series
from train.options.config import Config, option_values
from train.options.yaml_file import read_yaml
from train.state.checkpoint import load_checkpoint
from train.state.folder import exported_prompt, list_checkpoints


@dataclass(frozen=True)
class Story:
    """A run, as its folder shows it."""

    folder: Path
    options: Mapping[str, Any]
    """Every option that it was given or left, by dotted name."""
    training: list[dict[str, Any]]
    """Points of training, by step."""
    evaluations: list[dict[str, Any]]
    """Points of validation and previews, by step; one or more."""
    ablation: Mapping[str, float]
    """Series of the ablation at the end; empty where there was none."""
    warned: Mapping[str, str]
    """Diagnostics that still warn, with the text of each warning."""
    start: Tensor | None
    """W_0 [V, T, D]; None where there is no checkpoint."""
    prompt: Tensor | None
    """E [V, T, D] as exported; None where nothing is."""
    pictures: Mapping[str, Path] = field(default_factory=dict)
    """`tiles` and `ablation-tiles`, of the newest step that has them."""

    @property
    def first(self) -> dict[str, Any]:
        """The evaluation at step 0."""
        return self.evaluations[0]

    @property
    def last(self) -> dict[str, Any]:
        """The newest evaluation."""
        return self.evaluations[-1]

    @property
    def shown(self) -> dict[str, Any]:
        """The newest evaluation with previews, or else the newest."""
        return next((p for p in reversed(self.evaluations) if p.get("views/psnr") is not None), self.last)

    @property
    def best(self) -> dict[str, Any]:
        """The evaluation of the lowest held-out loss."""
        return min(self.evaluations, key=_loss)

    @property
    def step(self) -> int:
        """The last step that it took."""
        return max(int(point["step"]) for point in (self.last, *self.training[-1:]))

    @property
    def finished(self) -> bool:
        """Whether it took all its steps."""
        return self.step >= int(self.options["train.steps"])

    @property
    def views(self) -> list[str]:
        """Their names, in the order of the loss's series."""
        return [name.split("/", 1)[1] for name in self.first if name.startswith("loss_view/")]

    @property
    def slots(self) -> list[str]:
        """The same in the order of the pictures, the one that was given first."""
        return [name.split("/", 1)[1] for name in self.first if name.startswith("views_psnr/")] or self.views

    @property
    def changed(self) -> list[tuple[str, Any, Any]]:
        """(option, default, value) where they differ."""
        defaults = option_values(Config())
        return [(name, defaults.get(name), value) for name, value in self.options.items() if value != defaults.get(name)]

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of a series, wherever it was measured."""
        points = [p for p in (*self.training, *self.evaluations) if p.get(name) is not None]
        points.sort(key=lambda point: int(point["step"]))
        return [int(point["step"]) for point in points], [float(point[name]) for point in points]


def read_story(run: Path) -> Story:
    """Raises: InputError for a folder that is no run, or without an evaluation."""
    if not (run / "config.yaml").is_file():
        raise InputError(f"{run}: holds no config.yaml; expected the folder of a run, e.g. runs/micro-001{no_folder(run)}")
    given = read_yaml(run / "config.yaml")
    if not isinstance(given, dict):
        raise InputError(f"{run / 'config.yaml'}: holds no options; expected them by name, as a run writes them")
    points = read_series(run)
    evaluations = [point for point in points if is_evaluation(point)]
    if not evaluations:
        raise InputError(f"{run}: has no evaluation yet, so there is nothing to report; a run makes one before its first step")
    ablated = [point for point in points if is_ablation(point)]
    state, damage = _newest_checkpoint(run)
    return Story(
        folder=run,
        options=option_values(Config()) | dict(_flat(given, "")),  # a run of an earlier version lacks some
        training=[point for point in points if not is_evaluation(point) and not is_ablation(point)],
        evaluations=evaluations,
        ablation={name: value for name, value in ablated[-1].items() if value is not None} if ablated else {},
        warned=(state["warned"] if state else {}) | damage,
        start=state["waypoints"][0] if state else None,
        prompt=_exported(run / "export", state),
        pictures=dict(_pictures(run)),
    )


def _newest_checkpoint(run: Path) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """A run's newest sound checkpoint, and a warning where all are damaged: the report is made without them."""
    if not list_checkpoints(run):
        return None, {}
    try:
        return load_checkpoint(run), {}
    except InputError as error:
        return None, {"checkpoints": str(error)}


def _exported(folder: Path, state: Mapping[str, Any] | None) -> Tensor | None:
    """The exported prompt. Raises: InputError where its file is damaged."""
    if state is None or not any((folder / f"clr_embeds.{suffix}").is_file() for suffix in ("safetensors", "pt")):
        return None
    views, _, width = state["waypoints"][0].shape
    return load_prompt(exported_prompt(folder, option="run"), num_views=views, width=width)


def _pictures(run: Path) -> Iterator[tuple[str, Path]]:
    for name in ("tiles", "ablation-tiles"):
        if found := list((run / "previews").glob(f"{name}-step-*.png")):
            yield name, max(found, key=lambda file: (len(file.name), file.name))  # six digits at least: longer is later


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _loss(point: Mapping[str, Any]) -> float:
    loss = point["loss/validation"]
    return float("inf") if loss is None else float(loss)
