"""One training run, from its inputs to final.json.

    torchrun --standalone --nproc-per-node 2 workflow_scripts/pretrain.py --config config/runs/tiny.yaml \
        --manifest results/manifests/train.parquet --slides config/slides.tsv --run-dir results/runs/pretrain

The folder of a run: run_config.json (the seal), config.yaml (resolved), provenance.json (who made it), ckpt/<it>/
(DCP), eval/training_<it>/ (exported teachers), training_metrics.json, logs/, and final.json, which is written last.
"""

import contextlib
import hashlib
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from dinoscope.data.collate import Batch, Collate
from dinoscope.data.dataset import (
    ImageCrops,
    build_loader,
    crop_settings,
    open_images,
    pixels_digest,
    reader_digest,
    stains_digest,
)
from dinoscope.data.sampling import SampleOrder, sample_order
from dinoscope.data.sources import TrainingImages
from dinoscope.data.tiles import SlideAccess
from dinoscope.data.windows import CropRange, crop_ranges, describe_windows
from dinoscope.errors import ConfigError, DinoscopeError, RunError, StoppedError
from dinoscope.files import write_json
from dinoscope.models.registry import settings_from_config
from dinoscope.progress import Progress, progress
from dinoscope.train.checkpoint import export_teacher, load_checkpoint
from dinoscope.train.checkpoint_files import clean_end_marked
from dinoscope.train.clock import RunClock
from dinoscope.train.disk_errors import in_words, not_written
from dinoscope.train.distillation import TeacherShape, sealed_teacher
from dinoscope.train.distributed import World
from dinoscope.train.forecast import forecast
from dinoscope.train.health import HealthWindow
from dinoscope.train.lock import HeldLock, run_lock
from dinoscope.train.metrics import append_metrics, best_iteration, metrics_at, read_metrics
from dinoscope.train.optimizer import build_optimizer, copy_state
from dinoscope.train.outlook import Warmup, outlook, warnings
from dinoscope.train.parallelize import parallelize
from dinoscope.train.probing import TeacherProbe, best_probe, read_probe_set
from dinoscope.train.provenance import write_provenance
from dinoscope.train.run_folder import (
    complete_checkpoints,
    exported_teachers,
    follow_umask,
    newest_checkpoint,
    prune_exports,
    remove_partial,
    set_damaged_aside,
    teacher_export_path,
)
from dinoscope.train.saving import CheckpointSaver
from dinoscope.train.schedule import ScheduleValues, build_schedules
from dinoscope.train.seal import (
    compare_order,
    compare_pixels,
    compare_reader,
    compare_with_seal,
    seal_run,
    write_config,
)
from dinoscope.train.speed import speed_if_readable
from dinoscope.train.ssl_step import SSLModel
from dinoscope.train.starting import Start, start_model
from dinoscope.train.step import StepOutcome, TrainingStep, global_batch
from dinoscope.train.stopping import stop_requests
from dinoscope.train.teacher_heads import make_heads
from dinoscope.train.watchdog import Watchdog, watched
from dinoscope.train.window import MetricWindow

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from dinoscope.config import RunConfig

__all__ = ["RunInputs", "train_run"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True)
class RunInputs:
    """What a run reads: its recipe, tiles with the slides they are on (unless the recipe names images), its start.

    `resolve_start` is asked only when the run begins: what it began with may be gone when it goes on. The exports of
    `keep_exports` stay, whatever the recipe says; `access` says how slides are opened, `name_hosts` whether
    provenance.json has the names of machines.
    """

    config: "RunConfig"
    manifest: Path | None
    slides: str | None
    resolve_start: Callable[[], Start]
    run_dir: Path
    keep_exports: tuple[int, ...] = ()
    access: SlideAccess | None = None
    packed: Path | None = None
    name_hosts: bool = False
    probe: Path | None = None


@dataclass(frozen=True)
class Prepared:
    """What the main process finds out for all: the images, and either a start or a checkpoint to go on from.

    `epochs` is the length that a run which goes on had until now, `distilled` what the teacher that it distils is built
    from.
    """

    images: TrainingImages
    origin: str | None
    start: Start | None
    iteration: int
    checkpoint: Path | None
    epochs: int | None = None
    distilled: TeacherShape | None = None


