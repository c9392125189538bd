"""Curves of training runs: losses, schedules, gradient norms, throughput and signs of collapse, by iteration."""

import io
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dinoscope.errors import RunError
from dinoscope.files import atomic_path

__all__ = ["RUN_COLORS", "bin_curve", "curves_svg", "draw_curves", "save_curves"]

_log = logging.getLogger(__name__)

# Okabe and Ito's palette: told apart with any kind of colour vision
RUN_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
LINE_STYLES = ("-", "--", ":")
MAX_POINTS = 200
NUM_COLUMNS = 4
MAX_OTHERS = 16  # panels for quantities that are not ours
FORMATS = (".png", ".svg", ".pdf")
MARKS_APART = 300  # marks of one kind that are nearer than this part of the width are drawn as one


@dataclass(frozen=True)
class _Mark:
    """How events of one kind are drawn: their name in the legend, the line's style, its part of the height, its tip."""

    label: str
    style: Any
    height: float = 1.0
    tip: str = ""


MARKS = {
    "resume": _Mark("resumed", ":"),
    "gram_teacher_update": _Mark("gram teacher updated", (0, (6, 3))),
    "extended": _Mark("extended", "-."),
    "skipped": _Mark("step skipped", "-", 0.07, "|"),
    "not finite": _Mark("loss not finite", "-", 0.1, "x"),
}


@dataclass(frozen=True)
class _Panel:
    """One pair of axes: the columns it shows and what each is called in its legend."""

    title: str
    columns: Mapping[str, str] = field(default_factory=dict)
    log: bool = False


PANELS = (
    _Panel("Total loss", {"total_loss": ""}),
    _Panel("DINO loss, global crops", {"dino_global_crops_loss": ""}),
    _Panel("DINO loss, local crops", {"dino_local_crops_loss": ""}),
    _Panel("iBOT loss, masked patches", {"ibot_loss": ""}),
    _Panel("KoLeo loss", {"koleo_loss": ""}),
    _Panel("KDE loss", {"kde_loss": ""}),
    _Panel("Gram loss", {"gram_loss": ""}),
    _Panel("Learning rate", {"lr": "backbone", "last_layer_lr": "last", "head_lr": "heads"}),
    _Panel("Weight decay", {"wd": ""}),
    _Panel("Teacher momentum", {"mom": ""}),
    _Panel("Teacher temperature", {"teacher_temp": ""}),
    _Panel(
        "Gradient norm",
        {"backbone_grad_norm": "backbone", "dino_head_grad_norm": "DINO", "ibot_head_grad_norm": "iBOT"},
        log=True,
    ),
    _Panel("Throughput, tiles/s", {"samples_per_second": ""}),
    _Panel("Rank of the features (RankMe)", {"rankme": ""}),
    _Panel("Mean cosine of the features", {"mean_cosine": ""}),
    _Panel("Teacher entropy, nats", {"teacher_entropy": "each", "target_marginal_entropy": "mean"}),
    _Panel("KL, teacher to student, nats", {"teacher_student_kl": ""}),
    _Panel("Probe: k-NN, balanced accuracy", {"probe_knn": ""}),
    _Panel("Probe: patches, mean IoU", {"probe_dense": ""}),
    _Panel(
        "Probe: gain",
        {"probe_difference": "", "probe_difference_low": "low", "probe_difference_high": "high"},
    ),
    _Panel("Probe: RankMe", {"probe_rankme": ""}),
    _Panel("Probe: mean cosine", {"probe_mean_cosine": ""}),
    _Panel("Probe: seconds each", {"probe_seconds": ""}),
)
# in place of the throughput, which the published trainer does not log
TIME_PANEL = _Panel("Seconds an iteration", {"iter_time": "all", "data_time": "data"})


