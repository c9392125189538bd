"""Which checkpoint folders count as whole, which exports stay, when the clock asks for what."""

import errno
import json
import logging
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp

from dinoscope.errors import CheckpointError, StoppedError
from dinoscope.train.checkpoint_files import clean_end_marked, ended_cleanly, record_files, require_whole, why_damaged
from dinoscope.train.clock import RunClock
from dinoscope.train.disk_errors import disk_error, in_words
from dinoscope.train.run_folder import (
    complete_checkpoints,
    exported_teachers,
    newest_checkpoint,
    prune_checkpoints,
    prune_exports,
    remove_partial,
    replace_folder,
    set_damaged_aside,
    teacher_export_path,
)


def checkpoint(run_dir: Path, name: str, *, recorded: bool = True) -> Path:
    """A folder as DCP leaves it, as far as files go."""
    folder = run_dir / "ckpt" / name
    folder.mkdir(parents=True)
    for rank in range(2):
        (folder / f"__{rank}_0.distcp").write_bytes(f"{name} of rank {rank}".encode() * 50)
    (folder / ".metadata").write_bytes(name.encode())
    if recorded:
        record_files(folder)
    return folder


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_files_json_holds_name_size_and_checksum_of_every_file(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "4")
    entries = {entry["name"]: entry for entry in json.loads((folder / "files.json").read_text())}
    assert set(entries) == {"__0_0.distcp", "__1_0.distcp", ".metadata"}
    for name, entry in entries.items():
        content = (folder / name).read_bytes()
        assert entry["bytes"] == len(content)
        assert int(entry["crc32"], 16) == zlib.crc32(content)
    assert why_damaged(folder, "checksums") is None


def test_every_kind_of_damage_is_named(tmp_path: Path) -> None:
    def damaged(name: str, harm: Callable[[Path], object]) -> str:
        folder = checkpoint(tmp_path, name)
        harm(folder)
        return why_damaged(folder) or why_damaged(folder, "checksums")

    shard = "__1_0.distcp"
    assert damaged("1", lambda f: (f / ".metadata").unlink()) == "it has no .metadata"
    assert damaged("2", lambda f: (f / shard).unlink()) == f"{shard} is missing"
    size = 50 * len("3 of rank 1")
    cut_short = damaged("3", lambda f: (f / shard).write_bytes(b"ab"))
    assert cut_short == f"{shard} has 2 bytes, not the {size} that were written"
    assert "no longer holds what was written" in damaged("4", lambda f: flip_a_bit(f / shard))
    assert damaged("5", lambda f: (f / "files.json").write_text("")) == "its files.json is damaged"
    assert damaged("6", lambda f: (f / "files.json").write_text('[{"name": 3}]')) == "its files.json is damaged"
    with pytest.raises(CheckpointError, match=r"ckpt/3 is damaged or incomplete: __1_0.distcp has 2 bytes"):
        require_whole(tmp_path / "ckpt/3")


def test_a_flipped_bit_does_not_change_the_size(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "1")
    flip_a_bit(folder / ".metadata")
    assert why_damaged(folder, "sizes") is None


def test_damaged_checkpoints_are_skipped_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good, old = checkpoint(tmp_path, "3_keep"), checkpoint(tmp_path, "7", recorded=False)
    (checkpoint(tmp_path, "12") / "__0_0.distcp").write_bytes(b"")
    (tmp_path / "ckpt/.15.partial").mkdir()
    (tmp_path / "ckpt/frozen").mkdir()
    with caplog.at_level(logging.WARNING):
        assert complete_checkpoints(tmp_path) == {3: good, 7: old}
        assert list(complete_checkpoints(tmp_path)) == [3, 7]
    warnings = [record.message for record in caplog.records]
    assert len(warnings) == 1
    assert "checkpoint ckpt/12 is not used: __0_0.distcp has 0 bytes" in warnings[0]


def test_checksums_decide_after_an_unclean_end_only(tmp_path: Path) -> None:
    with clean_end_marked(tmp_path):
        first, last = checkpoint(tmp_path, "9"), checkpoint(tmp_path, "10")
        flip_a_bit(last / "__0_0.distcp")
        assert not ended_cleanly(tmp_path)
        assert newest_checkpoint(tmp_path) == (9, first)
    assert ended_cleanly(tmp_path)
    assert newest_checkpoint(tmp_path) == (10, last)
    assert newest_checkpoint(tmp_path, "checksums") == (9, first)


