"""One training run, from its inputs to final.json.

    torchrun --standalone --nproc-per-node 2 workflow_scripts/pretrain.py --config config/runs/tiny.yaml \
        --manifest results/manifests/train.parquet --slides config/slides.tsv --run-dir results/runs/pretrain

The folder of a run: run_config.json (the seal), config.yaml (resolved), ckpt/<it>/ (DCP), eval/training_<it>/
(exported teachers), training_metrics.json, logs/, and final.json, which is written last.
"""

import contextlib
import hashlib
import logging
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from dinoscope.data.collate import Batch, Collate
from dinoscope.data.dataset import ImageCrops, build_loader, crop_settings, open_images
from dinoscope.data.sampling import SampleOrder, sample_order
from dinoscope.data.sources import TrainingImages
from dinoscope.data.windows import crop_ranges
from dinoscope.errors import DinoscopeError, RunError
from dinoscope.files import write_json
from dinoscope.models.registry import settings_from_config
from dinoscope.progress import Progress, progress
from dinoscope.train.checkpoint import (
    export_teacher,
    load_checkpoint,
    save_checkpoint,
)
from dinoscope.train.distributed import World
from dinoscope.train.health import HealthWindow
from dinoscope.train.lock import run_lock
from dinoscope.train.metrics import append_metrics, read_metrics
from dinoscope.train.optimizer import build_optimizer, copy_state
from dinoscope.train.parallelize import parallelize
from dinoscope.train.run_folder import complete_checkpoints, teacher_export_path
from dinoscope.train.schedule import ScheduleValues, build_schedules
from dinoscope.train.seal import compare_with_seal, seal_run
from dinoscope.train.ssl_step import SSLModel
from dinoscope.train.starting import Start, start_model
from dinoscope.train.step import StepOutcome, TrainingStep, global_batch
from dinoscope.train.window import MetricWindow

if TYPE_CHECKING:
    from dinoscope.config import RunConfig

__all__ = ["RunInputs", "train_run"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True)
class RunInputs:
    """What a run reads: its recipe, tiles with the slides they are on (unless the recipe names images), its start.

    `resolve_start` is asked only when the run begins: what it began with may be gone when it goes on.
    """

    config: "RunConfig"
    manifest: Path | None
    slides: str | None
    resolve_start: Callable[[], Start]
    run_dir: Path


@dataclass(frozen=True)
class Prepared:
    """What the main process finds out for all: the images, and either a start or a checkpoint to go on from."""

    images: TrainingImages
    origin: str | None
    start: Start | None
    iteration: int
    checkpoint: Path | None


def train_run(inputs: RunInputs, world: World) -> None:
    """Trains until the last iteration, or until asked to stop, resuming from the newest complete checkpoint.

    All ranks call it together. Writes final.json last; when it is there, the run is finished.

    Raises:
        RunError: Another process trains in the folder, the settings differ from those the run was started with, the
            loss is not finite, or the process was asked to stop (after a checkpoint).
        DinoscopeError: An input is wrong.
    """
    with contextlib.ExitStack() as stack:
        prepared = _main_first(world, lambda: _prepare(inputs, stack, world))
        Trainer(inputs, world, prepared).run()


def _prepare(inputs: RunInputs, stack: contextlib.ExitStack, world: World) -> Prepared:
    """What the main process does alone: lock, seal, find the images."""
    config, run_dir = inputs.config, inputs.run_dir
    stack.enter_context(run_lock(run_dir))
    batch = global_batch(config, world.size)
    where = {"manifest": inputs.manifest, "slides": inputs.slides, "run_dir": run_dir}
    checkpoints = complete_checkpoints(run_dir)
    if checkpoints:
        seal = compare_with_seal(run_dir, config, batch)
        images = open_images(config.train.dataset_path, **where, sealed=seal["inputs"])
        return Prepared(images, seal["origin"], None, *list(checkpoints.items())[-1])
    start, images = inputs.resolve_start(), open_images(config.train.dataset_path, **where)
    crop_ranges(images.windows, crop_settings(config)[0])
    kind = "manifest" if config.train.dataset_path is None else "images"
    digests = {"manifest": None, kind: images.digest(), **start.digests()}
    seal_run(run_dir, config, batch, digests, start.origin(), images.slide_ids)
    return Prepared(images, start.origin(), start, -1, None)


