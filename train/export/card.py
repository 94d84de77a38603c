"""README.md of an export: a model card as the Hugging Face Hub reads it, with picture, results and exact commands."""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from softprompt import __version__
from softprompt.errors import RunError
from softprompt.files import new_file
from train.export.lora import FORMATS
from train.export.read import Source
from train.export.write import has_lora
from train.log.series import OUTCOMES, is_evaluation, read_series
from train.options.config import Config, option_values
from train.options.groups import MICRO
from train.report.template import render

PICTURE = "views.png"
FACELIFT = "wlyu/OpenFaceLift"
"""FaceLift's weights on the Hub."""
FACELIFT_LICENCE = "https://github.com/weijielyu/FaceLift/blob/main/Adobe%20Research%20License%20v1.2.txt"


def write_card(source: Source, folder: Path) -> list[str]:
    """Write README.md, and beside it the run's newest preview grid up to that step, into an export that is otherwise whole.

    Returns: the parts that it lacks, each with the reason. Raises: RunError when it reads back differently.
    """
    without = []
    picture, rows = newest_grid(source), results(source)
    if picture is not None:
        with new_file(folder / PICTURE) as partial:
            shutil.copyfile(picture, partial)
    else:
        without.append(_reason("a picture", source, "its previews hold none up to this step"))
    if not rows:
        without.append(_reason("results", source, "its metrics.jsonl holds no evaluation up to this step"))
    data = front_matter(source, has_picture=picture is not None)
    context = _context(source, folder, rows, None if picture is None else _step_of(picture))
    body = render("export/card.md.jinja", context, escape=False)
    file = folder / "README.md"
    with new_file(file) as partial:
        partial.write_text(f"---\n{data.to_yaml()}\n---\n\n{body.strip()}\n", encoding="utf-8")
    if ModelCard.load(file).data.to_dict() != data.to_dict():
        raise RunError(f"export: {file} read back has another front matter than was written; this is a fault of the program")
    return without


def front_matter(source: Source, *, has_picture: bool) -> ModelCardData:
    """The metadata by which the Hub lists a model."""
    micro = source.metadata["model"] == MICRO
    licence: dict[str, Any] = (
        {"license": "apache-2.0"}
        if micro
        else {"license": "other", "license_name": "adobe-research-license", "license_link": FACELIFT_LICENCE}
    )
    base: dict[str, Any] = {} if micro else {"base_model": FACELIFT, "base_model_relation": "adapter"}
    grid = {"text": "true views, pretrained and adapted ones", "output": {"url": PICTURE}}
    shown: dict[str, Any] = {"widget": [grid]} if has_picture else {}
    lora = ["lora"] if has_lora(source.pipeline.unet) else []
    return ModelCardData(
        **base,
        library_name="diffusers",
        **licence,
        pipeline_tag="image-to-image",
        tags=["softprompt", "facelift", "multi-view", "novel-view-synthesis", "prompt-tuning", *lora],
        **shown,
    )


def newest_grid(source: Source) -> Path | None:
    """The newest preview grid of the run up to the step that is exported."""
    grids = [] if source.run is None else sorted((source.run / "previews").glob("held_out-step-*.png"))
    return max((grid for grid in grids if _step_of(grid) <= source.step), key=_step_of, default=None)


def results(source: Source) -> list[tuple[str, float, float, int]]:
    """(name, value at step 0, newest value, its step) of each outcome, up to the exported step, if measured at both."""
    points = [] if source.run is None else [p for p in read_series(source.run) if is_evaluation(p) and p["step"] <= source.step]
    found = []
    for name, words in {**OUTCOMES, "loss/original": "loss on the original domain"}.items():
        measured = [p for p in points if p.get(name) is not None]
        if len(measured) > 1 and measured[0]["step"] == 0:
            # An adapted model that a run began with is not the pretrained one.
            before = measured[0].get(f"{name}_pretrained", measured[0][name])
            found.append((words, float(before), float(measured[-1][name]), int(measured[-1]["step"])))
    return found


def _context(source: Source, folder: Path, rows: list[tuple[str, float, float, int]], grid_step: int | None) -> dict[str, Any]:
    config = source.config
    micro = source.metadata["model"] == MICRO
    changed = {} if config is None else _public(option_values(config))
    defaults = _public(option_values(Config()))
    return {
        "title": source.run.name if source.run is not None else source.folder.absolute().name,
        "version": __version__,
        "micro": micro,
        "step": source.step,
        "steps": None if config is None else config.train.steps,
        "position": source.metadata["position"],
        "last": len(source.metadata["waypoints"]) - 1,
        "averaged": source.averaged,
        "subject": None if config is None else config.prompt.subject,
        "waypoints": [_public(waypoint["given"]) for waypoint in source.metadata["waypoints"]],
        "picture": PICTURE if grid_step is not None else None,
        "grid_step": grid_step,
        "rows": [(words, f"{before:.4g}", f"{now:.4g}", step) for words, before, now, step in rows],
        "lora": source.pipeline.unet.peft_config["default"] if has_lora(source.pipeline.unet) else None,
        "has": {name: (folder / form.path).exists() for name, form in FORMATS.items()},
        "pipeline": (folder / "pipeckpts").is_dir(),
        "unet": 'MICRO_MODEL / "unet"' if micro else '"PIPECKPTS/unet"',
        "model": "" if micro else " --model PIPECKPTS",
        "changed": [
            (n, _cell(defaults.get(n)), _cell(v)) for n, v in changed.items() if v != defaults.get(n) and n != "output"
        ],
        "config": None if config is None else yaml.safe_dump(_public(asdict(config)), sort_keys=False, allow_unicode=True),
        "base": FACELIFT,
        "licence": FACELIFT_LICENCE,
    }


def _reason(what: str, source: Source, otherwise: str) -> str:
    return f"{what}: {source.folder} lies in no run's folder" if source.run is None else f"{what}: {otherwise}"


def _step_of(grid: Path) -> int:
    return int(grid.stem.rsplit("-", 1)[1])


def _public(value: Any) -> Any:
    """A setting without the folders of this machine: of a path the last part."""
    if isinstance(value, Mapping):
        return {name: _public(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_public(one) for one in value]
    is_path = isinstance(value, str) and re.search(r"[/\\]", value) and "{" not in value
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1] if is_path else value


def _cell(value: Any) -> str:
    """A value as a cell of a Markdown table."""
    return (value if isinstance(value, str) else json.dumps(value)).replace("|", "\\|").replace("\n", " ")
