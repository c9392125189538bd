"""The files that make up a slide: one, or the members of a MIRAX, VMS or DICOM slide; formats that OpenSlide lacks."""

import os
from collections.abc import Iterator
from pathlib import Path

from dinoscope.errors import SlideError

__all__ = [
    "UNSUPPORTED",
    "dicom_series",
    "file_to_open",
    "mirax_members",
    "unsupported_format",
    "vms_members",
    "vsi_members",
]

_DICOM_HEADER_BYTES = 1 << 18
_BIO_FORMATS = "bioformats2raw with raw2ometiff, or QuPath's convert-ome"
# Slides that OpenSlide 4 does not open: whose format it is, and what converts it to a pyramidal TIFF or DICOM.
UNSUPPORTED = {
    ".vsi": ("an Olympus/Evident VSI slide", _BIO_FORMATS),
    ".ets": ("a part of an Olympus/Evident VSI slide (list the .vsi file)", _BIO_FORMATS),
    ".isyntax": ("a Philips iSyntax slide", "isyntax2raw with raw2ometiff, or the export of the Philips system"),
    ".i2syntax": ("a Philips iSyntax slide", "the export of the Philips system to DICOM or TIFF"),
    ".czi": ("a Zeiss CZI slide of a kind", f"{_BIO_FORMATS}, or ZEN's export (without JPEG XR compression)"),
    ".zvi": ("a Zeiss ZVI image", _BIO_FORMATS),
    ".lif": ("a Leica LIF image", _BIO_FORMATS),
    ".afi": ("a list of Aperio fluorescence channels", "its .svs files one by one, or " + _BIO_FORMATS),
    ".qptiff": ("a PerkinElmer/Akoya QPTIFF slide of a kind", _BIO_FORMATS),
    ".mds": ("a Motic slide", "the export of Motic's viewer to TIFF"),
    ".kfb": ("a KFBio slide", "the export of KFBio's viewer to TIFF or SVS"),
    ".sdpc": ("a Sqray slide", "the export of Sqray's viewer to TIFF or SVS"),
    ".tmap": ("a Unic TMAP slide", "the export of its viewer to TIFF or SVS"),
}  # fmt: skip


def mirax_members(key_file: Path) -> list[Path]:
    """The .mrxs file and all files of the folder of the same name."""
    folder = key_file.with_suffix("")
    return [key_file, *sorted(path for path in folder.rglob("*") if path.is_file())]


def vms_members(key_file: Path) -> list[Path]:
    """A Hamamatsu VMS or VMU file and the files beside it that it names as values of its keys."""
    values = (line.partition("=")[2].strip() for line in key_file.read_text(encoding="latin-1").splitlines())
    named = {key_file.with_name(Path(value).name) for value in values if value}
    return [key_file, *sorted(path for path in named if path.is_file() and path != key_file)]


def vsi_members(key_file: Path) -> list[Path]:
    """An Olympus VSI file and all files of its folder _NAME_."""
    folder = key_file.with_name(f"_{key_file.stem}_")
    return [key_file, *sorted(path for path in folder.rglob("*") if path.is_file())]


def unsupported_format(path: Path) -> str | None:
    """Of a format that OpenSlide lacks, the end of a sentence about the slide: what it is and what to do with it."""
    known = UNSUPPORTED.get(path.suffix.lower())
    if known is None:
        return None
    kind, converter = known
    return (
        f"is {kind} that OpenSlide cannot open: convert it to a pyramidal TIFF ({converter}) and list that instead, or "
        "name a reader of your own in slides.reader"
    )


def dicom_series(folder: Path, series_uid: str) -> Iterator[tuple[Path, bool]]:
    """All DICOM files of a folder, and whether each belongs to the series."""
    for path in _dicom_members(folder):
        with open(path, "rb") as file:
            yield path, series_uid.encode() in file.read(_DICOM_HEADER_BYTES)


def file_to_open(path: Path, name: str, *, any_folder: bool = False) -> Path:
    """The file that OpenSlide is to open: `path` itself, or the largest DICOM file if it is a folder.

    Args:
        path: What the user gave.
        name: How messages name the slide.
        any_folder: A folder is opened as it is, whatever it holds.

    Raises:
        SlideError: There is nothing to open, or it may not be read.
    """
    try:
        exists = path.exists()
    except PermissionError:
        raise SlideError(f"{name} may not be read: give this user permission to read its folder") from None
    except OSError:
        exists = False
    if not exists:
        what = "is a link to a file that is gone" if os.path.islink(path) else "does not exist"
        raise SlideError(f"{name} {what}: correct column path of slides.tsv")
    if path.is_dir() and any_folder:
        return path
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