def draw_curves(runs: Mapping[str, pd.DataFrame]) -> Figure:
    """Draws all quantities that any of the runs has logged, one colour a run.

    Quantities that are not known here come last, under their names in the file, unless they never change. Thin
    vertical lines mark where a run was resumed or extended and where the gram teacher was updated, ticks at the bottom
    where a step was skipped or the total loss was no finite number. Beyond 200 points a curve is the mean of as many
    bins, with the range of each bin behind it.

    Args:
        runs: Name of the run -> its metrics, as `dinoscope.train.metrics.read_metrics` gives them.
    """
    panels = _panels(runs)
    num_rows = max(1, -(-len(panels) // NUM_COLUMNS))
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(14, 0.6 + 2.5 * num_rows), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        grid = figure.subplots(num_rows, NUM_COLUMNS, squeeze=False).ravel()
        for axes, panel in zip(grid, panels, strict=False):
            _draw_panel(axes, panel, runs)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        figure.legend(handles=_run_legend(runs), loc="outside upper left", ncols=8, frameon=False, fontsize=10)
    return figure


def save_curves(runs: Mapping[str, pd.DataFrame], output: str | os.PathLike[str]) -> None:
    """Draws the curves into a file; its suffix (.png, .svg, .pdf) chooses the format.

    Raises:
        RunError: It has another suffix.
    """
    if Path(output).suffix not in FORMATS:
        raise RunError(f"{output}: curves are drawn as {', '.join(FORMATS)}; end the file's name in one of them")
    with atomic_path(output) as temporary:
        if Path(output).suffix == ".svg":
            temporary.write_bytes(curves_svg(runs))
        else:
            draw_curves(runs).savefig(temporary, dpi=130)


def curves_svg(runs: Mapping[str, pd.DataFrame]) -> bytes:
    """The curves as an SVG image with its text drawn as outlines; the same bytes for the same runs."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "dinoscope"}):
        draw_curves(runs).savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def bin_curve(curve: pd.Series, num_bins: int = MAX_POINTS) -> pd.DataFrame:
    """Bins of about equal numbers of points: their mean position `x`, and `mean`, `low` and `high` of the values.

    Args:
        curve: Values by iteration; points that are no finite numbers are left out.
        num_bins: A curve of no more points is returned as it is.
    """
    curve = curve[np.isfinite(curve)]
    positions = np.arange(len(curve)) * min(num_bins, len(curve)) // max(len(curve), 1)
    table = pd.DataFrame({"x": curve.index.to_numpy(float), "value": curve.to_numpy(float)}).groupby(positions)
    return pd.DataFrame(
        {
            "x": table["x"].mean(),
            "mean": table["value"].mean(),
            "low": table["value"].min(),
            "high": table["value"].max(),
        }
    )


def _panels(runs: Mapping[str, pd.DataFrame]) -> list[_Panel]:
    """What there is to draw of the runs."""
    logged = {column for frame in runs.values() for column in frame if np.isfinite(frame[column]).any()}
    panels = [panel for panel in PANELS if logged & panel.columns.keys()]
    if any("iter_time" in frame and "samples_per_second" not in frame for frame in runs.values()):
        panels.append(TIME_PANEL)
    return panels + [_Panel(column, {column: ""}) for column in _others(runs)]


def _others(runs: Mapping[str, pd.DataFrame]) -> list[str]:
    """Columns that no panel of ours shows, in the order of the files; a constant is told in words."""
    known = {column for panel in (*PANELS, TIME_PANEL) for column in panel.columns}
    others = dict.fromkeys(column for frame in runs.values() for column in frame if column not in known)
    values = {
        column: np.concatenate([frame[column] for frame in runs.values() if column in frame]) for column in others
    }
    finite = {column: found[np.isfinite(found)] for column, found in values.items() if np.isfinite(found).any()}
    constant = [column for column, found in finite.items() if len(found) > 1 and np.ptp(found) == 0]
    if constant:
        _log.info("not drawn, as they never change: %s", ", ".join(f"{name} {finite[name][0]:g}" for name in constant))
    changing = [column for column in finite if column not in constant]
    if left_out := changing[MAX_OTHERS:]:
        _log.warning("not drawn, beyond %d others: %s", MAX_OTHERS, ", ".join(left_out))
    return changing[:MAX_OTHERS]


def _draw_panel(axes: Axes, panel: _Panel, runs: Mapping[str, pd.DataFrame]) -> None:
    for number, (name, frame) in enumerate(runs.items()):
        color = RUN_COLORS[number % len(RUN_COLORS)]
        for style, column in zip(LINE_STYLES, panel.columns, strict=False):
            if column in frame and np.isfinite(frame[column]).any():
                _draw_curve(axes, frame[column], color, style)
        if panel.columns.keys() & set(frame.columns):
            _draw_marks(axes, name, frame, color)
    axes.set_title(panel.title, fontsize=10, loc="left", fontweight="bold")
    axes.set_xlabel("iteration", color="#555555")
    shown = [frame for frame in runs.values() if panel.columns.keys() & set(frame.columns)]
    last = max(1, *(frame.index.max() for frame in shown))
    axes.set_xlim(-0.02 * last, 1.02 * last)  # a quantity that is logged later, or less often, is not drawn wider
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.tick_params(colors="#555555", labelsize=8)
    if panel.log:
        axes.set_yscale("log")
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
    if len(panel.columns) > 1:
        styles = [
            Line2D([], [], color="#555555", linestyle=style, label=label)
            for style, (column, label) in zip(LINE_STYLES, panel.columns.items(), strict=False)
            if any(column in frame for frame in runs.values())
        ]
        tight = {"columnspacing": 0.7, "handlelength": 1.2, "handletextpad": 0.4, "frameon": False}
        axes.legend(handles=styles, fontsize=7.5, ncols=3, loc="lower right", bbox_to_anchor=(1.02, 0.97), **tight)


def _draw_curve(axes: Axes, curve: pd.Series, color: str, style: str) -> None:
    bins = bin_curve(curve)
    if len(curve) > len(bins):
        axes.fill_between(bins["x"], bins["low"], bins["high"], color=color, alpha=0.18, linewidth=0)
    marker = "o" if len(bins) == 1 else None
    axes.plot(bins["x"], bins["mean"], color=color, linestyle=style, linewidth=1.3, marker=marker, markersize=3)


def _draw_marks(axes: Axes, name: str, frame: pd.DataFrame, color: str) -> None:
    for kind, mark in MARKS.items():
        last = -np.inf
        for iteration in _marked(frame, kind):
            if iteration - last > max(frame.index.max(), 1) / MARKS_APART:
                axes.axvline(
                    iteration,
                    ymax=mark.height,
                    color=color,
                    alpha=0.65,
                    linewidth=0.9,
                    linestyle=mark.style,
                    marker=mark.tip,
                    markevery=[1],
                    markersize=4,
                    gid=f"{kind}-{name}-{iteration}",
                )
                last = iteration


def _marked(frame: pd.DataFrame, kind: str) -> list[int]:
    """Iterations of the events of one kind; after a restart some are in the file twice."""
    if kind == "not finite":  # a line without any loss is of an iteration all of whose steps were skipped
        return frame.index[~np.isfinite(frame["total_loss"])].tolist() if "total_loss" in frame else []
    events = frame.attrs.get("events", [])
    return sorted({int(event["iteration"]) for event in events if event["event"] == kind and "iteration" in event})


def _run_legend(runs: Mapping[str, pd.DataFrame]) -> list[Line2D]:
    handles = [
        Line2D([], [], color=RUN_COLORS[number % len(RUN_COLORS)], linewidth=2.5, label=name)
        for number, name in enumerate(runs)
    ]
    for kind, mark in MARKS.items():
        if any(_marked(frame, kind) for frame in runs.values()):
            handles.append(_mark_handle(mark))
    return handles


def _mark_handle(mark: _Mark) -> Line2D:
    if mark.tip:
        return Line2D([], [], color="#555555", linestyle="none", marker=mark.tip, markersize=6, label=mark.label)
    return Line2D([], [], color="#555555", linewidth=0.9, linestyle=mark.style, label=mark.label)
