"""Small arrays in .npz files that appear by rename, and what is said of one that is missing or damaged."""

import io
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from dinoscope.errors import FeaturesError
from dinoscope.files import atomic_path

__all__ = ["damage_named", "read_arrays", "write_arrays"]


def write_arrays(path: str | os.PathLike[str], **arrays: object) -> None:
    """Writes named arrays as .npz."""
    with atomic_path(path) as temporary:
        np.savez(temporary, **arrays)


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """All arrays of an .npz; use it within `damage_named`."""
    # from memory: numpy leaves the file open when it is damaged
    with np.load(io.BytesIO(Path(path).read_bytes())) as arrays:
        return dict(arrays)


@contextmanager
def damage_named(path: str | os.PathLike[str], what: str, remedy: str) -> Iterator[None]:
    """Turns what reading and unpacking of a damaged file raise into one sentence.

    Args:
        path: For the message.
        what: That should be there, e.g. "PCA basis".
        remedy: What to do, e.g. "run pca.py fit again".

    Raises:
        FeaturesError: A file is missing, cut short, or lacks what is taken from it.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise FeaturesError(f"{path}: no whole {what} ({error}); {remedy}") from error
