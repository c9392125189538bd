"""What a run will take, in words: before its first step, and once more when the first steps have been measured."""

import datetime
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dinoscope.data.windows import CropRange
from dinoscope.resolutions import Resolution, resolutions
from dinoscope.train.forecast import Forecast
from dinoscope.train.speed import Speed, cores_per_process

if TYPE_CHECKING:
    from dinoscope.config import RunConfig

__all__ = ["Warmup", "outlook", "peak_memory", "time_in_words", "warnings"]

_MOST_PASSES = 100
_FEW_TILES, _FEW_CASES = 100_000, 50
_MUCH_WAITING = 0.1
_WARM_UP, _MEASURED = 5, 20


def outlook(
    config: "RunConfig",
    ahead: Forecast,
    speed: Speed | None,
    crops: Sequence[CropRange],
    run_dir: Path,
    next_iteration: int = 0,
) -> list[tuple[str, str]]:
    """What is worth knowing, as label and text.

    Args:
        config: The recipe.
        ahead: The run.
        speed: As measured; None where it was not.
        crops: Which magnification they show.
        run_dir: Folder of the run; it need not exist.
        next_iteration: The first one that is still to do.
    """
    rows = [("crops", str(entry)) for entry in crops]
    rows += [("steps", _share(config, sizes)) for sizes in resolutions(config) if sizes.share < 1]
    rows += [
        ("length", _length(config, ahead)),
        ("learning rate", f"{ahead.peak_lr:.3g} at its peak (optim.lr scaled to {ahead.global_batch} tiles a step)"),
        ("model", _model(config, ahead)),
        ("memory", _memory(ahead)),
        ("disk", _disk(ahead, run_dir)),
    ]
    if speed is not None:
        left = (ahead.iterations - next_iteration) * ahead.global_batch
        slower = "the loaders" if speed.expected < speed.wanted else "the model"
        rows += [
            ("speed", _speed(ahead, speed)),
            ("duration", f"about {time_in_words(left / speed.expected)} at the speed of {slower}, the slower of both"),
        ]
    return rows


def _share(config: "RunConfig", sizes: Resolution) -> str:
    gram = f", gram teacher {sizes.gram_px} px" if sizes.gram_px is not None else ""
    crops = f"2 × {sizes.global_px} px + {config.crops.local_crops_number} × {sizes.local_px} px{gram}"
    return f"{100 * sizes.share:.3g} % with {crops}"


def _length(config: "RunConfig", ahead: Forecast) -> str:
    train = config.train
    parts = f" × {train.accumulation_steps} forwards" if train.accumulation_steps > 1 else ""
    return (
        f"{ahead.iterations:,} iterations of {ahead.global_batch:,} tiles ({_count(ahead.world_size, 'process')} × "
        f"{train.batch_size_per_gpu}{parts}): {ahead.passes:.1f} passes over the data"
    )


def _model(config: "RunConfig", ahead: Forecast) -> str:
    parameters = ahead.parameters
    trained = "all trained" if parameters.trained == parameters.backbone else f"{_millions(parameters.trained)} trained"
    return (
        f"{config.student.arch}, {_millions(parameters.backbone)} parameters, {trained}; "
        f"heads {_millions(parameters.heads)}"
    )


def _memory(ahead: Forecast) -> str:
    memory = ahead.memory
    parts = {
        "weights of all networks": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "gathered weights": memory.gathered,
        "activations": memory.activations,
        "program": memory.process,
    }
    shown = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items() if size >= 0.005 * 2**30)
    return f"about {_gib(memory.peak)} GiB {_device(ahead)} ({shown})"


def _disk(ahead: Forecast, run_dir: Path) -> str:
    disk = ahead.disk
    frozen = f", {_gb(disk.frozen)} of what is not trained" if disk.frozen else ""
    return (
        f"up to {_gb(disk.total)} ({_count(disk.num_checkpoints, 'checkpoint')} of {_gb(disk.checkpoint)}, "
        f"{_count(disk.num_exports, 'exported teacher')} of {_gb(disk.export)}{frozen}); {_gb(_free(run_dir))} free"
    )


