"""A slide reader of a user's own, for tests: pyramids kept as numpy files."""

import os
from pathlib import Path
from typing import ClassVar

import numpy as np


class Arrays:
    """Reads .npz files of levels `level0`, `level1` … and `mpp`."""

    suffixes = (".npz",)
    opened: ClassVar[list[int]] = []  # process ids, one an instance

    def __init__(self, path: str) -> None:
        with np.load(path) as file:
            self._levels = [file[f"level{number}"] for number in range(sum(name.startswith("l") for name in file))]
            self.mpp = float(file["mpp"]) if "mpp" in file else None
        self._step = [round(self._levels[0].shape[1] / level.shape[1]) for level in self._levels]
        self.level_dimensions = [level.shape[1::-1] for level in self._levels]
        self.opened.append(os.getpid())

    def read_region(self, x: int, y: int, level: int, width: int, height: int) -> np.ndarray:
        pixels, step = self._levels[level], self._step[level]
        region = pixels[y // step : y // step + height, x // step : x // step + width]
        assert region.shape[:2] == (height, width), "asked for pixels outside of the level"
        return region


class Everything(Arrays):
    """Serves all endings."""

    suffixes = None
    objective_power = 20
    background = (250, 240, 230)
    thread_safe = True


class CannotOpen(Arrays):
    def __init__(self, path: str) -> None:
        raise OSError(f"{path} is locked by {Path(path).name}")


class TransposedPixels(Arrays):
    def read_region(self, x: int, y: int, level: int, width: int, height: int) -> np.ndarray:
        return super().read_region(x, y, level, width, height).transpose(1, 0, 2)


class FloatPixels(Arrays):
    def read_region(self, x: int, y: int, level: int, width: int, height: int) -> np.ndarray:
        return super().read_region(x, y, level, width, height) / 255


class FailsInside(Arrays):
    def read_region(self, x: int, y: int, level: int, width: int, height: int) -> np.ndarray:
        raise RuntimeError("decoder gave up")


class NoLevels:
    def __init__(self, path: str) -> None:
        self.level_dimensions = []


class GrowingLevels(Arrays):
    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.level_dimensions = self.level_dimensions[::-1]


class Unscanned0(Arrays):
    """Straight alpha: from three quarters of the width on nothing was scanned, and rubbish stands there."""

    hidden = 0

    def read_region(self, x: int, y: int, level: int, width: int, height: int) -> np.ndarray:
        pixels = super().read_region(x, y, level, width, height).copy()
        unscanned = x + np.arange(width) * self._step[level] >= 0.75 * self.level_dimensions[0][0]
        pixels[:, unscanned] = (self.hidden, 0, self.hidden)
        alpha = np.where(unscanned, 0, 255).astype(np.uint8)
        return np.concatenate([pixels, np.broadcast_to(alpha[None, :, None], (height, width, 1))], axis=2)


class Unscanned128(Unscanned0):
    hidden = 128


class Unscanned255(Unscanned0):
    hidden = 255
