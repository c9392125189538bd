"""What is measured between two logged lines of a training."""

import time
from typing import Any

import torch

from dinoscope.errors import RunError
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
        self.count, self.data_time, self.started = 0, 0.0, time.perf_counter()

    def waited(self, seconds: float) -> None:
        """Counts time that the training waited for its data."""
        self.data_time += seconds

    def add(self, terms: dict[str, torch.Tensor]) -> None:
        """Adds one iteration."""
        for name, value in terms.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.count += 1

    def require_finite(self, iteration: int) -> None:
        """Raises RunError, on all ranks, when a loss since the last line was not finite."""
        finite = all(bool(torch.isfinite(value)) for value in self.sums.values())
        if self.world.any(not finite):
            raise RunError(
                f"the loss is not finite at iteration {iteration} or a few before; nothing was saved since. "
                "Lower optim.lr, or lengthen its warm-up, under a new run name"
            )

    def close(self, iteration: int, global_batch: int) -> dict[str, Any]:
        """One line of metrics; the CPU waits for the device here."""
        self.require_finite(iteration)
        names = sorted(self.sums)
        means = self.world.mean(torch.stack([self.sums[name] for name in names]).cpu()) / self.count
        seconds = (time.perf_counter() - self.started) / self.count
        self.last = {"iteration": iteration, **dict(zip(names, means.tolist(), strict=True))}
        self.last |= {
            "iter_time": seconds,
            "data_time": self.data_time / self.count,
            "samples_per_second": global_batch / seconds,
        }
        self._reset()
        return self.last
