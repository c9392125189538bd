"""One table of all segmenters that were measured, in the shape of dinov2-finetune's tables.

    python workflow_scripts/segment_compare.py --evaluations results/segmentation/*/*/*/evaluation.json \\
        --output comparison.tsv --runs-output runs.tsv
"""

import argparse
from pathlib import Path

from dinoscope.cli import HelpFormatter, run_script
from dinoscope.segment.tables import write_comparison


def main() -> None:
    """Reads and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, fromfile_prefix_chars="@")
    parser.add_argument(
        "--evaluations",
        nargs="+",
        type=Path,
        required=True,
        help="of segment_evaluate.py; what segment_corruptions.py wrote as corruptions.json beside one is taken in",
    )
    parser.add_argument("--output", type=Path, required=True, help="a row a task, encoder and method (.tsv)")
    parser.add_argument("--runs-output", type=Path, required=True, help="a row a training (.tsv)")
    arguments = parser.parse_args()
    write_comparison(arguments.evaluations, arguments.output, arguments.runs_output)


if __name__ == "__main__":
    run_script(main)
