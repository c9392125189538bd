"""What a pilot says: which adaptation, at equal compute, was better than the starting weights on cases held out.

One measure decides; all candidates (arms and encoders of other origin) against the starting weights are one family,
corrected by Holm's procedure. Whatever is not clearly better is no ground for spending a week of GPUs.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dinoscope.errors import ConfigError
from dinoscope.evaluate.comparing import SCORES, TaskComparison
from dinoscope.evaluate.intervals import Comparison, Verdict, judge_family, verdict
from dinoscope.files import write_json, write_text
from dinoscope.train.metrics import read_metrics

__all__ = ["COLUMNS", "Advice", "Arm", "Point", "advise", "costs_of", "read_curves", "with_site", "write_pilot"]

BASE = "base"
COLUMNS = (
    "task", "measure", "score", "model", "kind", "trained", "value", "low", "high", "cases", "seen", "primary",
    "difference", "difference_low", "difference_high", "verdict", "site_readout", "site_chance", "iterations",
    "petaflops", "seconds",
)  # fmt: skip
CURVE_COLUMNS = (
    "model", "iteration", "petaflops", "measure", "value", "difference", "difference_low", "difference_high",
)  # fmt: skip
_WORDS = {"lora": "adapters (LoRA)", "last_n": "the last blocks alone", "full": "the whole backbone"}
Decision = Literal["adapt", "keep", "foreign encoder", "too few to judge"]


@dataclass(frozen=True)
class Arm:
    """A run of the pilot.

    Attributes:
        run: Its name.
        trained: What of the backbone it trains: lora, last_n or full.
        step_flops: Floating-point operations of one process in a step.
    """

    run: str
    trained: str
    step_flops: float

    @classmethod
    def parse(cls, text: str) -> "Arm":
        """Of RUN=TRAINED=FLOPS.

        Raises:
            ConfigError: It reads otherwise.
        """
        try:
            run, trained, flops = text.split("=")
            return cls(run, trained, float(flops))
        except ValueError:
            raise ConfigError(f"--arms {text}: give RUN=TRAINED=FLOPS, e.g. pilot-lora=lora=1e12") from None


@dataclass(frozen=True)
class Point:
    """Of a learning curve, on the selection cases: the probe's answer and how it differs from the start's.

    Attributes:
        iterations: Done by then.
        petaflops: Of one process by then.
        measure: Of the probe, knn or dense.
        value: Its answer.
        difference: From the start; with low and high, its paired 95 % interval.
    """

    iterations: int
    petaflops: float
    measure: str
    value: float
    difference: float = 0.0
    low: float = 0.0
    high: float = 0.0


@dataclass(frozen=True)
class Advice:
    """What to do.

    Attributes:
        decision: Of the four that there are.
        model: The one that is advised; "base" where the starting weights are kept.
        sentence: For people.
        verdicts: Candidate -> what may be said of it against the starting weights.
    """

    decision: Decision
    model: str
    sentence: str
    verdicts: dict[str, Verdict] = field(default_factory=dict)


def advise(
    tasks: Sequence[TaskComparison],
    primary: str | None,
    arms: Sequence[Arm],
    encoders: Sequence[str],
    *,
    margin: float,
    start: str = "published weights",
) -> Advice:
    """One decision, from one measure.

    An encoder of other origin is advised where it is better than the starting weights and than the best arm that is
    so, if any is.

    Args:
        tasks: Comparisons of all tasks.
        primary: TASK/MEASURE that decides; None where nothing could be compared.
        arms: Of the pilot.
        encoders: Names of encoders of other origin.
        margin: Differences within it do not matter.
        start: What the starting weights are called.
    """
    found = _comparisons(tasks, primary)
    candidates = {name: found[name, BASE] for name in [*_by_run(arms), *encoders] if (name, BASE) in found}
    if not candidates:
        return Advice(
            "too few to judge", BASE, "Too few cases to judge: no two models could be compared on cases held out."
        )
    verdicts = judge_family(candidates, dict.fromkeys(candidates, margin))
    about = f"on {primary}"
    if all(one.decision == "too few to judge" for one in verdicts.values()):
        said = next(iter(verdicts.values())).sentence.partition("too few to judge: ")[2]
        return Advice("too few to judge", BASE, f"Too few cases to judge whether to adapt ({about}: {said}).", verdicts)
    better = [name for name, one in verdicts.items() if one.decision == "better"]
    best_arm = _best([name for name in better if name in _by_run(arms)], verdicts)
    best_encoder = _best([name for name in better if name in encoders], verdicts)
    if best_encoder and (best_arm is None or _is_better(found.get((best_encoder, best_arm)), margin)):
        against = "" if best_arm is None else f", and better than {best_arm}"
        return Advice(
            "foreign encoder",
            best_encoder,
            f"Use {best_encoder} as it is: {_said(verdicts[best_encoder])} than the {start} {about}{against}.",
            verdicts,
        )
    if best_arm:
        trained = _WORDS.get(_by_run(arms)[best_arm].trained, _by_run(arms)[best_arm].trained)
        others = [name for name in better if name != best_arm]
        also = f" ({' and '.join(others)} {'is' if len(others) == 1 else 'are'} better too)" if others else ""
        sentence = (
            f"Adapt, training {trained} ({best_arm}): {_said(verdicts[best_arm])} than the {start} {about}{also}."
        )
        return Advice("adapt", best_arm, sentence, verdicts)
    return Advice("keep", BASE, f"Keep the {start}: {_why_keep(verdicts, margin, about)}.", verdicts)


def with_site(advice: Advice, tasks: Sequence[TaskComparison], primary: str | None) -> str:
    """The advice and, where it is known, how well the advised model tells sites within a class, in one sentence."""
    numbers = next((task.numbers for task in tasks if primary and primary.startswith(f"{task.task}/")), {})
    mine, before = (numbers.get(name, {}) for name in (advice.model, BASE))
    if "site_readout" not in mine or "site_readout" not in before:
        return advice.sentence
    chance = f"chance {before['site_chance']:.3f}"
    if advice.model == BASE:
        told = f"the starting weights tell the site within a class by {before['site_readout']:.3f} ({chance})"
    else:
        told = (
            f"it tells the site within a class by {mine['site_readout']:.3f}, where the starting weights do by "
            f"{before['site_readout']:.3f} ({chance})"
        )
    return f"{advice.sentence.removesuffix('.')}; {told}."


def read_curves(runs: Path, arms: Sequence[Arm]) -> dict[str, list[Point]]:
    """Run -> its learning curve; empty where nothing labelled was asked.

    Args:
        runs: Folder of the runs.
        arms: Of the pilot.

    Raises:
        RunError: A run has no metrics.
    """
    curves = {}
    for arm in arms:
        metrics = read_metrics(runs / arm.run)
        measure = next((name for name in ("knn", "dense") if f"probe_{name}" in metrics), None)
        points = []
        if measure is not None:
            for iteration, row in metrics[metrics[f"probe_{measure}"].notna()].iterrows():
                ends = [row.get(f"probe_difference{end}", math.nan) for end in ("", "_low", "_high")]
                # the start, which has no difference, is logged at iteration 0; all others after theirs
                done = int(iteration) + 1 if iteration or math.isfinite(ends[0]) else 0
                known = [float(end) if math.isfinite(end) else 0.0 for end in ends]
                value = float(row[f"probe_{measure}"])
                points.append(Point(done, done * arm.step_flops / 1e15, measure, value, *known))
        curves[arm.run] = points
    return curves


def costs_of(runs: Path, arms: Sequence[Arm]) -> dict[str, dict[str, float]]:
    """Run -> iterations, operations (1e15) of one process, and seconds that its steps took, where it logged them."""
    costs = {}
    for arm in arms:
        logged = read_metrics(runs / arm.run)
        iterations = int(logged.index[-1]) + 1
        cost = {"iterations": iterations, "petaflops": iterations * arm.step_flops / 1e15}
        if "iter_time" in logged:
            times = logged["iter_time"].dropna()  # each the mean since the line before
            passed = np.diff([-1, *times.index])
            cost["seconds"] = float((times.to_numpy() * passed).sum())
        costs[arm.run] = cost
    return costs


def write_pilot(
    tasks: Sequence[TaskComparison],
    primary: str | None,
    arms: Sequence[Arm],
    advice: Advice,
    curves: Mapping[str, Sequence[Point]],
    *,
    sentence: str,
    kinds: Mapping[str, str],
    costs: Mapping[str, Mapping[str, Any]],
    table: Path,
    curves_file: Path,
    advice_file: Path,
) -> None:
    """Writes the table of all scores, the learning curves, and the advice as text and, for the report, as JSON."""
    rows = _rows(tasks, primary, arms, advice, kinds, costs)
    write_text(table, _tsv(COLUMNS, rows))
    points = [
        {
            "model": run, "iteration": one.iterations, "petaflops": one.petaflops, "measure": one.measure,
            "value": one.value, "difference": one.difference, "difference_low": one.low, "difference_high": one.high,
        }
        for run, of_run in curves.items()
        for one in of_run
    ]  # fmt: skip
    write_text(curves_file, _tsv(CURVE_COLUMNS, points))
    verdicts = {model: one.sentence for model, one in advice.verdicts.items()}
    document = {"decision": advice.decision, "model": advice.model, "sentence": sentence, "primary": primary}
    write_json(advice_file.with_suffix(".json"), document | {"verdicts": verdicts, "rows": rows})
    write_text(advice_file, sentence + "\n")


def _rows(
    tasks: Sequence[TaskComparison],
    primary: str | None,
    arms: Sequence[Arm],
    advice: Advice,
    kinds: Mapping[str, str],
    costs: Mapping[str, Mapping[str, Any]],
) -> list[dict[str, Any]]:
    by_run, rows = _by_run(arms), []
    for task in tasks:
        for row in task.rows:
            if row.score != SCORES[task.kind][0] or "~" in row.measure:
                continue
            is_primary = f"{task.task}/{row.measure}" == primary
            arm = by_run.get(row.model)
            kind = "arm" if arm else "start" if row.model == BASE else kinds.get(row.model, "")
            told = {"task": task.task, "kind": kind, "primary": "yes" if is_primary else "no"}
            told |= {key: getattr(row, key) for key in ("measure", "score", "model", "value", "low", "high")}
            told |= {"cases": row.cases, "seen": row.seen, "trained": arm.trained if arm else ""}
            numbers = task.numbers.get(row.model, {})
            told |= {key: numbers[key] for key in ("site_readout", "site_chance") if key in numbers}
            told |= costs.get(row.model, {})
            comparison = task.differences.get((row.measure, row.model, BASE))
            if comparison is not None and row.seen != "yes":
                low, high = comparison.interval()
                told |= {"difference": comparison.difference, "difference_low": low, "difference_high": high}
                if is_primary and row.model in advice.verdicts:
                    said = advice.verdicts[row.model]
                    told |= {"difference_low": said.low, "difference_high": said.high, "verdict": said.decision}
            rows.append({key: _finite(value) for key, value in told.items()})
    return rows


def _comparisons(tasks: Sequence[TaskComparison], primary: str | None) -> dict[tuple[str, str], Comparison]:
    """(model, reference) -> their difference on the measure that decides."""
    return {
        (model, reference): comparison
        for task in tasks
        for (measure, model, reference), comparison in task.differences.items()
        if f"{task.task}/{measure}" == primary
    }


def _by_run(arms: Sequence[Arm]) -> dict[str, Arm]:
    return {arm.run: arm for arm in arms}


def _best(names: Sequence[str], verdicts: Mapping[str, Verdict]) -> str | None:
    return max(names, key=lambda name: verdicts[name].difference, default=None)


def _is_better(comparison: Comparison | None, margin: float) -> bool:
    return comparison is not None and verdict(comparison, margin).decision == "better"


def _said(one: Verdict) -> str:
    return f"it is better by {one.difference:.3f} [{one.low:+.3f}, {one.high:+.3f}]"


def _why_keep(verdicts: Mapping[str, Verdict], margin: float, about: str) -> str:
    decisions = {one.decision for one in verdicts.values()}
    if decisions == {"no clear difference"}:
        return f"nothing that was tried differs from them by more than {margin:g} {about}"
    if "inconclusive" not in decisions:
        return f"nothing that was tried is better {about}"
    hopeful = [name for name, one in verdicts.items() if one.decision == "inconclusive" and one.difference > 0]
    best = _best(hopeful, verdicts)
    if best is None:
        return f"nothing that was tried is better {about}, though more cases would be needed to say so of all"
    one = verdicts[best]
    return (
        f"nothing that was tried is clearly better {about}, but {best} may be, by {one.difference:.3f} "
        f"[{one.low:+.3f}, {one.high:+.3f}], which more cases would tell"
    )


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tsv(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, delimiter="\t", lineterminator="\n", restval="")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
    return text.getvalue()
