"""Does the training learn? A small backbone from scratch on real images, held to its own random initialisation.

    python benchmarks/learned_features.py --data ../shared/data

Two trainings of learned_features.yaml, each on one half of the parent images, and two measures on the other half:

- blood cells (tiles/bccd_cells: platelets, red and white cells, 96 px): k nearest neighbours by cosine, on grey copies,
  since in colour a histogram knows them already; never a neighbour from the query's own parent image.
- stained tissue (seg/dsb2018_histology, enlarged twice): nucleus or not, for each patch of 16 px, by a logistic
  regression on its feature; folds by image, all of them images that the training has not seen.

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

from dinoscope.export.convert import write_initial_weights  # noqa: E402
from dinoscope.recipe import load_recipe  # noqa: E402
from dinoscope.train.metrics import read_metrics  # noqa: E402

RECIPE = Path(__file__).with_suffix(".yaml")
NEIGHBOURS = (5, 20)
WINDOW_PX = 128  # what the network sees of a tissue image at once, enlarged
PENALTY = 0.1  # C of the logistic regression, on standardised features; fixed, not tuned
FOLDS = 5
LOSSES = ("total_loss", "dino_global_crops_loss", "dino_local_crops_loss", "ibot_loss", "koleo_loss")


def main() -> None:
    """Prepares, trains, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data", help="folder with tiles/ and seg/")
    parser.add_argument("--out", type=Path, help="where images, runs and the picture go (default: a temporary folder)")
    parser.add_argument("--seeds", type=int, default=5, help="random networks; the first is the one that is trained")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of training and measuring")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the recipe")
    arguments = parser.parse_args()
    for name in ("tiles/bccd_cells", "seg/dsb2018_histology"):
        if not (arguments.data / name).is_dir():
            sys.exit(f"error: {arguments.data} has no folder {name}; give --data a folder that has")
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as temporary:
        _compare(arguments, (arguments.out or Path(temporary)).resolve())


def _compare(arguments: argparse.Namespace, out: Path) -> None:
    started = time.perf_counter()
    cells = read_cells(arguments.data / "tiles/bccd_cells")
    tissue = read_tissue(arguments.data / "seg/dsb2018_histology")
    write_training_images(cells.images[cells.training], out / "images/cells")
    write_training_images(tiles_of(tissue.images[tissue.training]), out / "images/tissue")
    begun = [random_network(out / f"random_{seed}", seed, arguments.overrides) for seed in range(arguments.seeds)]
    runs = {name: train(name, out, arguments) for name in ("cells", "tissue")}
    trained_s = time.perf_counter() - started
    print(f"\n{RECIPE.read_text()}\n", *_cells_report(cells, begun, runs["cells"]), "", sep="\n")
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
    write_initial_weights(load_recipe(RECIPE, [*overrides, f"train.seed={seed}"]), folder / "teacher.pth")
    return folder


def train(name: str, out: Path, arguments: argparse.Namespace) -> Path:
    """Trains on the images of that name, in a process of its own as the workflow does."""
    run, scripts = out / "runs" / name, ROOT / "workflow_scripts"
    launch = [sys.executable, scripts / "launch.py", "--processes", 1, "--threads", arguments.threads, "--"]
    command = [scripts / "pretrain.py", "--config", RECIPE, "--run-dir", run, *arguments.overrides, "train.seed=0"]
    images = f"train.dataset_path={out / 'images' / name}"
    subprocess.run([str(part) for part in [*launch, *command, images]], check=True)
    return run


