"""What the report says of the evaluation: verdicts in sentences, a figure and a table a task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dinoscope.evaluate.baseline_names import BASELINES
from dinoscope.evaluate.robust_measures import is_robustness
from dinoscope.files import read_json
from dinoscope.visualize.robustness_section import RobustnessFacts, robustness_facts

__all__ = ["EvaluationFacts", "TaskFacts", "evaluation_facts"]

_SENTENCE_WITHOUT = (
    "No label, tile set or mask was given, so nothing says whether training helped: see docs/evaluation.md for what "
    "it takes. The descriptive measures below have no better direction."
)
_SENTENCE_UNASKED = (
    "Nothing says whether training helped: what was given could not be asked about, and the notes below say why."
)
_SENTENCE_SEEN = (
    "Nothing says whether training helped: no two models could be compared on cases that training never saw."
)
_SENTENCE_ALONE = (
    "Nothing says whether training helped: the starting weights (base) are not among the models that were measured; "
    "add them to features.models."
)
_BASE = "base"


@dataclass(frozen=True)
class TaskFacts:
    """One task: what was asked, scores by measure and model, descriptive numbers, sentences."""

    name: str
    asked: str
    scores: list[str]
    rows: list[tuple[str, str, list[str]]]
    numbers: dict[str, dict[str, Any]]
    number_names: list[str]
    sentences: list[tuple[str, bool]]
    baseline_sentences: list[str]
    notes: list[str]
    robustness: RobustnessFacts | None


@dataclass(frozen=True)
class EvaluationFacts:
    """All of it; `on_top` are the sentences that a person reads first."""

    on_top: list[str] = field(default_factory=list)
    tasks: list[TaskFacts] = field(default_factory=list)


def evaluation_facts(results: Path) -> EvaluationFacts | None:
    """What was measured; None where nothing was."""
    path = results / "evaluation" / "summary.json"
    if not path.is_file():
        return None
    document = read_json(path)
    judged = [_Judged(**{key: one[key] for key in _Judged.__annotations__}) for one in document["verdicts"]]
    tasks = [_task(task, judged) for task in document["tasks"]]
    primary = [_capital(one.sentence) for one in judged if one.is_primary and one.model not in BASELINES]
    if not judged and tasks:
        primary = [_why_nothing(document["tasks"])]
    return EvaluationFacts(primary, tasks)


def _why_nothing(tasks: Sequence[Mapping[str, Any]]) -> str:
    asked = [task for task in tasks if task["kind"] != "none"]
    rows = [row for task in asked for row in task["rows"]]
    if not asked:
        return _SENTENCE_WITHOUT
    if not rows:
        return _SENTENCE_UNASKED
    return _SENTENCE_SEEN if any(row["model"] == _BASE for row in rows) else _SENTENCE_ALONE


@dataclass(frozen=True)
class _Judged:
    task: str
    measure: str
    model: str
    is_primary: bool
    sentence: str


def _task(task: Mapping[str, Any], judged: Sequence[_Judged]) -> TaskFacts:
    rows = [row for row in task["rows"] if not is_robustness(row["measure"])]
    scores = list(dict.fromkeys(row["score"] for row in rows))
    of_task = [one for one in judged if one.task == task["task"]]
    mine = [one for one in of_task if one.is_primary or not is_robustness(one.measure)]
    numbers = task["numbers"]
    return TaskFacts(
        name=task["task"],
        asked=_asked(rows, task["kind"]),
        scores=[score.replace("_", " ") for score in scores],
        rows=[
            (measure, model, [_cell(rows, measure, model, seen, score) for score in scores])
            for measure, model, seen in dict.fromkeys((row["measure"], _told(row), row["seen"]) for row in rows)
        ],
        numbers=numbers,
        number_names=list(dict.fromkeys(name for values in numbers.values() for name in values)),
        sentences=[(one.sentence, one.is_primary) for one in mine if one.model not in BASELINES],
        baseline_sentences=[one.sentence for one in mine if one.model in BASELINES],
        notes=task["notes"],
        robustness=robustness_facts(task, [(one.measure, one.sentence) for one in of_task if one not in mine]),
    )


def _told(row: Mapping[str, Any]) -> str:
    of_one = " (1 seed)" if row["seeds"] == 1 else ""
    return f"{row['model']}{of_one}{' (transductive)' if row['seen'] == 'yes' else ''}"


def _cell(rows: Sequence[Mapping[str, Any]], measure: str, model: str, seen: str, score: str) -> str:
    for row in rows:
        if (row["measure"], _told(row), row["seen"], row["score"]) == (measure, model, seen, score):
            ends = "" if row["low"] is None else f" [{row['low']:.3f}, {row['high']:.3f}]"
            return f"{row['value']:.3f}{ends}"
    return "–"


def _asked(rows: Sequence[Mapping[str, Any]], kind: str) -> str:
    if not rows:
        return ""
    row = rows[0]
    about = f"{row['cases']:,} cases, {row['units']:,} units"
    least = {
        "classes": f", at least {row['smallest_class']} cases a class",
        "survival": f", {row['smallest_class']} with the event",
    }
    return about + least.get(kind, "")


def _capital(sentence: str) -> str:
    return f"{sentence[0].upper()}{sentence[1:]}."
