"""Who is learned from and who is asked: folds by case, by site, and samples that no case dominates.

All rows of a case are on one side of every split; the folds depend on labels, cases and the seed alone, never on the
features, so that every encoder is asked the same.

Shapes: N rows, C classes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dinoscope.errors import EvaluationError

__all__ = [
    "Fold",
    "balanced_rows",
    "cases_of_strata",
    "grouped_folds",
    "leave_one_site_out",
    "preserved_site_folds",
    "strata_of_cases",
    "strata_of_survival",
    "strata_of_values",
]

_STARTS = 20  # of the search for balanced folds of sites


@dataclass(frozen=True)
class Fold:
    """One split.

    Attributes:
        repeat: Number of the repeat it belongs to; within a repeat every row is asked at most once.
        name: Of the fold, "1" to the number of folds, or the site that is asked.
        train: Rows to learn from, ascending.
        test: Rows that are asked, ascending.
    """

    repeat: int
    name: str
    train: np.ndarray
    test: np.ndarray


def grouped_folds(
    labels: np.ndarray, cases: np.ndarray, *, folds: int = 5, repeats: int = 5, seed: int = 0
) -> list[Fold]:
    """Repeated cross-validation by case, stratified by class.

    In each repeat the cases are shuffled, those of the rarest class first and of a class the large ones first, and each
    goes to a fold that has the fewest cases of its rarest class, among those to the one where the rows of all classes
    stay most even. (scikit-learn's StratifiedGroupKFold deals cases
    in the order of how uneven their labels are; where no two are equally uneven, every repeat is the same.)

    Args:
        labels: (N,) class numbers; for values see `strata_of_values`.
        cases: (N,) what stays together.
        folds: Number of folds.
        repeats: Number of repeats, each drawn by (seed, repeat).
        seed: Of the shuffling.

    Raises:
        EvaluationError: A class has fewer cases than there are folds, or there is one class only.
    """
    names, case = np.unique(cases, return_inverse=True)
    classes, label = np.unique(labels, return_inverse=True)
    counts = np.zeros((len(names), len(classes)), np.int64)
    np.add.at(counts, (case, label), 1)
    cases_of_class = (counts > 0).sum(0)
    _check_enough(classes, cases_of_class, folds)
    # a case counts for the rarest of its classes
    rarity = np.argsort(np.argsort(cases_of_class, kind="stable"))
    stratum = np.where(counts > 0, rarity, len(classes)).min(1)
    found = []
    for repeat in range(repeats):
        fold = _dealt(stratum, counts, folds, np.random.default_rng([seed, repeat]))[case]
        found += [_fold(repeat, str(number + 1), fold == number) for number in range(folds)]
    return found


def leave_one_site_out(labels: np.ndarray, cases: np.ndarray, sites: np.ndarray) -> list[Fold]:
    """One fold a site: learned on all others, asked about that one. Cases of that site are left out everywhere else.

    Args:
        labels: (N,) class numbers.
        cases: (N,).
        sites: (N,) site, or scanner.

    Raises:
        EvaluationError: Fewer than two sites, or without one of them a class is left alone.
    """
    names = np.unique(sites)
    if len(names) < 2:
        raise EvaluationError(
            f"all rows are of one site, {names[0]}, so none can be left out; give sites in the slide table, or use "
            "folds by case"
        )
    found = []
    for name in names:
        test = sites == name
        train = ~np.isin(cases, cases[test])
        if len(np.unique(labels[train])) < 2:
            raise EvaluationError(
                f"without site {name} fewer than two classes are left to learn from: classes and sites do not cross; "
                "use folds by case"
            )
        found.append(Fold(0, str(name), np.flatnonzero(train), np.flatnonzero(test)))
    return found


def preserved_site_folds(
    labels: np.ndarray, cases: np.ndarray, sites: np.ndarray, *, folds: int = 3, repeats: int = 1, seed: int = 0
) -> list[Fold]:
    """Cross-validation in which a site is in one fold only, classes as even as that allows (Howard et al. 2021).

    A model that recognises the site's stain or scanner gains nothing by it. Sites that share a case stay together. The
    assignment has the least sum of squared differences from even shares of cases of each class that moves and exchanges
    of sites, from 20 random starts, arrive at (doi:10.1038/s41467-021-24698-1 has it by quadratic programming).

    Args:
        labels: (N,) class numbers.
        cases: (N,).
        sites: (N,).
        folds: Number of folds.
        repeats: Number of repeats; with few sites there may be few different ones.
        seed: Of the starts.

    Raises:
        EvaluationError: Fewer sites than folds, or a class would be missing from what is learned from.
    """
    site = _joined_sites(cases, sites)
    num_sites = int(site.max()) + 1
    if num_sites < folds:
        raise EvaluationError(
            f"there are {num_sites} sites without common cases, but {folds} folds that keep sites whole were asked for;"
            " ask for fewer folds"
        )
    counts = _cases_by_class(labels, cases, site)
    found = []
    for repeat in range(repeats):
        fold = _even_assignment(counts, folds, np.random.default_rng([seed, repeat]))[site]
        for number in range(folds):
            one = _fold(repeat, str(number + 1), fold == number)
            if len(np.unique(labels[one.train])) < len(np.unique(labels)):
                raise EvaluationError(
                    "with whole sites in one fold a class is missing from what is learned from; ask for more folds, or "
                    "use folds by case"
                )
            found.append(one)
    return found


def strata_of_values(values: np.ndarray, num: int = 5) -> np.ndarray:
    """Numbers (N,) of the quantiles that values lie in, to stratify folds of a continuous label by."""
    inner = np.quantile(values, np.linspace(0, 1, num + 1)[1:-1])
    sides = [np.unique(np.searchsorted(inner, values, side=side), return_inverse=True)[1] for side in ("right", "left")]
    return max(sides, key=np.max)  # they differ where many values are the same


def cases_of_strata(labels: np.ndarray, cases: np.ndarray) -> list[int]:
    """Number of cases of each label, in their order."""
    return [len(np.unique(cases[labels == label])) for label in np.unique(labels)]


def strata_of_cases(values: np.ndarray, cases: np.ndarray, folds: int, num: int = 5) -> np.ndarray:
    """Numbers (N,) of quantiles, as many as leave each of them a case a fold; where none do, any halves of the cases.

    Args:
        values: (N,).
        cases: (N,).
        folds: Number of folds.
        num: Quantiles at most.
    """
    if len(np.unique(values)) < 2:
        return np.zeros(len(values), np.int64)  # nothing to predict
    for number in range(num, 1, -1):
        strata = strata_of_values(values, number)
        if len(np.unique(strata)) > 1 and min(cases_of_strata(strata, cases)) >= folds:
            return strata
    return np.unique(cases, return_inverse=True)[1] % 2


def strata_of_survival(truth: np.ndarray, cases: np.ndarray, folds: int) -> np.ndarray:
    """Events and censored ones (N,); where one of the two is too rare for so many folds, `strata_of_cases` of times.

    Args:
        truth: (N, 2) times and events.
        cases: (N,).
        folds: Number of folds.
    """
    events = (truth[:, 1] > 0).astype(np.int64)
    is_enough = len(np.unique(events)) > 1 and min(cases_of_strata(events, cases)) >= folds
    return events if is_enough else strata_of_cases(truth[:, 0], cases, folds)


def balanced_rows(groups: np.ndarray, limit: int, seed: int = 0) -> np.ndarray:
    """At most `limit` rows, ascending, as equal in number a group (slide) as the groups allow.

    Args:
        groups: (N,).
        limit: Rows in all.
        seed: The rows of group g are drawn by (seed, g).
    """
    if len(groups) <= limit:
        return np.arange(len(groups))
    _, group, counts = np.unique(groups, return_inverse=True, return_counts=True)
    by_group = np.split(np.argsort(group, kind="stable"), np.cumsum(counts)[:-1])
    taken, left = [], limit
    for place, number in enumerate(np.argsort(counts, kind="stable")):
        quota = min(int(counts[number]), left // (len(counts) - place))
        taken.append(np.random.default_rng([seed, number]).choice(by_group[number], quota, replace=False))
        left -= quota
    return np.sort(np.concatenate(taken))


def _check_enough(classes: np.ndarray, cases_of_class: np.ndarray, folds: int) -> None:
    if len(classes) < 2:
        raise EvaluationError(f"all rows are of one class, {classes[0]}; there is nothing to tell apart")
    fewest = int(cases_of_class.argmin())
    if cases_of_class[fewest] < folds:
        raise EvaluationError(
            f"class {classes[fewest]} has {cases_of_class[fewest]} cases, but {folds} folds need as many; ask for "
            "fewer folds, or leave the class out"
        )


def _dealt(stratum: np.ndarray, counts: np.ndarray, folds: int, rng: np.random.Generator) -> np.ndarray:
    """Fold of each case, of the rows that it has of each class."""
    size = np.floor(np.log2(counts.sum(1)))  # roughly, or the sizes alone would say what comes after what
    shares = counts / counts.sum(0)
    fold, loads = np.empty(len(stratum), np.int64), np.zeros((folds, counts.shape[1]))
    for number in np.unique(stratum):
        mine = rng.permutation(np.flatnonzero(stratum == number))
        num_cases = np.zeros(folds)
        for index in mine[np.argsort(-size[mine], kind="stable")]:
            more = np.square(loads + shares[index]).sum(1) - np.square(loads).sum(1)
            chosen = np.lexsort((rng.random(folds), more, num_cases))[0]
            fold[index] = chosen
            num_cases[chosen] += 1
            loads[chosen] += shares[index]
    return fold


def _fold(repeat: int, name: str, asked: np.ndarray) -> Fold:
    return Fold(repeat, name, np.flatnonzero(~asked), np.flatnonzero(asked))


def _joined_sites(cases: np.ndarray, sites: np.ndarray) -> np.ndarray:
    """Number of each row's site, one number for sites that share a case."""
    _, case = np.unique(cases, return_inverse=True)
    names, site = np.unique(sites, return_inverse=True)
    size = len(names) + int(case.max()) + 1
    links = coo_array((np.ones(len(site)), (site, len(names) + case)), shape=(size, size))
    return np.unique(connected_components(links, directed=False)[1][site], return_inverse=True)[1]


