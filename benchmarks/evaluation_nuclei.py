"""Does training help a dense question, and gram anchoring? Nuclei in stained tissue: docs/evaluation.md, "Shown".

    python benchmarks/evaluation_nuclei.py --data ../shared/data --out /tmp/nuclei

The 40 images of seg/dsb2018_histology in two halves. A network is trained on either half (squares of the images
enlarged twice; no mask reaches it) and asked about the images of the other, so that all 40 count: linear probe of
patches, folds by image within the half. Four networks a half and seed: the random initialisation (base), `nuclei`
trained from it, `gram` that goes on from `nuclei` for some iterations with the gram loss, and `control` that does the
very same iterations without.

Each half and seed is a workflow of its own under --out (snakemake evaluate; what is done is not done again). Then the
answers of all are put together: images of both halves one after another, repeats of the folds and seeds as repeats, and
`evaluate.py compare` and `summary` say what may be said of them (OUT/pooled). Minutes of training a half and seed.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from evaluation_runs import GRAM, ROOT, run_workflow, write_workflow

sys.path.insert(0, str(ROOT / "workflow_scripts"))
from feature_images import read_tissue, tiles_of, write_training_images

from dinoscope.cli import run_script
from dinoscope.evaluate.answers import Answers, read_answers, write_answers
from dinoscope.evaluate.units import Units, read_units, write_units

TASKS = ("masks-nuclei", "masks-nuclei-grey")
MODELS = ("base", "nuclei", "gram", "control")
AGAINST = ("nuclei=base", "gram=base", "gram=nuclei", "gram=control", "control=base", "control=nuclei")
RECIPE = """extends: learned_features_tissue.yaml
train: {{dataset_path: train, seed: {seed}, OFFICIAL_EPOCH_LENGTH: {length}}}
"""
CONTINUED = """extends: nuclei.yaml
optim: {epochs: 4, warmup_epochs: 0, lr: 7.0e-4}
teacher: {warmup_teacher_temp: 0.04, warmup_teacher_temp_epochs: 0}
"""
CONFIG = """slides: {source: slides.tsv}
demo: {enabled: true}
launch: {processes: 1}
tiling: {sets: {train: {tile_px: 144, mpp: 1.0}, features: {tile_px: 144, mpp: 1.0}}}
runs:
  nuclei: {recipe: nuclei.yaml}
  gram: {recipe: gram.yaml, continues: nuclei, gram_teacher: last}
  control: {recipe: control.yaml, continues: nuclei}
evaluation:
  descriptive: false
  primary: masks-nuclei/dense
  masks:
    nuclei: {images: held_out/images, masks: held_out/masks, instances: true, enlarge: 2}
    nuclei-grey: {images: held_out/images, masks: held_out/masks, instances: true, enlarge: 2, grey: true}
"""


def main() -> None:
    """Prepares, trains, measures and puts together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data", help="folder with seg/dsb2018_histology")
    parser.add_argument("--out", type=Path, required=True, help="where the workflows and what comes of them go")
    parser.add_argument("--seeds", type=int, default=3, help="of trainings, from 0")
    parser.add_argument("--split", type=int, default=4, help="which split into halves; 0 and 1 chose the recipe")
    parser.add_argument("--length", type=int, default=50, help="iterations times 16 of the training, times 4 after it")
    parser.add_argument("--cores", default="1", help="for snakemake")
    parser.add_argument("--only-train", action="store_true", help="measure nothing yet")
    arguments = parser.parse_args()
    source = arguments.data / "seg" / "dsb2018_histology"
    if not source.is_dir():
        sys.exit(f"error: {arguments.data} has no folder seg/dsb2018_histology; give --data a folder that has")
    folders = [[arguments.out / f"half_{half}_seed_{seed}" for half in (0, 1)] for seed in range(arguments.seeds)]
    for seed, halves in enumerate(folders):
        for half, out in enumerate(halves):
            if not (out / "config.yaml").is_file():
                prepare(source, out, arguments.split, half, seed, arguments.length)
            run_workflow(out, arguments.cores, MODELS[1:] if arguments.only_train else ("evaluate",))
    if not arguments.only_train:
        judge(folders, arguments.out / "pooled")


