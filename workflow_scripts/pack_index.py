"""Ties the packed files of a folder to the tile manifest that they were packed from; training reads this index.

    python workflow_scripts/pack_index.py --manifest results/manifests/train.parquet \\
        --output results/packed/train/index.json

Every file is checked: it must be whole and hold the tiles of the manifest, packed with the settings of the others.
"""

import argparse
import logging
from pathlib import Path

from dinoscope.cli import HelpFormatter, run_script
from dinoscope.data.packing import write_index


def main() -> None:
    """Checks every packed file against the manifest and writes the index."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--manifest", type=Path, required=True, help="merged tile manifest")
    add("--output", type=Path, required=True, metavar="index.json", help="index to write, in the packed files' folder")
    arguments = parser.parse_args()
    index = write_index(arguments.manifest, arguments.output.parent, arguments.output)
    logging.info(
        "%d tiles of %d slides, %.2f GB in %d files, %d tiles copied as they are stored, JPEG quality %d with %s, "
        "manifest %s",
        *(index["num_tiles"], len(index["slides"]), index["bytes"] / 1e9, index["files"], index["copied"]),
        *(index["quality"], index["subsampling"]),
        index["manifest"][:12],
    )


if __name__ == "__main__":
    run_script(main)
