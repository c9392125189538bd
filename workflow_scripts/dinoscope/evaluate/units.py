"""What a task asks about, written down before any model is asked: units, their groups, and what is true of them.

A unit is a case or slide (label-NAME), an image of a tile set (tiles-NAME), an image with a mask (masks-NAME), or a
slide (descriptive). Images go by number, in the order of their names: no file's name gets into the results.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dinoscope.errors import ConfigError
from dinoscope.evaluate.cohort import Cohort
from dinoscope.evaluate.labels import Label, check_units, labels_of_units
from dinoscope.evaluate.samples import SampledTiles
from dinoscope.evaluate.tile_sets import ImageSet
from dinoscope.files import read_json, write_json
from dinoscope.slides.table import SlideRecord

__all__ = ["Unit", "Units", "read_units", "units_of_images", "units_of_label", "units_of_slides", "write_units"]


@dataclass(frozen=True)
class Unit:
    """One of them.

    Attributes:
        name: Case, slide, or number of an image.
        group: The case, or what stands for it: units of a group stay on one side of every split.
        set: "test", "selection", "training", or "skipped": nothing is known of it.
        value: Class, number, [time, event], or None.
        slides: Of a case.
        site: Where it comes from, if known.
    """

    name: str
    group: str
    set: str
    value: Any = None
    slides: tuple[str, ...] = ()
    site: str | None = None


@dataclass(frozen=True)
class Units:
    """All of a task.

    Attributes:
        task: Its name.
        kind: "classes", "number", "survival", "masks" or "none".
        classes: Names of the classes, sorted.
        digest: Of the names of the images that they number; "" for slides.
    """

    task: str
    kind: str
    units: list[Unit]
    classes: list[str] = field(default_factory=list)
    digest: str = ""

    def __len__(self) -> int:
        return len(self.units)

    def without(self, skipped: np.ndarray) -> "Units":
        """The same, but for some (N,) bool that are neither asked nor learned from."""
        units = [
            replace(unit, set="skipped") if is_one else unit for unit, is_one in zip(self.units, skipped, strict=True)
        ]
        return replace(self, units=units)

    @property
    def groups(self) -> np.ndarray:
        """(N,) the number of each unit's group, in the order of appearance."""
        return _numbered([unit.group for unit in self.units])

    @property
    def sites(self) -> np.ndarray | None:
        """(N,) the number of each unit's site; None where one is unknown."""
        sites = [unit.site for unit in self.units]
        return None if None in sites else _numbered(sites)

    @property
    def targets(self) -> np.ndarray:
        """(N,) class numbers or float64 numbers; (N, 2) times and events."""
        if self.kind == "classes":
            numbers = {name: number for number, name in enumerate(self.classes)}
            return np.array([numbers[unit.value] for unit in self.units], dtype=np.int64)
        return np.array([unit.value for unit in self.units], dtype=np.float64)

    def only(self, name: str) -> "Units":
        """Those of one set."""
        return Units(self.task, self.kind, [unit for unit in self.units if unit.set == name], self.classes, self.digest)


def units_of_label(task: str, label: Label, cohort: Cohort, records: Mapping[str, SlideRecord]) -> Units:
    """The test cases (or their slides) that have the label; features of those of the selection are not needed.

    Raises:
        ConfigError: None of them has it.
    """
    found = [
        Unit(
            unit.name,
            unit.case,
            cohort.sets[unit.case],
            unit.value if label.kind != "survival" else [float(unit.value[0]), float(unit.value[1])],
            unit.slides,
            _site([records[slide] for slide in unit.slides]),
        )
        for unit in labels_of_units(label, cohort.slides_of("test"), cohort.case_of)
    ]
    check_units(label, found, len(cohort.cases("test")))
    classes = sorted({unit.value for unit in found}) if label.kind == "classes" else []
    return Units(task, label.kind, found, classes)


def units_of_slides(task: str, slides: Sequence[str], cohort: Cohort, records: Mapping[str, SlideRecord]) -> Units:
    """Slides that nothing is asked about."""
    return Units(
        task,
        "none",
        [
            Unit(slide, cohort.case_of[slide], cohort.slides[slide], None, (slide,), records[slide].site)
            for slide in slides
        ],
    )


def units_of_images(task: str, images: ImageSet, fraction: float, seed: int) -> Units:
    """Images by number.

    Args:
        task: Its name.
        images: The set.
        fraction: Share of the groups that is for selection, drawn by seed; 0 where runs are asked about something else.
        seed: Another seed draws other groups.
    """
    numbers = _numbered(images.groups)
    drawn = _drawn_groups(sorted(set(images.groups)), fraction, seed)
    units = [
        Unit(str(index), str(numbers[index]), "selection" if group in drawn else "test", label)
        for index, (group, label) in enumerate(zip(images.groups, images.labels or [None] * len(images), strict=True))
    ]
    kind = "classes" if images.labels else "masks"
    return Units(task, kind, units, sorted(set(images.labels)), digest_of(images))


def digest_of(images: ImageSet | SampledTiles) -> str:
    """Of the names of a set's images, which the numbers go by."""
    return hashlib.sha256(json.dumps(images.files).encode()).hexdigest()[:16]


def write_units(path: Path, units: Units) -> None:
    """Writes units.json."""
    write_json(path, asdict(units))


def read_units(path: Path) -> Units:
    """Reads units.json.

    Raises:
        ConfigError: It is missing.
    """
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; write it with evaluate.py units")
    document = read_json(path)
    units = [Unit(**{**unit, "slides": tuple(unit["slides"])}) for unit in document.pop("units")]
    return Units(units=units, **document)


def _drawn_groups(groups: Sequence[str], fraction: float, seed: int) -> set[str]:
    """Those of the smallest SHA-256 of seed and name, so that a group that comes or goes moves few others."""
    number = round(fraction * len(groups))
    ranked = sorted(groups, key=lambda group: hashlib.sha256(f"{seed}\n{group}".encode()).hexdigest())
    return set(ranked[:number])


def _numbered(names: Sequence[str]) -> np.ndarray:
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)


def _site(records: Sequence[SlideRecord]) -> str | None:
    sites = {record.site for record in records}
    return sites.pop() if len(sites) == 1 else None
