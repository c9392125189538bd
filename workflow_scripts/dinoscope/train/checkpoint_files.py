"""Whether a checkpoint folder is whole: `files.json` beside its files, and the mark of a run that ended in order.

`files.json` holds name, size and CRC-32 of every other file. It is written after them and before the folder gets its
name, so that a folder under its name with other sizes than those was damaged later. Folders of older versions have
none and count as whole when `.metadata`, which DCP writes last, is there.

A process that was killed, or a machine that went down, leaves no `.clean` in the run's folder. Sizes are then not
enough, and checksums are compared as well.
"""

import contextlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from dinoscope.errors import CheckpointError
from dinoscope.files import read_json, sync_folder

__all__ = [
    "CLEAN_NAME",
    "FILES_NAME",
    "Verification",
    "clean_end_marked",
    "ended_cleanly",
    "record_files",
    "require_whole",
    "why_damaged",
]

Verification = Literal["sizes", "checksums"]
FILES_NAME = "files.json"
CLEAN_NAME = ".clean"


def record_files(folder: Path) -> None:
    """Writes files.json for the files of a folder, all of it on the disk when this returns."""
    paths = sorted(path for path in folder.iterdir() if path.is_file() and path.name != FILES_NAME)
    entries = [{"name": path.name, "bytes": path.stat().st_size, "crc32": _crc32(path, sync=True)} for path in paths]
    with open(folder / FILES_NAME, "w", encoding="utf-8") as file:
        file.write(json.dumps(entries, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def why_damaged(folder: Path, verify: Verification = "sizes") -> str | None:
    """The reason why a checkpoint folder cannot be used, None if it can."""
    if not (folder / ".metadata").is_file():
        return "it has no .metadata"
    try:
        entries = read_json(folder / FILES_NAME)
        return next((reason for entry in entries if (reason := _why_off(folder, entry, verify))), None)
    except FileNotFoundError:  # of a version that wrote none
        return None
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError):
        return f"its {FILES_NAME} is damaged"


def require_whole(folder: Path, verify: Verification = "sizes") -> None:
    """Raises CheckpointError, which names what is off, unless the folder is there and whole."""
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint {folder} is not there; put it back, or use another one")
    if reason := why_damaged(folder, verify):
        raise CheckpointError(f"checkpoint {folder} is damaged or incomplete: {reason}; use another one")


def ended_cleanly(run_dir: Path) -> bool:
    """Whether the last trainer of a run ended by itself, well or with an error."""
    return (run_dir / CLEAN_NAME).is_file()


@contextlib.contextmanager
def clean_end_marked(run_dir: Path) -> Iterator[None]:
    """Takes the mark away while the block runs; a block that is killed leaves none."""
    mark = run_dir / CLEAN_NAME
    mark.unlink(missing_ok=True)
    sync_folder(run_dir)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # a full disk; the next start then looks more closely
            mark.touch()


def _why_off(folder: Path, entry: dict[str, Any], verify: Verification) -> str | None:
    path, wanted = folder / entry["name"], entry["bytes"]
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return f"{path.name} is missing"
    if size != wanted:
        return f"{path.name} has {size} bytes, not the {wanted} that were written"
    if verify == "checksums" and _crc32(path) != entry["crc32"]:
        return f"{path.name} no longer holds what was written (its checksum differs)"
    return None


def _crc32(path: Path, *, sync: bool = False) -> str:
    value = 0
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return f"{value:08x}"
