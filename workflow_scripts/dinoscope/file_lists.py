"""Many files at once: lists and folders in place of thousands of arguments.

Linux starts no command of which one argument is longer than 128 KiB, and a shell's whole command line is one argument.
All scripts that join files read arguments from a file as well (@FILE, one a line).
"""

import hashlib
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from dinoscope.errors import ConfigError
from dinoscope.files import write_text

__all__ = ["file_arguments", "files_among"]

MAX_BYTES = 65_536  # of all files, as the shell reads them; the rest of the command needs room too


def file_arguments(files: Sequence[str], folder: Path, *, write: bool = True) -> list[str]:
    """The files as arguments; where they are too many, one argument @LIST that names a list of them.

    Args:
        files: Paths, none with a line break.
        folder: Where the list is written, under a name that its content gives: it is the same file on every machine
            and in every attempt, and no other job's.
        write: Write it, unless it is there; a dry run only tells its name.
    """
    if len(shlex.join(files).encode()) <= MAX_BYTES:
        return list(files)
    text = "".join(f"{file}\n" for file in files)
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.txt"
    if write and not path.exists():
        write_text(path, text)
    return [f"@{path}"]


def files_among(paths: Iterable[Path], suffix: str) -> list[Path]:
    """The paths, and in place of each folder its files of that suffix by name; hidden files are passed over.

    Raises:
        ConfigError: A folder has none.
    """
    found = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(file for file in path.glob(f"*{suffix}") if not file.name.startswith("."))
        if not inside:
            raise ConfigError(f"{path} has no {suffix} files: give files, or a folder that has some")
        found += inside
    return found
