"""Does the evaluation see what training does? Blood cells, in colour and without: docs/evaluation.md, "Shown".

    python benchmarks/evaluation_cells.py --data ../shared/data --out /tmp/cells

Half of the parent images of tiles/bccd_cells are trained on (enlarged to 144 px), the crops of the other half are tile
sets of the evaluation, grouped by parent. Besides the question in colour and on grey copies, the regressions learned in
colour are asked about other stains, grey and further changes (evaluation.robustness). `cells-gram` goes on from `cells`
with the gram loss, `cells-control` does the very same iterations without. Writes images, recipes and config under --out
and runs the workflow there: snakemake evaluate. Minutes of training on two CPU cores; what is done is not done again.
"""

import argparse
import re
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import yaml
from evaluation_runs import GRAM, ROOT, run_workflow, write_workflow

PARENT = "BloodImage_[0-9]+"
CELLS = """extends: learned_features_cells.yaml
student: {{arch: vit_nano}}
train: {{dataset_path: cells/train, OFFICIAL_EPOCH_LENGTH: {length}}}
evaluation: {{probe_every: {probe_every}, select: best:probe_knn}}
"""
CONTINUED = """extends: cells.yaml
optim: {epochs: 3, warmup_epochs: 0, lr: 7.0e-4}
teacher: {warmup_teacher_temp: 0.04, warmup_teacher_temp_epochs: 0}
"""
CONFIG = f"""slides: {{source: slides.tsv}}
demo: {{enabled: true}}
launch: {{processes: 1}}
tiling: {{sets: {{train: {{tile_px: 144, mpp: 1.0}}, features: {{tile_px: 144, mpp: 1.0}}}}}}
runs:
  cells: {{recipe: cells.yaml}}
  cells-gram: {{recipe: cells_gram.yaml, continues: cells, gram_teacher: last}}
  cells-control: {{recipe: cells_control.yaml, continues: cells}}
evaluation:
  descriptive: false
  robustness: true
  primary: tiles-cells-grey/linear
  selection: {{fraction: 0.2}}
  probe: {{source: cells, images: 96}}
  tile_sets:
    cells: {{folder: cells/held_out, groups: "{PARENT}", tile_px: 96}}
    cells-grey: {{folder: cells/held_out, groups: "{PARENT}", tile_px: 96, grey: true}}
"""


def main() -> None:
    """Prepares, and runs the workflow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data", help="folder with tiles/bccd_cells")
    parser.add_argument("--out", type=Path, required=True, help="working directory of the workflow")
    parser.add_argument("--length", type=int, default=50, help="iterations times 10 of the training, times 3 after it")
    parser.add_argument("--cores", default="2", help="for snakemake")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="make all runs with these, 0 first")
    arguments = parser.parse_args()
    source = arguments.data / "tiles" / "bccd_cells"
    if not source.is_dir():
        sys.exit(f"error: {arguments.data} has no folder tiles/bccd_cells; give --data a folder that has")
    if not (arguments.out / "config.yaml").is_file():
        write_halves(source, arguments.out)
        length = arguments.length
        recipes = {"cells.yaml": CELLS.format(length=length, probe_every=2 * length)}
        recipes |= {"cells_control.yaml": CONTINUED, "cells_gram.yaml": CONTINUED + GRAM}
        write_workflow(arguments.out, CONFIG, recipes, ["learned_features.yaml", "learned_features_cells.yaml"])
    add_seeds(arguments.out / "config.yaml", arguments.seeds)
    run_workflow(arguments.out, arguments.cores)


def write_halves(source: Path, out: Path) -> None:
    """Writes the images of both halves: cells/train, enlarged, and cells/held_out."""
    files = sorted(source.rglob("*.jpg"))
    parents = sorted({parent_of(file) for file in files})
    trained = set(np.random.default_rng(0).permutation(parents)[: len(parents) // 2])
    for file in files:
        if parent_of(file) in trained:
            target = out / "cells/train" / f"{file.stem}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(target), cv2.resize(cv2.imread(str(file)), (144, 144), interpolation=cv2.INTER_CUBIC))
        else:
            target = out / "cells/held_out" / file.parent.name / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)


def add_seeds(path: Path, seeds: list[int]) -> None:
    """Writes into the config which seeds the runs are made with."""
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    for run in config["runs"].values():
        run["seeds"] = seeds
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def parent_of(file: Path) -> str:
    """The photograph that a crop was cut from."""
    return re.search(PARENT, file.name).group(0)


if __name__ == "__main__":
    main()
