"""A picture of a pilot: learning curves over compute, and what came of them on the test cases beside the site."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dinoscope.evaluate.comparing import SCORES, Row, TaskComparison
from dinoscope.evaluate.figures import measure_name
from dinoscope.evaluate.pilot import BASE, Arm, Point
from dinoscope.evaluate.scores import MEASURES
from dinoscope.files import atomic_path
from dinoscope.visualize.curves import RUN_COLORS

__all__ = ["draw_pilot"]

_DPI = 150
_GREY = "#8a929b"


def draw_pilot(
    tasks: Sequence[TaskComparison],
    primary: str | None,
    arms: Sequence[Arm],
    curves: Mapping[str, Sequence[Point]],
    output: Path,
    *,
    margin: float,
) -> None:
    """Saves a PNG.

    Args:
        tasks: Comparisons of all tasks.
        primary: TASK/MEASURE that the advice rests on; None where nothing could be compared.
        arms: Of the pilot.
        curves: Run -> its learning curve.
        output: The PNG.
        margin: Differences within it do not matter; the band around zero and around the starting weights.
    """
    colors = {arm.run: RUN_COLORS[index % len(RUN_COLORS)] for index, arm in enumerate(arms)}
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        task = next((task for task in tasks if primary and primary.startswith(f"{task.task}/")), None)
        has_sites = task is not None and any("site_readout" in of for of in task.numbers.values())
        figure = Figure(figsize=(11 if has_sites else 8.8, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        left, middle, *sites = figure.subplots(1, 2 + has_sites, width_ratios=[1.3, 1, 0.7][: 2 + has_sites])
        _draw_curves(left, curves, colors, margin)
        _draw_scores(middle, sites, task, primary, colors, margin)
        with atomic_path(output) as temporary:
            figure.savefig(temporary, dpi=_DPI, metadata={"Software": None})


def _draw_curves(axes: Axes, curves: Mapping[str, Sequence[Point]], colors: Mapping[str, str], margin: float) -> None:
    """Differences from the start on the selection cases, with their paired intervals."""
    axes.axhspan(-margin, margin, color=_GREY, alpha=0.2, linewidth=0)
    axes.axhline(0, color=_GREY, linewidth=0.8)
    measures = {point.measure for points in curves.values() for point in points}
    most = max((point.petaflops for points in curves.values() for point in points), default=0.0)
    exponent = 15 if not most else 3 * math.floor((15 + math.log10(most)) / 3)
    for number, (run, points) in enumerate(curves.items()):
        if not points:
            continue
        shift = 1 + 0.012 * (number - (len(curves) - 1) / 2)  # so that bars of arms do not lie upon each other
        compute = [point.petaflops * 10 ** (15 - exponent) * shift for point in points]
        differences = [point.difference for point in points]
        below = [point.difference - point.low for point in points]
        above = [point.high - point.difference for point in points]
        axes.errorbar(
            compute, differences, [below, above], color=colors[run], marker="o", markersize=3, linewidth=1.2,
            elinewidth=0.8, capsize=2, label=run,
        )  # fmt: skip
    asked = {"knn": "5-NN, balanced accuracy", "dense": "dense probe, mean IoU"}
    axes.set_title(
        f"selection cases, while training\n({', '.join(asked[name] for name in sorted(measures))})", fontsize=9
    )
    axes.set_xlabel(f"compute of one process, 1e{exponent} operations")
    axes.set_ylabel("difference from the start, 95 % interval")
    if measures:
        axes.legend(frameon=False, fontsize=8)


def _draw_scores(
    scores: Axes,
    sites: Sequence[Axes],
    task: TaskComparison | None,
    primary: str | None,
    colors: Mapping[str, str],
    margin: float,
) -> None:
    rows: list[Row] = []
    if task is not None:
        measure = primary.removeprefix(f"{task.task}/") if primary else ""
        first = SCORES[task.kind][0]
        rows = [row for row in task.rows if (row.measure, row.score) == (measure, first) and row.seen != "yes"]
    if task is None or not rows:
        scores.set_title("nothing could be compared\non cases held out", fontsize=9)
        for axes in sites:
            axes.set_visible(False)
        return
    names = [row.model for row in rows]
    for place, row in enumerate(rows):
        color = colors.get(row.model, "#000000" if row.model == BASE else _GREY)
        if row.model == BASE:
            scores.axvspan(row.value - margin, row.value + margin, color=_GREY, alpha=0.2, linewidth=0)
        scores.plot(row.value, place, "o", color=color, markersize=4)
        if row.low is not None and row.high is not None:
            scores.plot([row.low, row.high], [place, place], color=color, linewidth=1.4)
    scores.set_yticks(range(len(names)), names)
    scores.set_ylim(len(names) - 0.5, -0.5)
    score = rows[0].score
    scores.set_title(f"test cases, at the end\n{task.task}, {measure_name(rows[0].measure)}", fontsize=9)
    name = MEASURES[score].name if score in MEASURES else "mean IoU"
    scores.set_xlabel(f"{name}, {rows[0].cases} cases")
    for axes in sites:
        _draw_sites(axes, task, names, colors)


def _draw_sites(axes: Axes, task: TaskComparison, names: Sequence[str], colors: Mapping[str, str]) -> None:
    told = {name: task.numbers.get(name, {}).get("site_readout") for name in names}
    for place, name in enumerate(names):
        if told[name] is not None:
            color = colors.get(name, "#000000" if name == BASE else _GREY)
            axes.plot(told[name], place, "s", color=color, markersize=5)
    chances = [of["site_chance"] for of in task.numbers.values() if "site_chance" in of]
    axes.axvline(chances[0], color=_GREY, linestyle=":", linewidth=1)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), [""] * len(names))
    axes.set_title("how well the site is told\nwithin a class (dotted: chance)", fontsize=9)
    axes.set_xlabel("balanced accuracy")
