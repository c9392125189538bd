"""Features in the layouts of other tools: clam, anndata, stamp, parquet, wsidata (dinoscope/features/exports.py).

    python workflow_scripts/export_features.py --format clam --features results/features/gram/A.h5 \\
        --tiles results/tiles/features/A.parquet --output-dir results/exports/clam/gram

Several slides: give as many of --features and --tiles; long lists can stand in a file, one word a line: @list.txt.
"""

import argparse
import logging
from pathlib import Path

from dinoscope.cli import HelpFormatter, run_script
from dinoscope.errors import ConfigError, DinoscopeError


def main() -> None:
    """Writes the files of the given slides."""
    arguments = parse_arguments()
    features, tiles, slides = arguments.features, arguments.tiles, arguments.slide or [None] * len(arguments.features)
    if not len(features) == len(tiles) == len(slides):
        counts = f"{len(features)} --features, {len(tiles)} --tiles"
        counts += f" and {len(slides)} --slide" if arguments.slide else ""
        raise ConfigError(f"{counts}: give as many of each")

    from dinoscope.features.exports import export_features

    problems = []
    for feature_file, tile_file, slide in zip(features, tiles, slides, strict=True):
        try:
            written = export_features(arguments.format, feature_file, tile_file, arguments.output_dir, slide=slide)
        except DinoscopeError as error:  # the others are written all the same
            problems.append(str(error))
        else:
            logging.info("%s: %s", feature_file.stem, ", ".join(str(path) for path in written))
    if problems:
        more = f"; {len(problems)} of {len(features)} files failed, each named here" if len(problems) > 1 else ""
        raise DinoscopeError("\n".join(problems) + more)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, fromfile_prefix_chars="@")
    add = parser.add_argument
    formats = ("clam", "anndata", "stamp", "parquet", "wsidata")
    add("--format", choices=formats, required=True, help="whose layout")
    add("--features", nargs="+", type=Path, required=True, help="feature files (.h5)")
    add("--tiles", nargs="+", type=Path, required=True, help="tile manifests (.parquet) of their slides, in this order")
    add("--slide", nargs="+", type=Path, help="the slides themselves, which only wsidata needs")
    add("--output-dir", type=Path, required=True, help="folder of the layout; made if it is not there")
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