def train_run(inputs: RunInputs, world: World) -> None:
    """Trains until the last iteration, or until asked to stop, resuming from the newest complete checkpoint.

    All ranks call it together. Writes final.json last; when it is there, the run is finished. A process that hangs ends
    itself (watchdog.py), and with it all others.

    Raises:
        RunError: Another process trains in the folder, the settings differ from those the run was started with, the
            loss is not finite, or its last files cannot be written.
        StoppedError: It was asked to stop, or came near its time limit, and is to be started again.
        DinoscopeError: An input is wrong.
    """
    locks: list[HeldLock] = []  # the main process holds one

    def require_held() -> None:
        for lock in locks:
            lock.require_held()

    with contextlib.ExitStack() as stack:
        name, minutes = f"run {inputs.run_dir.name}", inputs.config.train.hang_minutes
        watchdog = stack.enter_context(watched(name, world.rank, minutes))
        prepared = _main_first(world, lambda: _prepare(inputs, stack, locks, world))
        saver = CheckpointSaver(inputs.run_dir, inputs.config.checkpointing, world, require_held)
        watchdog.beat()
        Trainer(inputs, world, prepared, stack.enter_context(saver), watchdog).run()


def _prepare(inputs: RunInputs, stack: contextlib.ExitStack, locks: list[HeldLock], world: World) -> Prepared:
    """What the main process does alone: lock, seal, find the images; tidy up what a killed trainer left."""
    locks.append(stack.enter_context(run_lock(inputs.run_dir)))
    follow_umask(inputs.run_dir / "logs")
    prepared = _find(inputs, world)
    if prepared.checkpoint is not None:
        set_damaged_aside(inputs.run_dir, prepared.iteration)
    for folder in ("ckpt", "eval"):
        remove_partial(inputs.run_dir / folder)
    stack.enter_context(clean_end_marked(inputs.run_dir))
    return prepared


def _find(inputs: RunInputs, world: World) -> Prepared:
    config, run_dir = inputs.config, inputs.run_dir
    batch = global_batch(config, world.size)
    where = {"manifest": inputs.manifest, "slides": inputs.slides, "packed": inputs.packed, "run_dir": run_dir}
    where["access"] = inputs.access
    checkpoint = newest_checkpoint(run_dir)
    if checkpoint is not None:
        seal = compare_with_seal(run_dir, config, batch)
        images = open_images(config.train.dataset_path, **where, sealed=seal["inputs"])
        compare_order(run_dir, seal, _order_of(images, inputs, world).digest(), stains_digest(images, config))
        compare_pixels(run_dir, seal, pixels_digest(images))
        compare_reader(run_dir, seal, reader_digest(images))
        write_config(run_dir, config)
        return Prepared(images, seal["origin"], None, *checkpoint, seal["epochs"], sealed_teacher(seal))
    start, images = inputs.resolve_start(), open_images(config.train.dataset_path, **where)
    data = describe_windows(images.windows, crop_settings(config)[0].choices)
    kind = "manifest" if config.train.dataset_path is None else "images"
    of_table = {"strata": _order_of(images, inputs, world).digest(), "stains": stains_digest(images, config)}
    of_pixels = {"pixels": pixels_digest(images), "reader": reader_digest(images)}
    digests = {"manifest": None, kind: images.digest(), **of_table, **of_pixels, **start.digests()}
    shape, origin = start.shape(config), start.origin()
    seal_run(run_dir, config, batch, digests, origin, images.slide_ids, shape and shape.as_dict(), data)
    return Prepared(images, origin, start, -1, None, distilled=shape)


def _order_of(images: TrainingImages, inputs: RunInputs, world: World) -> SampleOrder:
    batch = global_batch(inputs.config, world.size)
    return sample_order(
        images,
        inputs.config.sampling,
        seed=_stream_seed(inputs.config, inputs.run_dir),
        batch_size=batch // world.size,
        global_batch=batch,
    )


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


def _end_all(world: World, error: DinoscopeError) -> NoReturn:
    """Ends a run with an error that all ranks know of; the main process says it."""
    if world.is_main:
        raise error
    sys.exit(error.exit_status)


