"""Merges the adapters of a trained segmentation model into its encoder, for tools that know no adapters.

The folder then holds the encoder (of a backbone of ours teacher.pth, which everything here opens and export_model.py
turns into other formats) and the decoder, and is given both as --segmenter and as --encoder:

    export_segmenter.py --segmenter results/segmentation/nuclei --encoder teacher.pth --output merged
    segment_predict_slide.py --segmenter merged --encoder merged …
"""

import argparse
from pathlib import Path

from dinoscope.cli import HelpFormatter, run_script


def main() -> None:
    """Writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--segmenter", required=True, type=Path, help="folder of a trained model, or a .pt file of dinov2-finetune"
    )
    parser.add_argument("--encoder", required=True, type=Path, help="file or folder that it was trained on")
    parser.add_argument("--output", required=True, type=Path, help="folder to write; an earlier export is replaced")
    arguments = parser.parse_args()
    from dinoscope.segment.export import export_merged

    export_merged(arguments.segmenter, arguments.encoder, arguments.output)


if __name__ == "__main__":
    run_script(main)
