"""The page of a run: one HTML file that needs no other."""

import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from train.export.facelift import into_facelift
from train.log.series import ABLATION_PSNR, ABLATION_SSIM, HANDED_ON, VIEWS_FOLLOW, display_name
from train.options.groups import MICRO
from train.prompts.measure import drift, in_ranges, measure
from train.report.charts import chart, cut_strips, matrix_cells, strip_row
from train.report.figures import panels
from train.report.read import Story
from train.report.template import refuse_other_page, write_page
from train.state.folder import REPORT

OVERFITTED = 0.02
"""The report warns of overfitting where the lowest held-out loss is below the last one by more than this share."""


def write_report(story: Story, output: Path | None = None) -> tuple[Path, str]:
    """Write the page of a run, whole or not at all.

    output: where to; None: RUN/report.html. Returns: the page, and its headline.
    Raises: InputError for a folder that is no run, or where something lies that is no earlier page.
    """
    run, target = story.folder, output or story.folder / REPORT
    refuse_other_page(target, "report")
    command = f"python -m train.report {shlex.quote(str(run))}"
    if output is not None:
        command += f" --output {shlex.quote(str(output))}"
    context = _context(story) | {"command": command}
    write_page(target, "report", context)
    return target, str(context["headline"])


def _context(story: Story) -> dict[str, Any]:
    options = story.options
    return {
        "title": f"Run {story.folder.absolute().name}",
        "about": f"{_place(options['model'], 'The embedded model')} adapted to {_place(options['data.train'], 'its mice')}; "
        + ("finished" if story.finished else "not finished")
        + f", step {story.step} of {options['train.steps']}.",
        "headline": headline(story),
        "warnings": warnings(story),
        "columns": ["input", *(display_name(name) for name in story.slots)],
        "grid": _rows(story.pictures.get("tiles"), ("truth", "pretrained", "now"), story),
        "shown_step": story.shown["step"],
        "view_columns": [
            f"{kind}, {when}" for kind in ("loss", "PSNR (dB)", "SSIM") for when in ("step 0", f"step {story.shown['step']}")
        ],
        "views": view_rows(story),
        "worst": _worst(story),
        "ablation": _ablation(story),
        "prompt": _prompt(story),
        "settings": _settings(story),
        "changed": [(name, _value(default), _value(value)) for name, default, value in story.changed],
        "config": (story.folder / "config.yaml").read_text(encoding="utf-8"),
        "panels": [(panel, Markup(svg)) for panel, svg in panels(story)],
        "commands": commands(story),
    }


def headline(story: Story) -> str:
    """The results of the run in a sentence or two."""
    first, last, shown = story.first, story.last, story.shown
    if last is first:
        return "Nothing has been evaluated since the start, so there is nothing to compare yet."
    text = "The held-out loss was not finite at the end"
    if _finite(first["loss/validation"], last["loss/validation"]):
        before, now = first["loss/validation"], last["loss/validation"]
        verb = "fell" if now < before else "rose"
        text = f"The held-out loss {verb} from {before:.4g} to {now:.4g} ({now / before - 1:+.0%}) in {last['step']} steps"
    if _finite(first.get("views/psnr"), shown.get("views/psnr")):
        text += f", and the sampled views went from {first['views/psnr']:.1f} to {shown['views/psnr']:.1f} dB PSNR"
    text += "."
    if _finite(first.get("loss/original_pretrained"), last.get("loss/original")):
        times = last["loss/original"] / first["loss/original_pretrained"]
        text += f" On the original domain the loss is now {times:.2g} times what it was."
    return text


def warnings(story: Story) -> list[str]:
    """Warnings that a reader should see first."""
    found = [f"{name}: {words}" for name, words in story.warned.items()]
    best, last = story.best, story.last
    if not story.finished:
        found.append(f"The run is not finished: it stands at step {story.step} of {story.options['train.steps']}.")
    if _finite(best["loss/validation"], last["loss/validation"]):
        lower = 1 - best["loss/validation"] / last["loss/validation"]
        if best["step"] == 0 < last["step"]:
            found.append("On held-out objects no step was better than the pretrained model.")
        elif lower > OVERFITTED:
            found.append(
                f"The held-out loss was {lower:.0%} lower at step {best['step']} than at the end: the run has overfitted "
                f"since. What it was then is in {story.folder / 'export' / 'best'}."
            )
    if story.prompt is None:
        found.append("There is no export yet, so the prompt is not shown.")
    return found