class Trainer:
    """The state of a run in one process."""

    def __init__(
        self, inputs: RunInputs, world: World, prepared: Prepared, saver: CheckpointSaver, watchdog: Watchdog
    ) -> None:
        self.config, self.run_dir, self.world, self.images = inputs.config, inputs.run_dir, world, prepared.images
        self.origin, self.distilled = prepared.origin, prepared.distilled
        self.stream_seed = _stream_seed(self.config, self.run_dir)
        self.global_batch = global_batch(self.config, world.size)
        self.schedules = build_schedules(self.config, self.global_batch)
        self.settings = settings_from_config(self.config.student)
        with torch.device("meta"):
            self.model = SSLModel(self.config, self.settings, prepared.distilled)
        parallelize(self.model, world)
        self.optimizer = build_optimizer(self.model.student, self.config, self.settings.depth)
        self.window, self.health = MetricWindow(world), HealthWindow(world)
        self.step = TrainingStep(self.model, self.optimizer, world, self.stream_seed, self.health)
        self.skipped_in_a_row = 0
        self.saver, self.watchdog, self.keep_exports = saver, watchdog, inputs.keep_exports
        train = self.config.train
        self.clock = RunClock(self.config.checkpointing.every_minutes, train.time_limit_minutes)
        self.order = _order_of(self.images, inputs, world)
        self.warmup: Warmup | None = None
        self.next_iteration = self._restore(prepared)
        self.first_iteration = self.next_iteration
        write_provenance(self.run_dir, world, self.first_iteration, name_hosts=inputs.name_hosts)
        self.probe = self._open_probe(inputs.probe)
        self.dataset = self._dataset()
        if prepared.start is not None and self.distilled is not None and self.distilled.made:
            self._make_heads()

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
            self._tell_extension(iteration + 1, prepared.epochs)
        return iteration + 1

    def _tell_extension(self, iteration: int, epochs: int | None) -> None:
        """The joint of the learning rate, where a run goes on with another length."""
        if epochs in (None, self.config.optim.epochs):
            return
        before = build_schedules(OmegaConf.merge(self.config, {"optim": {"epochs": epochs}}), self.global_batch)
        old, new = before.at(min(iteration, len(before) - 1)).lr, self.schedules.at(iteration).lr
        story = f"has {self.config.optim.epochs} epochs instead of {epochs}"
        self._event("extended", iteration, f"{story}: its learning rate goes from {old:.3g} to {new:.3g}")

    def _event(self, name: str, iteration: int, story: str) -> None:
        if self.world.is_main:
            append_metrics(self.run_dir, {"event": name, "iteration": iteration, "note": story})
            _log.info("run %s %s", self.run_dir.name, story)

    def _dataset(self) -> ImageCrops:
        sizes, augmentation = crop_settings(self.config)
        ranges = crop_ranges(self.images.windows, sizes.choices)
        if self.world.is_main:
            self._summarise(ranges)
        return ImageCrops(self.images, sizes, augmentation, self.stream_seed, self.order, self.global_batch)

    def _summarise(self, crops: Sequence[CropRange]) -> None:
        """Says on the main process what the run will take, before its first step."""
        kind = "tiles" if self.config.train.dataset_path is None else "images"
        world, left = self.world, self.num_iterations - self.next_iteration
        _log.info("data: %d %s, on %s", len(self.images), kind, world.device.type)
        for line in self.order.story(self.num_iterations):
            _log.info("%s", line)
        if not left:
            return
        ahead = forecast(
            self.config,
            self.settings,
            world.size,
            len(self.images),
            world.device.type,
            world.local_size,
            self.distilled,
        )
        speed = speed_if_readable(self.config, self.images, ahead)
        for label, text in outlook(self.config, ahead, speed, crops, self.run_dir, self.next_iteration):
            _log.info("%s: %s", label, text)
        for text in warnings(self.config, ahead, speed, crops, self.run_dir):
            _log.warning("warning: %s", text)
        self.warmup = Warmup(ahead)

    def run(self) -> None:
        """Trains to the end and writes final.json."""
        with stop_requests() as stop, self._progress() as shown:
            if self.probe is not None and not self.next_iteration:
                self._ask(0, start=True)
            for iteration, batches in [] if self._ended_worse() else self._batches():
                values = self.schedules.at(iteration)
                self._train_step(iteration, batches, values)
                self.next_iteration = iteration + 1
                self._log_step(iteration, values, shown)
                worse = self._probe_if_due(iteration)
                self._keep(iteration, bool(stop), worse=worse)
                self.watchdog.beat()
                if worse:
                    break
        self._finish()

    def _progress(self) -> contextlib.AbstractContextManager[Progress | None]:
        if not self.world.is_main:
            return contextlib.nullcontext()
        return progress(
            f"training {self.run_dir.name}", self.num_iterations, start=self.next_iteration, unit="iterations"
        )

    def _make_heads(self) -> None:
        """Heads of the distilled teacher that its file lacks, from the images of the first steps."""
        parts = self.config.train.accumulation_steps
        batches = (part.to(self.world.device) for batch in self._loader() for part in self._checked(batch).split(parts))
        count = make_heads(self.model, self.distilled.made, batches, self.world, self.config.train.seed + 3)
        self._event("heads", 0, f"made heads of the distilled teacher from {count:,} crops")

    def _loader(self) -> "DataLoader[Batch]":
        """What this rank forwards in each step from `next_iteration` on."""
        config = self.config
        collate = Collate(
            config.train.batch_size_per_gpu * config.train.accumulation_steps,
            config.student.patch_size,
            _mask_probability(config),
            tuple(config.ibot.mask_ratio_min_max),
            config.ibot.mask_random_circular_shift,
            self.stream_seed,
        )
        return build_loader(
            self.dataset,
            collate,
            first=self.next_iteration,
            last=self.num_iterations,
            rank=self.world.rank,
            world_size=self.world.size,
            num_workers=config.train.num_workers,
        )

    @staticmethod
    def _checked(batch: Batch | DinoscopeError) -> Batch:
        """The batch; raises the error that a loader sent in its place."""
        if isinstance(batch, DinoscopeError):
            raise batch
        return batch

    def _batches(self) -> Iterator[tuple[int, list[Batch]]]:
        iteration, waiting_since = self.next_iteration, time.perf_counter()
        for batch in self._loader():
            data_time = time.perf_counter() - waiting_since
            self.window.waited(data_time)
            parts = self._checked(batch).split(self.config.train.accumulation_steps)
            yield iteration, [part.to(self.world.device) for part in parts]
            now = time.perf_counter()
            if self.warmup is not None and (story := self.warmup.note(iteration, now - waiting_since, data_time)):
                _log.info("%s", story)
            iteration, waiting_since = iteration + 1, now

    def _train_step(self, iteration: int, batches: list[Batch], values: ScheduleValues) -> None:
        if iteration == self.config.gram.it_load_ema_teacher and self.model.gram_teacher is not None:
            self._refresh_gram_teacher(iteration)
        frozen = iteration < self.schedules.frozen_iterations
        outcome = self.step(iteration, batches, values, backbone_frozen=frozen)
        if outcome.skipped:
            self._skipped(iteration, batches, outcome)
        else:
            self.skipped_in_a_row = 0
            self.window.add(outcome.terms)
        if self._gram_refresh_due(iteration):
            self._refresh_gram_teacher(iteration + 1)

    def _skipped(self, iteration: int, batches: list[Batch], outcome: StepOutcome) -> None:
        """Tells of a step that left the weights as they were; too many in a row end the run."""
        self.skipped_in_a_row += 1
        mine = [sample for batch in batches for sample in batch.samples]
        gathered: list[list[str]] = [[] for _ in range(self.world.size)]
        dist.all_gather_object(gathered, [] if outcome.own_loss_finite else self.dataset.sample_ids(mine))
        samples = [name for part in gathered for name in part]
        story = f"skips iteration {iteration}: its loss or gradients are not finite"
        self._event("skipped", iteration, story + (f"; the loss is not on {_some(samples)}" if samples else ""))
        limit = self.config.train.stop_after_skipped
        if self.skipped_in_a_row >= limit:
            kept = list(complete_checkpoints(self.run_dir))
            raise RunError(
                f"run {self.run_dir.name}: {limit} steps in a row, up to iteration {iteration}, had a loss or "
                "gradients that are not finite; lower optim.lr or lengthen its warm-up under a new run name"
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

    def _open_probe(self, path: Path | None) -> TeacherProbe | None:
        if not self.config.evaluation.probe_every:
            return None
        if path is None:
            raise ConfigError(
                f"run {self.run_dir.name}: evaluation.probe_every is {self.config.evaluation.probe_every}, but there "
                "are no images to ask about: give pretrain.py --probe (evaluate.py probe makes it)"
            )
        patch_size, batch_size = self.config.student.patch_size, 2 * self.config.train.batch_size_per_gpu
        return TeacherProbe(read_probe_set(path), self.run_dir, self.world, patch_size, batch_size)

    def _ask(self, iteration: int, *, start: bool = False) -> None:
        """Puts the probe to the teacher and logs what it answers; the step's clock does not count it."""
        line = self.probe(self.model, start=start)
        if self.world.is_main:
            append_metrics(self.run_dir, {"iteration": iteration} | line)

    def _probe_if_due(self, iteration: int) -> bool:
        """Asks the teacher where that is due; whether the run is to end because it has got worse."""
        evaluation, last = self.config.evaluation, self.next_iteration == self.num_iterations
        if self.probe is None or not (last or self.next_iteration % evaluation.probe_every == 0):
            return False
        self._ask(iteration)
        if evaluation.select != "last" and not last and self._is_best(iteration):
            self._export(iteration, last=False)
        return not last and self._ended_worse()

    def _is_best(self, iteration: int) -> bool:
        """Whether no probe before was as good, by the measure that chooses the teacher; all processes agree."""
        column = self.config.evaluation.select.removeprefix("best:")
        if not self.world.is_main:
            return self.world.any(False)
        exported = [it for it in exported_teachers(self.run_dir) if it < iteration]
        before, now = best_probe(self.run_dir, exported, column), best_probe(self.run_dir, [iteration], column)
        return self.world.any(now is not None and (before is None or now[1] > before[1]))

    def _ended_worse(self) -> bool:
        if self.probe is None or not self.config.evaluation.stop_when_worse:
            return False
        return self.probe.has_got_worse(self.num_iterations)

    def _keep(self, iteration: int, stop: bool, *, worse: bool = False) -> None:
        """Teacher export and checkpoint where they are due, and the end of a run that must stop."""
        last = worse or self.next_iteration == self.num_iterations
        stop, out_of_time, save_is_due = self._agree(stop)
        ends = last or stop or out_of_time
        export_period, period = self.config.evaluation.eval_period_iterations, self.config.checkpointing.period
        if not last and export_period and self.next_iteration % export_period == 0:
            self._export(iteration, last=False)
        if ends or save_is_due or self.next_iteration % period == 0:
            self._save(iteration, ends=ends)
        if ends and not last:
            self._stop_early(iteration, "was asked to stop" if stop else "came near its time limit")

    def _agree(self, stop: bool) -> list[bool]:
        """Whether any process was asked to stop; by the main process's clock: is time up, is a save due."""
        clock, main = self.clock, self.world.is_main
        flags = [stop, main and clock.time_is_up(self.saver.seconds_needed()), main and clock.save_is_due()]
        return self.world.reduce(torch.tensor(flags, dtype=torch.int), dist.ReduceOp.MAX).bool().tolist()

    def _save(self, iteration: int, *, ends: bool) -> None:
        _main_first(self.world, self.saver.require_held)
        self.clock.saved()
        cause = self.saver.save(iteration, self.model, self.optimizer, blocking=ends)
        if ends and cause is not None:
            _end_all(self.world, not_written(self.run_dir, f"checkpoint {iteration}", cause))

    def _export(self, iteration: int, *, last: bool) -> None:
        _main_first(self.world, self.saver.require_held)
        try:
            export_teacher(self.run_dir, iteration, self.model, self.origin, self.world)
        except OSError as error:
            what, cause = f"teacher export {iteration}", in_words(error)
            if last:
                _end_all(self.world, not_written(self.run_dir, what, cause))
            if self.world.is_main:
                _log.warning(
                    "run %s: %s cannot be written (%s); the training goes on without it", self.run_dir.name, what, cause
                )
            return
        _main_first(self.world, self._prune_exports)

    def _prune_exports(self) -> None:
        evaluation = self.config.evaluation
        best = None
        if evaluation.best_by is not None:
            best = best_iteration(self.run_dir, exported_teachers(self.run_dir), evaluation.best_by)
            if best is None:
                _log.warning("evaluation.best_by is %s, which the metrics do not have (yet)", evaluation.best_by)
        selected = self._selected()
        chosen = set() if selected is None else {selected[0]}
        prune_exports(self.run_dir, evaluation.max_to_keep, {best, *chosen, *self.keep_exports})

    def _selected(self) -> tuple[int, float] | None:
        """The export with the best probe so far, and its value; None where the last is taken anyhow."""
        select = self.config.evaluation.select
        if select == "last":
            return None
        return best_probe(self.run_dir, exported_teachers(self.run_dir), select.removeprefix("best:"))

    def _stop_early(self, iteration: int, why: str) -> None:
        raise StoppedError(
            f"run {self.run_dir.name} {why} and saved its state after iteration {iteration}; "
            "start it again to go on from there"
        )

    def _finish(self) -> None:
        iteration = self.next_iteration - 1
        teacher = teacher_export_path(self.run_dir, iteration)
        # one that is there may be of an earlier attempt, whose last checkpoint was damaged
        if self.next_iteration > self.first_iteration or not _main_first(self.world, teacher.is_file):
            self._export(iteration, last=True)
        _main_first(self.world, lambda: self._write_final(iteration, teacher))

    def _write_final(self, iteration: int, teacher: Path) -> None:
        self.saver.require_held()
        why = "" if self.next_iteration == self.num_iterations else ", since the probe got worse than at its start"
        _log.info("run %s is finished after %d iterations%s", self.run_dir.name, self.next_iteration, why)
        write_json(self.run_dir / "final.json", self._final(iteration, teacher))

    def _final(self, iteration: int, teacher: Path) -> dict[str, Any]:
        folder = complete_checkpoints(self.run_dir)[iteration]
        sizes, _ = crop_settings(self.config)
        return {
            "run": self.run_dir.name,
            "iteration": iteration,
            "checkpoint": str(folder.relative_to(self.run_dir)),
            "teacher": str(self._chosen_teacher(iteration, teacher).relative_to(self.run_dir)),
            "selected": self._selection(iteration),
            "stopped_early": self.next_iteration < self.num_iterations,
            "num_tiles": len(self.images),
            "samples_seen": self.next_iteration * self.global_batch,
            **describe_windows(self.images.windows, sizes.choices),
            "strata": [vars(share) for share in self.order.shares(self.next_iteration)],
            "metrics": metrics_at(self.run_dir),
        }

    def _chosen_teacher(self, last: int, teacher: Path) -> Path:
        selected = self._selected()
        return teacher if selected is None else teacher_export_path(self.run_dir, selected[0])

    def _selection(self, last: int) -> dict[str, Any]:
        """Which teacher is used onwards, why, and out of how many; the start is none of them, but is told beside."""
        select, found = self.config.evaluation.select, self._selected()
        if found is None:
            why = (
                "it is the last"
                if select == "last"
                else "it is the last; no export has a probe of its own to choose by"
            )
            return {"select": select, "iteration": last, "why": why, "out_of": 1}
        column = select.removeprefix("best:")
        values = read_metrics(self.run_dir)[column].dropna()
        at_start = float(values.iloc[0])
        why = f"{column} is highest there: {found[1]:.4f}, {at_start:.4f} at the start"
        if at_start >= found[1]:
            why += "; the start was no worse, so training gained nothing by this measure"
        return {
            "select": select,
            "iteration": found[0],
            "why": why,
            "out_of": len(values) - 1,
            "value": found[1],
            "value_at_start": at_start,
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


def _stream_seed(config: "RunConfig", run_dir: Path) -> int:
    """Seed of a run's samples, crops, masks and draws: a run that continues another sees other ones.

    A control (`train.stream`) sees those of the run that it is compared with.
    """
    drawn = f"{config.train.seed}/{config.train.stream or run_dir.name}"
    return int.from_bytes(hashlib.sha256(drawn.encode()).digest()[:7], "big")
