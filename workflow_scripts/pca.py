"""PCA maps of tile features.

Fits one colour space over slides of a model (in the workflow, the training slides), then colours tiles by it:
    python workflow_scripts/pca.py fit --features results/features/gram --basis results/pca/gram
    python workflow_scripts/pca.py map --features results/features/gram/A.h5 --basis results/pca/gram \\
        --thumbnail results/slides/A.jpg --slide-name A --output results/pca/gram/A.png

One slide by several models side by side, before and after training:
    python workflow_scripts/pca.py compare --features results/features/base/A.h5 results/features/gram/A.h5 \\
        --basis results/pca/base results/pca/gram --thumbnail results/slides/A.jpg --output results/pca/compare/A.png
"""

import argparse
import logging
from pathlib import Path

from dinoscope.cli import HelpFormatter, run_script
from dinoscope.errors import ConfigError
from dinoscope.features.writers import FeatureFile, read_features
from dinoscope.file_lists import files_among
from dinoscope.visualize.color_basis import BACKGROUNDS, ColorBasis
from dinoscope.visualize.pca import MAX_TILES, fit_basis, load_basis, rounding_note, save_basis
from dinoscope.visualize.pca_map import draw_map, read_thumbnail
from dinoscope.visualize.side_by_side import draw_comparison


def main() -> None:
    """Fits a colour space, or draws a map."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, fromfile_prefix_chars="@")
    parser.epilog = "@FILE reads arguments from a file, one a line."
    commands = parser.add_subparsers(required=True)
    fit = commands.add_parser("fit", help="fit the colour space of a model", formatter_class=HelpFormatter)
    fit.add_argument(
        "--features", nargs="+", type=Path, required=True, help="feature files (.h5) of one model, or a folder of them"
    )
    fit.add_argument("--basis", type=Path, required=True, help="folder for basis.json and basis.npz")
    fit.add_argument("--seed", type=int, default=0, help="of the sample of tiles, when there are many")
    fit.add_argument("--max-tiles", type=int, default=MAX_TILES, help="fit on at most so many tiles")
    fit.add_argument(
        "--background",
        choices=BACKGROUNDS,
        default="keep",
        help="leave out a side of the first component: low or high, little or much red in the maps made with keep",
    )
    fit.set_defaults(run=run_fit)
    draw = commands.add_parser("map", help="colour the tiles of one slide", formatter_class=HelpFormatter)
    draw.add_argument("--features", type=Path, required=True, help="feature file (.h5) of the slide")
    draw.add_argument("--basis", type=Path, required=True, help="folder that `pca.py fit` wrote")
    draw.add_argument("--thumbnail", type=Path, required=True, help="picture of the whole slide")
    draw.add_argument("--slide-name", help="shown in the title; the slide's id when not given")
    draw.add_argument("--output", type=Path, required=True, help="the PNG to write")
    draw.set_defaults(run=run_map)
    compare = commands.add_parser("compare", help="one slide by several models", formatter_class=HelpFormatter)
    compare.add_argument("--features", nargs="+", type=Path, required=True, help="feature files of the slide")
    compare.add_argument("--basis", nargs="+", type=Path, required=True, help="a basis folder each, in the same order")
    compare.add_argument("--thumbnail", type=Path, required=True, help="picture of the whole slide")
    compare.add_argument("--slide-name", help="shown in the title; the slide's id when not given")
    compare.add_argument("--output", type=Path, required=True, help="the PNG to write")
    compare.set_defaults(run=run_compare)
    arguments = parser.parse_args()
    arguments.run(arguments)


def run_fit(arguments: argparse.Namespace) -> None:
    """Writes basis.npz and basis.json."""
    files = files_among(arguments.features, ".h5")
    basis = fit_basis(files, seed=arguments.seed, max_tiles=arguments.max_tiles, background=arguments.background)
    save_basis(basis, arguments.basis)
    info = basis.info
    logging.info(
        "PCA of model %s: %d tiles of %d slides, 3 components explain %.1f %% of the variance",
        *(info["model"], info["num_tiles_fitted"], info["num_slides"], 100 * info["explained_by_top_3"]),
    )
    if note := rounding_note(info):
        logging.warning("warning: %s", note)


def run_map(arguments: argparse.Namespace) -> None:
    """Writes the map of one slide."""
    file, basis = read_with_basis(arguments.features, arguments.basis)
    thumbnail = read_thumbnail(arguments.thumbnail)
    draw_map(arguments.output, file, basis, thumbnail, slide_name=arguments.slide_name)


def run_compare(arguments: argparse.Namespace) -> None:
    """Writes the maps of one slide side by side."""
    if len(arguments.features) != len(arguments.basis):
        raise ConfigError(
            f"{len(arguments.features)} --features and {len(arguments.basis)} --basis: give as many of each"
        )
    models = [read_with_basis(*each) for each in zip(arguments.features, arguments.basis, strict=True)]
    thumbnail = read_thumbnail(arguments.thumbnail)
    draw_comparison(arguments.output, models, thumbnail, slide_name=arguments.slide_name)


def read_with_basis(features: Path, folder: Path) -> tuple[FeatureFile, ColorBasis]:
    """A feature file and the basis of its model."""
    basis, file = load_basis(folder), read_features(features)
    basis.check_fits(file.info, features)
    return file, basis


if __name__ == "__main__":
    run_script(main)
