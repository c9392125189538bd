"""Slides that lie on S3-compatible storage: `s3://BUCKET/KEY` in the column path.

Snakemake fetches them (snakemake-storage-plugin-s3); nothing here does. Paths keep the address as `s3:/BUCKET/KEY`,
which is what `pathlib` makes of it.
"""

import os
from pathlib import PurePosixPath

__all__ = ["remote_address"]

_SCHEME = "s3:"


def remote_address(path: str | os.PathLike[str]) -> str | None:
    """The address s3://BUCKET/KEY of a slide's path; None where it is a file's."""
    parts = PurePosixPath(path).parts
    return f"s3://{'/'.join(parts[1:])}" if parts[:1] == (_SCHEME,) else None
