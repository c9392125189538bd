"""A folder of images as training images, its listing memory-mapped: no Python object an image.

The folder is searched with all it contains; the order is that of the paths. What a run begins with is listed once, in
an uncompressed Arrow file named by the digest of the paths and sizes of the files; workers map it and copy nothing.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from dinoscope.data.sources import Window
from dinoscope.errors import ConfigError, DinoscopeError
from dinoscope.files import atomic_path

__all__ = ["IMAGE_SUFFIXES", "ImageFolder", "map_images", "read_image"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
_SCHEMA = pa.schema([("path", pa.string())])
_ROWS_PER_BATCH = 65_536
_HEADERS_READ = 2_000
_WHITE = (255, 255, 255, 255)


class ImageFolder:
    """The images of a folder by number, in the order of their paths (a `TrainingImages`)."""

    def __init__(self, root: Path, listing: Path) -> None:
        """Takes the folder and its mapped listing."""
        self.root, self.listing, self.slide_ids = root, listing, []
        reader = pa.ipc.open_file(pa.memory_map(str(listing)))
        header = json.loads(reader.schema.metadata[b"images"])
        self._digest = header["digest"]
        self.windows = [Window(**window) for window in header["windows"]]
        self._paths = [reader.get_batch(index).column(0) for index in range(reader.num_record_batches)]
        self._ends = np.cumsum([len(paths) for paths in self._paths])

    def __getstate__(self) -> tuple[Path, Path]:
        return self.root, self.listing

    def __setstate__(self, state: tuple[Path, Path]) -> None:
        self.__init__(*state)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def sample_id(self, index: int) -> str:
        """The image's path in the folder, with slashes."""
        batch = int(np.searchsorted(self._ends, index, side="right"))
        row = index - (int(self._ends[batch - 1]) if batch else 0)
        return self._paths[batch][row].as_py()

    def read(self, index: int) -> tuple[np.ndarray, str]:
        """The image and its sample id."""
        sample_id = self.sample_id(index)
        return read_image(self.root, sample_id), sample_id

    def stain(self, index: int) -> str | None:
        """Unknown."""
        return None

    def digest(self) -> str:
        """Of the paths and sizes of all files."""
        return self._digest


def map_images(root: Path, folder: Path, sealed: str | None = None) -> ImageFolder:
    """Lists the images of a folder, unless that was done before.

    Args:
        root: The folder of images.
        folder: Where listings are kept.
        sealed: Digest of the listing that a run was started with, when it goes on; None, what is there now.

    Raises:
        ConfigError: There is no image, or the listing wanted is gone.
        DinoscopeError: One of the images looked at is unreadable or not of 8 bits a channel.
    """
    if sealed is not None and (known := _listing_path(folder, sealed)).is_file():
        return ImageFolder(root, known)
    batches = list(_listed(root))
    digest = hashlib.sha256()
    for _, entries in batches:
        digest.update(entries)
    found = digest.hexdigest()
    if sealed not in (None, found):
        raise ConfigError(
            f"the run was started on the images of {root.name} with digest {sealed[:8]}, and the list of them is gone; "
            f"the folder's is now {found[:8]}: give a new run name, or restore the images it was started with"
        )
    if not batches:
        raise ConfigError(
            f"train.dataset_path: folder {root} holds no image; looked for {', '.join(IMAGE_SUFFIXES)} in it and below"
        )
    target = _listing_path(folder, found)
    if not target.is_file():
        paths = [paths for paths, _ in batches]
        header = {"digest": found, "windows": [vars(window) for window in _windows(root, paths)]}
        with atomic_path(target) as temporary:
            _write_arrow(paths, header, temporary)
    return ImageFolder(root, target)


