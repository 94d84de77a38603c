"""The curves of a run, each with what to look for in it."""

from collections.abc import Sequence
from dataclasses import dataclass

from train.figures import COLOURS, INK, blank, make_logarithmic, to_svg
from train.report.read import Story

MANY = 30
"""Points of a curve from which on it is drawn without marks."""


@dataclass(frozen=True)
class Panel:
    """A figure of several series over steps."""

    title: str
    lines: tuple[tuple[str, str], ...]
    """(series, what it is called)."""
    good: str
    """What it looks like in a run that goes well."""
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
    objectives = [Panel("Objectives", tuple((name, name.removeprefix("objective/")) for name in extra), "Of each step.")]
    found = []
    for panel in (*PANELS, *(objectives if extra else [])):
        curves: list[tuple[str, list[int], list[float]]] = []
        for series, label in panel.lines:
            steps, values = story.curve(series)
            if panel.log:
                kept = [(step, value) for step, value in zip(steps, values, strict=True) if value > 0]
                steps, values = [step for step, _ in kept], [value for _, value in kept]
            if len(steps) > 1 and all((steps, values) != curve[1:] for curve in curves):  # one line where two are the same
                curves.append((label, steps, values))
        if curves:
            found.append((panel, _draw(panel, curves)))
    return found


def _draw(panel: Panel, curves: Sequence[tuple[str, list[int], list[float]]]) -> str:
    figure, axes = blank(width=4.6, height=2.9)
    for index, (label, steps, values) in enumerate(curves):
        mark = "o" if len(steps) < MANY else None
        axes.plot(steps, values, label=label, linewidth=1.8, marker=mark, markersize=3, color=COLOURS[index % len(COLOURS)])
    if panel.log:
        make_logarithmic(axes)
    axes.set_xlabel("step")
    figure.legend(loc="outside lower center", ncols=min(3, len(curves)), frameon=False, labelcolor=INK, fontsize=9)
    return to_svg(figure, salt=panel.title)