def _speed(ahead: Forecast, speed: Speed) -> str:
    delivered = "unknown" if speed.delivered is None else f"{speed.delivered:.3g} tiles/s"
    return (
        f"model {speed.wanted:.3g} tiles/s, assuming {speed.share * 100:.0f} % of the {_flops(speed.rate)} that "
        f"matrix products reach; loaders {delivered} ({_count(speed.workers, 'worker')} a process on "
        f"{_count(speed.cores, 'core')})"
    )


def warnings(
    config: "RunConfig",
    ahead: Forecast,
    speed: Speed | None,
    crops: Sequence[CropRange],
    run_dir: Path,
    num_cases: int | None = None,
) -> list[str]:
    """What should be changed before the run is started.

    Args:
        config: The recipe.
        ahead: The run.
        speed: As measured; None where it was not.
        crops: Which magnification they show.
        run_dir: Folder of the run; it need not exist.
        num_cases: Cases, or slides, that the data are of; None where it is not slides.
    """
    found = [*_room(ahead, run_dir), *_data(config, ahead, num_cases)]
    found += [
        f"{crop.name} crops are enlarged from fewer pixels at their smallest scale: raise crops.{crop.name}_crops_scale"
        ", or cut larger tiles"
        for crop in crops
        if crop.upsampled and crop.name in ("global", "local")
    ]
    if speed is not None and speed.delivered is not None and speed.delivered < speed.wanted:
        found.append(
            f"loader-bound: the loaders deliver {speed.delivered:.3g} tiles/s and the model wants {speed.wanted:.3g}; "
            + _more_data(ahead.num_workers, speed.cores)
        )
    return found


def _room(ahead: Forecast, run_dir: Path) -> list[str]:
    found, there = [], _used(run_dir)
    if ahead.disk.total - there > (free := _free(run_dir)):
        found.append(
            f"the disk is too small: the run needs up to {_gb(ahead.disk.total)} and {_gb(free)} are free; lower "
            "checkpointing.max_to_keep or evaluation.max_to_keep, or make room"
        )
    if (limit := _memory_of_device(ahead)) is not None and ahead.memory.peak > limit:
        found.append(
            f"memory is short: about {_gib(ahead.memory.peak)} GiB {_device(ahead)} are needed and {_gib(limit)} GiB "
            "are there; lower train.batch_size_per_gpu and raise train.accumulation_steps, or set train.checkpointing"
        )
    return found


def _data(config: "RunConfig", ahead: Forecast, num_cases: int | None) -> list[str]:
    found = []
    if ahead.passes > _MOST_PASSES:
        fitting = int(_MOST_PASSES * ahead.num_images / ahead.global_batch / config.train.OFFICIAL_EPOCH_LENGTH)
        found.append(
            f"cap: {ahead.passes:.0f} passes over the data, more than {_MOST_PASSES} teach the model these tiles by "
            f"heart; {f'set optim.epochs to {fitting}, or ' if fitting else ''}take more tiles"
        )
    few_cases = num_cases is not None and num_cases < _FEW_CASES
    if ahead.num_images < _FEW_TILES or few_cases:
        of_cases = "" if num_cases is None else f" of {num_cases} cases"
        other = "" if config.student.trainable == "lora" else ", or student.trainable: lora"
        found.append(
            f"small: {ahead.num_images:,} tiles{of_cases}, where {_FEW_TILES:,} of {_FEW_CASES} cases are wanted; "
            f"consider frozen features of a published model{other}"
        )
    return found


