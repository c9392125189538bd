"""A picture of what a run is trained on: the crops of a few samples, cut and distorted as its recipe says.

    python workflow_scripts/show_crops.py --config config/runs/tiny.yaml --manifest results/manifests/train.parquet \\
        --slides config/slides.tsv --output crops.png

A row a sample: the two global crops, the gram teacher's where there are any, and the local crops. Shows the first
samples of the run, or those after --first; recipes whose train.dataset_path names images need no manifest.
"""

import argparse
from pathlib import Path

from dinoscope.cli import HelpFormatter, run_script


def main() -> None:
    """Draws the samples and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--config", required=True, type=Path, help="recipe of the run (YAML)")
    add("--manifest", type=Path, help="merged tile manifest; none where the recipe names images")
    add("--slides", help="where the manifest's slides are: slides.tsv, a folder or a glob")
    add("--output", required=True, type=Path, help="picture to write: .png")
    add("--samples", type=int, default=4, help="how many samples to show")
    add("--first", type=int, default=0, help="number of the first sample")
    add("overrides", nargs="*", metavar="key=value", help="settings that win over the recipe")
    arguments = parser.parse_args()
    from dinoscope.recipe import load_recipe
    from dinoscope.visualize.crop_sheet import save_crop_sheet

    config = load_recipe(arguments.config, arguments.overrides)
    numbers = range(arguments.first, arguments.first + arguments.samples)
    save_crop_sheet(config, arguments.manifest, arguments.slides, numbers, arguments.output)


if __name__ == "__main__":
    run_script(main)
