"""Measures a trained segmenter: mIoU, Dice, pixel accuracy and IoU of each class, from one confusion matrix.

    python workflow_scripts/segment_evaluate.py --segmenter results/segmentation/nuclei --dataset folder \\
        --data-root nuclei --data-option instance=nucleus --weights results/models/gram/teacher.pth \\
        --output evaluation.json --tables-dir tables --picture examples.png

--segmenter takes .pt files of dinov2-finetune as well; give --img-dim then.
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
    parser.add_argument("--model-name", help="what tables call the encoder, e.g. gram (default: its kind)")
    parser.add_argument("--output", type=Path, required=True, help="all measures (.json)")
    parser.add_argument("--classes-table", type=Path, help="IoU and Dice of each class (.tsv)")
    parser.add_argument("--images-table", type=Path, help="mIoU of each image (.tsv)")
    parser.add_argument("--picture", type=Path, help="image, truth, prediction and error of some images (.png)")
    parser.add_argument("--pictured", type=int, default=4, help="how many, from the worst to the best")
    arguments = parser.parse_args(hyphenated(sys.argv[1:]))
    from dinoscope.segment.questions import evaluate_run, question_of  # torch takes its time

    evaluate_run(
        question_of(arguments),
        arguments.output,
        model_name=arguments.model_name,
        classes_table=arguments.classes_table,
        images_table=arguments.images_table,
        picture=arguments.picture,
        pictured=arguments.pictured,
    )


if __name__ == "__main__":
    run_script(main)
