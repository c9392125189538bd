"""Intervals and verdicts: bootstrap over cases, paired between models, Holm's correction, margins.

Tiles of one patient are alike, and so are the errors made on them: to resample tiles would give intervals that are far
too narrow. What is drawn, with replacement, is cases, with all that belongs to them; and the same draws for all models,
so that what they share cancels in their difference.

Shapes: G cases, B resamples.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from dinoscope.evaluate.scores import Statistic

__all__ = [
    "DRAWS",
    "LEVEL",
    "MIN_CASES",
    "Comparison",
    "Decision",
    "Estimate",
    "Verdict",
    "case_weights",
    "compare",
    "estimate",
    "holm",
    "interval_of",
    "judge_family",
    "spread_factor",
    "verdict",
]

DRAWS = 10_000  # enough for the tails that Holm's correction of about 20 measures looks at
LEVEL = 0.95
MIN_CASES = 30  # in the smallest class; below nothing is judged
# "not judged" is no outcome of `verdict`: what has no agreed direction is given it (robust_verdicts.py).
Decision = Literal["better", "worse", "no clear difference", "inconclusive", "too few to judge", "not judged"]


@dataclass(frozen=True)
class Estimate:
    """A score and its interval.

    Attributes:
        value: On all cases.
        low: Lower end.
        high: Upper end.
        draws: Resamples on which the score was defined.
    """

    value: float
    low: float
    high: float
    draws: int


@dataclass(frozen=True)
class Comparison:
    """Score of a model minus that of another, on the same resamples of the same cases.

    Attributes:
        difference: On all cases; above 0 where the first is better.
        resampled: (B,) the same on each resample, NaN where it was not defined.
        num_cases: G.
        smallest_class: Cases in the class that the fewest have.
        by_seed: The difference with each training seed of a run (seeds.py), of which `difference` is the mean; empty of
            what is no run.
    """

    difference: float
    resampled: np.ndarray
    num_cases: int
    smallest_class: int
    by_seed: tuple[float, ...] = ()

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Ends of the interval of that level."""
        return interval_of(self.resampled, level, self.num_cases)

    @property
    def seeds_agree(self) -> bool:
        """Whether the difference has the same sign with all training seeds."""
        return len(set(np.sign(self.by_seed))) < 2

    @property
    def p_value(self) -> float:
        """Of no difference, two-sided: one minus the level of the interval that just touches 0."""
        values = self.resampled[np.isfinite(self.resampled)]
        tail = (min(np.sum(values <= 0), np.sum(values >= 0)) + 1) / (len(values) + 1)
        if tail >= 0.5:
            return 1.0
        t = -stats.norm.ppf(tail) / spread_factor(self.num_cases)
        return float(2 * stats.t.sf(t, self.num_cases - 1))


@dataclass(frozen=True)
class Verdict:
    """What may be said of a difference.

    Attributes:
        decision: Of those that there are.
        difference: New minus old.
        low: Lower end of the interval.
        high: Upper end.
        level: Of the interval; above 0.95 for a measure of a family.
        p_value: Of no difference, two-sided, corrected for the family.
        margin: Differences within ± this are taken for none.
        num_cases: That were resampled.
        sentence: For people.
    """

    decision: Decision
    difference: float
    low: float
    high: float
    level: float
    p_value: float
    margin: float
    num_cases: int
    sentence: str