def _main_first(world: World, work: Callable[[], _T]) -> _T:
    """Runs `work` on the main process and gives its result to all; an error of a user's ends all ranks."""
    outcome: list[Any] = [None, None]
    if world.is_main:
        try:
            outcome[0] = work()
        except DinoscopeError as error:
            outcome[1] = error
        except OSError as error:  # a full disk, a folder that cannot be written to
            outcome[1] = RunError(str(error))
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        if world.is_main:
            raise outcome[1]
        sys.exit(1)  # the main process says it, once
    return outcome[0]


class Trainer:
    """The state of a run in one process."""

    def __init__(self, inputs: RunInputs, world: World, prepared: Prepared) -> None:
        self.config, self.run_dir, self.world, self.images = inputs.config, inputs.run_dir, world, prepared.images
        self.origin = prepared.origin
        self.stream_seed = _stream_seed(self.config.train.seed, self.run_dir.name)
        self.global_batch = global_batch(self.config, world.size)
        self.schedules = build_schedules(self.config, self.global_batch)
        self.settings = settings_from_config(self.config.student)
        with torch.device("meta"):
            self.model = SSLModel(self.config, self.settings)
        parallelize(self.model, world)
        self.optimizer = build_optimizer(self.model.student, self.config, self.settings.depth)
        self.window, self.health = MetricWindow(world), HealthWindow(world)
        self.step = TrainingStep(self.model, self.optimizer, world, self.stream_seed, self.health)
        self.skipped_in_a_row = 0
        self.saved_iteration = prepared.iteration
        self.next_iteration = self._restore(prepared)
        self.dataset = self._dataset()

    @property
    def num_iterations(self) -> int:
        """Length of the run."""
        return len(self.schedules)

    def _restore(self, prepared: Prepared) -> int:
        """Fills the model; returns the first iteration to do."""
        if prepared.start is not None:
            story = start_model(self.model, self.optimizer, prepared.start, self.world)
            self._event("start", 0, story)
            return 0
        iteration, folder = prepared.iteration, prepared.checkpoint
        load_checkpoint(folder, self.model, self.optimizer)
        if iteration + 1 < self.num_iterations:
            self._event("resume", iteration + 1, f"resumes after iteration {iteration}, from ckpt/{folder.name}")
        return iteration + 1

    def _event(self, name: str, iteration: int, story: str) -> None:
        if self.world.is_main:
            append_metrics(self.run_dir, {"event": name, "iteration": iteration, "note": story})
            _log.info("run %s %s", self.run_dir.name, story)

    def _dataset(self) -> ImageCrops:
        sizes, augmentation = crop_settings(self.config)
        ranges = crop_ranges(self.images.windows, sizes)
        if self.world.is_main:
            self._summarise([str(r) for r in ranges])
        return ImageCrops(self.images, sizes, augmentation, self.stream_seed)

    def _summarise(self, crops: Sequence[str]) -> None:
        samples = self.num_iterations * self.global_batch
        kind = "tiles" if self.config.train.dataset_path is None else "images"
        _log.info(
            "%d %s, %d iterations of %d %s (%d processes on %s): %.1f passes over the data, peak lr %.3g",
            *(len(self.images), kind, self.num_iterations, self.global_batch, kind),
            *(self.world.size, self.world.device.type, samples / len(self.images), float(self.schedules.lr.max())),
        )
        for line in [*crops, *self._order().story(self.num_iterations)]:
            _log.info("%s", line)

    def _order(self) -> SampleOrder:
        return sample_order(
            self.images,
            self.config.sampling,
            seed=self.stream_seed,
            batch_size=self.config.train.batch_size_per_gpu,
            global_batch=self.global_batch,
        )

    def run(self) -> None:
        """Trains to the end and writes final.json."""
        with _stop_requests() as stop, self._progress() as shown:
            for iteration, batch in self._batches():
                values = self.schedules.at(iteration)
                self._train_step(iteration, batch, values)
                self.next_iteration = iteration + 1
                self._log_step(iteration, values, shown)
                self._keep(iteration)
                if self.next_iteration < self.num_iterations and self.world.any(bool(stop)):
                    self._stop_early(iteration)
        self._finish()

    def _progress(self) -> contextlib.AbstractContextManager[Progress | None]:
        if not self.world.is_main:
            return contextlib.nullcontext()
        return progress(
            f"training {self.run_dir.name}", self.num_iterations, start=self.next_iteration, unit="iterations"
        )

    def _batches(self) -> Iterator[tuple[int, Batch]]:
        config = self.config
        grid_side = config.crops.global_crops_size // config.student.patch_size
        collate = Collate(
            config.train.batch_size_per_gpu * config.train.accumulation_steps,
            (grid_side, grid_side),
            _mask_probability(config),
            tuple(config.ibot.mask_ratio_min_max),
            config.ibot.mask_random_circular_shift,
            self.stream_seed,
        )
        self.dataset.order = self._order()
        loader = build_loader(
            self.dataset,
            collate,
            first=self.next_iteration,
            last=self.num_iterations,
            rank=self.world.rank,
            world_size=self.world.size,
            num_workers=config.train.num_workers,
        )
        iteration, waiting_since = self.next_iteration, time.perf_counter()
        for batch in loader:
            self.window.waited(time.perf_counter() - waiting_since)
            if isinstance(batch, DinoscopeError):
                raise batch
            yield iteration, batch.to(self.world.device)
            iteration, waiting_since = iteration + 1, time.perf_counter()

    def _train_step(self, iteration: int, batch: Batch, values: ScheduleValues) -> None:
        if iteration == self.config.gram.it_load_ema_teacher and self.model.gram_teacher is not None:
            self._refresh_gram_teacher(iteration)
        frozen = iteration < self.schedules.frozen_iterations
        outcome = self.step(iteration, batch, values, backbone_frozen=frozen)
        if outcome.skipped:
            self._skipped(iteration, batch, outcome)
        else:
            self.skipped_in_a_row = 0
            self.window.add(outcome.terms)
        if self._gram_refresh_due(iteration):
            self._refresh_gram_teacher(iteration + 1)

    def _skipped(self, iteration: int, batch: Batch, outcome: StepOutcome) -> None:
        """Tells of a step that left the weights as they were; too many in a row end the run."""
        self.skipped_in_a_row += 1
        mine = [] if outcome.own_loss_finite else self.dataset.sample_ids(batch.samples)
        gathered: list[list[str]] = [[] for _ in range(self.world.size)]
        dist.all_gather_object(gathered, mine)
        samples = [name for part in gathered for name in part]
        story = f"skips iteration {iteration}: its loss or gradients are not finite"
        self._event("skipped", iteration, story + (f"; the loss is not on {_some(samples)}" if samples else ""))
        limit = self.config.train.stop_after_skipped
        if self.skipped_in_a_row >= limit:
            kept = list(complete_checkpoints(self.run_dir))
            raise RunError(
                f"run {self.run_dir.name}: {limit} steps in a row, up to iteration {iteration}, had a loss or gradients "
                "that are not finite; lower optim.lr or lengthen its warm-up under a new run name"
                + (f" (the last good checkpoint is of iteration {kept[-1]})" if kept else "")
            )

    def _gram_refresh_due(self, iteration: int) -> bool:
        """Whether the gram teacher follows the EMA teacher after this iteration."""
        gram, done = self.config.gram, iteration + 1
        if self.model.gram_teacher is None or not gram.rep_update or done < gram.it_first_update:
            return False
        first = math.ceil(max(gram.it_first_update, 1) / gram.update_frequency)
        updates_before = done // gram.update_frequency - first
        within = gram.max_updates is None or updates_before < gram.max_updates
        return done % gram.update_frequency == 0 and within

    def _refresh_gram_teacher(self, iteration: int) -> None:
        copy_state(self.model.gram_teacher["backbone"], self.model.teacher["backbone"])
        self._event(
            "gram_teacher_update", iteration, f"takes the EMA teacher as gram teacher from iteration {iteration}"
        )

    def _log_step(self, iteration: int, values: ScheduleValues, shown: Progress | None) -> None:
        due = (iteration + 1) % self.config.train.log_every == 0 or self.next_iteration == self.num_iterations
        if due:
            line = self.window.close(iteration, self.global_batch)
            if "dino_global_crops_loss" in line:
                line |= self.health.close(line["dino_global_crops_loss"])
            if self.world.is_main:
                append_metrics(self.run_dir, line | _schedule_line(values))
        if shown is not None:
            last = self.window.last
            rate = (
                f"loss {last['total_loss']:.3f}, {last['samples_per_second']:.1f} tiles/s, "
                if "total_loss" in last
                else ""
            )
            shown.advance(note=f"{rate}lr {values.lr:.2e}")

    def _keep(self, iteration: int) -> None:
        """Checkpoint and teacher export where they are due; both are at the last iteration."""
        last = self.next_iteration == self.num_iterations
        period = self.config.evaluation.eval_period_iterations
        if last or (period and (iteration + 1) % period == 0):
            export_teacher(self.run_dir, iteration, self.model, self.origin, self.world)
        if last or (iteration + 1) % self.config.checkpointing.period == 0:
            self._save(iteration)

    def _save(self, iteration: int) -> None:
        save_checkpoint(self.run_dir, iteration, self.model, self.optimizer, self.config.checkpointing, self.world)
        self.saved_iteration = iteration

    def _stop_early(self, iteration: int) -> None:
        if iteration != self.saved_iteration:
            self._save(iteration)
        raise RunError(
            f"run {self.run_dir.name} was asked to stop and saved its state after iteration {iteration}; "
            "start it again to go on from there"
        )

    def _finish(self) -> None:
        iteration = self.num_iterations - 1
        teacher = teacher_export_path(self.run_dir, iteration)
        if not _main_first(self.world, teacher.is_file):
            export_teacher(self.run_dir, iteration, self.model, self.origin, self.world)
        if self.world.is_main:
            _log.info("run %s is finished after %d iterations", self.run_dir.name, self.num_iterations)
            write_json(self.run_dir / "final.json", self._final(iteration, teacher))
        dist.barrier()

    def _final(self, iteration: int, teacher: Path) -> dict[str, Any]:
        folder = complete_checkpoints(self.run_dir)[iteration]
        sizes, _ = crop_settings(self.config)
        return {
            "run": self.run_dir.name,
            "iteration": iteration,
            "checkpoint": str(folder.relative_to(self.run_dir)),
            "teacher": str(teacher.relative_to(self.run_dir)),
            "num_tiles": len(self.images),
            "samples_seen": self.num_iterations * self.global_batch,
            "tiles": sorted({(w.shorter_px, w.mpp and round(w.mpp, 6)) for w in self.images.windows}),
            "crops": [vars(entry) for entry in crop_ranges(self.images.windows, sizes)],
            "metrics": _last_metrics(self.run_dir),
        }


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _mask_probability(config: "RunConfig") -> float:
    ibot = config.ibot
    return ibot.mask_sample_probability if ibot.loss_weight or ibot.force_masking_even_with_zero_weight else 0.0


def _schedule_line(values: ScheduleValues) -> dict[str, float]:
    line = {
        "lr": values.lr,
        "wd": values.weight_decay,
        "mom": values.momentum,
        "last_layer_lr": values.last_layer_lr,
        "teacher_temp": values.teacher_temp,
    }
    if values.head_lr is not None:
        line["head_lr"] = values.head_lr
    if values.gram_weight is not None:
        line["gram_weight"] = values.gram_weight
    return line


def _last_metrics(run_dir: Path) -> dict[str, Any]:
    return {key: value for key, value in read_metrics(run_dir).iloc[-1].items() if value == value}


def _stream_seed(seed: int, run: str) -> int:
    """Seed of a run's samples, crops, masks and draws: a run that continues another sees other ones."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{run}".encode()).digest()[:7], "big")


@contextlib.contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collects SIGTERM, SIGUSR1 and Ctrl-C, so that the training can stop at the end of a step."""
    received: list[int] = []
    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.signal(number, lambda number, _: received.append(number)) for number in signals]
    try:
        yield received
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
