"""A folder of images and masks of the user's own: images/ and masks/, files of the same stem belong together.

    root/images/a.png    root/masks/a.png    root/splits.tsv (columns name, split and, if wanted, a group)

Without a table of splits, a share of the groups is drawn for validation (and test): those of the smallest SHA-256 of
seed and group, so that a group that comes or goes moves few others.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dinoscope.data.images import IMAGE_SUFFIXES
from dinoscope.errors import ConfigError, MasksError
from dinoscope.names import nearest
from dinoscope.segment.mask_files import read_values
from dinoscope.segment.masks import IGNORE, FileMasks, Pair, Problems, ValueTable, first_few
from dinoscope.segment.metrics import IGNORED
from dinoscope.segment.palettes import Colour, default_palette, palette_of
from dinoscope.slides.table import read_rows

__all__ = ["SPLITS", "FolderSettings", "open_folder"]

SPLITS = ("train", "val", "test")
_SUFFIXES = (*IMAGE_SUFFIXES, ".gif", ".jp2", ".ppm", ".pgm", ".pbm")


@dataclass(frozen=True)
class FolderSettings:
    """How a folder of images and masks is read.

    Attributes:
        class_map: Class of each value of the masks; several may be of one class, class "ignore" is left out. The
            classes are in the order in which they first stand here.
        instance: The masks are instance maps: 0 is background, every other value an object. A text is the objects'
            class ("nucleus"), True calls it "foreground".
        images: Folder of the images below the root.
        masks: Folder of the masks below the root.
        mask_suffix: What a mask's stem has more than its image's ("_mask").
        splits: Table of splits below the root; None: splits.tsv where there is one.
        val_fraction: Share of groups drawn for validation, without a table.
        test_fraction: Share of groups drawn for the test, without a table.
        seed: Of the draw.
        groups: What must not be divided by a split: a column of the table, or a regular expression for stems, whose
            first group (or all that it matches) names the group. None: each image is one.
        palette: Colours of classes, "#rrggbb".
    """

    class_map: Mapping[int, str] | None = None
    instance: bool | str = False
    images: str = "images"
    masks: str = "masks"
    mask_suffix: str = ""
    splits: str | None = None
    val_fraction: float = 0.2
    test_fraction: float = 0.0
    seed: int = 0
    groups: str | None = None
    palette: Mapping[str, Colour] | None = None


def open_folder(root: Path, split: str, settings: FolderSettings) -> FileMasks:
    """The images of one split, in the order of their stems.

    Raises:
        ConfigError: The settings or the table of splits are wrong.
        MasksError: A folder is missing or empty, images lack masks or masks images, or the split has no image.
    """
    images = _stems(root, settings.images, "")
    masks = _stems(root, settings.masks, settings.mask_suffix)
    _check_partners(root, images, masks)
    table = _read_splits(root, settings, images)
    groups = _groups(root, settings, images, table)
    split_of = _given_splits(root, table, groups) if table is not None else _drawn_splits(groups, settings)
    chosen = [stem for stem in sorted(images) if split_of.get(stem) == split]
    if not chosen:
        raise MasksError(_nothing(root, split, split_of, table is not None))
    pairs = [Pair(stem, images[stem], masks[stem], groups[stem]) for stem in chosen]
    classes, values = _classes(root, settings, pairs)
    palette = palette_of(settings.palette, classes, default_palette(len(classes)))
    return FileMasks(root, pairs, classes, values, palette)


def _stems(root: Path, folder: str, suffix: str) -> dict[str, str]:
    """Stem -> path below the root."""
    if not (root / folder).is_dir():
        raise MasksError(f"{root} has no folder {folder}/; images are wanted in images/ and their masks in masks/")
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted((root / folder).iterdir()):
        if path.suffix.lower() in _SUFFIXES and path.stem.endswith(suffix) and not path.name.startswith("."):
            found[path.stem.removesuffix(suffix)].append(f"{folder}/{path.name}")
    twice = [" and ".join(paths) for paths in found.values() if len(paths) > 1]
    if twice:
        raise MasksError(f"{root}: {len(twice)} stems stand for several files ({first_few(twice)}); keep one of each")
    if not found:
        named = f" whose stem ends with {suffix!r}" if suffix else ""
        raise MasksError(f"{root}: {folder}/ holds no picture{named}; looked for {', '.join(_SUFFIXES)}")
    return {stem: paths[0] for stem, paths in found.items()}


def _check_partners(root: Path, images: Mapping[str, str], masks: Mapping[str, str]) -> None:
    problems = Problems()
    for stem in sorted(images.keys() - masks.keys()):
        problems.add("images without a mask of the same stem", images[stem])
    for stem in sorted(masks.keys() - images.keys()):
        problems.add("masks without an image of the same stem", masks[stem])
    if problems:
        raise MasksError(f"{root}: {problems.sentence()}; add what is missing, or take these out")


def _read_splits(root: Path, settings: FolderSettings, images: Mapping[str, str]) -> dict[str, dict[str, str]] | None:
    """Stem -> row of the table; None without a table."""
    path = root / (settings.splits or "splits.tsv")
    if settings.splits is None and not path.is_file():
        return None
    columns, rows = read_rows(path)
    missing = [column for column in ("name", "split") if column not in columns]
    if missing:
        raise ConfigError(f"{path} has no column {' and no '.join(missing)}; it has {', '.join(columns)}")
    table: dict[str, dict[str, str]] = {}
    problems = Problems()
    for line, row in rows:
        name = row.get("name", "")
        stem = name if name in images else name.removesuffix(Path(name).suffix)
        if stem not in images:
            problems.add("names that are no images", f"line {line}: {name}{nearest(name, images)}")
        elif stem in table:
            problems.add("names that stand twice", f"line {line}: {name}")
        if row.get("split") not in SPLITS:
            problems.add(f"splits that are none of {', '.join(SPLITS)}", f"line {line}: {row.get('split', 'empty')}")
        table[stem] = row
    if problems:
        raise ConfigError(f"{path}: {problems.sentence()}")
    return table


def _groups(
    root: Path, settings: FolderSettings, images: Mapping[str, str], table: Mapping[str, Mapping[str, str]] | None
) -> dict[str, str]:
    """Stem -> group."""
    wanted = settings.groups
    if wanted is None:
        return {stem: stem for stem in images}
    if table is not None and any(wanted in row for row in table.values()):
        without = [stem for stem, row in table.items() if wanted not in row]
        if without:
            raise ConfigError(f"{root}: {len(without)} images have no {wanted} in the table ({first_few(without)})")
        return {stem: table[stem][wanted] if stem in table else stem for stem in images}
    try:
        pattern = re.compile(wanted)
    except re.error as error:
        raise ConfigError(
            f"groups: {wanted!r} is no column of splits.tsv and no regular expression ({error})"
        ) from None
    matches = {stem: pattern.search(stem) for stem in images}
    without = sorted(stem for stem, match in matches.items() if match is None)
    if without:
        raise ConfigError(
            f"groups: {wanted!r} is no column of a table of splits and is not found in {len(without)} of {len(images)} "
            f"names ({first_few(without)}); write an expression that finds the group in every name"
        )
    return {stem: match[1 if pattern.groups else 0] or "" for stem, match in matches.items()}


def _given_splits(root: Path, table: Mapping[str, Mapping[str, str]], groups: Mapping[str, str]) -> dict[str, str]:
    splits: dict[str, set[str]] = defaultdict(set)
    for stem, row in table.items():
        splits[groups[stem]].add(row["split"])
    divided = [f"{group}: {', '.join(sorted(kinds))}" for group, kinds in splits.items() if len(kinds) > 1]
    if divided:
        raise ConfigError(
            f"{root}: {len(divided)} groups are in more than one split ({first_few(divided)}); a model would be judged "
            "on what it was trained on: give all images of a group one split"
        )
    return {stem: row["split"] for stem, row in table.items()}


def _drawn_splits(groups: Mapping[str, str], settings: FolderSettings) -> dict[str, str]:
    fractions = {"test": settings.test_fraction, "val": settings.val_fraction}
    if min(fractions.values()) < 0 or sum(fractions.values()) >= 1:
        raise ConfigError(
            f"val_fraction {settings.val_fraction} and test_fraction {settings.test_fraction} must be 0 or more and "
            "leave something to train on: together less than 1"
        )
    order = sorted(set(groups.values()), key=lambda group: hashlib.sha256(f"{settings.seed}:{group}".encode()).digest())
    split_of_group: dict[str, str] = {}
    for split, fraction in fractions.items():
        count = max(1, round(fraction * len(order))) if fraction and len(order) > 1 else 0
        start = len(split_of_group)
        split_of_group |= dict.fromkeys(order[start : start + count], split)
    return {stem: split_of_group.get(group, "train") for stem, group in groups.items()}


def _nothing(root: Path, split: str, split_of: Mapping[str, str], from_table: bool) -> str:
    counts = ", ".join(f"{kind} {list(split_of.values()).count(kind)}" for kind in SPLITS)
    how = "name some in the table of splits" if from_table else f"raise {split}_fraction, or write a splits.tsv"
    return f"{root}: no image is in split {split} ({counts}); {how}"


def _classes(root: Path, settings: FolderSettings, pairs: Sequence[Pair]) -> tuple[tuple[str, ...], ValueTable]:
    if settings.instance and settings.class_map:
        raise ConfigError(
            "instance and class_map exclude each other: in an instance map every value but 0 is an object"
        )
    if settings.instance:
        objects = settings.instance if isinstance(settings.instance, str) else "foreground"
        return ("background", objects), ValueTable.of_instances()
    if not settings.class_map:
        values = sorted(set(read_values(root, pairs[0].mask).ravel().tolist()))
        raise ConfigError(
            f"{root}: say what the masks' values are, class_map {{0: background, 1: …}} or instance: true (mask "
            f"{pairs[0].mask} has {first_few([str(value) for value in values])})"
        )
    return class_table(settings.class_map)


def class_table(class_map: Mapping[int, str]) -> tuple[tuple[str, ...], ValueTable]:
    """The classes of a `class_map` and what its values are.

    Raises:
        ConfigError: A value is no whole number of 0 to 65535, a class has no name, or there is none.
    """
    values: dict[int, str] = {}
    for value, name in class_map.items():
        if isinstance(value, bool) or not str(value).isdecimal() or int(value) >= 2**16:
            raise ConfigError(f"class_map: {value!r} is no value of a mask; write whole numbers of 0 to 65535")
        if isinstance(name, bool) or not isinstance(name, str | int):
            raise ConfigError(
                f"class_map: the class of {value} is {name!r}; write a name, in quotes where YAML takes it for "
                f"something else, or {IGNORE}"
            )
        values[int(value)] = str(name)
    classes = tuple(dict.fromkeys(name for name in values.values() if name != IGNORE))
    if not classes or len(classes) > IGNORED:
        raise ConfigError(f"class_map names {len(classes)} classes besides {IGNORE!r}; 1 to {IGNORED} are possible")
    return classes, ValueTable.of(
        {value: IGNORED if name == IGNORE else classes.index(name) for value, name in values.items()}
    )
