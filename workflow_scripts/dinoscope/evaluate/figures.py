"""Scores of all models side by side, with their intervals; descriptive measures as bars, without a verdict."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dinoscope.evaluate.baseline_names import BASELINES
from dinoscope.evaluate.comparing import SCORES, Row, TaskComparison
from dinoscope.evaluate.robust_measures import SITE, change_of, clean_measure, has_direction, is_robustness
from dinoscope.evaluate.scores import MEASURES
from dinoscope.files import atomic_path
from dinoscope.visualize.curves import RUN_COLORS

__all__ = ["draw_task"]

_GREY = "#8a929b"
_COLUMNS = 4
_DPI = 150
_NAMES = {
    "linear": "linear probe", "attention_mil": "attention MIL",
    "ridge": "ridge regression", "cox": "Cox regression", "dense": "dense linear probe",
    SITE: "site within a class (dots: chance)",
}  # fmt: skip
_CHANGES = {
    "": "", "unchanged": ", sampled tiles", "stain": ", other stain", "blur": ", blurred", "jpeg": ", JPEG",
    "mpp": ", coarser mpp", "rotation": ", rotated", "grey": ", without colour",
}  # fmt: skip
_SEEDS_TOLD = "; where a run has several seeds (small circles), for another seed too"
_SCORE_NAMES = {"mean_iou": "mean IoU", **{name: measure.name for name, measure in MEASURES.items()}}


def draw_task(found: TaskComparison, output: Path, *, margin: float) -> None:
    """Saves a PNG: a panel a measure, a line a model; the band is the margin around the starting weights.

    Args:
        found: Scores of all models.
        output: The PNG.
        margin: Differences within it do not matter.
    """
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = _drawn(found, margin) if found.rows else _described(found)
        with atomic_path(output) as temporary:
            figure.savefig(temporary, dpi=_DPI, metadata={"Software": None})


def measure_name(measure: str) -> str:
    """A measure's name for people."""
    name, _, split = measure.partition("@")
    name, _, change = name.partition("~")
    split, _, change_of_split = split.partition("~")
    change = change or change_of_split
    if name.startswith("knn_"):
        name = f"{name.removeprefix('knn_')}-NN"
    elif name.startswith("few_shot_"):
        name = f"{name.removeprefix('few_shot_')} a class"
    return _NAMES.get(name, name) + (f", {split}" if split else "") + _CHANGES.get(change, f", under {change}")


