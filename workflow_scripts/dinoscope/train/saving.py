"""Writing checkpoints while training goes on.

What is saved is copied to host memory at the end of a step; a thread then writes it with DCP, whose collectives go
through a gloo group of their own, so that they cannot mix with those of the training. The folder has a dot-prefixed
name until all ranks have written their part, and gets its own from rank 0, in that thread: the training never waits,
nor do ranks have to agree when a save is over. Two saves never overlap.

Where files cannot be written (a full disk, a used up quota), all ranks learn it through the same collectives, the
partial folder is removed and the training goes on to the next save.
"""

import datetime
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult

from dinoscope.files import sync_folder
from dinoscope.train.checkpoint import FROZEN_NAME, frozen_state, training_state
from dinoscope.train.checkpoint_files import record_files
from dinoscope.train.disk_errors import disk_error, in_words
from dinoscope.train.run_folder import complete_checkpoints, prune_checkpoints, remove_partial, replace_folder
from dinoscope.train.ssl_step import SSLModel

if TYPE_CHECKING:
    from dinoscope.config import CheckpointingConfig
    from dinoscope.train.distributed import World

__all__ = ["CheckpointSaver"]

_log = logging.getLogger(__name__)
_FIRST_SAVE = 60.0  # seconds allowed for a save while none has been timed
_TIMEOUT = datetime.timedelta(hours=2)  # of one rank's wait for the others' files


