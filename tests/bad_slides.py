"""Slides that cannot or can hardly be used, each made by a function of its own, for tests."""

import gzip
import os
import random
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile
from PIL import Image

from aperio_slides import write_aperio
from synthetic_slides import blobs, texture, write_lossless

__all__ = ["BAD_SLIDES", "BadSlide"]

_HEIGHT, _WIDTH = 700, 900


class BadSlide(NamedTuple):
    """How a bad slide is made, and what must come of it.

    Attributes:
        make: Makes it in a folder and returns what to open.
        words: What the error says, a regular expression; None if the slide can be used.
        options: Further arguments of the scripts.
        only_tiling: Inspecting it is no error.
    """

    make: Callable[[Path], Path]
    words: str | None
    options: tuple[str, ...] = ()
    only_tiling: bool = False


def _good(folder: Path, name: str = "slide.tiff") -> Path:
    return write_lossless(folder / name, texture(_HEIGHT, _WIDTH), 1.0, (1, 4))


def _bytes(content: bytes, name: str = "slide.svs") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def _cut(keep: Callable[[int], int]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = _good(folder)
        content = path.read_bytes()
        path.write_bytes(content[: keep(len(content))])
        return path

    return make


def _tag(page: int, **tags: object) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = _good(folder)
        with tifffile.TiffFile(path, mode="r+") as file:
            for name, value in tags.items():
                file.pages[page].tags[name].overwrite(value)
        return path

    return make


def _image(image: np.ndarray, mpp: float | tuple[float, float] | None = 1.0) -> Callable[[Path], Path]:
    return lambda folder: write_lossless(folder / "slide.tiff", image, mpp)


def _aperio(**keys: str) -> Callable[[Path], Path]:
    return lambda folder: write_aperio(folder / "slide.svs", texture(_HEIGHT, _WIDTH), keys)


def _folder(*files: tuple[str, bytes]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "slide").mkdir()
        for name, content in files:
            (folder / "slide" / name).write_bytes(content)
        return folder / "slide"

    return make


def _link_loop(folder: Path) -> Path:
    (folder / "a.svs").symlink_to(folder / "b.svs")
    (folder / "b.svs").symlink_to(folder / "a.svs")
    return folder / "a.svs"


def _dangling(folder: Path) -> Path:
    (folder / "slide.svs").symlink_to(folder / "gone.svs")
    return folder / "slide.svs"


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "slide.svs")
    return folder / "slide.svs"


