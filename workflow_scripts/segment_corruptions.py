"""Measures how a segmenter stands up to corrupted images: mIoU for each kind and severity (arXiv:1903.12261).

    python workflow_scripts/segment_corruptions.py --segmenter results/segmentation/nuclei --dataset folder \\
        --data-root nuclei --data-option instance=nucleus --weights results/models/gram/teacher.pth --output c.json

Kinds: common (the fifteen), extra (four more), pathology (stain shift, JPEG, blur, focus, micrometres a pixel), all, or
names of single ones. Draws come from the seed, the kind, the severity and the image.
"""

import argparse
import sys
from pathlib import Path

from dinoscope.cli import HelpFormatter, run_script
from dinoscope.segment.arguments import add_segmenter_arguments, hyphenated


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_segmenter_arguments(parser)
    add = parser.add_argument
    add("--kinds", nargs="+", default=["common"], metavar="KIND", help="common, extra, pathology, all, or names")
    add("--severities", nargs="+", type=int, default=[1, 2, 3, 4, 5], choices=range(1, 6), help="of each kind")
    add("--seed", type=int, default=0, help="of the corruptions")
    add("--output", type=Path, required=True, help="means and all measures (.json)")
    add("--table", type=Path, help="mIoU by kind and severity (.tsv)")
    add("--picture", type=Path, help="an image in all kinds at the highest severity, with its prediction (.png)")
    arguments = parser.parse_args(hyphenated(sys.argv[1:]))
    from dinoscope.segment.questions import question_of  # torch takes its time
    from dinoscope.segment.robustness import corruptions_run

    corruptions_run(
        question_of(arguments),
        arguments.output,
        kinds=arguments.kinds,
        severities=arguments.severities,
        seed=arguments.seed,
        table=arguments.table,
        picture=arguments.picture,
    )


if __name__ == "__main__":
    run_script(main)
