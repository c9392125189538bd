"""What may be said of each model, over all tasks: summary.tsv, a JSON a measure, and sentences for the report.

One measure was chosen beforehand (evaluation.primary) and is judged by itself; all others of a model against the same
reference are one family, corrected together by Holm's procedure. Measures of robustness are families of their own
(robust_verdicts.py). A run that was made with several training seeds is judged as a whole (seeds.py): none of its seeds
gets a verdict of its own, among which one could choose.
"""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dinoscope.errors import ConfigError
from dinoscope.evaluate.comparing import Row, TaskComparison, scores_of
from dinoscope.evaluate.intervals import LEVEL, Verdict, judge_family
from dinoscope.evaluate.robust_measures import has_direction, is_robustness
from dinoscope.evaluate.robust_verdicts import BESIDE, beside, judge_robustness
from dinoscope.files import atomic_folder, write_json, write_text
from dinoscope.names import nearest

__all__ = ["COLUMNS", "Judgement", "judge", "primary_of", "summary_rows", "write_summary"]

COLUMNS = (
    "task", "measure", "score", "model", "seeds", "value", "low", "high", "cases", "units", "seen", "primary",
    "reference", "difference", "difference_low", "difference_high", "level", "p_value", "verdict", "by_seed",
    "difference_by_seed", *BESIDE,
)  # fmt: skip


@dataclass(frozen=True)
class Judgement:
    """A verdict and what it is about.

    Attributes:
        by_seed: The difference with each training seed of a run; empty of what is no run.
    """

    task: str
    measure: str
    model: str
    reference: str
    is_primary: bool
    verdict: Verdict
    by_seed: tuple[float, ...] = ()

    @property
    def sentence(self) -> str:
        """For people: who against whom, on what, and what came of it."""
        said = self.verdict.sentence.partition(": ")[2]
        return f"{self.model} against {self.reference}, {self.task}/{self.measure}: {said}"


def primary_of(tasks: Sequence[TaskComparison], wanted: str | None) -> str | None:
    """The measure that the verdict rests on, TASK/MEASURE; None where no task has a verdict.

    Raises:
        ConfigError: There is no such measure.
    """
    names = [
        f"{task.task}/{measure}"
        for task in tasks
        for measure, _, _ in task.differences
        if has_direction(measure) or not is_robustness(measure)
    ]
    if wanted is None:
        linear = [name for name in names if name.rpartition("/")[2] == "linear"]
        return next(iter([*linear, *names]), None)
    if names and wanted not in names:
        known = list(dict.fromkeys(names))
        raise ConfigError(
            f"evaluation.primary is {wanted!r}, which no task measures{nearest(wanted, known)}; "
            f"there are {', '.join(known)}"
        )
    return wanted


def judge(tasks: Sequence[TaskComparison], margin: float, primary: str | None) -> list[Judgement]:
    """A verdict for each model, reference, task and measure.

    Args:
        tasks: All of them.
        margin: Differences within it do not matter.
        primary: TASK/MEASURE.
    """
    pairs = dict.fromkeys((model, reference) for task in tasks for _, model, reference in task.differences)
    of_families = _judged_as_a_whole(tasks)
    judgements = []
    for model, reference in pairs:
        if (model, reference) in of_families:
            continue
        of_pair = {
            f"{task.task}/{measure}": comparison
            for task in tasks
            for (measure, of, against), comparison in task.differences.items()
            if (of, against) == (model, reference)
        }
        found = {name: one for name, one in of_pair.items() if not is_robustness(name.rpartition("/")[2])}
        verdicts = judge_family(found, dict.fromkeys(found, margin), primary=primary)
        for one in tasks:
            chosen = (primary or "").removeprefix(f"{one.task}/")
            robust = judge_robustness(one, model, reference, margin, chosen)
            verdicts |= {f"{one.task}/{measure}": said for measure, said in robust.items()}
        for name, verdict in verdicts.items():
            task, _, measure = name.rpartition("/")
            by_seed = of_pair[name].by_seed
            judgements.append(Judgement(task, measure, model, reference, name == primary, verdict, by_seed))
    return judgements


def _judged_as_a_whole(tasks: Sequence[TaskComparison]) -> set[tuple[str, str]]:
    """Seeds of a run with their references, where the run as a whole is held against these."""
    found = set()
    for task in tasks:
        for _, model, reference in task.differences:
            if (members := task.families.get(model)) is not None:
                others = task.families.get(reference, [reference] * len(members))
                found |= set(zip(members, others, strict=True))
    return found


