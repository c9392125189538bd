"""PCA maps of tile features.

Fits one colour space over all slides of a model, then colours each slide's tiles by it:
    python workflow_scripts/pca.py fit --features results/features/gram --basis results/pca/gram
    python workflow_scripts/pca.py map --features results/features/gram/A.h5 --basis results/pca/gram \\
        --thumbnail results/slides/A.jpg --slide-name A --output results/pca/gram/A.png
"""

import argparse
import logging
from pathlib import Path

from dinoscope.cli import HelpFormatter, run_script
from dinoscope.features.writers import read_features
from dinoscope.file_lists import files_among
from dinoscope.visualize.pca import MAX_TILES, fit_basis, load_basis, rounding_note, save_basis
from dinoscope.visualize.pca_map import draw_map, read_thumbnail


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
    fit.set_defaults(run=run_fit)
    draw = commands.add_parser("map", help="colour the tiles of one slide", formatter_class=HelpFormatter)
    draw.add_argument("--features", type=Path, required=True, help="feature file (.h5) of the slide")
    draw.add_argument("--basis", type=Path, required=True, help="folder that `pca.py fit` wrote")
    draw.add_argument("--thumbnail", type=Path, required=True, help="picture of the whole slide")
    draw.add_argument("--slide-name", help="shown in the title; the slide's id when not given")
    draw.add_argument("--output", type=Path, required=True, help="the PNG to write")
    draw.set_defaults(run=run_map)
    arguments = parser.parse_args()
    arguments.run(arguments)


def run_fit(arguments: argparse.Namespace) -> None:
    """Writes basis.npz and basis.json."""
    basis = fit_basis(files_among(arguments.features, ".h5"), seed=arguments.seed, max_tiles=arguments.max_tiles)
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
    basis = load_basis(arguments.basis)
    file = read_features(arguments.features)
    basis.check_fits(file.info, arguments.features)
    thumbnail = read_thumbnail(arguments.thumbnail)
    draw_map(arguments.output, file, basis, thumbnail, slide_name=arguments.slide_name)


if __name__ == "__main__":
    run_script(main)
