"""Does the training learn? A small backbone from scratch on real images, held to its own random initialisation.

    python benchmarks/learned_features.py --data ../shared/data

Trainings of two recipes (learned_features_tissue.yaml and learned_features_cells.yaml), each from several seeds and on
one half of the parent images, and two measures on the other half:

- stained tissue (seg/dsb2018_histology, enlarged twice): nucleus or not, for each patch of 16 px, by a logistic
  regression on the patches of the last block; folds by image, all of them images that the training has not seen.
  Trained on either half and asked about the other, so that all images count. The network sees quarters of an image, so
  that a patch can be judged by the stain around it. Beside colour images: grey copies; the same regressions asked about
  copies in other stains and of other brightness; and regressions from one, two and five images.
- blood cells (tiles/bccd_cells: platelets, red and white cells, 96 px): k nearest neighbours by cosine, on grey copies,
  since in colour a histogram knows them already; never a neighbour from the query's own parent image.

The recipes were chosen on other splits into halves than the one that is reported (--split).

Beside the trained networks stand the networks they began as, others from more seeds, and colour alone. All features
take the same way: exported file, load_backbone, no augmentation. Prints Markdown; figures, runs and the picture
pca.png (images, their patches before and after) stay under --out. Given again with the same --out it goes on where it
was, or measures only.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import cv2
import numpy as np
import torch
from threadpoolctl import threadpool_limits

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "workflow_scripts"))
from feature_images import PATCH_PX, Tissue, read_cells, read_tissue, tiles_of, write_training_images  # noqa: E402
from feature_probes import pca_colors  # noqa: E402
from feature_reports import Networks, cells_report, losses_report, patches_of, tissue_report  # noqa: E402

from dinoscope.cli import run_script  # noqa: E402
from dinoscope.export.convert import write_initial_weights  # noqa: E402
from dinoscope.recipe import load_recipe  # noqa: E402

RECIPES = {
    "tissue": Path(__file__).with_name("learned_features_tissue.yaml"),
    "cells": Path(__file__).with_name("learned_features_cells.yaml"),
}
PUBLISHED = ("student.layerscale=1e-5",)


def main() -> None:
    """Prepares, trains, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data", help="folder with tiles/ and seg/")
    parser.add_argument("--out", type=Path, help="where images, runs and the picture go (default: a temporary folder)")
    parser.add_argument("--seeds", type=int, default=5, help="random networks; the first ones are trained")
    parser.add_argument("--trained", type=int, default=3, help="how many of them, by either recipe")
    parser.add_argument("--only", choices=RECIPES, help="one of the two measures")
    parser.add_argument("--split", type=int, default=4, help="which split into halves; 0 and 1 chose the recipes")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of training and measuring")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the recipe")
    arguments = parser.parse_args()
    for name in ("tiles/bccd_cells", "seg/dsb2018_histology"):
        if not (arguments.data / name).is_dir():
            sys.exit(f"error: {arguments.data} has no folder {name}; give --data a folder that has")
    if not 1 <= arguments.trained <= arguments.seeds:
        sys.exit(f"error: --trained is {arguments.trained}; give 1 to --seeds ({arguments.seeds})")
    torch.set_num_threads(arguments.threads)
    with threadpool_limits(arguments.threads), tempfile.TemporaryDirectory() as temporary:
        _compare(arguments, (arguments.out or Path(temporary)).resolve() / f"split_{arguments.split}")


def _compare(arguments: argparse.Namespace, out: Path) -> None:
    started = time.perf_counter()
    cells = read_cells(arguments.data / "tiles/bccd_cells", arguments.split)
    tissue = read_tissue(arguments.data / "seg/dsb2018_histology", arguments.split)
    images = {
        "tissue": tiles_of(tissue.images[tissue.training]),
        "tissue_reverse": tiles_of(tissue.images[~tissue.training]),
        "cells": cells.images[cells.training],
    }
    for name, training in images.items():
        write_training_images(training, out / "images" / name)
    reports = {
        "tissue": lambda networks: tissue_report(tissue, networks),
        "cells": lambda networks: cells_report(cells, networks),
    }
    for name in [arguments.only] if arguments.only else RECIPES:
        parts, seeds = [part for part in images if part.startswith(name)], range(arguments.seeds)
        begun, published = (
            [(random_network(name, out / kind, seed, [*arguments.overrides, *more]),) * len(parts) for seed in seeds]
            for kind, more in (("random", ()), ("published", PUBLISHED))
        )
        since = time.perf_counter()
        trained = [tuple(train(part, out, seed, arguments) for part in parts) for seed in range(arguments.trained)]
        seconds = (time.perf_counter() - since) / arguments.trained / len(parts)
        networks = Networks(begun, trained, published)
        print(f"```yaml\n{RECIPES[name].read_text()}```\n")
        for line in reports[name](networks):
            print(line, flush=True)
        losses = losses_report({run.name: run for runs in trained for run in runs})
        print("", *losses, f"\n{seconds:.0f} s a training\n", sep="\n")
        if name == "tissue":
            draw_pca(tissue, begun[0][0], trained[0][0], out / "pca.png")
    packages = ("torch", "numpy", "scikit-learn", "opencv-python-headless")
    print(
        f"{time.perf_counter() - started:.0f} s in all; {os.cpu_count()} CPU cores, {arguments.threads} threads; "
        f"{', '.join(f'{name} {version(name)}' for name in packages)}"
    )


def random_network(name: str, out: Path, seed: int, overrides: list[str]) -> Path:
    """The recipe's backbone as a training with this seed and these settings begins."""
    folder = out / f"{name}_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    write_initial_weights(load_recipe(RECIPES[name], [*overrides, f"train.seed={seed}"]), folder / "teacher.pth")
    return folder


def train(part: str, out: Path, seed: int, arguments: argparse.Namespace) -> Path:
    """Trains on the images of that name, in a process of its own as the workflow does."""
    name, run, scripts = part.split("_")[0], out / "runs" / f"{part}_{seed}", ROOT / "workflow_scripts"
    launch = [sys.executable, scripts / "launch.py", "--processes", 1, "--threads", arguments.threads, "--"]
    settings = [*arguments.overrides, f"train.seed={seed}", f"train.dataset_path={out / 'images' / part}"]
    command = [scripts / "pretrain.py", "--config", RECIPES[name], "--run-dir", run, *settings]
    if subprocess.run([str(part) for part in [*launch, *command]]).returncode:
        sys.exit(f"error: the training on {name} with seed {seed} failed; the lines above say why")
    return run


def draw_pca(tissue: Tissue, before: Path, after: Path, target: Path) -> None:
    """Three held-out images, each beside its patches before and after; colours mean the same within a column."""
    images = tissue.images[~tissue.training]
    height, width = images.shape[1:3]
    columns = [images[:3]]
    for path in (before, after):
        maps = pca_colors(patches_of(path)(images)).reshape(-1, height // PATCH_PX, width // PATCH_PX, 3)[:3]
        columns.append(maps.repeat(PATCH_PX, axis=1).repeat(PATCH_PX, axis=2))
    cv2.imwrite(str(target), np.concatenate(np.concatenate(columns, axis=2))[..., ::-1])


if __name__ == "__main__":
    run_script(main)
