"""What lets a device compute while results travel and are written."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import torch
from torch import Tensor

__all__ = ["BackgroundThread", "HostCopy"]


class HostCopy:
    """Results on their way from the device; the copy is queued at once, so that the next batch can be too.

    Args:
        rows: Which rows of the slide's tiles they are of.
        tensors: Results on one device; None stays None.
    """

    def __init__(self, rows: slice, *tensors: Tensor | None) -> None:
        self.rows = rows
        self._copies = [None if tensor is None else tensor.to("cpu", non_blocking=True) for tensor in tensors]
        device = next(tensor.device for tensor in tensors if tensor is not None)
        self._arrived = None
        if device.type != "cpu":
            self._arrived = torch.Event(device)
            self._arrived.record()

    def wait(self) -> list[Tensor | None]:
        """The results on the CPU, once they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copies


class BackgroundThread:
    """Runs one call at a time beside the caller; what a call raises surfaces at the next one, or at the end."""

    def __enter__(self) -> Self:
        self._thread = ThreadPoolExecutor(1)
        self._running: Future | None = None
        return self

    def run(self, function: Callable[..., None], *arguments: object) -> None:
        """Waits for the call before, then starts this one."""
        self._wait()
        self._running = self._thread.submit(function, *arguments)

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self._wait()
        finally:
            self._thread.shutdown()

    def _wait(self) -> None:
        if self._running is not None:
            self._running.result()
