"""Small arrays in .npz files that appear by rename, and what is said of one that is missing or damaged."""

import io
import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dinoscope.errors import DinoscopeError, FeaturesError
from dinoscope.files import atomic_path

__all__ = ["damage_named", "document_in", "document_of", "read_arrays", "write_arrays"]


def write_arrays(path: str | os.PathLike[str], *, packed: bool = False, **arrays: object) -> None:
    """Writes named arrays as .npz, compressed if `packed`."""
    save = np.savez_compressed if packed else np.savez
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        save(file, **arrays)


def document_in(value: Any) -> np.ndarray:
    """What JSON can hold, as an array to stand among others. NaN is refused."""
    return np.frombuffer(json.dumps(value, allow_nan=False).encode(), dtype=np.uint8)


def document_of(array: np.ndarray) -> Any:
    """The inverse of `document_in`."""
    return json.loads(bytes(array))


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """All arrays of an .npz; use it within `damage_named`."""
    # from memory: numpy leaves the file open when it is damaged
    with np.load(io.BytesIO(Path(path).read_bytes())) as arrays:
        return dict(arrays)


@contextmanager
def damage_named(
    path: str | os.PathLike[str], what: str, remedy: str, kind: type[DinoscopeError] = FeaturesError
) -> Iterator[None]:
    """Turns what reading and unpacking of a damaged file raise into one sentence.

    Args:
        path: For the message.
        what: That should be there, e.g. "PCA basis".
        remedy: What to do, e.g. "run pca.py fit again".
        kind: What is raised.

    Raises:
        DinoscopeError: Of that kind; a file is missing, cut short, or lacks what is taken from it.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise kind(f"{path}: no whole {what} ({error}); {remedy}") from error
