"""`training_metrics.json`: one JSON object a line, appended while training."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinoscope.errors import RunError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["METRICS_NAME", "append_metrics", "best_iteration", "metrics_at", "read_events", "read_metrics"]

METRICS_NAME = "training_metrics.json"
_log = logging.getLogger(__name__)


def append_metrics(run_dir: Path, values: Mapping[str, Any]) -> None:
    """Appends one line; a line that a kill cut short before is closed first, so that it spoils nothing after it.

    A full disk costs the line, which is said, and never the run.
    """
    try:
        with open(run_dir / METRICS_NAME, "ab+") as file:
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(values).encode() + b"\n")
    except OSError as error:
        _log.warning("run %s: a line of metrics cannot be written: %s", run_dir.name, error)


def read_metrics(run: str | Path) -> "pd.DataFrame":
    """Metrics of a run, ours or the published trainer's, also while it is going on.

    Args:
        run: A run's folder or its training_metrics.json.

    Returns:
        One row an iteration (the index), float64; what a line does not say is NaN, and values that are no numbers are
        left out. Where a run went on from a checkpoint, the lines after that checkpoint are those of the later attempt
        only. The events (see `read_events`) are in `frame.attrs["events"]`; a file that tells no restarts, as the
        published trainer's, gets a "resume" at the first iteration logged after each.

    Raises:
        RunError: There is no such file, or it holds no iteration.
    """
    import pandas as pd

    path, lines = _read_lines(run)
    rows, events = _last_attempts(lines)
    if not rows:
        raise RunError(_nothing_in(path))
    numbers = [{key: value for key, value in row.items() if isinstance(value, int | float)} for row in rows.values()]
    frame = pd.DataFrame(numbers, index=pd.Index(rows, name="iteration"), dtype=float).drop(columns="iteration")
    frame.attrs["events"] = events
    return frame


def metrics_at(run: str | Path, iteration: int | None = None) -> dict[str, float]:
    """What was logged last at or before an iteration, or last of all; finite values only.

    Raises:
        RunError: There is no such file, or it holds no iteration.
    """
    logged = read_metrics(run).loc[:iteration]
    last = logged.iloc[-1].items() if len(logged) else ()
    return {name: value for name, value in last if math.isfinite(value)}


def read_events(run: str | Path) -> list[dict[str, Any]]:
    """What happened in a run, in the order of the file.

    Args:
        run: A run's folder or its training_metrics.json.

    Returns:
        Lines with `event` (start, resume, extended, gram_teacher_update, skipped), `iteration` and what belongs to it.
        All attempts are in it: what is done again after a restart is there twice.

    Raises:
        RunError: There is no such file.
    """
    return [line for line in _read_lines(run)[1] if "event" in line]


def best_iteration(run: str | Path, iterations: Sequence[int], by: str) -> int | None:
    """The one of some iterations at which a metric is best; None where it was never logged by then.

    Args:
        run: A run's folder or its training_metrics.json.
        iterations: What is chosen from; each has the value that was logged last before its end.
        by: The column; it is best where it is highest, with a leading minus where it is lowest.
    """
    column, sign = by.removeprefix("-"), -1 if by.startswith("-") else 1
    try:
        logged = read_metrics(run)[column].dropna()
    except (RunError, KeyError):
        return None
    before = {iteration: logged.loc[:iteration] for iteration in iterations}
    values = {iteration: known.iloc[-1] for iteration, known in before.items() if len(known)}
    return max(values, key=lambda iteration: sign * values[iteration], default=None)


def _last_attempts(lines: list[dict[str, Any]]) -> tuple[dict[int, dict[str, Any]], list[dict[str, Any]]]:
    """Iteration -> its line, in order, without what a later attempt undid; and the events, restarts among them."""
    rows: dict[int, dict[str, Any]] = {}
    events: list[dict[str, Any]] = []
    last = -1
    for line in lines:
        if "event" in line:
            events.append(line)
            goes_back = line["event"] in ("start", "resume")
        else:
            goes_back = line["iteration"] < last
            if goes_back:
                events.append({"event": "resume", "iteration": line["iteration"], "note": "told by the iterations"})
        if goes_back:  # what an earlier attempt did from here on is undone
            last = line.get("iteration", 0) - 1
            rows = {iteration: row for iteration, row in rows.items() if iteration <= last}
        if "event" not in line:
            last = line["iteration"]
            rows[last] = rows.get(last, {}) | line  # a probe's line is of the same iteration
    return rows, events


def _nothing_in(path: Path) -> str:
    if not any(text.strip() for text in path.read_text(encoding="utf-8", errors="replace").splitlines()):
        return f"{path} is empty: the run has logged nothing yet; try again later"
    if _read_lines(path)[1]:
        return f"{path} holds no iteration yet: the run has begun and logged none; try again later"
    return (
        f"{path} holds no iteration: no line of it is a JSON object with a whole number `iteration`; give a run's "
        f"{METRICS_NAME}"
    )


def _read_lines(run: str | Path) -> tuple[Path, list[dict[str, Any]]]:
    path = Path(run)
    path = path / METRICS_NAME if path.is_dir() else path
    if not path.is_file():
        raise RunError(f"{path} does not exist; give a run's folder or its {METRICS_NAME}")
    # after a power cut a file may hold anything at its end
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return path, [line for text in texts if (line := _parse(text)) is not None]


def _parse(text: str) -> dict[str, Any] | None:
    """An event, or a line of an iteration; None for whatever else."""
    try:
        line = json.loads(text)
    except (json.JSONDecodeError, RecursionError):  # cut short by a kill
        return None
    if not isinstance(line, dict):
        return None
    iteration = line.get("iteration")
    if isinstance(iteration, float) and iteration.is_integer():
        line["iteration"] = int(iteration)
    return line if "event" in line or type(line.get("iteration")) is int else None
