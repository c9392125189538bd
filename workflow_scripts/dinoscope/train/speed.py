"""Tiles a second: what the model would take in, and what the loaders deliver, measured in a second or two."""

import os
import pickle
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import torch

from dinoscope.data.dataset import ImageCrops, crop_settings
from dinoscope.data.sources import TrainingImages
from dinoscope.errors import DinoscopeError
from dinoscope.train.forecast import Forecast
from dinoscope.train.ssl_step import compute_dtype

if TYPE_CHECKING:
    from dinoscope.config import RunConfig

__all__ = ["Speed", "cores_per_process", "measure_speed", "product_rate", "samples_per_second", "speed_if_readable"]

_SHARE_REACHED, _SHARE_WHEN_RECOMPUTING = 0.4, 0.3


@dataclass(frozen=True)
class Speed:
    """Tiles a second of all processes together.

    Attributes:
        wanted: What the model would take in, if it reached `share` of the rate of matrix products.
        delivered: What the loaders make; None where that is unknown.
        share: See `wanted`.
        rate: Of matrix products, FLOP/s of all devices together.
        workers: Loader processes of a process that find a core.
        cores: CPU cores of a process.
    """

    wanted: float
    delivered: float | None
    share: float
    rate: float
    workers: int
    cores: int

    @property
    def expected(self) -> float:
        """The slower of both."""
        return self.wanted if self.delivered is None else min(self.wanted, self.delivered)


def measure_speed(config: "RunConfig", images: TrainingImages, ahead: Forecast, *, all_cores: bool) -> Speed:
    """Measures matrix products on this process's device, and a few samples: a second or two.

    Args:
        config: The recipe.
        images: The data.
        ahead: The run.
        all_cores: On CPUs, whether this process may use as many threads as all of them together will.

    Raises:
        DinoscopeError: An image cannot be read.
    """
    cores = cores_per_process(ahead)
    workers = max(1, min(ahead.num_workers, cores))
    share = _SHARE_WHEN_RECOMPUTING if config.train.checkpointing_full else _SHARE_REACHED
    devices = ahead.world_size / ahead.local_size if all_cores and ahead.device_type == "cpu" else ahead.world_size
    rate = devices * product_rate(ahead.device_type, compute_dtype(config, ahead.device_type))
    one_worker = samples_per_second(ImageCrops(images, *crop_settings(config), seed=0))
    return Speed(
        wanted=share * rate / ahead.flops_per_tile,
        delivered=ahead.world_size * workers * one_worker,
        share=share,
        rate=rate,
        workers=workers,
        cores=cores,
    )


def speed_if_readable(config: "RunConfig", images: TrainingImages, ahead: Forecast) -> Speed | None:
    """`measure_speed` in one process of a run that begins; None where an image cannot be read, which may be rare."""
    try:
        return measure_speed(config, images, ahead, all_cores=False)
    except DinoscopeError:
        return None


def samples_per_second(dataset: ImageCrops, count: int = 12, seconds: float = 5.0) -> float:
    """How many samples one loader process makes a second, measured on a few.

    Args:
        dataset: It is copied first, so that slides which are opened here are closed again.
        count: Samples to measure, after two that warm up.
        seconds: Time after which fewer must do.

    Raises:
        DinoscopeError: An image cannot be read.
    """
    dataset, threads = pickle.loads(pickle.dumps(dataset)), cv2.getNumThreads()
    cv2.setNumThreads(0)  # as in a loader process
    try:
        done, begun = -2, time.perf_counter()
        while done < count and (done < 1 or time.perf_counter() - begun < seconds):
            if done == 0:
                begun = time.perf_counter()
            sample = dataset[done + 2]
            if isinstance(sample, DinoscopeError):
                raise sample
            done += 1
        return done / (time.perf_counter() - begun)
    finally:
        cv2.setNumThreads(threads)


def product_rate(device_type: str, dtype: torch.dtype) -> float:
    """FLOP/s of large matrix products in this process."""
    side = 1024 if device_type == "cpu" else 8192
    left = torch.full((side, side), 0.5, device=device_type, dtype=dtype)
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        left @ left
        if device_type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - begun)
    return 2 * side**3 / min(times)


def cores_per_process(ahead: Forecast) -> int:
    """Of this machine, for each of its processes."""
    return max(1, len(os.sched_getaffinity(0)) // ahead.local_size)