def view_rows(story: Story) -> list[dict[str, Any]]:
    """Loss, PSNR and SSIM of each view at the start and at the newest previews; the view that came out worst is marked."""
    first, shown = story.first, story.shown
    psnr = {view: shown.get(f"views_psnr/{view}") for view in story.slots[1:]}
    known = [(value, view) for view, value in psnr.items() if value is not None]
    worst = min(known)[1] if known else None
    return [
        {
            "view": display_name(view),
            "worst": view == worst,
            "given": view == story.slots[0],
            "cells": [
                _number(point.get(f"{kind}/{view}"), form)
                for kind, form in (("loss_view", ".4f"), ("views_psnr", ".2f"), ("views_ssim", ".3f"))
                for point in (first, shown)
            ],
        }
        for view in story.slots
    ]


def _worst(story: Story) -> str:
    worst = next((row["view"] for row in view_rows(story) if row["worst"]), None)
    if worst is None:
        return "The views were not measured."
    return f"The worst view is {worst} (by PSNR; the input view is left out, since it is only copied)."


def _ablation(story: Story) -> dict[str, Any] | None:
    if not story.ablation:
        return None
    names = [name.split("/", 1)[1] for name in story.ablation if name.startswith(f"{ABLATION_PSNR}/")]
    psnr, ssim = ({n: story.ablation[f"{kind}/{n}"] for n in names} for kind in (ABLATION_PSNR, ABLATION_SSIM))
    objects = _rows(story.pictures.get("ablation-tiles"), ("truth", *names, HANDED_ON), story, most=1)  # the PNG has the others
    share = story.ablation[VIEWS_FOLLOW]
    return {
        "objects": objects,
        "rows": [{"name": display_name(name), "psnr": psnr[name], "ssim": ssim[name]} for name in names],
        "follow": f"In the last row of pictures each place has the next view's prompt: {share:.0%} of the views then are "
        f"nearer to the true view of that prompt than to that of their own place. 100 % means that the prompt alone decides "
        f"which view is drawn, 0 % that it does not matter.",
    }


def _prompt(story: Story) -> dict[str, Any] | None:
    if story.prompt is None or story.start is None:
        return None
    before, after = measure(story.start, story.views), measure(story.prompt, story.views)
    moved = drift(story.prompt, story.start, None)
    least = min(float(m.cosines.min()) for m in (before, after))
    sides = []
    for title, m in (("W_0, the pretrained prompt", before), ("E, as exported", after)):
        one, other, cosine = m.closest
        caption = f"Cosines between views: {title}. Closest: {display_name(one)} and {display_name(other)}, {cosine:.3f}."
        sides.append({"title": caption, "rows": matrix_cells(m.cosines, least)})
    most = ", ".join(map(str, sorted(moved.by_token.topk(3).indices.tolist())))
    views = [display_name(view) for view in story.views]
    changes = ", ".join(f"{view} {change:.0%}" for view, change in zip(views, moved.by_view.tolist(), strict=True))
    return {
        "views": views,
        "matrices": sides,
        "chart": chart("Change from W_0, by token, of the token's norm", moved.by_token, set(before.carriers)),
        "caption": f"Change from W_0 by token, mean over views, relative to the token's norm there. Marked: the tokens that "
        f"carry the view in W_0 ({in_ranges(before.carriers)}). Most changed: {most}. By view: {changes} of its norm.",
    }