def summary_rows(tasks: Sequence[TaskComparison], judgements: Sequence[Judgement]) -> list[dict[str, Any]]:
    """One row a number; verdicts stand beside the score that is judged, one row more for each further reference."""
    by_place: dict[tuple[str, str, str], list[Judgement]] = {}
    for one in judgements:
        by_place.setdefault((one.task, one.measure, one.model), []).append(one)
    rows = []
    for task in tasks:
        for row in task.rows:
            number = {"task": task.task, **{key: value for key, value in asdict(row).items() if key in COLUMNS}}
            number |= beside(task, row)
            judged = [_told(one) for one in by_place.get((task.task, row.measure, row.model), [])]
            judged += _told_of_seeds(task, row, judgements)
            if row.seen == "yes" or row.score != scores_of(task.kind, row.measure)[0]:
                judged = []
            rows += [number | told for told in judged] or [number]
        kind = "robustness" if task.rows and task.kind != "masks" else "descriptive"
        told = {row.measure for row in task.rows}  # with an interval, above
        for model, numbers in task.numbers.items():
            rows += [
                {"task": task.task, "measure": kind, "score": name, "model": model, "value": value}
                for name, value in numbers.items()
                if isinstance(value, int | float) and math.isfinite(value) and name not in told
            ]
    return rows


def write_summary(
    tasks: Sequence[TaskComparison],
    judgements: Sequence[Judgement],
    primary: str | None,
    *,
    table: Path,
    document: Path,
    folder: Path,
) -> None:
    """Writes summary.tsv, summary.json (all that the report shows), and a JSON a measure."""
    with atomic_folder(folder) as inside:
        for task in tasks:
            for measure in dict.fromkeys(row.measure for row in task.rows):
                write_json(inside / f"{task.task}.{measure}.json", _measure_document(task, measure, judgements))
            if task.numbers:
                write_json(inside / f"{task.task}.json", {"task": task.task, "models": task.numbers})
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, delimiter="\t", lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows({key: _shown(value) for key, value in row.items()} for row in summary_rows(tasks, judgements))
    write_text(table, text.getvalue())
    write_json(
        document,
        {
            "primary": primary,
            "tasks": [
                {
                    "task": task.task,
                    "kind": task.kind,
                    "rows": [asdict(row) for row in task.rows],
                    "numbers": task.numbers,
                    "about": task.about,
                    "notes": task.notes,
                }
                for task in tasks
            ],
            "verdicts": [_document(one) for one in judgements],
        },
    )


def _measure_document(task: TaskComparison, measure: str, judgements: Sequence[Judgement]) -> dict[str, Any]:
    return {
        "task": task.task,
        "measure": measure,
        "kind": task.kind,
        "scores": [asdict(row) for row in task.rows if row.measure == measure],
        "verdicts": [_document(one) for one in judgements if (one.task, one.measure) == (task.task, measure)],
    }


def _document(one: Judgement) -> dict[str, Any]:
    about = {"task": one.task, "measure": one.measure, "model": one.model, "reference": one.reference}
    numbers = {key: _finite(value) for key, value in asdict(one.verdict).items()}
    seeds = {"seeds": len(one.by_seed) or None, "by_seed": list(one.by_seed)}
    return {**about, "is_primary": one.is_primary, **seeds, **numbers, "sentence": one.sentence}


def _told(one: Judgement) -> dict[str, Any]:
    said = one.verdict
    return {
        "primary": "yes" if one.is_primary else "no",
        "reference": one.reference,
        "difference": said.difference,
        "difference_low": _finite(said.low),
        "difference_high": _finite(said.high),
        "level": said.level,
        "p_value": said.p_value,
        "verdict": said.decision,
        "difference_by_seed": " ".join(f"{each:+.6g}" for each in one.by_seed if len(one.by_seed) > 1),
    }


def _told_of_seeds(task: TaskComparison, row: Row, judgements: Sequence[Judgement]) -> list[dict[str, Any]]:
    """Differences that have no verdict of their own: those of one of several training seeds."""
    judged = {(one.model, one.reference) for one in judgements}
    told = []
    for (measure, model, reference), found in task.differences.items():
        if (measure, model) == (row.measure, row.model) and (model, reference) not in judged:
            low, high = map(_finite, found.interval())
            ends = {"difference_low": low, "difference_high": high, "level": LEVEL}
            told.append({"reference": reference, "difference": found.difference, **ends})
    return told


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shown(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return " ".join(f"{each:.6g}" for each in value)
    return f"{value:.6g}" if isinstance(value, float) else value
