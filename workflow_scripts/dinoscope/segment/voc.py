"""Pascal VOC's segmentation, in the layout of its archive (Everingham et al. 2010).

VOCdevkit/VOC2012/JPEGImages/2007_000032.jpg
                  SegmentationClass/2007_000032.png   palette indices 0 … 20; 255 at outlines, ignored
                  ImageSets/Segmentation/train.txt    a name a line; val.txt, trainval.txt
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from dinoscope.errors import ConfigError, MasksError
from dinoscope.segment.masks import FileMasks, Pair, Problems, ValueTable
from dinoscope.segment.metrics import IGNORED
from dinoscope.segment.palettes import default_palette

__all__ = ["VOC_CLASSES", "VocSettings", "open_voc"]

VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor"),
)


@dataclass(frozen=True)
class VocSettings:
    """How VOC is read.

    Attributes:
        year: Of the challenge.
        train_list: Name of the list of training images; "trainval" or a list of one's own.
        val_list: Name of the list of validation images.
        masks: Folder of the masks; "SegmentationClassAug" for the additional ones of Hariharan et al. 2011.
    """

    year: str = "2012"
    train_list: str = "train"
    val_list: str = "val"
    masks: str = "SegmentationClass"


def open_voc(root: Path, split: str, settings: VocSettings) -> FileMasks:
    """The images of a list, in its order.

    Args:
        root: VOCdevkit, the folder it is in, or the year's folder itself.
        split: "train", "val", or "test", whose masks are not published.
        settings: What to read.

    Raises:
        ConfigError: The list is missing or empty.
        MasksError: The layout is another, or images or masks of the list are missing.
    """
    folder = _year_folder(root, settings.year)
    listed = {"train": settings.train_list, "val": settings.val_list}.get(split, split)
    names = _names(folder, listed)
    pairs = [Pair(name, f"JPEGImages/{name}.jpg", f"{settings.masks}/{name}.png", name) for name in names]
    problems = Problems()
    for pair in pairs:
        if not (folder / pair.image).is_file():
            problems.add("images that are missing", pair.image)
        if not (folder / pair.mask).is_file():
            problems.add("masks that are missing", pair.mask)
    for name in [name for name, count in Counter(names).items() if count > 1]:
        problems.add("names that stand twice", name)
    if problems:
        raise MasksError(f"{folder}, list {listed}: {problems.sentence()}; unpack the archive again, or mend the list")
    values = {number: number for number in range(len(VOC_CLASSES))} | {IGNORED: IGNORED}
    return FileMasks(folder, pairs, VOC_CLASSES, ValueTable.of(values), default_palette(len(VOC_CLASSES)))


def _year_folder(root: Path, year: str) -> Path:
    candidates = [root / f"VOC{year}", root / "VOCdevkit" / f"VOC{year}", root]
    found = next((folder for folder in candidates if (folder / "JPEGImages").is_dir()), None)
    if found is None:
        raise MasksError(
            f"{root} is no VOCdevkit: there is no JPEGImages in VOC{year}, VOCdevkit/VOC{year} or in itself; give the "
            "folder that the archive was unpacked to, or another year"
        )
    return found


def _names(folder: Path, listed: str) -> list[str]:
    lists = folder / "ImageSets" / "Segmentation"
    path = lists / f"{listed}.txt"
    if not path.is_file():
        found = ", ".join(sorted(each.stem for each in lists.glob("*.txt"))) if lists.is_dir() else ""
        there = f"there are {found}" if found else f"there is no {lists.relative_to(folder)}, as in a set for detection"
        raise ConfigError(f"{folder} has no list ImageSets/Segmentation/{listed}.txt: {there}")
    names = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not names:
        raise ConfigError(f"{path} is empty; it must have a name a line")
    return names