def _settings(story: Story) -> list[tuple[str, str]]:
    options = story.options
    batch = f"{options['train.batch_size']} x {options['train.accumulation']} objects"
    _, speed = story.curve("speed/steps_per_second")
    pace = f", {sorted(speed)[len(speed) // 2]:.2g} a second" if speed else ""
    lora = "none" if options["lora.rank"] == 0 else f"rank {options['lora.rank']} on {', '.join(options['lora.targets'])}"
    learned = f"at {options['prompt.learning_rate']:g}" if options["prompt.learn"] else "not trained"
    held = f"weight {options['kl.weight']:g} on the {options['kl.domain']} domain" if options["kl.weight"] else "none"
    return [
        ("model", _place(options["model"], "the embedded model")),
        (
            "data",
            _place(options["data.train"], "the embedded mice") + f", held out: {options['data.val'] or 'a part of them'}",
        ),
        ("length", f"{options['train.steps']} steps of {batch}{pace}"),
        ("prompt", f"{' → '.join(options['prompt.waypoints'])}, learned {learned} ({options['prompt.carry']})"),
        ("LoRA", lora if options["lora.rank"] == 0 else f"{lora}, at {options['lora.learning_rate']:g}"),
        ("KL", held),
    ]


def commands(story: Story) -> list[tuple[str, str]]:
    """(purpose, command) of each next step, to be copied."""
    run, export, start = (
        shlex.quote(str(one)) for one in (story.folder, story.folder / "export", story.options["prompt.waypoints"][0])
    )
    model = "" if story.options["model"] == MICRO else f" --model {shlex.quote(str(story.options['model']))}"
    unet = f" --unet {shlex.quote(str(given))}" if (given := story.options.get("unet")) is not None else ""
    sample = f"python -m train.sample --pictures '[PICTURE.png]' --export {export}{model}{unet}"
    pretrained = "" if start == "facelift" else f" --pretrained {start}"
    found = []
    if not story.finished:
        found.append(("Go on with it:", f"python -m train.softprompt --resume {run}"))
    if story.prompt is not None:
        found += [
            ("Six views of pictures of your own:", f"{sample} --output views"),
            ("How much of prompt and LoRA to use:", f"{sample} --rows strengths{pretrained} --output strengths"),
            (
                "Into FaceLift, whose own prompt is kept beside it; --undo puts it back:",
                into_facelift(story.folder / "export"),
            ),
            (
                "The prompt in detail, beside the pretrained one:",
                f"python -m train.prompts show {start} {export}/clr_embeds.safetensors{model}",
            ),
        ]
    elif story.start is not None:
        found.append(("An export of its newest checkpoint:", f"python -m train.export {run} --output FOLDER"))
    samples, subject = (shlex.quote(str(story.options[name])) for name in ("data.train", "prompt.subject"))
    found.append(
        (
            "The untouched model's loss on these samples under each text: which waypoint to begin with:",
            f"python -m train.prompts probe --model {shlex.quote(str(story.options['model']))}{unet} --data.train {samples} "
            f"--subject {subject}",
        )
    )
    found.append(("The curves, live and to zoom into:", f"tensorboard --logdir {run}"))
    if story.finished:
        more = 2 * int(story.options["train.steps"])
        found.append(("Train it for longer:", f"python -m train.softprompt --resume {run} --train.steps {more}"))
    return found


def _rows(tiles: Path | None, names: Sequence[str], story: Story, most: int | None = None) -> list[list[dict[str, Any]]]:
    """Strips of pictures for each object, the first `most` of them; none without a file, or if its rows are others."""
    if tiles is None:
        return []
    objects = cut_strips(tiles, views=len(story.slots), rows=len(names))[:most]
    return [
        [
            strip_row(label, strip, alt=f"Object {number}: {label}")
            for label, strip in zip(map(display_name, names), strips, strict=True)
        ]
        for number, strips in enumerate(objects, start=1)
    ]


def _place(given: str, embedded: str) -> str:
    """A path, or what `micro` stands for there."""
    return embedded if given == MICRO else str(given)


def _value(value: Any) -> str:
    """A value as the command line takes it."""
    return json.dumps(value).replace('"', "") if not isinstance(value, str) else value


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _finite(*values: float | None) -> bool:
    return all(value is not None and math.isfinite(value) for value in values)
