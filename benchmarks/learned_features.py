"""Does the training learn? A small backbone from scratch on real images, held to its own random initialisation.

    python benchmarks/learned_features.py --data ../shared/data

Two trainings (learned_features.yaml and learned_features_cells.yaml), each on one half of the parent images, and two
measures on the other half:

- blood cells (tiles/bccd_cells: platelets, red and white cells, 96 px): k nearest neighbours by cosine, on grey copies,
  since in colour a histogram knows them already; never a neighbour from the query's own parent image.
- stained tissue (seg/dsb2018_histology, enlarged twice): nucleus or not, for each patch of 16 px, by a logistic
  regression on its feature; folds by image, all of them images that the training has not seen. The network sees windows
  of 128 px, near the crops it was trained on; whole images at once, 20 times as large, are measured beside.

The recipes were chosen on other splits into halves than the one that is reported (--split).

Beside the trained network stand the network it began as, the same one from other seeds, and colour alone. All features
take the same way: exported file, load_backbone, no augmentation. Prints Markdown; figures, runs and the picture
pca.png (an image, its patches before and after) stay under --out. Given again with the same --out it goes on where it
was, or measures only.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

import cv2
import numpy as np
import torch
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "workflow_scripts"))
from feature_images import (  # noqa: E402
    PATCH_PX,
    Cells,
    Tissue,
    grey,
    histograms,
    mean_colors,
    pixels,
    read_cells,
    read_tissue,
    thumbnails,
    tiles_of,
    write_training_images,
)
from feature_probes import (  # noqa: E402
    cut_windows,
    features_of,
    interval,
    join_windows,
    linear_probe,
    mean_iou,
    neighbour_votes,
    pca_colors,
)

from dinoscope.cli import run_script  # noqa: E402
from dinoscope.export.convert import write_initial_weights  # noqa: E402
from dinoscope.recipe import load_recipe  # noqa: E402
from dinoscope.train.metrics import read_metrics  # noqa: E402

RECIPES = {
    "tissue": Path(__file__).with_suffix(".yaml"),
    "cells": Path(__file__).with_name("learned_features_cells.yaml"),
}
NEIGHBOURS = (5, 20)
WINDOW_PX = 128  # near the crops of the training, where the whole tissue image is much larger
PENALTY = 0.1  # C of the logistic regression, on standardised features; fixed, not tuned
FOLDS = 5
Extract = Callable[[np.ndarray], np.ndarray]  # images to features
LOSSES = ("total_loss", "dino_global_crops_loss", "dino_local_crops_loss", "ibot_loss", "koleo_loss")


def main() -> None:
    """Prepares, trains, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data", help="folder with tiles/ and seg/")
    parser.add_argument("--out", type=Path, help="where images, runs and the picture go (default: a temporary folder)")
    parser.add_argument("--seeds", type=int, default=5, help="random networks; the first is the one that is trained")
    parser.add_argument("--split", type=int, default=2, help="which split into halves; 0 and 1 chose the recipes")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of training and measuring")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the recipe")
    arguments = parser.parse_args()
    for name in ("tiles/bccd_cells", "seg/dsb2018_histology"):
        if not (arguments.data / name).is_dir():
            sys.exit(f"error: {arguments.data} has no folder {name}; give --data a folder that has")
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as temporary:
        _compare(arguments, (arguments.out or Path(temporary)).resolve() / f"split_{arguments.split}")


def _compare(arguments: argparse.Namespace, out: Path) -> None:
    started = time.perf_counter()
    cells = read_cells(arguments.data / "tiles/bccd_cells", arguments.split)
    tissue = read_tissue(arguments.data / "seg/dsb2018_histology", arguments.split)
    write_training_images(cells.images[cells.training], out / "images/cells")
    write_training_images(tiles_of(tissue.images[tissue.training]), out / "images/tissue")
    begun = [random_network(out / f"random_{seed}", seed, arguments.overrides) for seed in range(arguments.seeds)]
    runs = {name: train(name, out, arguments) for name in RECIPES}
    trained_s = time.perf_counter() - started
    print(*(f"```yaml\n{recipe.read_text()}```\n" for recipe in RECIPES.values()), sep="\n")
    print(*_cells_report(cells, begun, runs["cells"]), "", sep="\n")
    print(*_tissue_report(tissue, begun, runs["tissue"]), "", *_losses_report(runs), "", sep="\n")
    draw_pca(tissue, begun[0], runs["tissue"], out / "pca.png")
    packages = ("torch", "numpy", "scikit-learn", "opencv-python-headless")
    print(
        f"{trained_s:.0f} s until trained, {time.perf_counter() - started:.0f} s in all; {os.cpu_count()} CPU cores, "
        f"{arguments.threads} threads; {', '.join(f'{name} {version(name)}' for name in packages)}"
    )


def random_network(folder: Path, seed: int, overrides: list[str]) -> Path:
    """The recipe's backbone as a training with this seed begins."""
    folder.mkdir(parents=True, exist_ok=True)
    write_initial_weights(load_recipe(RECIPES["tissue"], [*overrides, f"train.seed={seed}"]), folder / "teacher.pth")
    return folder


def train(name: str, out: Path, arguments: argparse.Namespace) -> Path:
    """Trains on the images of that name, in a process of its own as the workflow does."""
    run, scripts = out / "runs" / name, ROOT / "workflow_scripts"
    launch = [sys.executable, scripts / "launch.py", "--processes", 1, "--threads", arguments.threads, "--"]
    command = [
        scripts / "pretrain.py",
        "--config",
        RECIPES[name],
        "--run-dir",
        run,
        *arguments.overrides,
        "train.seed=0",
    ]
    images = f"train.dataset_path={out / 'images' / name}"
    if subprocess.run([str(part) for part in [*launch, *command, images]]).returncode:
        sys.exit(f"error: the training on {name} failed; the lines above say why")
    return run