def _cells_report(cells: Cells, begun: list[Path], run: Path) -> Iterable[str]:
    """The table of nearest neighbours."""
    held_out = ~cells.training
    grey_images = grey(cells.images)
    yield (
        f"Cells: {cells.training.sum()} of {len(set(cells.parents[cells.training]))} parent images for training, the "
        f"queries are {held_out.sum()} of {len(set(cells.parents[held_out]))} others; balanced accuracy, %"
    )

    def votes(features: np.ndarray, bank: np.ndarray, k: int) -> np.ndarray:
        return neighbour_votes(features, cells.labels, cells.parents, bank, held_out, k)

    def scores(extract: Callable[[np.ndarray], np.ndarray]) -> list[float]:
        cases = [(images, bank) for images in (grey_images, cells.images) for bank in (cells.training, held_out)]
        found = [votes(extract(images), bank, k) for images, bank in cases for k in NEIGHBOURS]
        return [100 * balanced_accuracy_score(cells.labels[held_out], said) for said in found]

    rows = {"HSV histogram, 48 bins": [scores(histograms)], "thumbnail of 8×8 px": [scores(thumbnails)]}
    rows |= _network_rows(begun, run, lambda path: scores(lambda images: features_of(path)(images)["cls"]))
    columns = [
        f"{colour}, bank {bank}, k = {k}"
        for colour in ("grey", "colour")
        for bank in ("training", "held out")
        for k in NEIGHBOURS
    ]
    yield from _table(["features", *columns], rows, "{:.1f}")
    right = [
        votes(features_of(path)(grey_images)["cls"], cells.training, NEIGHBOURS[0]) == cells.labels[held_out]
        for path in (begun[0], run)
    ]
    truth = cells.labels[held_out]

    def gain(chosen: np.ndarray) -> float:
        of_class = [chosen[truth[chosen] == name] for name in np.unique(truth[chosen])]
        return 100 * float(np.mean([right[1][rows].mean() - right[0][rows].mean() for rows in of_class]))

    low, high = interval(gain, cells.parents[held_out])
    yield f"\ntrained - initialisation, first column: 95 % interval {low:+.1f} to {high:+.1f} (bootstrap over parents)"


def _tissue_report(tissue: Tissue, begun: list[Path], run: Path) -> Iterable[str]:
    """The table of linear probes."""
    images, nuclei = tissue.images[~tissue.training], tissue.nuclei[~tissue.training]
    yield (
        f"Tissue: {tissue.training.sum()} images for training, the probe's are {len(images)} others; "
        f"{nuclei.size} patches, {100 * nuclei.mean():.1f} % nucleus"
    )

    def probed(extract: Callable[[np.ndarray], np.ndarray], shown: np.ndarray) -> np.ndarray:
        return linear_probe(extract(shown), nuclei, PENALTY, FOLDS)

    def scores(extract: Callable[[np.ndarray], np.ndarray]) -> list[float]:
        found = [probed(extract, shown) for shown in (images, grey(images))]
        return [
            measure
            for said in found
            for measure in (mean_iou(said, nuclei), roc_auc_score(nuclei.ravel(), said.ravel()))
        ]

    rows = {"mean colour of the patch": [scores(mean_colors)], "pixels of the patch": [scores(pixels)]}
    rows |= _network_rows(begun, run, lambda path: scores(_patches_of(path)))
    columns = [f"{colour}, {measure}" for colour in ("colour", "grey") for measure in ("mean IoU", "AUROC")]
    yield from _table(["features", *columns], rows, "{:.4f}")
    before, after = (probed(_patches_of(path), images) for path in (begun[0], run))

    def gain(chosen: np.ndarray) -> float:
        return mean_iou(after[chosen], nuclei[chosen]) - mean_iou(before[chosen], nuclei[chosen])

    low, high = interval(gain, np.arange(len(images)))
    yield f"\ntrained - initialisation, first column: 95 % interval {low:+.4f} to {high:+.4f} (bootstrap over images)"


def _losses_report(runs: dict[str, Path]) -> Iterable[str]:
    rows = {}
    for name, run in runs.items():
        metrics = read_metrics(run)
        for line in (metrics.iloc[0], metrics.iloc[-1]):
            rows[f"{name}, iteration {line['iteration']:.0f}"] = [[line[key] for key in LOSSES]]
    yield from _table(["losses (of the last log_every iterations)", *LOSSES], rows, "{:.3f}")


def _network_rows(begun: list[Path], run: Path, scores: Callable[[Path], list[float]]) -> dict[str, list[list[float]]]:
    first, *others = [scores(path) for path in begun]
    return {
        f"random networks, seeds 0 to {len(begun) - 1}": [first, *others],
        "initialisation of the training (seed 0)": [first],
        "**trained**": [scores(run)],
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


def _patches_of(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Patch features of whole images, seen window by window."""
    extract = features_of(path)

    def of_images(images: np.ndarray) -> np.ndarray:
        grid = images.shape[1] // WINDOW_PX, images.shape[2] // WINDOW_PX
        return join_windows(extract(cut_windows(images, WINDOW_PX))["patches"], grid)

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
    main()
