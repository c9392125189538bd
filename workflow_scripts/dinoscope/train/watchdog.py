"""A training process that hangs ends itself, so that torchrun ends all others, and leaves in its log where it stood.

A process that waits for one that is dead, for a file system that does not answer, or for a GPU that is gone would
otherwise wait for ever, and the job with it.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator

from dinoscope.cli import record_error
from dinoscope.errors import StoppedError

__all__ = ["Watchdog", "watched"]

_GRACE_SECONDS = 30.0  # for the sentence; after that the interpreter's own watchdog ends the process without one


class Watchdog:
    """Ends this process when `beat` was not called for too long."""

    def __init__(self, name: str, rank: int, minutes: float) -> None:
        """Counts from now.

        Args:
            name: What is watched, for the sentence.
            rank: Number of this process.
            minutes: The longest time between two beats.
        """
        self.name, self.rank, self.minutes = name, rank, minutes
        self._stopped = threading.Event()
        self.beat()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self) -> None:
        """All is well; called after every step."""
        self._last = time.monotonic()
        # written in C: it works while the interpreter is locked by what hangs
        faulthandler.dump_traceback_later(60 * self.minutes + _GRACE_SECONDS, exit=True, file=sys.__stderr__)

    def stop(self) -> None:
        """Watches no longer."""
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, 6 * self.minutes)):
            if time.monotonic() - self._last > 60 * self.minutes:
                self._end()

    def _end(self) -> None:
        sentence = (
            f"{self.name}: process {self.rank} has come to no end of a step for {self.minutes:g} minutes "
            "(train.hang_minutes) and ended the training; where each process stood is in its stderr.log; start it "
            "again to go on from the last checkpoint"
        )
        record_error(sentence, StoppedError.exit_status)
        print(f"error: {sentence}", file=sys.__stderr__, flush=True)
        faulthandler.dump_traceback(all_threads=True, file=sys.__stderr__)
        os._exit(StoppedError.exit_status)


@contextlib.contextmanager
def watched(name: str, rank: int, minutes: float) -> Iterator[Watchdog]:
    """A watchdog for as long as the block takes."""
    watchdog = Watchdog(name, rank, minutes)
    try:
        yield watchdog
    finally:
        watchdog.stop()
