"""Writes a model for other tools (a Hugging Face folder, timm, ONNX) and checks that these give the same features.

The folder appears only if they do; verification.json in it says how far they are apart.
"""

import argparse
from pathlib import Path

from dinoscope.cli import HelpFormatter, run_script


def main() -> None:
    """Writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--weights", required=True, type=Path, help="model file or folder, any kind that MODEL.WEIGHTS takes"
    )
    parser.add_argument("--format", required=True, choices=("hf", "timm", "onnx"), help="what the model is written for")
    parser.add_argument("--output", required=True, type=Path, help="folder to write; an earlier export is replaced")
    arguments = parser.parse_args()
    from dinoscope.export.formats import export_model

    export_model(arguments.weights, arguments.format, arguments.output)


if __name__ == "__main__":
    run_script(main)