@functools.lru_cache(maxsize=2)
def case_weights(num_cases: int, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """How often each case is in each resample, (B, G), not to be written to; resample b is drawn by (seed, b) alone."""
    weights = np.empty((draws, num_cases), np.float32)
    for index in range(draws):
        drawn = np.random.default_rng([seed, index]).integers(num_cases, size=num_cases)
        weights[index] = np.bincount(drawn, minlength=num_cases)
    weights.flags.writeable = False
    return weights


def estimate(
    statistic: Statistic, num_cases: int, *, draws: int = DRAWS, seed: int = 0, level: float = LEVEL
) -> Estimate:
    """A score with its interval by bootstrap over cases.

    The interval is the percentile interval, widened for few cases (Hesterberg 2015, "What teachers should know about
    the bootstrap"): resampling G cases understates the spread by √((G - 1)/G), and its tails are those of the normal
    distribution where Student's belong.

    Args:
        statistic: Of the weights of cases.
        num_cases: G, at least 2.
        draws: B.
        seed: Of the draws.
        level: Share of intervals that shall hold the true score.
    """
    resampled = statistic(case_weights(num_cases, draws, seed))
    low, high = interval_of(resampled, level, num_cases)
    value = float(statistic(np.ones((1, num_cases)))[0])
    return Estimate(value, low, high, int(np.isfinite(resampled).sum()))


def compare(
    new: Statistic, old: Statistic, num_cases: int, smallest_class: int, *, draws: int = DRAWS, seed: int = 0
) -> Comparison:
    """The difference of two models' scores on the same resamples of the same cases.

    Args:
        new: Statistic of the one.
        old: Statistic of the other.
        num_cases: G, at least 2.
        smallest_class: Cases in the class that the fewest have (`Predictions.smallest_class`).
        draws: B.
        seed: Of the draws.
    """
    weights, all_once = case_weights(num_cases, draws, seed), np.ones((1, num_cases))
    difference = float((new(all_once) - old(all_once))[0])
    return Comparison(difference, new(weights) - old(weights), num_cases, smallest_class)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979): below α, a p-value may be believed while a whole family errs with at most α.

    Args:
        p_values: Of all measures of the family, in any order; NaN counts as 1.

    Returns:
        Corrected ones, in the same order.
    """
    given = np.nan_to_num(np.asarray(p_values, np.float64), nan=1.0)
    order = np.argsort(given, kind="stable")
    factors = np.arange(len(given), 0, -1)
    corrected = np.empty(len(given))
    corrected[order] = np.maximum.accumulate(given[order] * factors).clip(max=1)
    return corrected.tolist()


def verdict(
    comparison: Comparison,
    margin: float,
    *,
    level: float = LEVEL,
    p_value: float | None = None,
    alpha: float = 1 - LEVEL,
    min_cases: int = MIN_CASES,
    measure: str = "",
) -> Verdict:
    """What may be said of a difference.

    In this order: fewer than `min_cases` in a class: "too few to judge". The interval inside ± margin: "no clear
    difference", also where it leaves out 0, for such a difference is too small to matter. All of it above or below 0:
    "better" or "worse", unless the training seeds of a run disagree in sign. Else "inconclusive": there may be a
    difference, or none.

    Args:
        comparison: New minus old.
        margin: Differences within ± this do not matter, in units of the measure; above 0.
        level: Of the interval, for one measure of several as `judge_family` chooses it.
        p_value: Corrected; None: the comparison's own.
        alpha: A p-value above this is no ground for "better" or "worse".
        min_cases: In the smallest class.
        measure: Its name, for the sentence.
    """
    assert margin > 0, margin
    low, high = comparison.interval(level)
    p_value = comparison.p_value if p_value is None else p_value
    decision = _decision(comparison, low, high, margin, p_value <= alpha, min_cases)
    sentence = _sentence(decision, comparison, low, high, margin, level, min_cases)
    return Verdict(
        *(decision, comparison.difference, low, high, level, p_value, margin, comparison.num_cases),
        f"{measure}: {sentence}" if measure else sentence,
    )


def judge_family(
    comparisons: Mapping[str, Comparison],
    margins: Mapping[str, float],
    *,
    primary: str | None = None,
    level: float = LEVEL,
    min_cases: int = MIN_CASES,
) -> dict[str, Verdict]:
    """Verdicts on several measures: the primary one by itself, the rest as one family by Holm's correction.

    The interval of a measure of the family is that of the level at which Holm's procedure judges it, so that interval
    and verdict agree; it is wider than that of the measure alone. What cannot be judged for lack of cases is left out
    of the family, for nothing is claimed of it.

    Args:
        comparisons: By name of the measure.
        margins: Of each.
        primary: Name of the one endpoint that was chosen beforehand.
        level: Of the primary one's interval, and of the family as a whole.
        min_cases: In the smallest class.
    """
    verdicts = {}
    family = [name for name, found in comparisons.items() if name != primary and found.smallest_class >= min_cases]
    raw = [comparisons[name].p_value for name in family]
    corrected = dict(zip(family, holm(raw), strict=True))
    levels = dict(zip(family, _levels(raw, level), strict=True))
    for name, comparison in comparisons.items():
        verdicts[name] = verdict(
            comparison,
            margins[name],
            level=levels.get(name, level),
            p_value=corrected.get(name),
            alpha=1 - level,
            min_cases=min_cases,
            measure=name,
        )
    return verdicts


def _levels(p_values: Sequence[float], level: float) -> list[float]:
    """Level of each interval: that of Holm's step for what is rejected, that of the step that stopped for the rest."""
    alpha, number = 1 - level, len(p_values)
    levels, stopped = [level] * number, False
    for step, index in enumerate(np.argsort(p_values, kind="stable")):
        if not stopped:
            threshold = alpha / (number - step)
            stopped = p_values[index] > threshold
        levels[index] = 1 - threshold
    return levels


