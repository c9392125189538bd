"""What jobs ask a cluster for: memory and time that grow with the input and with each attempt."""

import itertools
from collections.abc import Iterable
from pathlib import Path

__all__ = ["gigabytes", "grown"]

_USUAL_REMOTE_BYTES = 10**9  # of a slide on object storage, of which nothing is known before it is brought


def grown(base: float, per_gb: float, files: Iterable[str | Iterable[str]], attempt: int) -> int:
    """A demand, such as megabytes or minutes, for an attempt at a job with these input files.

    Args:
        base: What the smallest job needs.
        per_gb: What each gigabyte of input adds.
        files: The input files, and lists of such; those that are yet to be made count nothing, those that Snakemake is
            to bring from object storage a gigabyte.
        attempt: 1, 2, …; a second attempt gets twice as much, a third three times.
    """
    size = gigabytes(itertools.chain(*([file] if isinstance(file, str) else file for file in files))) if per_gb else 0.0
    return round((base + per_gb * size) * attempt)


def gigabytes(files: Iterable[str]) -> float:
    """Size of the files that are there, in units of 1e9 bytes; one of object storage counts one where it is not."""
    total = 0
    for file in files:
        try:
            total += Path(file).stat().st_size
        except OSError:
            total += _USUAL_REMOTE_BYTES if getattr(file, "is_storage", False) else 0
    return total / 1e9