def _drawn(found: TaskComparison, margin: float) -> Figure:
    score = SCORES[found.kind][0]
    drawn = [row for row in found.rows if row.score == score or row.measure == SITE]
    drawn = [row for row in drawn if change_of(row.measure) is None or has_direction(row.measure)]
    rows = [row for row in drawn if row.seen != "yes"] or drawn
    # a seed of several is a mark on the line of its run
    rows = [row for row in rows if not any(row.model in members for members in found.families.values())]
    measures = sorted(dict.fromkeys(row.measure for row in rows), key=is_robustness)
    models = list(dict.fromkeys(row.model for row in rows))
    across = min(_COLUMNS, max(1, len(measures)))
    down = math.ceil(len(measures) / across)
    # narrow tables get wider panels, so that titles have room
    figure = Figure(
        figsize=(1.3 + 2.6 * max(across, 2), 0.9 + down * (0.75 + 0.24 * len(models))), layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(down, across, squeeze=False, sharex=True)
    for index, place in enumerate(axes.flat):
        if index >= len(measures):
            place.set_visible(False)
            continue
        place.tick_params(labelbottom=index + across >= len(measures))
        of_measure = {row.model: row for row in rows if row.measure == measures[index]}
        _panel(place, models, of_measure, margin, measure_name(measures[index]), names=index % across == 0)
        _mark_clean(place, models, found.rows, measures[index], score)
        chances = {numbers["site_chance"] for numbers in found.numbers.values() if "site_chance" in numbers}
        if measures[index] == SITE and len(chances) == 1:
            place.axvline(*chances, color=_GREY, linewidth=1, linestyle=":")
    first = rows[0]
    transductive = " (transductive: training saw these cases)" if first.seen == "yes" else ""
    diamonds = "; diamonds: the same on unchanged tiles" if any(map(change_of, measures)) else ""
    figure.suptitle(
        f"{found.task}: {_SCORE_NAMES[score]} on {first.cases} test cases ({first.units} units){transductive}\n"
        f"95 % intervals by bootstrap over cases{_SEEDS_TOLD if found.families else ''}{diamonds}",
        fontsize=9.5,
    )
    return figure


def _panel(axes: Axes, models: Sequence[str], rows: dict[str, Row], margin: float, title: str, *, names: bool) -> None:
    if models[0] in rows and rows[models[0]].seen != "yes":
        value = rows[models[0]].value
        axes.axvspan(value - margin, value + margin, color="#eceff2", linewidth=0)
        axes.axvline(value, color="#c3cad1", linewidth=0.8)
    for place, model in enumerate(models):
        row = rows.get(model)
        if row is None:
            continue
        color = _GREY if model in BASELINES else RUN_COLORS[place % len(RUN_COLORS)]
        if row.low is not None and row.high is not None:
            axes.plot([row.low, row.high], [place, place], color=color, linewidth=2, solid_capstyle="butt")
        axes.plot([row.value], [place], marker="o", markersize=5, color=color)
        for value in row.by_seed:
            axes.plot([value], [place], marker="o", markersize=3, color=color, markerfacecolor="white", linewidth=0)
        axes.annotate(
            f"{row.value:.3f}", (row.value, place), (0, 4), textcoords="offset points", ha="center", fontsize=7
        )
    axes.set_ylim(len(models) - 0.4, -0.7)
    told = [f"{model} (1 seed)" if model in rows and rows[model].seeds == 1 else model for model in models]
    axes.set_yticks(range(len(models)), told if names else [""] * len(models))
    axes.tick_params(axis="y", length=0)
    axes.set_title(title, fontsize=9, loc="left")
    axes.grid(axis="x", color="#e6e9ec", linewidth=0.6)
    axes.set_axisbelow(True)


def _mark_clean(axes: Axes, models: Sequence[str], rows: Sequence[Row], measure: str, score: str) -> None:
    """The figure on unchanged tiles beside that on changed ones."""
    if change_of(measure) is None:
        return
    clean = clean_measure(measure, {row.measure for row in rows})
    for row in rows:
        if (row.measure, row.score) == (clean, score) and row.seen != "yes" and row.model in models:
            color = _GREY if row.model in BASELINES else RUN_COLORS[models.index(row.model) % len(RUN_COLORS)]
            axes.plot(row.value, models.index(row.model), "D", markersize=5, markerfacecolor="none", color=color)


def _described(found: TaskComparison) -> Figure:
    """Numbers that have no better direction, a panel each."""
    models = list(found.numbers)
    names = list(dict.fromkeys(name for numbers in found.numbers.values() for name in numbers))
    across = min(_COLUMNS, max(1, len(names)))
    down = max(1, math.ceil(len(names) / across))
    figure = Figure(figsize=(1.3 + 2.6 * max(across, 2), 0.9 + down * (0.7 + 0.22 * len(models))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(down, across, squeeze=False)
    for index, place in enumerate(axes.flat):
        if index >= len(names):
            place.set_visible(False)
            continue
        values = [found.numbers[model].get(names[index]) for model in models]
        for row, value in enumerate(values):
            if value is None:
                continue
            place.barh(row, value, color=RUN_COLORS[row % len(RUN_COLORS)], height=0.6)
            side = -1 if value < 0 else 1  # beyond the bar's end
            place.annotate(
                f"{value:.3g}",
                *((value, row), (3 * side, 0)),
                textcoords="offset points",
                ha="left" if side > 0 else "right",
                va="center",
                fontsize=7,
            )
        place.set_ylim(len(models) - 0.4, -0.6)
        place.set_yticks(range(len(models)), models if index % across == 0 else [""] * len(models))
        place.tick_params(axis="y", length=0)
        place.margins(x=0.25)
        place.locator_params(axis="x", nbins=4)
        place.set_title(names[index].replace("_", " "), fontsize=9, loc="left")
    figure.suptitle(f"{found.task}: none of these has a better direction", fontsize=9.5)
    return figure