def _cases_by_class(labels: np.ndarray, cases: np.ndarray, site: np.ndarray) -> np.ndarray:
    """Cases of each class at each site, (sites, C)."""
    _, label = np.unique(labels, return_inverse=True)
    _, case = np.unique(cases, return_inverse=True)
    kinds = np.unique(np.stack([site, label, case]), axis=1)
    counts = np.zeros((site.max() + 1, label.max() + 1))
    np.add.at(counts, (kinds[0], kinds[1]), 1)
    return counts


def _unevenness(counts: np.ndarray, fold: np.ndarray, folds: int) -> float:
    """Sum over folds and classes of squared differences from an even share, in shares of the class."""
    shares = counts / counts.sum(0)
    of_folds = np.zeros((folds, counts.shape[1]))
    np.add.at(of_folds, fold, shares)
    return float(np.square(of_folds - 1 / folds).sum())


def _even_assignment(counts: np.ndarray, folds: int, rng: np.random.Generator) -> np.ndarray:
    """Fold of each site, no fold empty: the best that moves and exchanges arrive at from several starts."""
    best, least = None, np.inf
    for _ in range(_STARTS):
        fold = rng.permutation(np.arange(len(counts)) % folds)
        found = _unevenness(counts, fold, folds)
        while (step := _best_step(counts, fold, folds))[0] < found - 1e-12:
            found, fold = step
        if found < least - 1e-12:
            best, least = fold, found
    return best


def _best_step(counts: np.ndarray, fold: np.ndarray, folds: int) -> tuple[float, np.ndarray]:
    steps = [other for other in _steps(fold, folds) if len(np.unique(other)) == folds]
    return min(((_unevenness(counts, other, folds), other) for other in steps), key=lambda step: step[0])


def _steps(fold: np.ndarray, folds: int) -> Iterator[np.ndarray]:
    for index in range(len(fold)):
        for number in range(folds):
            if number != fold[index]:
                yield _with(fold, [index], [number])
        for other in range(index):
            if fold[other] != fold[index]:
                yield _with(fold, [index, other], [fold[other], fold[index]])


def _with(fold: np.ndarray, indices: Sequence[int], numbers: Sequence[int]) -> np.ndarray:
    changed = fold.copy()
    changed[list(indices)] = numbers
    return changed
