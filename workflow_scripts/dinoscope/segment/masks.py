"""Images with masks as files: what every data set of this package is made of, and the checks of all of them.

A mask file holds one whole number a pixel; a table says which class each number is, or that it is ignored. Opening a
data set lists files and reads none. `check` then reads every mask once and names all that is wrong in one message.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from dinoscope.errors import MasksError
from dinoscope.segment.mask_files import image_size, read_image, read_values
from dinoscope.segment.metrics import IGNORED

__all__ = [
    *("IGNORE", "FileMasks", "MaskDataset", "Pair", "Problems", "Sample", "ValueTable", "check_masks", "first_few"),
]

IGNORE = "ignore"  # as a class of a mask's values: 255
_SHOWN = 5
_THREADS = 4


@dataclass(frozen=True)
class Sample:
    """One image with its mask.

    Attributes:
        image: uint8 (H, W, 3), RGB.
        mask: uint8 (H, W), classes 0 … C - 1, 255 where ignored.
        name: What messages and tables call it.
    """

    image: np.ndarray
    mask: np.ndarray
    name: str


class MaskDataset(Protocol):
    """Images with masks by number.

    Attributes:
        classes: Names of the C classes.
        palette: uint8 (C, 3), their colours.
        names: Of each image.
        groups: What each image is of (case, slide, photograph): all of a group are in one split.
    """

    classes: tuple[str, ...]
    palette: np.ndarray
    names: list[str]
    groups: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Raises DinoscopeError, naming the file, where an image or a mask cannot be used."""
        ...

    def check(self, allow_empty: bool = False) -> np.ndarray:
        """Reads every mask; see `check_masks`."""
        ...


@dataclass(frozen=True)
class Pair:
    """An image and its mask, as paths below the root of a data set."""

    name: str
    image: str
    mask: str
    group: str


class Problems:
    """What is wrong with files, by kind; the first few of each are named."""

    def __init__(self) -> None:
        self._found: dict[str, list[str]] = defaultdict(list)

    def add(self, what: str, where: str) -> None:
        """Notes `where` (a file, and what is there) under `what` ("masks without image", say)."""
        self._found[what].append(where)

    def __bool__(self) -> bool:
        return bool(self._found)

    def sentence(self) -> str:
        """All kinds in one sentence, with the number of files of each."""
        return "; ".join(f"{what}: {len(where)} ({first_few(where)})" for what, where in self._found.items())


@dataclass(frozen=True)
class ValueTable:
    """Which class the values of mask files are of.

    Attributes:
        classes: uint8 (65536,): class of each value, 255 where ignored.
        known: bool (65536,): whether the value may be in a mask.
    """

    classes: np.ndarray
    known: np.ndarray

    @classmethod
    def of(cls, class_of: Mapping[int, int]) -> "ValueTable":
        """From value -> class (255: ignored)."""
        classes, known = np.full(2**16, IGNORED, np.uint8), np.zeros(2**16, bool)
        for value, number in class_of.items():
            classes[value], known[value] = number, True
        return cls(classes, known)

    @classmethod
    def of_instances(cls) -> "ValueTable":
        """0 is class 0, every other value an object of class 1."""
        classes = np.ones(2**16, np.uint8)
        classes[0] = 0
        return cls(classes, np.ones(2**16, bool))

    def unknown(self, values: np.ndarray) -> list[int]:
        """Which values of a mask are not in the table, sorted."""
        found = np.flatnonzero(np.bincount(values.ravel(), minlength=1))
        return [int(value) for value in found if not self.known[value]]


