"""Scores and differences of a run that was made with several training seeds, with intervals that hold for another seed.

What a training comes to depends on its seed, often as much as on what is compared (Bouthillier et al. 2021, "Accounting
for variance in machine learning benchmarks": randomise what can be randomised, and let the interval speak of it). So an
interval over cases alone, of one seed or of the mean of a few, is too narrow for what another training would give.

The score of S seeds is their mean; in each resample of cases it gets, besides, an error of that mean. To resample S = 3
seeds as cases are resampled would give far too small errors: their spread is understated by √((S - 1)/S), and its tails
are those of three values. The error of a mean of few is known instead: s/√S times a number of Student's distribution
with S - 1 degrees of freedom, s being the standard deviation of the seeds' scores. Two seeds allow for little (12.7
standard errors at 95 %), three for more (4.3), five for much (2.8).

Shapes: G cases, B resamples, S seeds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from dinoscope.evaluate.intervals import DRAWS, Comparison, Estimate, case_weights, spread_factor
from dinoscope.evaluate.scores import Statistic

__all__ = ["Family", "compare_over_seeds", "estimate_over_seeds", "families", "family_references", "seed_errors"]


@dataclass(frozen=True)
class Family:
    """A run that was made with several training seeds.

    Attributes:
        name: As in tables.
        members: Models of the seeds, in their order.
    """

    name: str
    members: tuple[str, ...]


def families(runs: Sequence[Sequence[str]], models: Sequence[str]) -> list[Family]:
    """Those of the runs that have several seeds.

    Args:
        runs: Models of each run's seeds.
        models: Those that were asked; others do not count.
    """
    asked = [tuple(model for model in members if model in models) for members in runs]
    return [Family(f"{members[0]} ({len(members)} seeds)", members) for members in asked if len(members) > 1]


def family_references(
    family: Family, references: Mapping[str, Sequence[str]], others: Sequence[Family]
) -> dict[str, tuple[str, ...]]:
    """What a family is held against: name -> the reference of each seed.

    One model for all seeds, or another family, seed by seed.

    Args:
        family: Of seeds.
        references: Model -> models that it is held against.
        others: All families.
    """
    by_members = {other.members: other.name for other in others}
    found = {}
    for each in zip(*(references.get(member, ()) for member in family.members), strict=False):
        if len(set(each)) == 1:
            found[each[0]] = each
        elif each in by_members:
            found[by_members[each]] = each
    return found


def seed_errors(values: Sequence[float], num_cases: int, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Errors of the mean of the seeds' scores, (B,); 0 where there is one seed, of whose spread nothing is known.

    They are the B quantiles of their distribution in an order drawn by `seed`. `interval_of` reads quantiles a little
    further out, as resamples of cases need it; the errors are spaced so that it finds Student's S - 1 at its level.

    Args:
        values: S of them.
        num_cases: G.
        draws: B.
        seed: Of their order.
    """
    number = len(values)
    if number < 2:
        return np.zeros(draws)
    places = stats.norm.ppf((np.arange(draws) + 0.5) / draws) / spread_factor(num_cases)
    quantiles = stats.t.ppf(stats.t.cdf(places, num_cases - 1), number - 1)
    order = np.random.default_rng([seed, number]).permutation(draws)
    return np.std(values, ddof=1) / np.sqrt(number) * quantiles[order]


def estimate_over_seeds(
    statistics: Sequence[Statistic], num_cases: int, *, draws: int = DRAWS, seed: int = 0
) -> tuple[Estimate, tuple[float, ...]]:
    """The mean score of a run's seeds with its 95 % interval, and the score of each.

    Args:
        statistics: Of the weights of cases, one a seed.
        num_cases: G, at least 2.
        draws: B.
        seed: Of the draws.
    """
    found = _over_seeds(statistics, num_cases, draws, seed)
    low, high = found.interval()
    return Estimate(found.difference, low, high, int(np.isfinite(found.resampled).sum())), found.by_seed


def compare_over_seeds(
    new: Sequence[Statistic],
    old: Sequence[Statistic],
    num_cases: int,
    smallest_class: int,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Comparison:
    """The mean difference of a run's seeds, each from the reference of its own.

    Args:
        new: Statistics of the run, one a seed.
        old: Of the references, in the same order; the same one for all seeds, or each its own.
        num_cases: G, at least 2.
        smallest_class: Cases in the class that the fewest have.
        draws: B.
        seed: Of the draws.
    """
    pairs = [_difference(mine, theirs) for mine, theirs in zip(new, old, strict=True)]
    return _over_seeds(pairs, num_cases, draws, seed, smallest_class)


def _over_seeds(
    statistics: Sequence[Statistic], num_cases: int, draws: int, seed: int, smallest_class: int = 0
) -> Comparison:
    weights, all_once = case_weights(num_cases, draws, seed), np.ones((1, num_cases))
    by_seed = tuple(float(statistic(all_once)[0]) for statistic in statistics)
    resampled = np.mean([statistic(weights) for statistic in statistics], axis=0)
    errors = seed_errors(by_seed, num_cases, draws, seed)
    return Comparison(float(np.mean(by_seed)), resampled + errors, num_cases, smallest_class, by_seed)


def _difference(new: Statistic, old: Statistic) -> Statistic:
    return lambda weights_BG: new(weights_BG) - old(weights_BG)