class Warmup:
    """Compares the first steps with what was forecast, and says it once."""

    def __init__(self, ahead: Forecast, now: Callable[[], float] = time.time) -> None:
        """Begins before the first step of this start.

        Args:
            ahead: The run.
            now: The time in seconds since 1970.
        """
        self.ahead, self._now = ahead, now
        if ahead.device_type != "cpu":
            torch.accelerator.reset_peak_memory_stats()
        self._steps, self._seconds, self._waiting = 0, 0.0, 0.0

    def note(self, iteration: int, iter_time: float, data_time: float) -> str | None:
        """The sentence, once, after 20 steps; the first 5 do not count.

        Args:
            iteration: That has ended, counted from 0 at the run's beginning.
            iter_time: Seconds that it took, waiting included.
            data_time: Seconds that it waited for its data.
        """
        self._steps += 1
        if not _WARM_UP < self._steps <= _MEASURED:
            return None
        self._seconds, self._waiting = self._seconds + iter_time, self._waiting + data_time
        return self._story(iteration) if self._steps == _MEASURED else None

    def _story(self, iteration: int) -> str:
        ahead, count = self.ahead, _MEASURED - _WARM_UP
        left = (ahead.iterations - iteration - 1) * self._seconds / count
        end = datetime.datetime.fromtimestamp(self._now() + left)
        speed, waiting = ahead.global_batch * count / self._seconds, self._waiting / self._seconds
        bound = (
            f" (loader-bound: {_more_data(ahead.num_workers, cores_per_process(ahead))})"
            if waiting > _MUCH_WAITING
            else ""
        )
        memory = f"{_gib(peak_memory(ahead.device_type))} GiB {_device(ahead)} ({_gib(ahead.memory.peak)} forecast)"
        return (
            f"after {_MEASURED} steps: {speed:.3g} tiles/s, {waiting * 100:.0f} % of the time waiting for data{bound}; "
            f"peak memory {memory}; about {time_in_words(left)} left, until {end:%a %d %b %H:%M}"
        )


def peak_memory(device_type: str) -> int:
    """The most that was taken so far, in bytes: by torch on an accelerator, by this process on CPUs."""
    if device_type != "cpu":
        return torch.accelerator.max_memory_allocated()
    return _proc_kb("/proc/self/status", "VmHWM") * 1024


def time_in_words(seconds: float) -> str:
    """Rounded to what matters: 40 s, 12 min, 3 h 20 min, 2.4 days."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        hours, minutes = divmod(round(seconds / 60), 60)
        return f"{hours} h {minutes:02d} min"
    return f"{seconds / 86400:.1f} days"


def _more_data(num_workers: int, cores: int) -> str:
    if num_workers < cores:
        return f"raise train.num_workers (now {num_workers} on {_count(cores, 'core')} a process)"
    busy = f"all {_count(cores, 'core')} of a process load already (train.num_workers {num_workers})"
    return f"{busy}: faster storage or more cores would help"


def _memory_of_device(ahead: Forecast) -> int | None:
    if ahead.device_type != "cpu":
        return torch.accelerator.get_memory_info()[1]
    return _proc_kb("/proc/meminfo", "MemTotal") * 1024 // ahead.local_size or None


def _proc_kb(path: str, name: str) -> int:
    """A number of kilobytes that Linux tells; 0 elsewhere."""
    if not Path(path).is_file():
        return 0
    lines = Path(path).read_text(encoding="ascii", errors="replace").splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


def _free(run_dir: Path) -> int:
    return shutil.disk_usage(next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.is_dir())).free


def _used(run_dir: Path) -> int:
    files = (path for folder in ("ckpt", "eval") for path in (run_dir / folder).rglob("*"))
    sizes = 0
    for path in files:
        try:
            sizes += path.lstat().st_size
        except FileNotFoundError:  # a trainer deleted it meanwhile
            continue
    return sizes


def _device(ahead: Forecast) -> str:
    return "a process" if ahead.device_type == "cpu" else "a GPU"


def _count(number: int, name: str) -> str:
    plural = name + ("es" if name.endswith("s") else "s")
    return f"{number} {name if number == 1 else plural}"


def _millions(number: int) -> str:
    return f"{number / 1e6:.3g} million"


def _gib(size: float) -> str:
    return f"{size / 2**30:.{2 if size < 10 * 2**30 else 1}f}"


def _gb(size: float) -> str:
    return f"{size / 1e6:.3g} MB" if size < 1e9 else f"{size / 1e9:.1f} GB"


def _flops(rate: float) -> str:
    return f"{rate / 1e12:.3g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.3g} GFLOP/s"