def _cells_report(cells: Cells, begun: list[Path], run: Path) -> Iterable[str]:
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
    for name, extract_from in (("CLS", _cls_of), ("mean of patches", _mean_of)):
        rows |= _network_rows(name, begun, run, lambda path, source=extract_from: scores(source(path)))
    cases = ("grey, bank: training parents", "grey, bank: other held-out parents", "colour, bank: training parents")
    yield from _table(["features", *(f"{case}, k = {k}" for case in cases for k in NEIGHBOURS)], rows, "{:.1f}")
    for name, extract_from in (("CLS", _cls_of), ("mean of patches", _mean_of)):
        right = [votes(extract_from(path)(copies), cells.training, NEIGHBOURS[0]) == truth for path in (begun[0], run)]

        def gain(chosen: np.ndarray, right: list[np.ndarray] = right) -> float:
            of_class = [chosen[truth[chosen] == label] for label in np.unique(truth[chosen])]
            return 100 * float(np.mean([right[1][rows].mean() - right[0][rows].mean() for rows in of_class]))

        low, high = interval(gain, cells.parents[held_out])
        yield f"\n{name}, trained - initialisation, first column: {low:+.1f} to {high:+.1f} (95 %, by parent)"


def _tissue_report(tissue: Tissue, begun: list[Path], run: Path) -> Iterable[str]:
    """The table of linear probes."""
    images, nuclei = tissue.images[~tissue.training], tissue.nuclei[~tissue.training]
    copies = grey(images)
    yield (
        f"Tissue: {tissue.training.sum()} images for training, the probe's are {len(images)} others; "
        f"{nuclei.size} patches, {100 * nuclei.mean():.1f} % nucleus\n"
    )

    def probed(features: np.ndarray) -> np.ndarray:
        return linear_probe(features, nuclei, PENALTY, FOLDS)

    def measures(features: np.ndarray) -> list[float]:
        said = probed(features)
        return [mean_iou(said, nuclei), _auroc(said, nuclei)]

    def scores(path: Path) -> list[float]:
        whole, windows = _patches_of(path), _patches_of(path, WINDOW_PX)
        return [*measures(windows(images)), *measures(windows(copies)), *measures(whole(images))]

    def plain(extract: Extract) -> list[float]:
        on_colour = measures(extract(images))
        return [*on_colour, *measures(extract(copies)), *on_colour]

    rows = {"mean colour of the patch": [plain(mean_colors)], "pixels of the patch": [plain(pixels)]}
    rows |= _network_rows("patch", begun, run, scores)
    cases = (f"windows of {WINDOW_PX} px", "the same, grey", "whole image at once")
    yield from _table(["features", *(f"{c}: {m}" for c in cases for m in ("mean IoU", "AUROC"))], rows, "{:.4f}")
    before, after = (probed(_patches_of(path, WINDOW_PX)(images)) for path in (begun[0], run))

    for name, measure in (("mean IoU", mean_iou), ("AUROC", _auroc)):

        def gain(chosen: np.ndarray, measure: Callable[..., float] = measure) -> float:
            return measure(after[chosen], nuclei[chosen]) - measure(before[chosen], nuclei[chosen])

        low, high = interval(gain, np.arange(len(images)))
        yield f"\n{name}, trained - initialisation, first column: {low:+.4f} to {high:+.4f} (95 %, by image)"


def _auroc(probabilities: np.ndarray, targets: np.ndarray) -> float:
    return float(roc_auc_score(targets.ravel(), probabilities.ravel()))


def _losses_report(runs: dict[str, Path]) -> Iterable[str]:
    rows = {}
    for name, run in runs.items():
        metrics = read_metrics(run)
        for iteration, line in ((metrics.index[0], metrics.iloc[0]), (metrics.index[-1], metrics.iloc[-1])):
            rows[f"{name}, iteration {iteration}"] = [[line[key] for key in LOSSES]]
    yield from _table(["losses (of the last log_every iterations)", *LOSSES], rows, "{:.3f}")


def _network_rows(
    name: str, begun: list[Path], run: Path, scores: Callable[[Path], list[float]]
) -> dict[str, list[list[float]]]:
    random = [scores(path) for path in begun]
    return {
        f"{name}: random, seeds 0 to {len(begun) - 1}": random,
        f"{name}: the training's initialisation": random[:1],
        f"**{name}: trained**": [scores(run)],
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


def _patches_of(path: Path, window_px: int | None = None) -> Extract:
    """Patch features of images seen at once, or window by window."""
    extract = features_of(path)

    def of_images(images: np.ndarray) -> np.ndarray:
        if window_px is None:
            return extract(images)["patches"]
        grid = images.shape[1] // window_px, images.shape[2] // window_px
        return join_windows(extract(cut_windows(images, window_px))["patches"], grid)

    return of_images


def draw_pca(tissue: Tissue, before: Path, after: Path, target: Path) -> None:
    """Three held-out images, each beside its patches before and after; colours mean the same within a column."""
    images = tissue.images[~tissue.training]
    height, width = images.shape[1:3]
    columns = [images[:3]]
    for path in (before, after):
        maps = pca_colors(_patches_of(path)(images)).reshape(-1, height // PATCH_PX, width // PATCH_PX, 3)[:3]
        columns.append(maps.repeat(PATCH_PX, axis=1).repeat(PATCH_PX, axis=2))
    cv2.imwrite(str(target), np.concatenate(np.concatenate(columns, axis=2))[..., ::-1])


if __name__ == "__main__":
    run_script(main)