def read_image(root: Path, name: str) -> np.ndarray:
    """One image of 8 bits a channel as uint8 RGB (H, W, 3); what is transparent is laid on white, grey stays grey.

    Of a file with several pictures the first is taken; orientation tags are not followed.

    Raises:
        DinoscopeError: Names the image: it is gone, damaged, or has more bits a channel.
    """
    with _opened(root, name) as image:
        try:
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image.convert("RGBA"))
            return np.array(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            raise _unreadable(root, name, error) from None


def _opened(root: Path, name: str) -> Image.Image:
    """The image with its header read, and nothing else."""
    try:
        image = Image.open(root / name)
    except FileNotFoundError:
        raise DinoscopeError(
            f"image {name} is no longer in {root.name}: put it back, or train under a new run name"
        ) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(root, name, error) from None
    if _is_deep(image):
        image.close()
        raise DinoscopeError(
            f"image {name} of {root.name} has more than 8 bits a channel ({image.mode}); convert it to 8 bits, since "
            "how to map its values to 0 … 255 is for you to say"
        )
    return image


def _is_deep(image: Image.Image) -> bool:
    """Whether channels have more than 8 bits; Pillow would drop the lower ones of RGB without a word."""
    stored = {str(tile.args) for tile in image.tile}
    return image.mode.startswith(("I", "F")) or any(
        ";16" in raw_mode and "BGR;16" not in raw_mode  # that one has 5 or 6 bits a channel
        for raw_mode in stored
    )


def _unreadable(root: Path, name: str, error: Exception) -> DinoscopeError:
    reason = " ".join(str(error).replace(str(root / name), name).split())
    return DinoscopeError(f"image {name} of {root.name} cannot be read ({reason}); replace it or take it out")


def _listing_path(folder: Path, digest: str) -> Path:
    return folder / f"images_{digest[:16]}.arrow"


def _listed(root: Path) -> Iterator[tuple[pa.Array, bytes]]:
    """Paths of images in order, in batches, each with the bytes that its part of the digest is made of."""
    paths: list[str] = []
    sizes: list[int] = []
    for path, size in _images_below(str(root), "", set()):
        paths.append(path)
        sizes.append(size)
        if len(paths) == _ROWS_PER_BATCH:
            yield _batch(paths, sizes)
            paths, sizes = [], []
    if paths:
        yield _batch(paths, sizes)


def _batch(paths: list[str], sizes: list[int]) -> tuple[pa.Array, bytes]:
    wrong = next((path for path in paths if any("\udc80" <= letter <= "\udcff" for letter in path)), None)
    if wrong is not None:  # how Python shows bytes that are not UTF-8
        raise ConfigError(f"the name of image {wrong!r} is not UTF-8; rename it")
    entries = "".join(f"{path}\0{size}\0" for path, size in zip(paths, sizes, strict=True)).encode()
    return pa.array(paths, pa.string()), entries


def _images_below(folder: str, prefix: str, above: set[str]) -> Iterator[tuple[str, int]]:
    """Path and size of each image, the paths in order.

    A folder is sorted by its name with the slash that follows in the paths, so that depth first is in order.
    """
    real = os.path.realpath(folder)
    if real in above:  # a link that leads back up
        return
    with os.scandir(folder) as found:
        entries = {entry.name + "/" * entry.is_dir(): entry for entry in found if not entry.name.startswith(".")}
    for name in sorted(entries):
        entry = entries[name]
        if name.endswith("/"):
            yield from _images_below(entry.path, prefix + name, above | {real})
        elif name.lower().endswith(IMAGE_SUFFIXES) and entry.is_file():
            yield prefix + name, entry.stat().st_size


def _windows(root: Path, batches: list[pa.Array]) -> list[Window]:
    """The smallest and the largest image, by the shorter side; of many images a sample is looked at."""
    paths = pa.chunked_array(batches)
    chosen = np.arange(len(paths))
    if len(paths) > _HEADERS_READ:
        chosen = np.sort(np.random.default_rng(0).choice(len(paths), _HEADERS_READ, replace=False))
    windows = []
    for index in chosen:
        name = paths[int(index)].as_py()
        with _opened(root, name) as image:
            windows.append(Window(*image.size, name=f"image {name}"))
    smallest, *_, largest = sorted([*windows, windows[0]], key=lambda window: window.shorter_px)
    return [smallest] if smallest.shorter_px == largest.shorter_px else [smallest, largest]


def _write_arrow(batches: list[pa.Array], header: dict, target: Path) -> None:
    schema = _SCHEMA.with_metadata({"images": json.dumps(header)})
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for paths in batches:
            writer.write_batch(pa.record_batch([paths], schema=schema))
