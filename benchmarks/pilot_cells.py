"""Is adaptation worth it? A pilot on real images: docs/evaluation.md, "Pilot".

    python benchmarks/pilot_cells.py --data ../shared/data --out /tmp/pilot_cells

Stands in for published weights: a small backbone trained for minutes on the tissue of wsi/CMU-1-Small-Region.svs. The
pilot adapts it to blood cells (tiles/bccd_cells), on the crops of half of the photographs, and judges on grey copies of
the crops of the other half, grouped by photograph. All of it by the workflow, in the folder --out: what is done is not
done again.
"""

import argparse
from pathlib import Path

from evaluation_cells import PARENT, write_halves
from evaluation_runs import ROOT, run_workflow

START = """extends: learned_features_tissue.yaml
optim: {epochs: 10, warmup_epochs: 2}
teacher: {warmup_teacher_temp_epochs: 10}
"""
START_CONFIG = """results: start
slides: {source: slides.tsv}
demo: {enabled: false}
split: {fraction: 0}
launch: {processes: 1}
tiling:
  sets:
    train: {tile_px: 144, mpp: 0.5, stride_px: 72}
    features: {tile_px: 144, mpp: 0.5}
runs: {tissue: {recipe: start.yaml}}
"""
WEIGHTS = "start/models/tissue/teacher.pth"
RECIPE = f"""extends: learned_features_cells.yaml
MODEL: {{WEIGHTS: {WEIGHTS}}}
student: {{arch: vit_nano}}
train: {{dataset_path: cells/train, OFFICIAL_EPOCH_LENGTH: 50}}
"""
CONFIG = """slides: {source: slides.tsv}
demo: {enabled: false}
split: {fraction: 0}
launch: {processes: 1}
tiling: {sets: {train: {tile_px: 144, mpp: 0.5}, features: {tile_px: 144, mpp: 0.5}}}
runs: {cells: {recipe: pilot.yaml}}
evaluation:
  descriptive: false
  primary: tiles-cells-grey/linear
  selection: {fraction: 0.2}
  probe: {source: cells-grey, images: 96}
  tile_sets:
    cells-grey: {folder: cells/held_out, groups: "PARENT", tile_px: 96, grey: true}
pilot: {iterations: ITERATIONS, gpu_minutes: 60, tflops: 0.05, probes: 5}
"""


def main() -> None:
    """Prepares, and runs the workflow twice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data", help="folder with tiles/ and wsi/")
    parser.add_argument("--out", type=Path, required=True, help="working directory of the workflow")
    parser.add_argument("--cores", default="2", help="for snakemake")
    parser.add_argument("--iterations", type=int, default=250, help="of full adaptation")
    arguments = parser.parse_args()
    out, slides = arguments.out, (arguments.data / "wsi/CMU-1-Small-Region.svs").resolve()
    if not (out / "cells").is_dir():
        out.mkdir(parents=True, exist_ok=True)
        write_halves(arguments.data / "tiles/bccd_cells", out)
    for name in ("learned_features", "learned_features_cells", "learned_features_tissue"):
        (out / f"{name}.yaml").write_bytes((ROOT / f"benchmarks/{name}.yaml").read_bytes())
    (out / "start.yaml").write_text(START, encoding="utf-8")
    (out / "pilot.yaml").write_text(RECIPE, encoding="utf-8")
    (out / "start_config.yaml").write_text(START_CONFIG, encoding="utf-8")
    config = CONFIG.replace("PARENT", PARENT).replace("ITERATIONS", str(arguments.iterations))
    (out / "config.yaml").write_text(config, encoding="utf-8")
    (out / "slides.tsv").write_text(f"slide_id\tpath\nCMU-1\t{slides}\n", encoding="utf-8")
    run_workflow(out, arguments.cores, [WEIGHTS], config="start_config.yaml")
    run_workflow(out, arguments.cores, ["pilot"])
    print((out / "results/pilot/advice.txt").read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    main()
