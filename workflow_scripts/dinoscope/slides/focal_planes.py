"""How many focal planes a slide has, and which of them is read.

OpenSlide has no word for focal planes: of every format it reads one. Some formats say how many there are; for TIFF
files the number of images of full size is counted. Where nothing is known, that is said too.
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

__all__ = ["PLANE_PROPERTIES", "FocalPlanes", "focal_planes"]

_MIRAX_HIERARCHIES = range(8)
PLANE_PROPERTIES = (
    "dicom.TotalPixelMatrixFocalPlanes",
    "hamamatsu.NoLayers",
    "ventana.Z-layers",
    "zeiss.Information.Image.SizeZ",
    *(f"mirax.HIERARCHICAL.HIER_{number}_{part}" for number in _MIRAX_HIERARCHIES for part in ("NAME", "COUNT")),
)
_TIFF_VENDORS = {"aperio", "generic-tiff", "hamamatsu", "leica", "philips", "trestle"}
_MAX_DIRECTORIES = 2000


class FocalPlanes(NamedTuple):
    """The focal planes of a slide.

    Attributes:
        count: How many the file holds; None when unknown.
        used: Number of the one that is read, the first being 1; None when unknown.
        source: How that is known, as half a sentence.
    """

    count: int | None
    used: int | None
    source: str

    @property
    def warning(self) -> str | None:
        """What a user must know, as a sentence; None when there is one plane."""
        if self.count is None:
            return f"the number of focal planes is unknown ({self.source}); the one that OpenSlide takes is read"
        if self.count == 1:
            return None
        which = f"number {self.used}" if self.used else "the one that OpenSlide takes"
        return f"the file holds {self.count} focal planes ({self.source}); {which} is read, the others are left out"


def focal_planes(vendor: str, properties: Mapping[str, str | None], file: Path, size: tuple[int, int]) -> FocalPlanes:
    """What is known of the focal planes of a slide.

    Args:
        vendor: OpenSlide's name of the format.
        properties: Those of `PLANE_PROPERTIES`, as far as the file has them.
        file: The file that is opened.
        size: Width and height of level 0.
    """
    if vendor == "dicom":
        count = _number(properties.get("dicom.TotalPixelMatrixFocalPlanes"))
        return FocalPlanes(count, 1, "TotalPixelMatrixFocalPlanes") if count else _unknown("DICOM does not say")
    if vendor == "mirax":
        return _mirax_planes(properties)
    if vendor == "ventana" and (count := _number(properties.get("ventana.Z-layers"))):
        return FocalPlanes(count, None if count > 1 else 1, "Z-layers of the scanner")
    if vendor == "zeiss" and (count := _number(properties.get("zeiss.Information.Image.SizeZ"))):
        return FocalPlanes(count, None if count > 1 else 1, "SizeZ of the file")
    if vendor == "hamamatsu" and file.suffix.lower() in {".vms", ".vmu"}:
        count = _number(properties.get("hamamatsu.NoLayers"))
        return FocalPlanes(count, 1, "NoLayers of the key file") if count else _unknown("the key file has no NoLayers")
    if vendor in _TIFF_VENDORS:
        count = _full_size_images(file, size)
        if count:
            return FocalPlanes(count, 1, f"{count} image{'s' if count > 1 else ''} of full size in the file")
        return _unknown("the file's directories cannot be followed")
    return _unknown(f"format {vendor} does not say")


def _unknown(why: str) -> FocalPlanes:
    return FocalPlanes(None, None, why)


def _number(text: str | None) -> int | None:
    return int(text) if text and text.strip().isdecimal() and int(text) > 0 else None


def _mirax_planes(properties: Mapping[str, str | None]) -> FocalPlanes:
    """MIRAX names its hierarchies; one of focus levels is there when there are several, beside a merged one."""
    names = {number: properties.get(f"mirax.HIERARCHICAL.HIER_{number}_NAME") for number in _MIRAX_HIERARCHIES}
    if not any(names.values()):
        return _unknown("Slidedat.ini names no hierarchies")
    for number, name in names.items():
        if name and "focus" in name.lower():
            count = _number(properties.get(f"mirax.HIERARCHICAL.HIER_{number}_COUNT"))
            if count is None:
                return _unknown("Slidedat.ini does not count its focus levels")
            return FocalPlanes(count, 1, "focus levels in Slidedat.ini")
    return FocalPlanes(1, 1, "no focus levels in Slidedat.ini")


def _full_size_images(file: Path, size: tuple[int, int]) -> int | None:
    """How many of a TIFF file's images have the size of level 0; None when they cannot be counted."""
    try:
        with open(file, "rb") as stream:
            return sum(found == size for found in _image_sizes(stream)) or None
    except (OSError, struct.error, ValueError, OverflowError):
        return None


def _image_sizes(stream: BinaryIO) -> list[tuple[int, int]]:
    """(width, height) of every directory of a TIFF or BigTIFF file."""
    head = stream.read(16)
    order = {b"II": "<", b"MM": ">"}[head[:2]] if head[:2] in (b"II", b"MM") else None
    if order is None:
        raise ValueError("no TIFF file")
    version = struct.unpack_from(order + "H", head, 2)[0]
    is_big = version == 43
    if version not in (42, 43):
        raise ValueError("no TIFF file")
    offset = struct.unpack_from(order + ("Q" if is_big else "I"), head, 8 if is_big else 4)[0]
    count_form, entry_bytes, value_at, next_form = ("Q", 20, 12, "Q") if is_big else ("H", 12, 8, "I")
    sizes, seen = [], set()
    while offset:
        if offset in seen or len(seen) >= _MAX_DIRECTORIES:
            raise ValueError("the directories go round in circles")
        seen.add(offset)
        stream.seek(offset)
        count = struct.unpack(order + count_form, stream.read(struct.calcsize(count_form)))[0]
        if count > 4096:
            raise ValueError("no TIFF directory")
        entries = stream.read(count * entry_bytes)
        sizes.append(_size_of(entries, order, entry_bytes, value_at))
        offset = struct.unpack(order + next_form, stream.read(struct.calcsize("<" + next_form)))[0]
    return sizes


def _size_of(entries: bytes, order: str, entry_bytes: int, value_at: int) -> tuple[int, int]:
    values = {256: 0, 257: 0}
    for start in range(0, len(entries), entry_bytes):
        tag, kind = struct.unpack_from(order + "HH", entries, start)
        if tag in values:
            form = {3: "H", 4: "I", 16: "Q"}.get(kind, "I")
            values[tag] = struct.unpack_from(order + form, entries, start + value_at)[0]
    return values[256], values[257]
