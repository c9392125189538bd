"""Does the evaluation see what training does? Blood cells, in colour and without: docs/evaluation.md, "Shown".

    python benchmarks/evaluation_cells.py --data ../shared/data --out /tmp/cells

Half of the parent images of tiles/bccd_cells are trained on (enlarged to 144 px), the crops of the other half are tile
sets of the evaluation, grouped by parent. Writes images, recipes and config under --out and runs the workflow there:
snakemake evaluate. Minutes of training on two CPU cores; what is done is not done again.
"""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import yaml

ROOT = Path(__file__).resolve().parents[1]
PARENT = "BloodImage_[0-9]+"
CELLS = """extends: learned_features_cells.yaml
student: {arch: vit_nano}
train: {dataset_path: cells/train, OFFICIAL_EPOCH_LENGTH: 50}
evaluation: {probe_every: 100, select: best:probe_knn}
"""
GRAM = """extends: cells.yaml
crops: {gram_teacher_crops_size: 128, gram_teacher_no_distortions: true}
gram: {use_loss: true, img_level: true, loss_weight: 1.0, rep_update: false}
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
evaluation:
  descriptive: false
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
    parser.add_argument("--cores", default="2", help="for snakemake")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="make both runs with these, 0 first")
    parser.add_argument("--control", action="store_true", help="cells-gram without the gram loss too")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not (arguments.out / "config.yaml").is_file():
        prepare(arguments.data / "tiles/bccd_cells", arguments.out)
    add_runs(arguments.out / "config.yaml", arguments.seeds, control=arguments.control)
    workflow = ["--snakefile", ROOT / "Snakefile", "--configfile", "config.yaml", "--replace-workflow-config"]
    command = [sys.executable, "-m", "snakemake", *workflow, "--cores", arguments.cores, "evaluate"]
    sys.exit(subprocess.run(command, cwd=arguments.out, check=False).returncode)


def prepare(source: Path, out: Path) -> None:
    """Writes the images of both halves, recipes, slide table and config."""
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
    for recipe in ("learned_features.yaml", "learned_features_cells.yaml"):
        shutil.copy(ROOT / "benchmarks" / recipe, out)
    (out / "cells.yaml").write_text(CELLS, encoding="utf-8")
    (out / "cells_gram.yaml").write_text(GRAM, encoding="utf-8")
    rows = [f"demo_he_{i}\tresults/demo/demo_he_{i}.tiff\tcase_{i}" for i in (1, 2, 3)]  # a config needs slides
    (out / "slides.tsv").write_text("\n".join(["slide_id\tpath\tcase_id", *rows]) + "\n", encoding="utf-8")
    (out / "config.yaml").write_text(CONFIG, encoding="utf-8")


def add_runs(path: Path, seeds: list[int], *, control: bool) -> None:
    """Writes into the config which seeds the runs are made with, and whether there is a control of the gram loss."""
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    for run in config["runs"].values():
        run["seeds"] = seeds
    config["runs"]["cells-gram"]["control"] = control
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def parent_of(file: Path) -> str:
    """The photograph that a crop was cut from."""
    return re.search(PARENT, file.name).group(0)


if __name__ == "__main__":
    main()