class FileMasks:
    """Images and masks in files (a `MaskDataset`)."""

    def __init__(
        self, root: Path, pairs: Sequence[Pair], classes: Sequence[str], table: ValueTable, palette: np.ndarray
    ) -> None:
        """Takes what a kind of data set has found out about its files."""
        assert len(classes) == len(palette), (len(classes), len(palette))
        self.root, self._pairs, self._table = root, list(pairs), table
        self.classes, self.palette = tuple(classes), np.asarray(palette, np.uint8)
        self.names = [pair.name for pair in self._pairs]
        self.groups = [pair.group for pair in self._pairs]

    def __len__(self) -> int:
        return len(self._pairs)

    def image_path(self, index: int) -> Path:
        """The file that the image is read from."""
        return self.root / self._pairs[index].image

    def files(self, index: int) -> list[Path]:
        """The files of an image and its mask."""
        return [self.root / self._pairs[index].image, self.root / self._pairs[index].mask]

    def __getitem__(self, index: int) -> Sample:
        pair = self._pairs[index]
        image, values = read_image(self.root, pair.image), read_values(self.root, pair.mask)
        if image.shape[:2] != values.shape:
            raise MasksError(f"{self.root.name}: {_sizes(pair, image.shape, values.shape)}; both must be of one size")
        if unknown := self._table.unknown(values):
            raise MasksError(
                f"{self.root.name}: mask {pair.mask} has {_values(unknown)}, which is no class: name the class of each "
                "value, or that it is ignored"
            )
        return Sample(image, self._table.classes[values], pair.name)

    def check(self, allow_empty: bool = False) -> np.ndarray:
        """Reads every mask; see `check_masks`."""
        return check_masks(str(self.root), self.classes, self._check_one, len(self), allow_empty)

    def _check_one(self, index: int) -> tuple[np.ndarray, list[tuple[str, str]]]:
        """Pixels of each class, and problems (kind, file)."""
        pair, counts = self._pairs[index], np.zeros(len(self.classes), np.int64)
        try:
            width, height = image_size(self.root, pair.image)
            values = read_values(self.root, pair.mask)
        except MasksError as error:
            return counts, [("files that cannot be used", str(error))]
        if values.shape != (height, width):
            return counts, [
                ("masks of another size than their image", _sizes(pair, (height, width), values.shape)),
            ]
        if unknown := self._table.unknown(values):
            return counts, [("masks with values that are no class", f"{pair.mask}: {_values(unknown)}")]
        classes = np.bincount(self._table.classes[values].ravel(), minlength=IGNORED + 1)
        return classes[: len(counts)], []


def check_masks(
    source: str,
    classes: Sequence[str],
    check_one: Callable[[int], tuple[np.ndarray, list[tuple[str, str]]]],
    count: int,
    allow_empty: bool,
) -> np.ndarray:
    """Looks at every mask of a data set.

    Args:
        source: What the message calls the data set.
        classes: Their names.
        check_one: Gives pixels of each class of an image, and its problems (kind, file).
        count: Number of images.
        allow_empty: Whether classes without a pixel are no problem (a validation set may lack a rare one, but not all).

    Returns:
        int64 (C,): pixels of each class.

    Raises:
        MasksError: One message with all kinds of problems, the first files of each and their number.
    """
    problems, pixels = Problems(), np.zeros(len(classes), np.int64)
    with ThreadPoolExecutor(_THREADS) as pool:
        for counts, found in pool.map(check_one, range(count)):
            pixels += counts
            for what, where in found:
                problems.add(what, where)
    damaged = bool(problems)
    for name, number in zip(classes, pixels, strict=True):
        if number == 0 and not damaged and not (allow_empty and pixels.any()):
            problems.add(f"of {len(classes)} classes, those without a pixel in the {count} masks", name)
    if problems:
        raise MasksError(
            f"{source}: {problems.sentence()}; mend or take out these files, or change the data set's settings"
        )
    return pixels


def _sizes(pair: Pair, image: tuple[int, ...], mask: tuple[int, ...]) -> str:
    return f"{pair.image} is {image[1]} x {image[0]} and its mask {pair.mask} {mask[1]} x {mask[0]} pixels"


def _values(values: Iterable[int]) -> str:
    values = list(values)
    return f"value{'s' if len(values) > 1 else ''} {first_few([str(value) for value in values])}"


def first_few(where: Sequence[str]) -> str:
    """The first of many names, and how many more there are."""
    more = f", and {len(where) - _SHOWN} more" if len(where) > _SHOWN else ""
    return ", ".join(where[:_SHOWN]) + more
