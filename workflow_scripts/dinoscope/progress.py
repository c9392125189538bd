"""A progress bar on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TextIO

__all__ = ["Progress", "progress"]

_SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """What `progress` yields: call `advance` as work gets done.

    On a terminal a bar with elapsed time and ETA is drawn; elsewhere a line is written at the start, at the end and at
    most every 15 seconds in between, so that log files stay short.
    """

    def __init__(self, description: str, total: int, start: int, unit: str, stream: TextIO) -> None:
        self.description, self.total, self.done, self.unit = description, total, start, unit
        self._first, self._stream = start, stream
        self._started = time.monotonic()
        self._last_line = float("-inf")
        self._bar, self._task = None, None
        if stream.isatty():
            self._bar, self._task = _terminal_bar(description, total, start, unit, stream)

    def advance(self, count: int = 1, note: str = "") -> None:
        """Counts `count` more units as done and shows `note` (loss, rate, …) beside them."""
        self.done += count
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=note)
        elif self.done >= self.total or time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            print(self._line(note), file=self._stream, flush=True)

    def _line(self, note: str) -> str:
        elapsed = time.monotonic() - self._started
        rate = (self.done - self._first) / elapsed if elapsed > 0 else 0.0
        parts = [f"{self.description}: {self.done}/{self.total} {self.unit}", note]
        if 0 < self.done < self.total and rate > 0:
            parts.append(f"about {_duration((self.total - self.done) / rate)} left")
        elif self.done >= self.total:
            parts.append(f"done in {_duration(elapsed)}")
        return ", ".join(part for part in parts if part)


@contextlib.contextmanager
def progress(
    description: str, total: int, *, start: int = 0, unit: str = "", stream: TextIO | None = None
) -> Iterator[Progress]:
    """Shows how far a piece of work has come, on stderr unless told otherwise.

    Args:
        description: What is being done, e.g. "tiling CMU-1".
        total: Number of units in all; `start` of them are already done (a resumed run).
        unit: Name of the unit, e.g. "tiles".
    """
    shown = Progress(description, total, start, unit, stream or sys.stderr)
    with shown._bar if shown._bar is not None else contextlib.nullcontext():
        yield shown


def _terminal_bar(description: str, total: int, start: int, unit: str, stream: TextIO):
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{unit}  {{task.fields[note]}}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    ]
    bar = Bar(*columns, console=Console(file=stream))
    return bar, bar.add_task(description, total=total, completed=start, note="")


def _duration(seconds: float) -> str:
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
