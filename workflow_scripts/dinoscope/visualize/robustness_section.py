"""What the report says of robustness: a row a probe and model, a column a change; what features tell of the site."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dinoscope.evaluate.robust_measures import (
    INDEX,
    RETAINED,
    SITE,
    UNCHANGED,
    change_of,
    clean_measure,
    has_direction,
    is_robustness,
)

__all__ = ["RobustnessFacts", "robustness_facts"]

_NAMES = {"linear": "linear probe", "ridge": "ridge regression", "cox": "Cox regression", RETAINED: "neighbours kept"}
_PROBES = ("linear", "ridge", "cox")


@dataclass(frozen=True)
class RobustnessFacts:
    """Of one task.

    Attributes:
        changes: Columns, "unchanged" first.
        rows: Measure, model, a cell a column.
        sites: Model, and its cells: site read-out, chance, the class by the first probe, robustness index.
        sentences: On what is judged, and on the site.
    """

    changes: list[str]
    rows: list[tuple[str, str, list[str]]]
    sites: list[tuple[str, list[str]]]
    sentences: list[str]


def robustness_facts(task: Mapping[str, Any], verdicts: Sequence[tuple[str, str]]) -> RobustnessFacts | None:
    """Tables and sentences; None where nothing was asked.

    Args:
        task: Of summary.json.
        verdicts: Measure and sentence of each verdict on the task's models.
    """
    rows = [row for row in task["rows"] if row["seen"] != "yes"]
    first: dict[str, str] = {}
    for row in rows:
        first.setdefault(row["measure"], row["score"])
    cells = {(row["measure"], row["model"]): row for row in rows if row["score"] == first[row["measure"]]}
    measures = list(first)
    changed = [name for name in measures if change_of(name) not in (None, UNCHANGED) and first[name] != "change"]
    changes = list(dict.fromkeys(change_of(name) for name in changed))
    if not any(map(is_robustness, measures)):
        return None
    table = []
    stems = dict.fromkeys(name.partition("~")[0] for name in changed)
    for stem in sorted(stems, key=lambda name: name not in _PROBES):  # what is judged comes first
        clean = clean_measure(f"{stem}~{changes[0]}", measures)
        for model in dict.fromkeys(model for name, model in cells if name.startswith(f"{stem}~")):
            names = [clean, *(f"{stem}~{change}" for change in changes)]
            table.append((_called(stem), model, [_cell(cells.get((name, model))) for name in names]))
    probe = next((name for name in _PROBES if name in measures), "")
    sites = [
        (model, [_cell(cells.get((SITE, model))), _number(task, model), *_others(cells, model, probe)])
        for model in dict.fromkeys(model for name, model in cells if name in (SITE, INDEX))
    ]
    told = [sentence for name, sentence in verdicts if has_direction(name) or name in (SITE, INDEX)]
    return RobustnessFacts([UNCHANGED, *changes], table, sites, told)


def _others(cells: Mapping[tuple[str, str], Mapping[str, Any]], model: str, probe: str) -> list[str]:
    return [_cell(cells.get((name, model))) for name in (probe, INDEX)]


def _number(task: Mapping[str, Any], model: str) -> str:
    chance = task["numbers"].get(model, {}).get("site_chance")
    return "–" if chance is None else f"{chance:.3f}"


def _called(stem: str) -> str:
    return f"{stem.removeprefix('knn_')}-NN" if stem.startswith("knn_") else _NAMES.get(stem, stem)


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    return f"{row['value']:.3f}" + ("" if row["low"] is None else f" [{row['low']:.3f}, {row['high']:.3f}]")
