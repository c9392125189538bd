"""Requests to stop that a training heeds at the end of a step."""

import contextlib
import signal
from collections.abc import Iterator

__all__ = ["stop_requests"]


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collects SIGTERM, SIGUSR1 and Ctrl-C, so that the training can stop at the end of a step."""
    received: list[int] = []
    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.signal(number, lambda number, _: received.append(number)) for number in signals]
    try:
        yield received
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
