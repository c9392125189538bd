"""What lies where in the folder of a run. Nothing here imports torch: planning looks into run folders too."""

import contextlib
import functools
import logging
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from dinoscope.errors import CheckpointError
from dinoscope.train.checkpoint_files import Verification, ended_cleanly, why_damaged

__all__ = [
    "complete_checkpoints",
    "exported_teachers",
    "follow_umask",
    "newest_checkpoint",
    "prune_checkpoints",
    "prune_exports",
    "remove_partial",
    "replace_folder",
    "set_damaged_aside",
    "teacher_export_path",
]

_log = logging.getLogger(__name__)


def complete_checkpoints(run_dir: Path, verify: Verification = "sizes") -> dict[int, Path]:
    """Iteration -> folder of the checkpoints of a run that can be used, the oldest first; warns of the others.

    Args:
        run_dir: Folder of the run.
        verify: What is compared with files.json; "checksums" reads all the files.
    """
    return {iteration: folder for iteration, folder in _named_checkpoints(run_dir) if _usable(folder, verify)}


def newest_checkpoint(run_dir: Path, verify: Verification | None = None) -> tuple[int, Path] | None:
    """Iteration and folder of the newest checkpoint that can be used; None for a run that has come to none.

    Args:
        run_dir: Folder of the run.
        verify: What is compared with files.json; None: checksums if the run's last trainer was killed, else sizes.

    Raises:
        CheckpointError: There are checkpoints and none can be used.
    """
    folders = _named_checkpoints(run_dir)
    if folders and verify is None:
        verify = "sizes" if ended_cleanly(run_dir) else "checksums"
    for iteration, folder in reversed(folders):
        if _usable(folder, verify or "sizes"):
            return iteration, folder
    if folders:
        last = folders[-1][1]
        raise CheckpointError(
            f"run {run_dir.name}: none of its {len(folders)} checkpoints can be used (ckpt/{last.name}: "
            f"{why_damaged(last, verify or 'sizes')}); put a good copy back, or delete {run_dir}/ckpt to start over"
        )
    return None


def set_damaged_aside(run_dir: Path, iteration: int) -> None:
    """Renames what is newer than the checkpoint that is gone on from; it cannot be used and would be in the way."""
    for number, folder in _named_checkpoints(run_dir):
        if number > iteration:
            aside = folder.with_name(f"{folder.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)


def follow_umask(logs: Path) -> None:
    """Opens the folders of logs to whom the umask lets in: torchrun makes them for the owner alone."""
    umask = os.umask(0o077)
    os.umask(umask)
    for folder in logs.glob("*"):
        with contextlib.suppress(OSError):  # somebody else's
            if folder.is_dir() and not folder.is_symlink():
                folder.chmod(0o777 & ~umask)


def prune_checkpoints(run_dir: Path, max_to_keep: int | None) -> None:
    """Deletes all but the newest usable checkpoints, and what was set aside; those named <it>_keep stay."""
    if max_to_keep is None:
        return
    temporary = [folder for folder in complete_checkpoints(run_dir).values() if not folder.name.endswith("_keep")]
    for folder in [*temporary[:-max_to_keep], *(run_dir / "ckpt").glob("*.damaged")]:
        _delete(folder)


def remove_partial(folder: Path) -> None:
    """Deletes what was left half written or half deleted in `ckpt` or `eval`; only who holds the run's lock may."""
    for leftover in folder.glob(".*.partial"):
        shutil.rmtree(leftover)


def replace_folder(partial: Path, target: Path) -> None:
    """Gives a folder its name; one that has it already is deleted."""
    if target.is_dir():
        _delete(target)
    partial.rename(target)


def teacher_export_path(run_dir: Path, iteration: int) -> Path:
    """Where the teacher of an iteration is exported to."""
    return run_dir / "eval" / f"training_{iteration}" / "teacher_checkpoint.pth"


def exported_teachers(run_dir: Path) -> list[int]:
    """The iterations of which there is an exported teacher, the oldest first."""
    matches = (re.fullmatch(r"training_(\d+)", folder.name) for folder in (run_dir / "eval").glob("*"))
    found = sorted(int(match[1]) for match in matches if match)
    return [iteration for iteration in found if teacher_export_path(run_dir, iteration).is_file()]


def prune_exports(run_dir: Path, max_to_keep: int | None, keep: Collection[int] = ()) -> None:
    """Deletes all exported teachers but the first, the newest ones, and those of the iterations in `keep`."""
    if max_to_keep is None:
        return
    found = exported_teachers(run_dir)
    for iteration in found[1 : -max(1, max_to_keep)]:
        if iteration not in keep:
            _delete(teacher_export_path(run_dir, iteration).parent)


def _delete(folder: Path) -> None:
    doomed = folder.with_name(f".{folder.name}.deleted.partial")
    folder.rename(doomed)  # a kill halfway through the deletion must not leave half of it under its name
    shutil.rmtree(doomed)


def _named_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """Iterations and folders that are named as checkpoints, whatever they hold, the oldest first."""
    matches = ((re.fullmatch(r"(\d+)(_keep)?", folder.name), folder) for folder in (run_dir / "ckpt").glob("*"))
    return sorted((int(match[1]), folder) for match, folder in matches if match)


def _usable(folder: Path, verify: Verification) -> bool:
    reason = why_damaged(folder, verify)
    if reason and folder.is_dir():  # else it was deleted while we looked
        _warn_once(folder, reason)
    return reason is None


@functools.cache
def _warn_once(folder: Path, reason: str) -> None:
    _log.warning("run %s: checkpoint ckpt/%s is not used: %s", folder.parents[1].name, folder.name, reason)
