"""What may be said of robustness: always beside the clean figure, chance and colour, and never for having collapsed.

Measures of robustness of a model against another, within a task, are a family of their own, corrected by Holm's
procedure: that they were asked widens no other interval. Judged are the probes under each change, and what they lose
by it; of two models the one that loses less is called better only where it is shown to be no worse on unchanged tiles.
The rest has no agreed direction: its differences have intervals, and no verdict.
"""

from dataclasses import replace
from typing import Any

from dinoscope.evaluate.baseline_names import COLOR
from dinoscope.evaluate.comparing import SCORES, Row, TaskComparison, scores_of
from dinoscope.evaluate.intervals import LEVEL, Comparison, Verdict, judge_family, verdict
from dinoscope.evaluate.robust_measures import (
    RETAINED,
    SITE,
    change_of,
    clean_measure,
    has_direction,
    is_robustness,
    own_score,
)

__all__ = ["BESIDE", "beside", "judge_robustness"]

BESIDE = ("clean", "chance", "color_histogram")
_PROBES = ("linear", "ridge", "cox")


def judge_robustness(
    task: TaskComparison, model: str, reference: str, margin: float, primary: str | None
) -> dict[str, Verdict]:
    """Verdicts on the measures of robustness of one task.

    Args:
        task: With the differences.
        model: Who is judged.
        reference: Against whom.
        margin: Differences within it do not matter.
        primary: The measure that was chosen beforehand, which is judged by itself, if it is one of these.
    """
    all_of_pair = {
        measure: found
        for (measure, of, against), found in task.differences.items()
        if (of, against) == (model, reference)
    }
    mine = {measure: found for measure, found in all_of_pair.items() if is_robustness(measure)}
    judged = {measure: found for measure, found in mine.items() if has_direction(measure)}
    verdicts = judge_family(judged, dict.fromkeys(judged, margin), primary=primary)
    said = {}
    for measure, found in mine.items():
        if measure not in verdicts:
            said[measure] = _unjudged(found, margin, f"{measure}: {_told(task, measure, model, reference, found)}")
            continue
        clean = all_of_pair.get(clean_measure(measure, all_of_pair))
        one = verdicts[measure]
        if clean is not None and own_score(measure) == "change":
            one = _gated(one, clean, measure)
        if clean is not None and one.decision not in ("not judged", "too few to judge"):
            one = replace(one, sentence=f"{one.sentence}; on unchanged tiles {_difference(clean)}")
        said[measure] = one
    return said


def beside(task: TaskComparison, row: Row) -> dict[str, float]:
    """What stands beside a number of robustness: the same on unchanged tiles, of no knowledge, and of colour alone."""
    if not is_robustness(row.measure):
        return {}
    found: dict[str, float | None] = {}
    measures = {other.measure for other in task.rows}
    if change_of(row.measure) and own_score(row.measure) != RETAINED:
        score = SCORES[task.kind][0] if own_score(row.measure) == "change" else row.score
        found["clean"] = _value(task, clean_measure(row.measure, measures), row.model, score)
    if row.score in (SITE, RETAINED):
        name = "site_chance" if row.measure == SITE else f"chance~{change_of(row.measure)}"
        found["chance"] = _chance(task, row.model, name)
    found["color_histogram"] = _value(task, row.measure, COLOR, row.score)
    return {name: value for name, value in found.items() if value is not None}


def _gated(one: Verdict, clean: Comparison, measure: str) -> Verdict:
    """No verdict where the one that loses less may be the worse one on unchanged tiles by more than the margin."""
    low, high = clean.interval()
    if one.decision == "better" and low < -one.margin:
        loses, whose = "less", "it is"
    elif one.decision == "worse" and high > one.margin:
        loses, whose = "more", "the other is"
    else:
        return one
    sentence = (
        f"{measure}: not judged: it loses {abs(one.difference):.3f} {loses} [{one.low:+.3f}, {one.high:+.3f}], but "
        f"{whose} not shown to be as good on unchanged tiles within {one.margin:g}: {_difference(clean)}"
    )
    return replace(one, decision="not judged", sentence=sentence)


def _unjudged(found: Comparison, margin: float, sentence: str) -> Verdict:
    """Difference and interval of a measure without an agreed direction."""
    return replace(verdict(found, margin, level=LEVEL), decision="not judged", sentence=sentence)


def _told(task: TaskComparison, measure: str, model: str, reference: str, found: Comparison) -> str:
    score = scores_of(task.kind, measure)[0]
    mine, theirs = (_shown(_value(task, measure, name, score)) for name in (model, reference))
    about = f"not judged: {mine} against {theirs}, {_difference(found)}"
    if measure == SITE:
        probe = next((name for name in _PROBES if any(row.measure == name for row in task.rows)), None)
        accuracy = [_shown(_value(task, probe, name, SCORES[task.kind][0])) for name in (model, reference)]
        about = (
            f"not judged: the site is told within a class by {mine} against {theirs}, {_difference(found)}; chance "
            f"{_shown(_chance(task, model, 'site_chance'))}, colour histogram "
            f"{_shown(_value(task, SITE, COLOR, SITE))}; the class by {accuracy[0]} against {accuracy[1]}"
        )
    return f"{about} ({100 * LEVEL:.4g} % interval, {found.num_cases} cases)"


def _difference(found: Comparison) -> str:
    low, high = found.interval()
    return f"{found.difference:+.3f} [{low:+.3f}, {high:+.3f}]"


def _chance(task: TaskComparison, model: str, name: str) -> float | None:
    """What knowing nothing gives: as counted with the model, else with any other that was asked the same."""
    numbers = [task.numbers.get(model, {}), *task.numbers.values()]
    return next((of_model[name] for of_model in numbers if name in of_model), None)


def _value(task: TaskComparison, measure: str | None, model: str, score: str) -> float | None:
    """A number of the table, of cases that training has not seen."""
    for row in task.rows:
        if (row.measure, row.model, row.score) == (measure, model, score) and row.seen != "yes":
            return row.value
    return None


def _shown(value: Any) -> str:
    return "–" if value is None else f"{value:.3f}"
