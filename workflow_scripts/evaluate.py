"""What models are worth on cases that training never saw: measures, intervals and verdicts (docs/evaluation.md).

By hand, for a folder of labelled tiles (one folder a class) and two models:
    python workflow_scripts/evaluate.py units --task tiles-cells --set-name cells --folder tiles/cells \\
        --groups "Image_[0-9]+" --output units.json
    python workflow_scripts/evaluate.py embed --weights base.pth --model-name base --set-name cells \\
        --folder tiles/cells --groups "Image_[0-9]+" --output base.npz        (likewise for the other model)
    python workflow_scripts/evaluate.py measure --units units.json --features base.npz --model-name base \\
        --set-name cells --folder tiles/cells --groups "Image_[0-9]+" --output base_answers.npz
    python workflow_scripts/evaluate.py compare --units units.json --answers base_answers.npz mine_answers.npz \\
        --models base mine --against mine=base --output cells.npz --figure cells.png
    python workflow_scripts/evaluate.py summary --comparisons cells.npz --table summary.tsv --document summary.json \\
        --measures measures

The workflow does the same: snakemake --cores all evaluate
"""

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path

from dinoscope.cli import HelpFormatter, run_script


def main() -> None:
    """Runs one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, fromfile_prefix_chars="@")
    parser.epilog = "@FILE reads arguments from a file, one a line."
    commands = parser.add_subparsers(required=True)
    steps = {
        add_random: ("random", "a random initialisation of a recipe's backbone"),
        add_units: ("units", "write down what a task asks about"),
        add_sample: ("sample", "a sample of the tiles of one slide, for changed copies"),
        add_embed: ("embed", "features of images from elsewhere, or of sampled tiles"),
        add_tiles: ("tiles", "the tiles that patches are compared on, for gram distances"),
        add_patches: ("patches", "the patches of these tiles by one model"),
        add_measure: ("measure", "the answers of one model to one task"),
        add_compare: ("compare", "the answers of all models to one task side by side"),
        add_summary: ("summary", "verdicts over all tasks"),
        add_probe: ("probe", "the images that a run is asked about while it trains"),
    }
    for add, (name, words) in steps.items():
        add(commands.add_parser(name, help=words, formatter_class=HelpFormatter, fromfile_prefix_chars="@"))
    arguments = parser.parse_args()
    arguments.run(arguments)


def add_random(parser: argparse.ArgumentParser) -> None:
    """Options of `random`."""
    parser.add_argument("--config", type=Path, required=True, help="recipe of a run (YAML)")
    parser.add_argument("--output", type=Path, required=True, help="teacher.pth to write")
    parser.set_defaults(run=run_step("write_random_weights"))


def add_units(parser: argparse.ArgumentParser) -> None:
    """Options of `units`."""
    add = parser.add_argument
    add("--task", required=True, help="label-NAME, tiles-NAME, masks-NAME or descriptive")
    add("--slides", help="slide table; not for images")
    add("--labels", type=Path, help="table of labels")
    add("--label", help="the one that is predicted")
    add("--described", nargs="*", default=[], help="slides of a task that asks nothing")
    add("--split-fraction", type=float, default=0.15, help="share of cases held out where the table names none")
    add("--selection-fraction", type=float, default=0.0, help="share of held-out cases that is for selection")
    add("--selection", nargs="*", default=[], help="the cases themselves, in place of a draw")
    add("--seed", type=int, default=0, help="of both draws")
    add("--output", type=Path, required=True, help="units.json to write")
    add_images(parser)
    parser.set_defaults(run=run_step("make_units"))


def add_embed(parser: argparse.ArgumentParser) -> None:
    """Options of `embed`."""
    add_encoder(parser)
    add = parser.add_argument
    add("--pooling", default="cls", help="cls, mean, cls+mean or cls+storage")
    add("--shifts", nargs="*", default=[], help="changes of tiles too: stain, blur, jpeg, mpp, rotation, grey")
    add("--sampled", type=Path, nargs="*", default=[], help="files of `sample`, in place of a folder")
    add("--output", type=Path, required=True, help="features (.npz) to write")
    add_images(parser)
    parser.set_defaults(run=run_step("embed"))


def add_sample(parser: argparse.ArgumentParser) -> None:
    """Options of `sample`."""
    add = parser.add_argument
    add("--slide", type=Path, required=True, help="the slide: a file, or the folder of a DICOM series")
    add("--slide-id", required=True, help="its name")
    add("--slide-reader", metavar="MODULE:CLASS", help="reader of your own, for other formats")
    add("--tiles", type=Path, required=True, help="manifest of the slide's tiles (tile_slide.py)")
    add("--count", type=int, default=16, help="tiles at most")
    add("--seed", type=int, default=0, help="which ones")
    add("--on-error", choices=("fail", "skip"), default="fail", help="skip: a slide that cannot be read gives no tile")
    add("--output", type=Path, required=True, help="sample (.npz) to write")
    parser.set_defaults(run=run_step("take_sample"))


def add_tiles(parser: argparse.ArgumentParser) -> None:
    """Options of `tiles`."""
    add = parser.add_argument
    add_reading(parser)
    add("--described", nargs="*", default=[], help="slides that tiles are taken of, as equal as possible a slide")
    add("--tiles", type=Path, required=True, help="folder with the tile manifest of each slide, SLIDE.parquet")
    add("--seed", type=int, default=0, help="which tiles")
    add("--output", type=Path, required=True, help="set of images (.npz) to write")
    parser.set_defaults(run=run_step("sample_described"))


def add_patches(parser: argparse.ArgumentParser) -> None:
    """Options of `patches`."""
    add_encoder(parser)
    add = parser.add_argument
    add("--sampled", type=Path, required=True, help="the file of `tiles`")
    add("--output", type=Path, required=True, help="patches (.npz) to write")
    parser.set_defaults(run=run_step("embed_sampled_patches"))


def add_measure(parser: argparse.ArgumentParser) -> None:
    """Options of `measure`."""
    add = parser.add_argument
    add("--units", type=Path, required=True, help="units.json")
    add("--features", type=Path, nargs="+", required=True, help="files of the slides (.h5), or the one of `embed`")
    add("--sampled", type=Path, help="the file of `embed` of sampled tiles and their changed copies; for slides")
    add("--patches", type=Path, help="patches of the model's sampled tiles; of images with masks --features has them")
    add("--patches-from", nargs="*", default=[], metavar="NAME=FILE", help="those of models to give the distance from")
    add("--model-name", required=True, help="as in tables")
    add("--slides", help="slide table, for the cases of slides that the model was trained on")
    add("--seal", type=Path, action="append", default=[], help="run_config.json of a run that the model comes from")
    add("--trained-on", type=Path, action="append", default=[], help="folder of images that it was trained on")
    add("--unknown-origin", action="store_true", help="somebody else trained it, on what is not known")
    add("--folds", type=int, default=5, help="of the cross-validation")
    add("--repeats", type=int, default=5, help="of the cross-validation")
    add("--splits", nargs="+", default=["grouped"], help="grouped, leave-one-site-out, preserved-site")
    add("--no-attention", action="store_true", help="leave out attention MIL, which takes by far the most time")
    add("--max-tiles", type=int, default=200_000, help="tiles at most, as equal as possible a slide")
    add("--seed", type=int, default=0, help="of folds, draws and samples")
    add("--output", type=Path, required=True, help="answers (.npz) to write")
    add_images(parser)
    parser.set_defaults(run=run_step("measure"))


def add_compare(parser: argparse.ArgumentParser) -> None:
    """Options of `compare`."""
    add = parser.add_argument
    add("--units", type=Path, required=True, help="units.json")
    add("--answers", type=Path, nargs="+", required=True, help="files of `measure`, one a model")
    add("--models", nargs="+", required=True, help="their names, in the same order")
    add("--against", nargs="*", default=[], metavar="MODEL=REFERENCE", help="whom each model is held against")
    seeds = "models of one run's training seeds; once a run, also of a single seed"
    add("--seeds-of", nargs="+", action="append", default=[], metavar="MODEL", help=seeds)
    add("--bootstraps", type=int, default=10_000, help="draws of cases")
    add("--margin", type=float, default=0.02, help="smaller differences do not matter; drawn in the figure")
    add("--seed", type=int, default=0, help="of the draws")
    add("--output", type=Path, required=True, help="comparison (.npz) to write")
    add("--figure", type=Path, required=True, help="PNG to write")
    parser.set_defaults(run=run_step("compare"))


def add_summary(parser: argparse.ArgumentParser) -> None:
    """Options of `summary`."""
    add = parser.add_argument
    add("--comparisons", type=Path, nargs="*", default=[], help="files of `compare`, one a task")
    add("--margin", type=float, default=0.02, help="differences below it do not matter")
    add("--primary", help="TASK/MEASURE that the verdict rests on; the first linear probe when not given")
    add("--table", type=Path, required=True, help="summary.tsv to write")
    add("--document", type=Path, required=True, help="summary.json to write, for the report")
    add("--measures", type=Path, required=True, help="folder for a JSON a measure")
    parser.set_defaults(run=run_step("summarise"))


def add_probe(parser: argparse.ArgumentParser) -> None:
    """Options of `probe`."""
    add = parser.add_argument
    add_reading(parser)
    add("--probed", nargs="*", default=[], help="slides of the selection cases")
    add("--tiles", type=Path, help="folder with the tile manifest of each slide, SLIDE.parquet")
    add("--labels", type=Path, help="table of labels; the first label of classes is asked about")
    add("--label", nargs="*", default=[], help="those of them that may be asked about; without, any")
    add("--units", type=Path, help="units.json of the images")
    add("--images", type=int, default=256, help="images at most")
    add("--seed", type=int, default=0, help="which ones")
    add("--output", type=Path, required=True, help="set of images (.npz) to write")
    add_images(parser)
    parser.set_defaults(run=run_step("make_probe"))


def add_encoder(parser: argparse.ArgumentParser) -> None:
    """Options that name a model."""
    add = parser.add_argument
    add("--weights", required=True, help="file, folder or function of the encoder")
    add("--architecture", help="timm's name of the model, where the file does not tell it")
    add("--encoder-files", nargs="*", type=Path, default=[], help="further files that it reads")
    add("--encoder-version", default="", help="anything; part of its digest")
    add("--model-name", required=True, help="as in tables")
    add("--device", default="auto", help="auto, cpu, or a GPU, e.g. cuda:0")


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Options that say how slides are read."""
    add = parser.add_argument
    add("--slides", help="slide table; not for images")
    add("--slide-mpp", type=float, help="micrometres a pixel of slides that the table gives none for")
    add("--slide-reader", metavar="MODULE:CLASS", help="reader of your own, for other formats")
    add("--on-error", choices=("fail", "skip"), default="fail", help="skip: slides that cannot be read are left out")


def add_images(parser: argparse.ArgumentParser) -> None:
    """Options that say which images a task has."""
    add = parser.add_argument
    add("--set-name", help="name of the set of images")
    add("--folder", type=Path, help="folder of images; of tiles, with one folder a class")
    add("--masks", type=Path, help="folder of masks of the same names; without, the images are labelled tiles")
    add("--groups", help="table (.csv, .tsv) with file and group, or a pattern that finds the group in a name")
    add("--tile-px", type=int, default=224, help="side that tiles are brought to, px")
    add("--instances", action="store_true", help="mask values above 0 are instances of one class")
    add("--enlarge", type=float, default=1.0, help="times that images with masks are enlarged")
    add("--grey", action="store_true", help="take colour away")


def run_step(name: str) -> Callable[[argparse.Namespace], None]:
    """The step of that name, imported when it is called: those that ask models need torch, which takes its time."""

    def run(arguments: argparse.Namespace) -> None:
        without_models = name in ("make_units", "compare", "summarise")
        module = importlib.import_module(f"dinoscope.evaluate.{'run' if without_models else 'run_models'}")
        getattr(module, name)(arguments)

    return run


if __name__ == "__main__":
    run_script(main)
