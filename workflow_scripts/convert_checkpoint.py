"""Turns a training checkpoint (a DCP folder) into one torch file that every tool can open, and a model card beside it.

Reads only the tensors that are wanted, on the CPU, without a process group; a run that is still training can be
converted from its newest complete checkpoint.
"""

import argparse
from pathlib import Path

from dinoscope.cli import HelpFormatter, run_script


def main() -> None:
    """Writes teacher.pth and, beside it, model.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--checkpoint", required=True, type=Path, help="final.json of a run, its folder, or one folder ckpt/<it> of it"
    )
    parser.add_argument("--output", required=True, type=Path, help="file to write, e.g. models/pretrain/teacher.pth")
    parser.add_argument("--branch", default="teacher", choices=("teacher", "student"), help="which network")
    arguments = parser.parse_args()
    from dinoscope.export.convert import convert_checkpoint

    convert_checkpoint(arguments.checkpoint, arguments.output, arguments.branch)


if __name__ == "__main__":
    run_script(main)
