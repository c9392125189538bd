"""What is measured between two logged lines of a training."""

import time
from typing import Any

import torch

from dinoscope.train.distributed import World

__all__ = ["MetricWindow"]


class MetricWindow:
    """Means over the iterations since the last logged line, taken over all ranks only when a line is due."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.last: dict[str, Any] = {}
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.passed, self.count, self.data_time, self.started = 0, 0, 0.0, time.perf_counter()

    def waited(self, seconds: float) -> None:
        """Counts an iteration, and the time that the training waited for its data."""
        self.passed += 1
        self.data_time += seconds

    def add(self, terms: dict[str, torch.Tensor]) -> None:
        """Adds the terms of an iteration that was not skipped."""
        for name, value in terms.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.count += 1

    def close(self, iteration: int, global_batch: int) -> dict[str, Any]:
        """One line of metrics; the CPU waits for the device here."""
        names = sorted(self.sums)
        self.last = {"iteration": iteration}
        if names:
            means = self.world.mean(torch.stack([self.sums[name] for name in names]).cpu()) / self.count
            self.last |= dict(zip(names, means.tolist(), strict=True))
        seconds = (time.perf_counter() - self.started) / self.passed
        self.last |= {
            "iter_time": seconds,
            "data_time": self.data_time / self.passed,
            "samples_per_second": global_batch / seconds,
        }
        if self.passed > self.count:
            self.last["skipped_steps"] = self.passed - self.count
        self._reset()
        return self.last