class CheckpointSaver:
    """Saves the state of a run, one checkpoint at a time. All ranks make it and call its methods together.

    Leaving its context waits for the save that is under way.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: "CheckpointingConfig",
        world: "World",
        require_held: Callable[[], None] = lambda: None,
    ) -> None:
        """Makes the process group of the saves.

        Args:
            run_dir: Folder of the run.
            settings: When and how checkpoints are kept.
            world: The processes of the run.
            require_held: Called on the main process before a checkpoint gets its name; may raise LockError.
        """
        self.run_dir, self.settings, self.world, self.require_held = run_dir, settings, world, require_held
        self.iteration: int | None = None  # of the last save that was begun
        self._longest: float | None = None  # seconds that a save took
        self._began = 0.0
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: Future[str | None] | None = None

    def __enter__(self) -> "CheckpointSaver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        try:
            self.wait()
        except Exception:
            if error is None:
                raise
        finally:
            self._thread.shutdown()

    def save(self, iteration: int, model: SSLModel, optimizer: torch.optim.Optimizer, *, blocking: bool) -> str | None:
        """Begins to save, after the save before has ended.

        Args:
            iteration: Of the last step done.
            model: Student and teachers.
            optimizer: With the moments of the student's parameters.
            blocking: Whether to wait for the end of this save; always so with `async_save: false`.

        Returns:
            Why it could not be written, if it was waited for and could not.
        """
        self._wait_for_the_one_before(iteration)
        blocking = blocking or not self.settings.async_save
        folders = self._folders(iteration, model, optimizer)
        if not blocking:
            folders = {target: _copied(state) for target, state in folders.items()}
        self.iteration, self._began = iteration, time.monotonic()
        if blocking:
            return self._write(iteration, folders)
        self._under_way = self._thread.submit(self._write, iteration, folders)
        return None

    def seconds_needed(self) -> float:
        """What a save would take that began now: the longest so far, and the rest of the one that is under way."""
        longest = self._longest if self._longest is not None else _FIRST_SAVE
        under_way = self._under_way is not None and not self._under_way.done()
        return longest + (max(0.0, longest - (time.monotonic() - self._began)) if under_way else 0.0)

    def wait(self) -> str | None:
        """Waits for the save that is under way; returns why it could not be written, None if all is well."""
        under_way, self._under_way = self._under_way, None
        return under_way.result() if under_way is not None else None

    def _wait_for_the_one_before(self, iteration: int) -> None:
        if self._under_way is None:
            return
        before, waits, since = self.iteration, not self._under_way.done(), time.monotonic()
        self.wait()
        if waits and self.world.is_main:
            seconds = time.monotonic() - since
            _log.info("checkpoint %d waited %.1f s for checkpoint %s to be written", iteration, seconds, before)

    def _folders(self, iteration: int, model: SSLModel, optimizer: torch.optim.Optimizer) -> dict[Path, dict[str, Any]]:
        """Folder -> what it is to hold, in the order of writing; the tensors are those that are trained."""
        keep = (iteration + 1) % self.settings.keep_every == 0
        target = self.run_dir / "ckpt" / (f"{iteration}_keep" if keep else str(iteration))
        folders, frozen = {target: training_state(model, optimizer)}, frozen_state(model)
        # what an attempt without any checkpoint left may be of other weights
        if frozen and self.world.any(self.world.is_main and not complete_checkpoints(self.run_dir)):
            folders = {target.with_name(FROZEN_NAME): frozen, **folders}
        return folders

    def _write(self, iteration: int, folders: dict[Path, dict[str, Any]]) -> str | None:
        """Writes folders one after another, in whatever thread; returns why it could not."""
        started = time.monotonic()
        try:
            for target, state in folders.items():
                self._write_folder(target, state)
        except (dcp.api.CheckpointException, OSError) as error:
            if (found := disk_error(error)) is None:  # nothing is known to be well
                raise RuntimeError(f"checkpoint {iteration}: {error}") from error
            cause = in_words(found)
            self._on_main(lambda: self._give_up(iteration, cause))  # the others must not end before
            return cause
        finally:
            self._longest = max(self._longest or 0.0, time.monotonic() - started)
        if self.world.is_main:
            self._prune()
        return None

    def _write_folder(self, target: Path, state: dict[str, Any]) -> None:
        partial = target.with_name(f".{target.name}.partial")

        def begin() -> None:
            remove_partial(self.run_dir / "ckpt")
            partial.mkdir(parents=True)

        def finish() -> None:
            self.require_held()
            record_files(partial)
            replace_folder(partial, target)
            sync_folder(target.parent)

        self._on_main(begin)
        # one copy at a time: what is copied ahead would go through the first GPU in a thread of its own
        dcp.save(state, storage_writer=_Writer(partial, per_thread_copy_ahead=0), process_group=self._group)
        self._on_main(finish)

    def _on_main(self, work: Callable[[], None]) -> None:
        """Runs `work` on the main process; what it raises is raised on all."""
        outcome: list[Exception | None] = [None]
        if self.world.is_main:
            try:
                work()
            except Exception as error:
                outcome[0] = error
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[0] is not None:
            raise outcome[0]

    def _give_up(self, iteration: int, cause: str) -> None:
        try:
            remove_partial(self.run_dir / "ckpt")  # it may be what fills the disk
        except OSError as error:
            _log.warning("run %s: the partial checkpoint cannot be removed: %s", self.run_dir.name, error)
        kept = list(complete_checkpoints(self.run_dir))
        _log.warning(
            "run %s: checkpoint %d cannot be written (%s); the training goes on and tries again at the next one, %s",
            *(self.run_dir.name, iteration, cause),
            f"the last complete one is of iteration {kept[-1]}" if kept else "none is complete yet",
        )

    def _prune(self) -> None:
        try:
            prune_checkpoints(self.run_dir, self.settings.max_to_keep)
        except OSError as error:  # the checkpoint itself is well
            _log.warning("run %s: an old checkpoint cannot be deleted: %s", self.run_dir.name, error)


class _Writer(dcp.FileSystemWriter):
    """Leaves the folder out of a checkpoint's metadata, and says what the system said."""

    def storage_meta(self) -> StorageMeta:
        """Results hold no absolute paths."""
        return StorageMeta(checkpoint_id=None, save_id=self.save_id)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        """An error of the system comes through as it is, though torch's writer raises another one over it."""
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            # made here: what it comes from does not travel to the other ranks
            if (cause := disk_error(error)) is not None:
                raise OSError(cause.errno, cause.strerror or str(cause)) from error
            raise


def _copied(state: Any) -> Any:
    """A copy in host memory; sharded tensors stay sharded."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    return {key: _copied(value) for key, value in state.items()}