def prepare(source: Path, out: Path, split: int, half: int, seed: int, length: int) -> None:
    """Writes squares of one half, images and masks of the other, recipes and config."""
    tissue = read_tissue(source, split)
    is_trained = tissue.training if half == 0 else ~tissue.training
    write_training_images(tiles_of(tissue.images[is_trained]), out / "train")
    for index, file in enumerate(sorted(source.glob("images/*.png"))):
        if not is_trained[index]:
            for kind in ("images", "masks"):
                (out / "held_out" / kind).mkdir(parents=True, exist_ok=True)
                shutil.copy(source / kind / file.name, out / "held_out" / kind)
    recipes = {"nuclei.yaml": RECIPE.format(seed=seed, length=length)}
    recipes |= {"control.yaml": CONTINUED, "gram.yaml": CONTINUED + GRAM}
    write_workflow(out, CONFIG, recipes, ["learned_features.yaml", "learned_features_tissue.yaml"])


def judge(folders: Sequence[Sequence[Path]], out: Path) -> None:
    """Puts the answers of all halves and seeds together, compares the models and writes the verdicts.

    Args:
        folders: Working directories, those of both halves a seed.
        out: Where the results go, as `results/evaluation` has them.
    """
    script, comparisons = [sys.executable, str(ROOT / "workflow_scripts/evaluate.py")], []
    for task in TASKS:
        of_task = [[folder / "results/evaluation" / task for folder in halves] for halves in folders]
        target = out / task
        write_units(target / "units.json", joined_units([read_units(path / "units.json") for path in of_task[0]]))
        files = []
        for model in MODELS:
            answers = [[read_answers(path / "answers" / f"{model}.npz") for path in halves] for halves in of_task]
            files.append(target / "answers" / f"{model}.npz")
            write_answers(files[-1], joined_answers(answers))
        comparisons.append(target / "comparison.npz")
        command = ["compare", "--units", target / "units.json", "--answers", *files, "--models", *MODELS]
        command += ["--against", *AGAINST, "--output", comparisons[-1], "--figure", target / "figure.png"]
        subprocess.run([*script, *map(str, command)], check=True)
    command = ["summary", "--comparisons", *comparisons, "--primary", f"{TASKS[0]}/dense"]
    command += ["--table", out / "summary.tsv", "--document", out / "summary.json", "--measures", out / "measures"]
    subprocess.run([*script, *map(str, command)], check=True)


def joined_units(halves: Sequence[Units]) -> Units:
    """The images of both halves, numbered on."""
    units = [unit for half in halves for unit in half.units]
    numbered = [replace(unit, name=str(index), group=str(index)) for index, unit in enumerate(units)]
    return replace(halves[0], units=numbered, digest="")


def joined_answers(answers: Sequence[Sequence[Answers]]) -> Answers:
    """Answers of a model about all images; repeats of the folds with each seed's networks are repeats.

    Args:
        answers: Those of both halves a seed.
    """
    confusions = {
        measure: np.concatenate(
            [np.concatenate([half.confusions[measure] for half in halves], axis=1) for halves in answers]
        )
        for measure in answers[0][0].confusions
    }
    seen = np.concatenate([half.seen for half in answers[0]])
    of_images = [half.numbers for halves in answers for half in halves]
    numbers = {name: float(np.mean([one[name] for one in of_images])) for name in of_images[0]}
    note = f"{len(answers)} training seeds of two networks each, one a half of the images; descriptions are their means"
    return Answers(answers[0][0].about, seen, confusions=confusions, numbers=numbers, notes=[note])


if __name__ == "__main__":
    run_script(main)