def test_the_end_is_clean_also_with_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoppedError), clean_end_marked(tmp_path):
        raise StoppedError("asked to")
    assert ended_cleanly(tmp_path)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over_silently(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for name in ("4", "9"):
        (checkpoint(tmp_path, name) / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"none of its 2 checkpoints can be used \(ckpt/9: it has no .metadata\)"):
        newest_checkpoint(tmp_path)


def test_what_is_damaged_is_set_aside_and_deleted_after_the_next_save(tmp_path: Path) -> None:
    for name in ("4", "9", "14"):
        checkpoint(tmp_path, name)
    (tmp_path / "ckpt/14/.metadata").unlink()
    set_damaged_aside(tmp_path, 9)
    assert {path.name for path in (tmp_path / "ckpt").iterdir()} == {"4", "9", "14.damaged"}
    checkpoint(tmp_path, "14")
    prune_checkpoints(tmp_path, 2)
    assert {path.name for path in (tmp_path / "ckpt").iterdir()} == {"9", "14"}


def test_only_usable_checkpoints_count_when_old_ones_are_deleted(tmp_path: Path) -> None:
    for name in ("1_keep", "2", "3", "4", "5", "6"):
        checkpoint(tmp_path, name)
    (tmp_path / "ckpt/5/__1_0.distcp").write_bytes(b"cut short")
    (tmp_path / "ckpt/6/__1_0.distcp").unlink()
    prune_checkpoints(tmp_path, 2)
    assert list(complete_checkpoints(tmp_path)) == [1, 3, 4]
    prune_checkpoints(tmp_path, None)
    assert list(complete_checkpoints(tmp_path)) == [1, 3, 4]


def test_half_written_folders_are_removed_and_a_finished_one_takes_its_name(tmp_path: Path) -> None:
    old, new = checkpoint(tmp_path, "4"), checkpoint(tmp_path, ".4.partial")
    (new / "__0_0.distcp").write_bytes(b"new")
    replace_folder(new, old)
    assert (old / "__0_0.distcp").read_bytes() == b"new"
    checkpoint(tmp_path, ".9.partial")
    (tmp_path / "eval/.training_3.deleted.partial").mkdir(parents=True)
    for folder in ("ckpt", "eval"):
        remove_partial(tmp_path / folder)
    assert [path.name for path in (tmp_path / "ckpt").iterdir()] == ["4"]
    assert not list((tmp_path / "eval").iterdir())


def test_first_newest_and_named_exports_stay(tmp_path: Path) -> None:
    for iteration in (9, 19, 29, 39, 49, 109):
        path = teacher_export_path(tmp_path, iteration)
        path.parent.mkdir(parents=True)
        path.touch()
    (tmp_path / "eval/training_59").mkdir()  # nothing was exported there
    prune_exports(tmp_path, None)
    assert len(exported_teachers(tmp_path)) == 6
    prune_exports(tmp_path, 3, keep=[19])
    assert exported_teachers(tmp_path) == [9, 19, 39, 49, 109]
    prune_exports(tmp_path, 1)
    assert exported_teachers(tmp_path) == [9, 109]
    assert not list((tmp_path / "eval").glob(".*"))


class Time:
    def __init__(self) -> None:
        self.seconds = 1_700_000_000.0

    def __call__(self) -> float:
        return self.seconds


def test_a_save_is_due_some_minutes_after_the_last_one() -> None:
    time = Time()
    clock = RunClock(2.0, None, {}, time)
    time.seconds += 119
    assert not clock.save_is_due()
    time.seconds += 1
    assert clock.save_is_due()
    clock.saved()
    time.seconds += 60
    assert not clock.save_is_due()
    assert not RunClock(None, None, {}, time).save_is_due()


@pytest.mark.parametrize(
    ("limit", "job_minutes", "end"),
    [(30, None, 30), (None, 20, 20), (30, 20, 20), (10, 20, 10), (None, -5, None), (None, None, None)],
)
def test_a_minute_and_the_time_of_a_save_before_the_end(
    limit: float | None, job_minutes: int | None, end: int | None
) -> None:
    time = Time()
    job = {} if job_minutes is None else {"SLURM_JOB_END_TIME": str(int(time.seconds) + 60 * job_minutes)}
    clock = RunClock(None, limit, job, time)
    started = time.seconds
    up = []
    for second in range(40 * 60):
        time.seconds = started + second
        if clock.time_is_up(15.0):
            up.append(second)
    assert (up[0] if up else None) == (None if end is None else 60 * end - 60 - 15)


def test_the_error_of_the_file_system_is_found_under_those_of_torch() -> None:
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "/secret/path")
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")
    except RuntimeError as error:
        assert in_words(disk_error(error)) == "no space left on the device"
    quota, other = OSError(errno.EDQUOT, "Disk quota exceeded"), ValueError("a defect")
    gathered = dcp.api.CheckpointException("write", {1: (quota, None)})
    assert in_words(disk_error(pickle.loads(pickle.dumps(gathered)))) == "the disk quota is used up"
    assert in_words(disk_error(OSError(errno.EIO, "Input/output error"))) == "Input/output error"
    assert disk_error(dcp.api.CheckpointException("write", {0: (quota, None), 1: (other, None)})) is None
    assert disk_error(other) is None
