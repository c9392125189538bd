"""Turns a training checkpoint (a DCP folder) into files that every tool can open, and a model card beside them.

Takes runs of dinoscope and checkpoints laid out as the published DINOv3 trainer writes them. Reads only the tensors
that are wanted, on the CPU, without a process group; a run that is still training is converted from its newest
complete checkpoint.
"""

import argparse
from pathlib import Path

from dinoscope.cli import HelpFormatter, run_script


def main() -> None:
    """Writes teacher.pth and, beside it, teacher.safetensors and model.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        help="a run's final.json or folder, a folder ckpt/<it>, or a sharded teacher export",
    )
    parser.add_argument("--output", required=True, type=Path, help="file to write, e.g. models/pretrain/teacher.pth")
    branches = ("teacher", "student", "all")
    parser.add_argument(
        "--branch", default="teacher", choices=branches, help="which network; all: every one, with its heads"
    )
    parser.add_argument("--heads", action="store_true", help="the heads of that network, too")
    arguments = parser.parse_args()
    from dinoscope.export.convert import convert_checkpoint

    convert_checkpoint(arguments.checkpoint, arguments.output, arguments.branch, heads=arguments.heads)


if __name__ == "__main__":
    run_script(main)
