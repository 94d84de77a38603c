"""Draw the figure of docs/guide.md from a run that kept its checkpoints: `python docs/formula.py RUN docs/formula.svg`.

Left, the prompt of one view in two coordinates: along the line from W_0 to W_1, and away from it. Right, the position s, and
the distance of each view's prompt from its start.
"""

import sys
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from softprompt.files import new_file
from softprompt.prompt.templates import view_names
from train.log.series import read_series
from train.options.command_line import parse
from train.state.checkpoint import read_state
from train.state.folder import list_checkpoints

VIEW = 2
"""Index of the view shown: right, whose prompt moves far."""
SHOWN = 20
"""Step at which the parallelogram is drawn."""
PATH, LEARNED, EFFECTIVE = "#666666", "#d55e00", "#0072b2"
VIEW_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def trace(run: Path) -> tuple[float, list[tuple[int, float, float]]]:
    """Length of the line from W_0 to W_1, and for each kept checkpoint (step, P along the line, P away from it)."""
    points = [(0, 0.0, 0.0)]
    length = 0.0
    for folder in list_checkpoints(run):
        state = read_state(folder)
        start, target = state["waypoints"][:2, VIEW].double()
        moved = state["trainable"]["prompt.learned"][VIEW].double() - start
        length = float((target - start).norm())
        along = float((moved * (target - start)).sum() / length)
        points.append((state["step"], along, max(0.0, float(moved.norm() ** 2) - along**2) ** 0.5))
    return length, points


def draw_plane(axes: Axes, length: float, points: list[tuple[int, float, float]], positions: dict[int, float]) -> None:
    """Draw W_0, W_1, the path between them, the learned P and the prompt E that the UNet sees."""
    axes.plot([0, length], [0, 0], color=PATH, linewidth=2, zorder=1)
    learned = [(along, off) for _, along, off in points]
    effective = [(positions[step] * length + along, off) for step, along, off in points]
    for places, colour, name in ((learned, LEARNED, "P"), (effective, EFFECTIVE, "E(s)")):
        axes.plot(*zip(*places, strict=True), "o-", color=colour, markersize=3.5, linewidth=1.3, zorder=3)
        axes.annotate(name, places[-1], xytext=(6, 6), textcoords="offset points", color=colour, fontsize=13, fontweight="bold")
    at = min(range(len(points)), key=lambda i: abs(points[i][0] - SHOWN))
    step, (p, q) = points[at][0], learned[at]
    foot = positions[step] * length
    for tail, head, colour in (
        ((0, 0), (p, q), LEARNED),
        ((foot, 0), effective[at], LEARNED),
        ((0, 0), (foot, 0), PATH),
        ((p, q), effective[at], PATH),
    ):
        arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.1, "linestyle": "--", "shrinkA": 0, "shrinkB": 2}
        axes.annotate("", head, tail, arrowprops=arrow, zorder=2)
    axes.annotate("P − W$_0$", (foot, q / 2), xytext=(6, 0), textcoords="offset points", color=LEARNED, fontsize=10)
    axes.annotate(f"path(s)\ns = {positions[step]:.2g}", (foot, 0), xytext=(0, -7), textcoords="offset points", color=PATH,
                  fontsize=10, ha="center", va="top")  # fmt: skip
    axes.annotate(f"step {step}", effective[at], xytext=(7, -3), textcoords="offset points", color=EFFECTIVE, fontsize=9)
    axes.annotate(
        f"step {points[-1][0]}", effective[-1], xytext=(8, -9), textcoords="offset points", color=EFFECTIVE, fontsize=9
    )
    for place, name, what in (((0, 0), "W$_0$", "FaceLift's text"), ((length, 0), "W$_1$", "realistic text")):
        axes.plot(*place, "s", color="black", markersize=6, zorder=4)
        axes.annotate(f"{name}\n{what}", place, xytext=(0, -8), textcoords="offset points", ha="center", va="top", fontsize=10)
    axes.set_xlim(-0.28 * length, 1.4 * length)
    highest = max(q for _, q in learned)
    axes.set_ylim(-0.22 * highest, 1.12 * highest)
    axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= highest])
    axes.set_xlabel("along the line from W$_0$ to W$_1$")
    axes.set_ylabel("off that line")
    axes.set_title(f"the prompt of the view “{view_names(6)[VIEW]}”: 77 x 1024 numbers, seen as two", fontsize=11)


def draw_series(position: Axes, drift: Axes, series: list[dict[str, float]]) -> None:
    """Draw s, and the distance of each view's prompt from W_0, over the steps."""
    paced = [(p["step"], p["curriculum/position"]) for p in series if "curriculum/position" in p]
    position.plot(*zip(*paced, strict=True), color=PATH, linewidth=2)
    position.set_ylim(-0.05, 1.1)
    position.set_title("position s, set by the curriculum", fontsize=11)
    for name, colour in zip(view_names(6), VIEW_COLOURS, strict=True):
        key = f"prompt_drift_from_start/{name}"
        drift.plot(
            *zip(*((p["step"], p[key]) for p in series if key in p), strict=True), color=colour, label=name, linewidth=1.3
        )
    drift.set_ylim(0, None)
    drift.legend(fontsize=8, ncols=2, loc="lower right", frameon=False)
    drift.set_title("‖E − W$_0$‖ / ‖W$_0$‖", fontsize=11)
    drift.set_xlabel("step")


def main(run: Path, output: Path) -> None:
    """Draw the figure. run: a run with two waypoints, `carry: keep`, `lerp` and all its checkpoints."""
    config = parse(["--config", str(run / "config.yaml")]).config
    assert len(config.prompt.waypoints) == 2 and config.prompt.carry == "keep" and config.prompt.interpolation == "lerp"
    series = read_series(run)
    positions = {p["step"]: p["curriculum/position"] for p in series if "curriculum/position" in p}
    length, points = trace(run)
    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=[1.35, 1])
    plane, position, drift = (figure.add_subplot(place) for place in (grid[:, 0], grid[0, 1], grid[1, 1]))
    positions.setdefault(0, 0.0)
    draw_plane(plane, length, points, positions)
    draw_series(position, drift, series)
    for axes in (plane, position, drift):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    # A date would make each file different.
    metadata = {"Date": None} if output.suffix == ".svg" else {}
    with rc_context({"svg.hashsalt": "formula"}), new_file(output) as partial:
        figure.savefig(partial, format=output.suffix[1:], facecolor="white", dpi=150, metadata=metadata)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
