"""Labels of slides or cases: classes, numbers, and times with events, by the names of their columns.

A column is of classes unless all its values are numbers and they are more than ten different ones or not whole. Two
columns NAME_time and NAME_event (1 seen, 0 censored) are one label NAME of survival. Nothing here imports torch.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dinoscope.errors import ConfigError
from dinoscope.names import nearest
from dinoscope.slides.table import read_rows

__all__ = ["KINDS", "Label", "Unit", "check_units", "labels_of_units", "read_labels"]

KINDS = ("classes", "number", "survival")
_MOST_CLASSES = 10  # of columns that hold whole numbers only
_TIME, _EVENT = "_time", "_event"
_NAME = re.compile("[A-Za-z][A-Za-z0-9_-]*")  # of files and of Snakemake's wildcards, as config/schemas has it


@dataclass(frozen=True)
class Label:
    """One label.

    Attributes:
        name: Its column, or what its two columns have in common.
        kind: One of `KINDS`.
        key: "slide_id" or "case_id": what it is a label of.
        values: By that key: a class's name, a number, or (time, whether the event was seen).
    """

    name: str
    kind: str
    key: str
    values: Mapping[str, str | float | tuple[float, bool]]

    @property
    def classes(self) -> list[str]:
        """Names of the classes, sorted."""
        return sorted({str(value) for value in self.values.values()}) if self.kind == "classes" else []


@dataclass(frozen=True)
class Unit:
    """What is predicted: a case with all its slides, or a slide where slides of a case differ."""

    name: str
    case: str
    slides: tuple[str, ...]
    value: str | float | tuple[float, bool]


def read_labels(path: str | Path, wanted: Sequence[str] | None = None) -> list[Label]:
    """Reads the labels of a table.

    Args:
        path: config/labels.tsv.
        wanted: Their names; None, all.

    Raises:
        ConfigError: No such label, a name that names no file, a time without an event column, or a value that does not
            fit; columns that are not wanted may be as they are.
    """
    columns, rows = read_rows(Path(path))
    key = next((column for column in columns if column in ("slide_id", "case_id")), None)
    if key is None:
        raise ConfigError(f"{path} has no column slide_id or case_id; say with one of them what the labels are of")
    known = _names(path, columns, key, wanted)
    for name in known if wanted is None else wanted:
        if name not in known:
            raise ConfigError(
                f"evaluation.labels names {name!r}, which is no label of {path}{nearest(name, known)}; "
                f"it has {', '.join(known)}"
            )
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{path}: column {name!r} cannot name a label: rename it (letters A to Z, digits, _ and -, a letter "
                "first), or name the others in evaluation.labels"
            )
    return [_label(path, name, key, columns, rows) for name in (known if wanted is None else wanted)]


def check_units(label: Label, units: Sequence[object], num_cases: int) -> None:
    """Refuses a label that none of the test cases has.

    Raises:
        ConfigError: There are no units.
    """
    if not units:
        raise ConfigError(
            f"label {label.name}: none of the {num_cases} test cases has it; label some, or leave it out of "
            "evaluation.labels"
        )


def labels_of_units(label: Label, slides: Iterable[str], case_of: Mapping[str, str]) -> list[Unit]:
    """What the label is predicted of, among some slides.

    It is the case, with all its slides, wherever the slides of each case agree; else the labelled slide. Those without
    the label are left out.
    """
    by_case: dict[str, list[str]] = {}
    for slide in slides:
        by_case.setdefault(case_of[slide], []).append(slide)
    if label.key == "case_id":
        return [Unit(case, case, tuple(of), label.values[case]) for case, of in by_case.items() if case in label.values]
    labelled = {case: [slide for slide in of if slide in label.values] for case, of in by_case.items()}
    if all(len({label.values[slide] for slide in of}) <= 1 for of in labelled.values()):
        return [Unit(case, case, tuple(by_case[case]), label.values[of[0]]) for case, of in labelled.items() if of]
    return [Unit(slide, case, (slide,), label.values[slide]) for case, of in labelled.items() for slide in of]


def _names(path: str | Path, columns: Sequence[str], key: str, wanted: Sequence[str] | None) -> list[str]:
    names = []
    for column in columns:
        if column == key:
            continue
        for suffix, other in ((_TIME, _EVENT), (_EVENT, _TIME)):
            stem = column.removesuffix(suffix)
            if stem != column and stem + other in columns:
                if suffix == _TIME:
                    names.append(stem)
                break
        else:
            stem = column.removesuffix(_EVENT).removesuffix(_TIME)
            if stem != column and (wanted is None or {column, stem} & set(wanted)):
                other = _TIME if column.endswith(_EVENT) else _EVENT
                raise ConfigError(
                    f"{path} has a column {column} but no {stem}{other}: survival needs both; add it, or rename "
                    f"{column}"
                )
            names.append(column)
    return names


def _label(
    path: str | Path, name: str, key: str, columns: Sequence[str], rows: Sequence[tuple[int, dict[str, str]]]
) -> Label:
    if name not in columns:
        survival = {}
        for line, row in rows:
            time, event = row.get(name + _TIME), row.get(name + _EVENT)
            if time is None and event is None:
                continue
            survival[row[key]] = _survival(path, line, name, time, event)
        return Label(name, "survival", key, survival)
    texts = {row[key]: row[name] for _, row in rows if name in row}
    numbers = {unit: _number(text) for unit, text in texts.items()}
    if texts and all(number is not None for number in numbers.values()):
        different = set(numbers.values())
        if len(different) > _MOST_CLASSES or any(number != int(number) for number in different):
            return Label(name, "number", key, numbers)
    return Label(name, "classes", key, texts)


def _survival(path: str | Path, line: int, name: str, time: str | None, event: str | None) -> tuple[float, bool]:
    number = None if time is None else _number(time)
    if number is None or number <= 0:
        raise ConfigError(f"{path} line {line}: {name}{_TIME} is {time!r}, but must be a time above 0")
    if event not in ("0", "1"):
        raise ConfigError(f"{path} line {line}: {name}{_EVENT} is {event!r}, but must be 1 (seen) or 0 (censored)")
    return number, event == "1"


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
