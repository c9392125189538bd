"""Files that appear whole or not at all, and their digests."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dinoscope.errors import DinoscopeError

__all__ = [
    "atomic_folder",
    "atomic_path",
    "atomic_paths",
    "read_json",
    "sha256_file",
    "sync_folder",
    "write_json",
    "write_text",
    "writing",
]


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a dot-prefixed path beside `path` to write to, and renames it to `path` when the block ends well.

    The temporary name keeps the suffix, so that writers that choose a format by it work. The file is synced before the
    rename. If the block raises, the temporary file is removed and `path` is left as it was. Parent folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_paths(*paths: Path) -> Iterator[list[Path]]:
    """`atomic_path` for files that belong together: all are whole and synced before the first gets its name."""
    with contextlib.ExitStack() as stack:
        temporary = [stack.enter_context(atomic_path(path)) for path in reversed(paths)]
        yield temporary[::-1]
        for path in temporary:
            with open(path, "rb") as file:
                os.fsync(file.fileno())


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a dot-prefixed new folder beside `path` to fill, which takes its place when the block ends well.

    If the block raises, the new folder is removed and `path` is left as it was; else what was in `path` is gone. Where
    `path` is a link, what it points to is replaced. Parent folders are made.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed and had this number
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
        sync_folder(temporary)
        if path.exists():
            os.rename(path, old)
        os.rename(temporary, path)
    finally:
        if old.exists() and not path.exists():
            os.rename(old, path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def writing(path: str | os.PathLike[str], kind: type[DinoscopeError], *of_libraries: type[Exception]) -> Iterator[None]:
    """Says in a sentence what keeps the system from writing: a full disk, no permission, a file in the way.

    Args:
        path: For the message.
        kind: What is raised.
        of_libraries: Exceptions in which a library passes on what the system said.

    Raises:
        DinoscopeError: Of that kind; names `path` and the reason.
    """
    try:
        yield
    except (OSError, *of_libraries) as error:
        if isinstance(error, OSError) and error.errno is None:  # not the system's, but raised by a library
            raise
        reason = os.strerror(error.errno) if isinstance(error, OSError) else str(error)
        raise kind(
            f"{path} cannot be written ({reason}); free space, or give a place that can be written; what was there is "
            "left as it was"
        ) from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` as UTF-8 to `path`, by rename."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented JSON with a final newline to `path`, by rename. NaN is refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads one JSON document.

    Raises:
        DinoscopeError: It is none, or cut short.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise DinoscopeError(f"{path} cannot be read as JSON ({error}); put a good copy back, or delete it") from None


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Makes renames inside a folder durable (POSIX asks for an fsync of the folder itself)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
