"""The tables of learned_features.py, in Markdown: trained networks beside what they began as."""

from collections.abc import Callable, Iterable
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
LAST_BLOCKS = 4  # side by side, as is usual for dense tasks
PENALTY = 0.1  # C of the logistic regression, on standardised features; fixed, not tuned
FOLDS = 5
FEW_IMAGES, FEW_DRAWS = (1, 2, 5), 5
LOSSES = ("total_loss", "dino_global_crops_loss", "dino_local_crops_loss", "ibot_loss", "koleo_loss")
Extract = Callable[[np.ndarray], np.ndarray]  # images to features


@dataclass(frozen=True)
class Networks:
    """Folders of exported backbones: untrained ones, and trained ones, each begun as the untrained of that place."""

    begun: list[Path]
    trained: list[Path]


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
        rows |= _network_rows(name, networks, lambda path, source=source: scores(source(path)))
    cases = ("grey, bank: training parents", "grey, bank: other held-out parents", "colour, bank: training parents")
    yield from _table(["features", *(f"{case}, k = {k}" for case in cases for k in NEIGHBOURS)], rows, "{:.1f}")

    def accuracy(right: np.ndarray, chosen: np.ndarray) -> float:
        of_class = [chosen[truth[chosen] == label] for label in np.unique(truth[chosen])]
        return 100 * float(np.mean([right[rows].mean() for rows in of_class]))

    for name, source in sources.items():
        right = {
            path: votes(source(path)(copies), cells.training, NEIGHBOURS[0]) == truth for path in _paired(networks)
        }
        yield _gain_line(f"{name}, grey, k = {NEIGHBOURS[0]}", accuracy, right, networks, cells.parents[held_out])


def tissue_report(tissue: Tissue, networks: Networks) -> Iterable[str]:
    """The tables of linear probes."""
    images, nuclei = tissue.images[~tissue.training], tissue.nuclei[~tissue.training]
    yield (
        f"Tissue: {tissue.training.sum()} images for training, the probe's are {len(images)} others; "
        f"{nuclei.size} patches, {100 * nuclei.mean():.1f} % nucleus\n"
    )
    names = ("mean IoU", "AUROC")
    copies = {"stained otherwise": restained(images), "darker or brighter": rebrightened(images)}
    plain: dict[Path, np.ndarray] = {}

    def measures(said: np.ndarray, asked: np.ndarray | None = None) -> list[float]:
        truth = nuclei if asked is None else nuclei[asked]
        return [mean_iou(said, truth), _auroc(said, truth)]

    def probed(features: np.ndarray) -> np.ndarray:
        return linear_probe(features, nuclei, PENALTY, FOLDS, {"": features})[""]

    def scores(extract: Extract) -> tuple[list[float], np.ndarray]:
        features, on_grey = extract(images), extract(grey(images))
        tested = {"": features} | {name: extract(of_kind) for name, of_kind in copies.items()}
        said = linear_probe(features, nuclei, PENALTY, FOLDS, tested)
        few = [
            np.mean([measures(*one) for one in few_labels(features, nuclei, PENALTY, number, FEW_DRAWS)], axis=0)
            for number in FEW_IMAGES
        ]
        whole_row = [measures(said[""]), measures(probed(on_grey)), *(measures(said[name]) for name in copies), *few]
        return [value for pair in whole_row for value in pair], said[""]

    def of_network(path: Path) -> list[float]:
        values, plain[path] = scores(patches_of(path))
        return values

    references = {"mean colour": mean_colors, "pixels": pixels, "pixels and standardised colour": standardised_pixels}
    rows = {f"{name} of the patch": [scores(extract)[0]] for name, extract in references.items()}
    rows |= _network_rows(f"last {LAST_BLOCKS} blocks", networks, of_network)
    cases = ("as they are", "grey", *copies, *(f"{number} labelled" for number in FEW_IMAGES))
    yield from _table(["features", *(f"{case}: {name}" for case in cases for name in names)], rows, "{:.4f}")
    groups = np.arange(len(images))
    for name, measure in zip(names, (mean_iou, _auroc), strict=True):
        of_rows = lambda said, chosen, measure=measure: measure(said[chosen], nuclei[chosen])  # noqa: E731
        yield _gain_line(f"{name}, images as they are", of_rows, plain, networks, groups)
    yield "\nOther ways to look, images as they are\n"

    def otherwise(path: Path) -> list[float]:
        ways = [patches_of(path, last_blocks=1), patches_of(path, None)]
        return [value for extract in ways for value in measures(probed(extract(images)))]

    cases = ("last block, quarters", f"last {LAST_BLOCKS} blocks, whole image at once")
    rows = _network_rows("patch", networks, otherwise)
    yield from _table(["features", *(f"{case}: {name}" for case in cases for name in names)], rows, "{:.4f}")


def losses_report(runs: dict[str, Path]) -> Iterable[str]:
    """The losses that each training began and ended with."""
    rows = {}
    for name, run in runs.items():
        metrics = read_metrics(run)
        for iteration, line in ((metrics.index[0], metrics.iloc[0]), (metrics.index[-1], metrics.iloc[-1])):
            rows[f"{name}, iteration {iteration}"] = [[line[key] for key in LOSSES]]
    yield from _table(["losses (of the last log_every iterations)", *LOSSES], rows, "{:.3f}")


def patches_of(path: Path, window_hw: tuple[int, int] | None = WINDOW_HW, last_blocks: int = LAST_BLOCKS) -> Extract:
    """Patch features (N, P, D · blocks) of images seen window by window, or at once."""
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


def _paired(networks: Networks) -> list[Path]:
    """The trained networks and what they began as."""
    return [*networks.begun[: len(networks.trained)], *networks.trained]


def _gain_line(
    name: str,
    measure: Callable[[np.ndarray, np.ndarray], float],
    said: dict[Path, np.ndarray],
    networks: Networks,
    groups: np.ndarray,
) -> str:
    """Trained minus its initialisation, mean over the training seeds and each alone, by bootstrap over groups."""
    pairs = [(said[before], said[after]) for before, after in zip(networks.begun, networks.trained)]  # noqa: B905 - begun is longer

    def gains(chosen: np.ndarray) -> np.ndarray:
        each = [measure(after, chosen) - measure(before, chosen) for before, after in pairs]
        return np.array([np.mean(each), *each])

    (low, *lows), (high, *highs) = interval(gains, groups)
    alone = ", ".join(f"{a:+.4f} to {b:+.4f}" for a, b in zip(lows, highs, strict=True))
    return f"\n{name}, trained - initialisation: {low:+.4f} to {high:+.4f} (95 %); seed by seed {alone}"


def _network_rows(name: str, networks: Networks, scores: Callable[[Path], list[float]]) -> dict[str, list[list[float]]]:
    random, number = [scores(path) for path in networks.begun], len(networks.trained)
    return {
        f"{name}: random, seeds 0 to {len(random) - 1}": random,
        f"{name}: the trainings' initialisations": random[:number],
        f"**{name}: trained, seeds 0 to {number - 1}**": [scores(path) for path in networks.trained],
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


def _cls_of(path: Path) -> Extract:
    return lambda images: features_of(path)(images)["cls"]


def _mean_of(path: Path) -> Extract:
    return lambda images: features_of(path)(images)["patches"].mean(axis=1)
