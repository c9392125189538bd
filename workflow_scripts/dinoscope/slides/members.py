"""The files that make up a slide: one, or the members of a MIRAX, VMS or DICOM slide."""

import os
from collections.abc import Iterator
from pathlib import Path

from dinoscope.errors import SlideError

__all__ = ["dicom_series", "file_to_open", "mirax_members", "vms_members"]

_DICOM_HEADER_BYTES = 1 << 18


def mirax_members(key_file: Path) -> list[Path]:
    """The .mrxs file and all files of the folder of the same name."""
    folder = key_file.with_suffix("")
    return [key_file, *sorted(path for path in folder.rglob("*") if path.is_file())]


def vms_members(key_file: Path) -> list[Path]:
    """A Hamamatsu VMS or VMU file and the files beside it that it names as values of its keys."""
    values = (line.partition("=")[2].strip() for line in key_file.read_text(encoding="latin-1").splitlines())
    named = {key_file.with_name(Path(value).name) for value in values if value}
    return [key_file, *sorted(path for path in named if path.is_file() and path != key_file)]


def dicom_series(folder: Path, series_uid: str) -> Iterator[tuple[Path, bool]]:
    """All DICOM files of a folder, and whether each belongs to the series."""
    for path in _dicom_members(folder):
        with open(path, "rb") as file:
            yield path, series_uid.encode() in file.read(_DICOM_HEADER_BYTES)


def file_to_open(path: Path, name: str) -> Path:
    """The file that OpenSlide is to open: `path` itself, or the largest DICOM file if it is a folder.

    Args:
        path: What the user gave.
        name: How messages name the slide.

    Raises:
        SlideError: There is nothing to open, or it may not be read.
    """
    try:
        exists = path.exists()
    except OSError:
        exists = False
    if not exists:
        raise SlideError(f"{name} does not exist: correct column path of slides.tsv")
    if path.is_dir():
        members = _dicom_members(path)
        if not members:
            raise SlideError(
                f"{name} is a folder without DICOM files: give the slide's own file in column path of slides.tsv "
                "(of a MIRAX slide the .mrxs file)"
            )
        return max(members, key=lambda member: (member.stat().st_size, member.name))
    if not path.is_file():
        raise SlideError(f"{name} is neither a file nor a folder: correct column path of slides.tsv")
    if not os.access(path, os.R_OK):
        raise SlideError(f"{name} may not be read: give this user permission to read it")
    if path.stat().st_size == 0:
        raise SlideError(f"{name} is empty (0 bytes): copy it again from the scanner")
    return path


def _dicom_members(folder: Path) -> list[Path]:
    members = []
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            with open(path, "rb") as file:
                if file.read(132)[128:] == b"DICM":
                    members.append(path)
    return members
