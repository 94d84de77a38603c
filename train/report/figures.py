"""The curves of a run, each with what to look for in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from softprompt.files import new_file
from train.log.series import display_name
from train.report.charts import COLOURS, INK, blank, cut_strips, make_logarithmic, to_svg
from train.report.read import Story

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MANY = 30
"""Points of a curve from which on it is drawn without marks."""


@dataclass(frozen=True)
class Panel:
    """A figure of several series over steps."""

    title: str
    lines: tuple[tuple[str, str], ...]
    """(series, label)."""
    good: str
    """Its looks in a run that goes well."""
    log: bool = False


PANELS = (
    Panel(
        "Loss",
        (("loss/train", "training"), ("loss/validation", "held out"), ("loss/original", "pretrained domain")),
        "Training and held-out loss fall and level off. Held-out rising while training falls is overfitting; the pretrained "
        "domain rising is forgetting. The training loss is weighted and of each step's own noise, so it lies elsewhere.",
        log=True,
    ),
    Panel(
        "KL to the pretrained model",
        (("loss/kl_to_pretrained", "where it is held"), ("kl/on_original", "on the pretrained domain")),
        "Rises from 0 as the model learns, then stands. In nats per latent element.",
        log=True,
    ),
    Panel(
        "Position on the path",
        (("curriculum/position", "position s"),),
        "0 is the pretrained prompt, the last waypoint the realistic one.",
    ),
    Panel(
        "Learning rates",
        (("learning_rate/prompt", "prompt"), ("learning_rate/lora", "LoRA")),
        "Warm-up, then the schedule; a part that does not train has no point.",
        log=True,
    ),
    Panel(
        "Gradient norms",
        (("gradient/norm_prompt", "prompt"), ("gradient/norm_lora", "LoRA")),
        "Before clipping. Steady or falling; a rise by orders of magnitude comes before a loss that is not finite.",
        log=True,
    ),
    Panel(
        "The prompt",
        (
            ("prompt_views_alike/mean_cosine", "views alike"),
            ("prompt_norm/most_to_path", "largest norm"),
            ("prompt_norm/least_to_path", "smallest norm"),
        ),
        "Views alike: mean cosine between the views' prompts; it falls where they part. Norms: of tokens, as shares of the "
        "path's; far from 1 are tokens that the model never saw.",
    ),
    Panel(
        "Sampled views",
        (("views/ssim", "SSIM"), ("views/copy_score", "copy score"), ("views/separation_ratio", "separation")),
        "SSIM rises; copy score falls toward 0 (1: each view copies the input); separation is 1 where the views differ as "
        "much as the true ones.",
    ),
)


def panels(story: Story) -> list[tuple[Panel, str]]:
    """The figures for which the run has points, as SVG."""
    extra = sorted({name for point in story.training for name in point if name.startswith("objective/")})
    objectives = [Panel("Objectives", tuple((name, name.removeprefix("objective/")) for name in extra), "At each step.")]
    found = []
    for panel in (*PANELS, *(objectives if extra else [])):
        if curves := _curves(panel, story):
            figure, axes = blank(width=4.6, height=2.9)
            _draw(axes, panel, curves)
            figure.legend(loc="outside lower center", ncols=min(3, len(curves)), frameon=False, labelcolor=INK, fontsize=9)
            found.append((panel, to_svg(figure, salt=panel.title)))
    return found


def picture(story: Story, path: Path) -> None:
    """A run at a glance, as a PNG: its losses, its views in numbers, its prompt, and views of two objects."""
    from matplotlib.figure import Figure

    objects = cut_strips(story.pictures["tiles"], views=len(story.slots), rows=3) if "tiles" in story.pictures else []
    rows = [*zip(("truth", "pretrained", "now"), objects[0], strict=True)] if objects else []
    if len(objects) > 1:
        rows += [("truth", objects[1][0]), ("now", objects[1][2])]
    heights = [3.2, 1.3 * len(rows)] if rows else [3.2]
    figure = Figure(figsize=(11, sum(heights)), layout="constrained", facecolor="white")
    above, *below = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False).flatten()
    for axes, title in zip(above.subplots(1, 3), ("Loss", "Sampled views", "The prompt"), strict=True):
        panel = next(panel for panel in PANELS if panel.title == title)
        curves = _curves(panel, story)
        axes.set_title(title, fontsize=10, loc="left", fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        if not curves:
            axes.text(0.5, 0.5, "one point or none", ha="center", transform=axes.transAxes)
            continue
        _draw(axes, panel, curves)
        axes.legend(frameon=False, fontsize=8)
        axes.tick_params(labelsize=8)
    for part in below:
        columns = ("input", *(display_name(name) for name in story.slots))
        for row, (axes, (name, strip)) in enumerate(zip(part.subplots(len(rows), 1), rows, strict=True)):
            axes.imshow(strip, interpolation="nearest")
            axes.set_axis_off()
            axes.text(-0.01, 0.5, name, ha="right", va="center", fontsize=9, transform=axes.transAxes)
            for place, column in enumerate(columns if row == 0 else ()):
                axes.text((place + 0.5) * strip.height, 0, column, ha="center", va="bottom", fontsize=9)
    with new_file(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def _curves(panel: Panel, story: Story) -> list[tuple[str, list[int], list[float]]]:
    """(label, steps, values) of what can be drawn as a line."""
    curves: list[tuple[str, list[int], list[float]]] = []
    for series, label in panel.lines:
        steps, values = story.curve(series)
        if panel.log:
            kept = [(step, value) for step, value in zip(steps, values, strict=True) if value > 0]
            steps, values = [step for step, _ in kept], [value for _, value in kept]
        if len(steps) > 1 and all((steps, values) != curve[1:] for curve in curves):  # one line where two are the same
            curves.append((label, steps, values))
    return curves


def _draw(axes: "Axes", panel: Panel, curves: Sequence[tuple[str, list[int], list[float]]]) -> None:
    for index, (label, steps, values) in enumerate(curves):
        mark = "o" if len(steps) < MANY else None
        axes.plot(steps, values, label=label, linewidth=1.8, marker=mark, markersize=3, color=COLOURS[index % len(COLOURS)])
    if panel.log:
        make_logarithmic(axes)
    axes.locator_params("x", integer=True)
    axes.set_xlabel("step")
