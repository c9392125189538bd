"""When a run saves by the clock, and when it must end. Only the main process's clock counts."""

import os
import time
from collections.abc import Callable, Mapping

__all__ = ["RunClock"]

_MARGIN_SECONDS = 60.0
_JOB_END = "SLURM_JOB_END_TIME"  # seconds since 1970


class RunClock:
    """Counts from when it is made."""

    def __init__(
        self,
        every_minutes: float | None,
        limit_minutes: float | None,
        environment: Mapping[str, str] = os.environ,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Starts counting.

        Args:
            every_minutes: Time between two saves; None: none by the clock.
            limit_minutes: Time after which the run must have ended; None: only when the SLURM job ends.
            environment: Where SLURM says when that is.
            now: The time in seconds since 1970.
        """
        self._now, self._every_minutes = now, every_minutes
        started = self._last_save = now()
        ends = [] if limit_minutes is None else [started + 60 * limit_minutes]
        job_end = environment.get(_JOB_END, "")
        if job_end.isdigit() and int(job_end) > started:  # else it is left from a job that was
            ends.append(float(job_end))
        self._end = min(ends, default=None)

    def save_is_due(self) -> bool:
        """Whether it is time for a save."""
        return self._every_minutes is not None and self._now() - self._last_save >= 60 * self._every_minutes

    def saved(self) -> None:
        """A save begins, whatever the reason: the next one is counted from here."""
        self._last_save = self._now()

    def time_is_up(self, save_seconds: float) -> bool:
        """Whether just enough time is left for a save that takes as long as the last one."""
        return self._end is not None and self._now() + save_seconds + _MARGIN_SECONDS >= self._end
