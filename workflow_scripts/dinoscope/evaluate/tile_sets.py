"""External images: labelled tiles in folders named after their classes, and images with masks.

Images of one parent (a patient, a slide, a photograph that was cut up) must stay on one side of every split, so a tile
set may say which those are: by a table of files and groups, or by a pattern that finds the parent in a file's name.
"""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinoscope.data.images import IMAGE_SUFFIXES, read_image
from dinoscope.errors import ConfigError

__all__ = ["ImageSet", "image_files", "list_masks", "list_tiles"]


@dataclass(frozen=True)
class ImageSet:
    """Images by number.

    Attributes:
        name: Of the set.
        folder: That the names start from.
        files: (N,) names in the folder, with slashes, sorted.
        groups: (N,) the parent of each.
        labels: (N,) its class; empty for images with masks.
        masks: (N,) its mask's path; empty for tiles.
    """

    name: str
    folder: Path
    files: list[str]
    groups: list[str]
    labels: list[str]
    masks: list[Path]

    def __len__(self) -> int:
        return len(self.files)

    def pixels(self, index: int) -> np.ndarray:
        """An image, uint8 RGB (H, W, 3).

        Raises:
            DinoscopeError: It cannot be read.
        """
        return read_image(self.folder, self.files[index])


def image_files(folder: Path) -> list[str]:
    """Names of all images in a folder and below, sorted; hidden ones are passed over."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts))


def list_tiles(name: str, folder: Path, groups: str | None) -> ImageSet:
    """The tiles of a folder with one folder a class.

    Args:
        name: Of the set, for messages.
        folder: Its first level names the classes.
        groups: A table (.csv or .tsv, columns file and group), or a regular expression of which the match in a file's
            name is its group; None, each tile is a group of its own.

    Raises:
        ConfigError: No such folder, images that lie in no class's folder, fewer than two classes, a file without group.
    """
    key = f"evaluation.tile_sets.{name}"
    files = _found(key, folder)
    loose = [file for file in files if "/" not in file]
    if loose:
        raise ConfigError(f"{key}: {loose[0]} lies in no class's folder; put each tile under FOLDER/CLASS/")
    labels = [file.split("/")[0] for file in files]
    if len(set(labels)) < 2:
        raise ConfigError(f"{key}: folder {folder} has the one class {labels[0]}; give two or more folders")
    return ImageSet(name, folder, files, _groups(key, files, groups), labels, [])


def list_masks(name: str, images: Path, masks: Path, groups: str | None) -> ImageSet:
    """Images and the masks of the same names (less the suffix) in another folder.

    Raises:
        ConfigError: No such folder, an image without mask, or a file without group.
    """
    key = f"evaluation.masks.{name}"
    files = _found(key, images)
    found = {str(Path(file).with_suffix("")): masks / file for file in _found(key, masks)}
    missing = [file for file in files if str(Path(file).with_suffix("")) not in found]
    if missing:
        raise ConfigError(f"{key}: image {missing[0]} has no mask of that name in {masks}; add it, or leave it out")
    paths = [found[str(Path(file).with_suffix(""))] for file in files]
    return ImageSet(name, images, files, _groups(key, files, groups), [], paths)


def _found(key: str, folder: Path) -> list[str]:
    if not folder.is_dir():
        raise ConfigError(f"{key}: {folder} is no folder; give a folder of images")
    files = image_files(folder)
    if not files:
        raise ConfigError(f"{key}: {folder} holds no image; looked for {', '.join(IMAGE_SUFFIXES)} in it and below")
    return files


def _groups(key: str, files: Sequence[str], groups: str | None) -> list[str]:
    if groups is None:
        return list(files)
    if Path(groups).suffix.lower() in (".csv", ".tsv"):
        return _groups_of_table(key, files, Path(groups))
    try:
        pattern = re.compile(groups)
    except re.error as error:
        raise ConfigError(
            f"{key}.groups is {groups!r}, which is neither a table (.csv, .tsv) nor a regular expression ({error})"
        ) from None
    found = []
    for file in files:
        match = pattern.search(file)
        if match is None:
            raise ConfigError(f"{key}.groups: {groups!r} matches nothing in {file}; each tile needs a group")
        found.append(match.group(1) if pattern.groups else match.group(0))
    return found


def _groups_of_table(key: str, files: Sequence[str], table: Path) -> list[str]:
    if not table.is_file():
        raise ConfigError(f"{key}.groups: {table} does not exist; write a table with columns file and group")
    with open(table, encoding="utf-8-sig", newline="") as opened:
        rows = list(csv.DictReader(opened, delimiter="\t" if table.suffix.lower() == ".tsv" else ","))
    if not rows or not {"file", "group"} <= rows[0].keys():
        raise ConfigError(f"{key}.groups: {table} must have columns file and group")
    known = {row["file"].strip(): row["group"].strip() for row in rows}
    found = []
    for file in files:
        group = known.get(file) or known.get(file.rpartition("/")[2])
        if not group:
            raise ConfigError(f"{key}.groups: {table} has no group for {file}; each tile needs one")
        found.append(group)
    return found
