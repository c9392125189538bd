"""The tables of learned_features.py, in Markdown: trained networks beside what they began as."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from feature_images import (
    PATCH_PX,
    Cells,
    Tissue,
    grey,
    histograms,
    mean_colors,
    pixels,
    rebrightened,
    restained,
    standardised_pixels,
    thumbnails,
)
from feature_probes import (
    cut_windows,
    dense_features_of,
    features_of,
    few_labels,
    interval,
    join_windows,
    linear_probe,
    mean_iou,
    neighbour_votes,
)
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from dinoscope.train.metrics import read_metrics

__all__ = ["WINDOW_HW", "Networks", "cells_report", "losses_report", "patches_of", "tissue_report"]

NEIGHBOURS = (5, 20)
WINDOW_HW = (256, 320)  # a quarter of a tissue image: enough of it to judge a patch by the stain around it
STANDARDISED = "pixels and standardised colour"
MEASURES = ("mean IoU", "AUROC")
PENALTY = 0.1  # C of the logistic regression, on standardised features; fixed, not tuned
FOLDS = 5
FEW_IMAGES, FEW_DRAWS = (1, 2, 5), 5
LOSSES = ("total_loss", "dino_global_crops_loss", "dino_local_crops_loss", "ibot_loss", "koleo_loss")
Extract = Callable[[np.ndarray], np.ndarray]  # images to features


Folders = tuple[Path, ...]  # exported backbones of one seed, one for each part of the images that is measured


@dataclass(frozen=True)
class Networks:
    """Folders of exported backbones by seed: untrained, and trained ones, each begun as the untrained of that place.

    Tissue has two folders a seed: the network that has not seen the second half of the images is asked about it, the
    one that has not seen the first about that. Cells have one. `published` are untrained ones whose LayerScale begins
    at 1e-5, as published, where the recipe does without.
    """

    begun: list[Folders]
    trained: list[Folders]
    published: list[Folders]


def cells_report(cells: Cells, networks: Networks) -> Iterable[str]:
    """The table of nearest neighbours."""
    held_out, copies = ~cells.training, grey(cells.images)
    truth = cells.labels[held_out]
    yield (
        f"Cells: {cells.training.sum()} of {len(set(cells.parents[cells.training]))} parent images for training, the "
        f"queries are {held_out.sum()} of {len(set(cells.parents[held_out]))} others; balanced accuracy, %\n"
    )

    def votes(features: np.ndarray, bank: np.ndarray, k: int) -> np.ndarray:
        return neighbour_votes(features, cells.labels, cells.parents, bank, held_out, k)

    def scores(extract: Extract) -> list[float]:
        on_grey, on_colour = extract(copies), extract(cells.images)
        cases = [(on_grey, cells.training), (on_grey, held_out), (on_colour, cells.training)]
        found = [votes(features, bank, k) for features, bank in cases for k in NEIGHBOURS]
        return [100 * balanced_accuracy_score(truth, said) for said in found]

    rows = {"HSV histogram, 48 bins": [scores(histograms)], "thumbnail of 8×8 px": [scores(thumbnails)]}
    sources = {"CLS": _cls_of, "mean of patches": _mean_of}
    for name, source in sources.items():
        rows |= _network_rows(name, networks, lambda folders, source=source: scores(source(folders)))
    cases = ("grey, bank: training parents", "grey, bank: other held-out parents", "colour, bank: training parents")
    yield from _table(["features", *(f"{case}, k = {k}" for case in cases for k in NEIGHBOURS)], rows, "{:.1f}")

    def accuracy(right: np.ndarray, chosen: np.ndarray) -> float:
        of_class = [chosen[truth[chosen] == label] for label in np.unique(truth[chosen])]
        return 100 * float(np.mean([right[rows].mean() for rows in of_class]))

    pairs = list(zip(networks.begun, networks.trained))  # noqa: B905 - begun is longer
    for name, source in sources.items():
        right = [[source(folders)(copies) for folders in pair] for pair in pairs]
        right = [[votes(found, cells.training, NEIGHBOURS[0]) == truth for found in pair] for pair in right]
        title = f"{name}, grey, k = {NEIGHBOURS[0]}, trained - initialisation"
        yield _gain_line(title, accuracy, right, cells.parents[held_out])


def tissue_report(tissue: Tissue, networks: Networks) -> Iterable[str]:
    """The tables of linear probes, both halves of the images together."""
    halves = [np.flatnonzero(~tissue.training), np.flatnonzero(tissue.training)]
    yield (
        f"Tissue: {len(tissue.images)} images, each half asked of networks trained on the other; {tissue.nuclei.size} "
        f"patches, {100 * tissue.nuclei.mean():.1f} % nucleus\n"
    )
    references = {"mean colour": mean_colors, "pixels": pixels, STANDARDISED: standardised_pixels}
    said: dict[str | Folders, np.ndarray] = {}

    def plain(extracts: Sequence[Extract], key: str | Folders) -> list[float]:
        said[key] = _probed(tissue.images, tissue.nuclei, halves, extracts)
        return _measures(said[key], tissue.nuclei)

    def of_network(folders: Folders) -> list[float]:
        return plain([patches_of(path) for path in folders], folders)

    rows = {f"{name} of the patch": [plain([extract] * 2, name)] for name, extract in references.items()}
    rows |= {"last block: random, LayerScale as published": [of_network(folders) for folders in networks.published]}
    rows |= _network_rows("last block", networks, of_network)
    yield from _table(["images as they are", *MEASURES], rows, "{:.4f}")
    yield from _tissue_gains(said, tissue.nuclei, networks)

    def otherwise(folders: Folders) -> list[float]:
        ways = [[patches_of(p, last_blocks=None) for p in folders], [patches_of(p, None) for p in folders]]
        answers = [_probed(tissue.images, tissue.nuclei, halves, extracts) for extracts in ways]
        return [value for answer in answers for value in _measures(answer, tissue.nuclei)]

    yield "\nOther ways to look, images as they are\n"
    cases = ("all blocks, quarters", "last block, whole image at once")
    header = ["features", *(f"{case}: {name}" for case in cases for name in MEASURES)]
    yield from _table(header, _network_rows("patch", networks, otherwise), "{:.4f}")
    yield "\nChanged copies, and regressions from few images\n"
    yield from _copies_report(tissue, halves, references, networks)


def _tissue_gains(said: dict[str | Folders, np.ndarray], nuclei: np.ndarray, networks: Networks) -> Iterable[str]:
    """Trained minus what it began as, minus the best random one, minus what needs no network."""
    best = max(networks.begun, key=lambda folders: mean_iou(said[folders], nuclei))
    against = {
        "their initialisations": networks.begun,
        "the best of the random ones": [best],
        "random, LayerScale as published": networks.published,
        "pixels of the patch": ["pixels"],
        STANDARDISED: [STANDARDISED],
    }
    for other, keys in against.items():
        pairs = [(said[before], said[after]) for before, after in zip(itertools.cycle(keys), networks.trained)]
        for name, measure in zip(MEASURES, (mean_iou, _auroc), strict=True):
            of_rows = lambda answer, chosen, measure=measure: measure(answer[chosen], nuclei[chosen])  # noqa: E731
            yield _gain_line(f"{name}, trained - {other}", of_rows, pairs, np.arange(len(nuclei)))


def _copies_report(
    tissue: Tissue, halves: list[np.ndarray], references: dict[str, Extract], networks: Networks
) -> Iterable[str]:
    """Regressions on grey copies; such from unchanged images asked about changed copies; such from few images."""
    copies = {"stained otherwise": restained(tissue.images), "darker or brighter": rebrightened(tissue.images)}
    on_grey = grey(tissue.images)

    def scores(extracts: Sequence[Extract]) -> list[float]:
        said = {name: np.empty(tissue.nuclei.shape) for name in copies}
        few: dict[int, list[list[float]]] = {number: [] for number in FEW_IMAGES}
        for half, extract in zip(halves, extracts, strict=True):
            features, truth = extract(tissue.images[half]), tissue.nuclei[half]
            tested = {name: extract(changed[half]) for name, changed in copies.items()}
            for name, answer in linear_probe(features, truth, PENALTY, FOLDS, tested).items():
                said[name][half] = answer
            for number, found in few.items():
                draws = few_labels(features, truth, PENALTY, number, FEW_DRAWS)
                found += [_measures(answer, truth[asked]) for answer, asked in draws]
        answers = [_probed(on_grey, tissue.nuclei, halves, extracts), *said.values()]
        pairs = [_measures(answer, tissue.nuclei) for answer in answers] + [np.mean(f, axis=0) for f in few.values()]
        return [value for pair in pairs for value in pair]

    rows = {f"{name} of the patch": [scores([extract] * 2)] for name, extract in references.items()}
    rows |= _network_rows("last block", networks, lambda folders: scores([patches_of(path) for path in folders]))
    cases = ("grey", *copies, *(f"{number} labelled" for number in FEW_IMAGES))
    yield from _table(["features", *(f"{case}: {name}" for case in cases for name in MEASURES)], rows, "{:.4f}")


def _probed(
    images: np.ndarray, nuclei: np.ndarray, halves: list[np.ndarray], extracts: Sequence[Extract]
) -> np.ndarray:
    """Probabilities (N, P) of all images, each half by regressions of its own on the features that are its own."""
    said = np.empty(nuclei.shape)
    for half, extract in zip(halves, extracts, strict=True):
        features = extract(images[half])
        said[half] = linear_probe(features, nuclei[half], PENALTY, FOLDS, {"": features})[""]
    return said


def _measures(said: np.ndarray, truth: np.ndarray) -> list[float]:
    return [mean_iou(said, truth), _auroc(said, truth)]


def losses_report(runs: dict[str, Path]) -> Iterable[str]:
    """The losses that each training began and ended with."""
    rows = {}
    for name, run in runs.items():
        metrics = read_metrics(run)
        for iteration, line in ((metrics.index[0], metrics.iloc[0]), (metrics.index[-1], metrics.iloc[-1])):
            rows[f"{name}, iteration {iteration}"] = [[line[key] for key in LOSSES]]
    yield from _table(["losses (of the last log_every iterations)", *LOSSES], rows, "{:.3f}")


def patches_of(path: Path, window_hw: tuple[int, int] | None = WINDOW_HW, last_blocks: int | None = 1) -> Extract:
    """Patch features (N, P, D · blocks) of images seen window by window, or at once; None: of all blocks."""
    extract = dense_features_of(path, last_blocks)

    def of_images(images: np.ndarray) -> np.ndarray:
        if window_hw is None:
            return extract(images)
        windows = images.shape[1] // window_hw[0], images.shape[2] // window_hw[1]
        grid = window_hw[0] // PATCH_PX, window_hw[1] // PATCH_PX
        return join_windows(extract(cut_windows(images, window_hw)), windows, grid)

    return of_images


def _auroc(probabilities: np.ndarray, targets: np.ndarray) -> float:
    return float(roc_auc_score(targets.ravel(), probabilities.ravel()))


def _gain_line(
    name: str,
    measure: Callable[[np.ndarray, np.ndarray], float],
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    groups: np.ndarray,
) -> str:
    """After minus before: mean over the pairs and its interval, and each pair's, by bootstrap over groups."""

    def gains(chosen: np.ndarray) -> np.ndarray:
        each = [measure(after, chosen) - measure(before, chosen) for before, after in pairs]
        return np.array([np.mean(each), *each])

    found, ((low, *lows), (high, *highs)) = gains(np.arange(len(groups)))[0], interval(gains, groups)
    alone = ", ".join(f"{a:+.4f} to {b:+.4f}" for a, b in zip(lows, highs, strict=True))
    return f"\n{name}: {found:+.4f}, {low:+.4f} to {high:+.4f} (95 %); seed by seed {alone}"


