"""Slides among the files of a folder or glob, each once however many files it has. Nothing here opens a slide."""

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from dinoscope.slides.members import UNSUPPORTED, mirax_members, vms_members, vsi_members

__all__ = ["SLIDE_SUFFIXES", "find_slides", "slide_files"]

# What OpenSlide 4 opens. Of other formats (members.UNSUPPORTED) a folder lists the slides too, so that none is missed
# silently: each ends in an error that names a converter, or is read by slides.reader.
SLIDE_SUFFIXES = (
    ".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".czi", ".dcm",
)  # fmt: skip
_LISTED = {*SLIDE_SUFFIXES, *UNSUPPORTED} - {".ets"}


def find_slides(spec: str) -> Iterator[Path]:
    """The slides of a folder, searched with all it contains, or of a glob (** matches any number of folders).

    A MIRAX slide is its .mrxs file; a folder with DICOM files is one slide. Hidden files and folders are passed over.
    """
    if not Path(spec).is_dir():
        yield from _slides_among(Path(match) for match in glob.iglob(spec, recursive=True))
        return
    seen: set[str] = set()
    for parent, folders, files in os.walk(spec, followlinks=True):
        known = os.path.realpath(parent) in seen
        seen.add(os.path.realpath(parent))
        folders[:] = [] if known else sorted(name for name in folders if not name.startswith("."))
        if known:  # a link that leads back up
            continue
        yield from _slides_among(Path(parent) / name for name in files)


def slide_files(path: Path) -> list[Path]:
    """The files that a slide consists of besides `path` itself (MIRAX, VMS, a DICOM folder), as far as they exist."""
    suffix = path.suffix.lower()
    if not os.path.exists(path):
        members = []
    elif path.is_dir():
        members = sorted(file for file in path.iterdir() if file.is_file())
    elif suffix == ".mrxs":
        members = mirax_members(path)
    elif suffix == ".vsi":
        members = vsi_members(path)
    elif suffix in (".vms", ".vmu") and path.is_file():
        members = vms_members(path)
    else:
        members = []
    return [member for member in members if member != path]


def _slides_among(paths: Iterable[Path]) -> Iterator[Path]:
    """The slides among files and folders, each once: DICOM files are taken together as their folder."""
    dicom_folders: set[Path] = set()
    for path in sorted(paths):
        if path.name.startswith("."):
            continue
        folder = path if path.is_dir() else path.parent
        is_dicom = _has_dicom(path) if path.is_dir() else path.suffix.lower() == ".dcm"
        if is_dicom and folder not in dicom_folders:
            dicom_folders.add(folder)
            yield folder
        elif not is_dicom and path.suffix.lower() in _LISTED and not path.is_dir():
            yield path


def _has_dicom(folder: Path) -> bool:
    return any(file.suffix.lower() == ".dcm" for file in folder.iterdir())