def _socket(folder: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(folder)  # names of sockets must be short
        try:
            server.bind("slide.svs")
        finally:
            os.chdir(here)
    return folder / "slide.svs"


def _zeroed(folder: Path) -> Path:
    """Pixels overwritten with zeros in a compressed file, as a bad disk leaves it."""
    image = texture(_HEIGHT, _WIDTH)
    path = folder / "slide.tiff"
    options = {"tile": (256, 256), "photometric": "rgb", "metadata": None, "compression": "zlib"}
    with tifffile.TiffWriter(path) as writer:
        writer.write(image, resolution=(1e4, 1e4), resolutionunit="CENTIMETER", **options)
    content = bytearray(path.read_bytes())
    content[len(content) // 3 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 3)
    path.write_bytes(content)
    return path


def _compressed(folder: Path) -> Path:
    path = folder / "slide.svs"
    path.write_bytes(gzip.compress(_good(folder).read_bytes()))
    return path


def _picture(kind: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        Image.fromarray(texture(300, 400)).save(folder / "slide.svs", format=kind)
        return folder / "slide.svs"

    return make


def _untiled(folder: Path) -> Path:
    tifffile.imwrite(folder / "slide.tiff", texture(300, 400), photometric="rgb")
    return folder / "slide.tiff"


def _deep(folder: Path) -> Path:
    image = np.random.default_rng(0).integers(0, 2**16, (512, 512), np.uint16)
    tifffile.imwrite(folder / "slide.tiff", image, tile=(256, 256), photometric="minisblack")
    return folder / "slide.tiff"


def _circle(folder: Path) -> Path:
    directory = struct.pack("<HHHIII", 1, 256, 4, 1, 400, 8)  # whose next one is itself
    return _bytes(struct.pack("<2sHI", b"II", 42, 8) + directory)(folder)


def _long_name(folder: Path) -> Path:
    return _good(folder, "ß [" + "x" * 230 + "] (1).tiff")


def _huge(side: int) -> Callable[[Path], Path]:
    """A TIFF of few bytes that says that it has `side` x `side` pixels in tiles of that size that all are one."""

    def make(folder: Path) -> Path:
        tile = 2**14
        number = (side // tile) ** 2
        entries = [
            (256, 4, 1, side), (257, 4, 1, side), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1),
            (322, 4, 1, tile), (323, 4, 1, tile), (324, 4, number, 1000), (325, 4, number, 1000 + 4 * number),
        ]  # fmt: skip
        data = struct.pack("<2sHI", b"II", 42, 8) + struct.pack("<H", len(entries))
        data += b"".join(struct.pack("<HHII", *entry) for entry in entries) + struct.pack("<I", 0)
        data = data.ljust(1000, b"\0") + struct.pack("<I", 900) * number + struct.pack("<I", 64) * number
        return _bytes(data, "slide.tiff")(folder)

    return make


_TISSUE = blobs(_HEIGHT, _WIDTH, [(450, 350, 300)], (200, 120, 160), (243, 242, 244))
_NOT = r"is not a slide that OpenSlide can open, or it is cut short"
_DAMAGED = r"it is damaged|damaged or cut short"
_EITHER = f"{_NOT}|{_DAMAGED}"
_SEED = random.Random(0)

BAD_SLIDES = {
    "missing": BadSlide(lambda folder: folder / "gone.svs", r"does not exist: correct column path"),
    "dangling link": BadSlide(_dangling, r"is a link to a file that is gone"),
    "link in a circle": BadSlide(_link_loop, r"is a link to a file that is gone|does not exist"),
    "named pipe": BadSlide(_pipe, r"is neither a file nor a folder"),
    "socket": BadSlide(_socket, r"is neither a file nor a folder"),
    "device": BadSlide(lambda folder: Path("/dev/zero"), r"is neither a file nor a folder"),
    "name too long": BadSlide(lambda folder: folder / ("x" * 300 + ".svs"), r"does not exist"),
    "empty folder": BadSlide(_folder(), r"is a folder without DICOM files"),
    "folder of other files": BadSlide(_folder(("a.txt", b"x"), ("b.svs", b"")), r"is a folder without DICOM files"),
    "folder with a broken DICOM": BadSlide(_folder(("a.dcm", bytes(128) + b"DICM" + bytes(64))), _EITHER),
    "zero bytes": BadSlide(_bytes(b""), r"is empty \(0 bytes\): copy it again"),
    "one byte": BadSlide(_bytes(b"I"), _NOT),
    "text": BadSlide(_bytes(b"slide_id\tpath\n"), _NOT),
    "web page": BadSlide(_bytes(b"<!DOCTYPE html><title>404</title>"), _NOT),
    "wrong magic": BadSlide(_bytes(b"II\x2b\x01" + bytes(500)), _NOT),
    "noise": BadSlide(_bytes(_SEED.randbytes(100_000)), _NOT),
    "noise after a good magic": BadSlide(_bytes(b"II*\0\x08\0\0\0" + _SEED.randbytes(100_000)), _NOT),
    "a megabyte of zeros": BadSlide(_bytes(bytes(1 << 20)), _NOT),
    "PNG as svs": BadSlide(_picture("PNG"), _NOT),
    "JPEG as svs": BadSlide(_picture("JPEG"), _NOT),
    "gzip": BadSlide(_compressed, _NOT),
    "only the magic": BadSlide(_cut(lambda size: 8), _NOT),
    "cut in the header": BadSlide(_cut(lambda size: 100), _NOT),
    "cut after a tenth": BadSlide(_cut(lambda size: size // 10), _EITHER),
    "cut in the middle": BadSlide(_cut(lambda size: size // 2), _EITHER),
    "cut near the end": BadSlide(_cut(lambda size: size * 97 // 100), _EITHER),
    "zeros inside": BadSlide(_zeroed, _DAMAGED),
    "directories in a circle": BadSlide(_circle, _EITHER),
    "width of 0": BadSlide(_tag(0, ImageWidth=0), _EITHER),
    "tile width of 0": BadSlide(_tag(0, TileWidth=0), _EITHER),
    "unknown compression": BadSlide(_tag(0, Compression=65_000), _EITHER),
    "a level that points nowhere": BadSlide(_tag(1, TileOffsets=[2**31] * 1), _EITHER),
    "huge width": BadSlide(_tag(0, ImageWidth=2_000_000_000), _EITHER),
    "huge in all": BadSlide(_huge(2**20), r"says that it has 1,048,576 x 1,048,576 pixels, but has only .* bytes"),
    "not tiled": BadSlide(_untiled, _NOT),
    "16 bits": BadSlide(_deep, _EITHER + "|column mpp"),
    "MIRAX without its folder": BadSlide(_bytes(b"\xff\xd8\xff\xe0" + bytes(99), "slide.mrxs"), _EITHER),
    "VMS without its pictures": BadSlide(
        _bytes(b"[Virtual Microscope Specimen]\nNoLayers=1\nImageFile=a.jpg\nMapFile=m.jpg\n", "slide.vms"), _EITHER
    ),
    "VSI": BadSlide(_bytes(b"II*\0" + bytes(99), "slide.vsi"), r"is an Olympus/Evident VSI slide .*bioformats2raw"),
    "iSyntax": BadSlide(_bytes(b"<DataObject ObjectType", "slide.isyntax"), r"Philips iSyntax .*isyntax2raw"),
    "CZI of another kind": BadSlide(_bytes(b"ZISRAWFILE" + bytes(600), "slide.czi"), r"Zeiss CZI|" + _EITHER),
    "unknown mpp": BadSlide(_image(_TISSUE, None), r"does not say how many micrometres a pixel has.*column mpp"),
    "NaN mpp": BadSlide(_aperio(MPP="nan"), r"does not say how many micrometres a pixel has.*column mpp"),
    "negative mpp": BadSlide(_aperio(MPP="-0.5"), r"does not say how many micrometres a pixel has.*column mpp"),
    "infinite mpp": BadSlide(_aperio(MPP="inf"), r"does not say how many micrometres a pixel has.*column mpp"),
    "mpp of a printer": BadSlide(_image(_TISSUE, 25400 / 72), r"352\.8.*outside the plausible 0\.05 to 50"),
    "mpp in nanometres": BadSlide(_aperio(MPP="250"), r"says 250 x 250 micrometres a pixel, outside the plausible"),
    "uneven mpp": BadSlide(_image(_TISSUE, (1.0, 1.2)), r"mpp (is )?1 horizontally and 1\.2 vertically"),
    "implausible mpp of the table": BadSlide(
        _image(_TISSUE), r"has mpp 500 in slides\.tsv, outside the plausible", ("--slide-mpp", "500")
    ),
    "NaN in the table": BadSlide(_image(_TISSUE), r"has mpp nan in slides\.tsv", ("--slide-mpp", "nan")),
    "one pixel wide": BadSlide(_image(_TISSUE[:, :1]), r"covers 128 x 128 pixels .* only 1 x 700", (), True),
    "one pixel in all": BadSlide(_image(_TISSUE[:1, :1]), r"covers 128 x 128 pixels .* only 1 x 1", (), True),
    "smaller than a tile": BadSlide(
        _image(_TISSUE[:100, :200]), r"covers 128 x 128 pixels .* only 200 x 100", (), True
    ),
    "too coarse": BadSlide(_image(_TISSUE, 40.0), r"would have to be enlarged 20 times", (), True),
    "all background": BadSlide(_image(np.full((700, 900, 3), 244, np.uint8)), r"no tissue found", (), True),
    "all black": BadSlide(_image(np.zeros((700, 900, 3), np.uint8)), r"no tissue found", (), True),
    "all white": BadSlide(_image(np.full((700, 900, 3), 255, np.uint8)), r"no tissue found", (), True),
    "all tissue": BadSlide(_image(texture(_HEIGHT, _WIDTH)), None),
    "one level only": BadSlide(_image(_TISSUE), None),
    "long name with brackets": BadSlide(_long_name, None),
}