def _network_rows(
    name: str, networks: Networks, scores: Callable[[Folders], list[float]]
) -> dict[str, list[list[float]]]:
    random, number = [scores(folders) for folders in networks.begun], len(networks.trained)
    return {
        f"{name}: random, seeds 0 to {len(random) - 1}": random,
        f"{name}: the trainings' initialisations": random[:number],
        f"**{name}: trained, seeds 0 to {number - 1}**": [scores(folders) for folders in networks.trained],
    }


def _table(header: list[str], rows: dict[str, list[list[float]]], form: str) -> Iterable[str]:
    """Markdown; of several lists of numbers their mean, lowest and highest."""
    yield f"| {' | '.join(header)} |"
    yield f"|---|{'---:|' * (len(header) - 1)}"
    for name, values in rows.items():
        cells = [form.format(np.mean(column)) for column in zip(*values, strict=True)]
        if len(values) > 1:
            ranges = [f" ({form}–{form})".format(min(column), max(column)) for column in zip(*values, strict=True)]
            cells = [cell + spread for cell, spread in zip(cells, ranges, strict=True)]
        yield f"| {name} | {' | '.join(cells)} |"


def _cls_of(folders: Folders) -> Extract:
    (path,) = folders
    return lambda images: features_of(path)(images)["cls"]


def _mean_of(folders: Folders) -> Extract:
    (path,) = folders
    return lambda images: features_of(path)(images)["patches"].mean(axis=1)