def spread_factor(num_cases: int) -> float:
    """By how much resampling so many cases understates the spread."""
    return math.sqrt(num_cases / (num_cases - 1))


def interval_of(resampled: np.ndarray, level: float, num_cases: int) -> tuple[float, float]:
    """Ends of the interval of that level of a score, from its resamples (see `estimate`)."""
    assert num_cases > 1, "one case alone has no interval"
    values = resampled[np.isfinite(resampled)]
    if not len(values):
        return math.nan, math.nan
    t = stats.t.isf((1 - level) / 2, num_cases - 1)
    tail = stats.norm.sf(spread_factor(num_cases) * t)
    # the order statistic that leaves out 0 exactly where `p_value` is at most 1 - level
    last_left_out = max(0, math.floor((len(values) + 1) * tail + 1e-9) - 1)
    ordered = np.sort(values)
    return float(ordered[last_left_out]), float(ordered[-1 - last_left_out])


def _decision(
    comparison: Comparison, low: float, high: float, margin: float, believed: bool, min_cases: int
) -> Decision:
    if comparison.smallest_class < min_cases or not np.isfinite([low, high]).all():
        return "too few to judge"
    if -margin <= low and high <= margin:
        return "no clear difference"
    if believed and comparison.seeds_agree and (low > 0 or high < 0):
        return "better" if low > 0 else "worse"
    return "inconclusive"


def _sentence(
    decision: Decision, comparison: Comparison, low: float, high: float, margin: float, level: float, min_cases: int
) -> str:
    ends = f"[{low:+.3f}, {high:+.3f}]"
    about = f"{100 * level:.4g} % interval, {comparison.num_cases} cases{_seeds_told(comparison)}"
    if decision == "too few to judge":
        return f"too few to judge: {comparison.smallest_class} cases in the smallest class, {min_cases} are needed"
    if decision == "no clear difference":
        return f"no clear difference: {comparison.difference:+.3f} {ends} lies within ±{margin:g} ({about})"
    if decision == "inconclusive" and (low > 0 or high < 0) and not comparison.seeds_agree:
        return f"inconclusive: {comparison.difference:+.3f} {ends}, but training seeds disagree ({about})"
    if decision == "inconclusive" and (low > 0 or high < 0):
        draws = int(np.isfinite(comparison.resampled).sum())
        return (
            f"inconclusive: {comparison.difference:+.3f} {ends}, but {draws:,} draws of cases are too few to tell it "
            f"among so many measures ({about}); raise evaluation.bootstraps"
        )
    if decision == "inconclusive":
        more = "more cases or more training seeds" if len(comparison.by_seed) > 1 else "more cases"
        return (
            f"inconclusive: {comparison.difference:+.3f} {ends} is neither clear of 0 nor within ±{margin:g} "
            f"({about}); {more} would tell"
        )
    return f"{decision} by {abs(comparison.difference):.3f} {ends} ({about})"


def _seeds_told(comparison: Comparison) -> str:
    """How many training seeds there are and what each of them gave."""
    found = comparison.by_seed
    if len(found) < 2:
        return ", 1 seed" if found else ""
    better, worse = sum(each > 0 for each in found), sum(each < 0 for each in found)
    told = [f"{number} {word}" for number, word in ((better, "better"), (worse, "worse")) if number]
    if len(found) in (better, worse):
        told = [f"all {'better' if better else 'worse'}"]
    return f"; {len(found)} seeds, {', '.join(told) or 'all the same'}: {', '.join(f'{each:+.3f}' for each in found)}"
