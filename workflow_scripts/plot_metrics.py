"""Curves of one or more training runs: losses, schedules, gradient norms, throughput, signs of collapse.

    python workflow_scripts/plot_metrics.py --metrics results/runs/pretrain/training_metrics.json \\
        results/runs/gram/training_metrics.json --output curves.png

A run is called by its folder. Reading a run that is still going on is fine. Thin vertical lines mark restarts,
extensions and updates of the gram teacher, ticks at the bottom skipped steps.
"""

import argparse
from pathlib import Path

from dinoscope.cli import HelpFormatter, run_script
from dinoscope.errors import RunError
from dinoscope.train.metrics import read_metrics
from dinoscope.visualize.curves import save_curves


def main() -> None:
    """Reads the metrics and draws them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--metrics", nargs="+", type=Path, required=True, help="training_metrics.json files, or folders of runs")
    add("--output", type=Path, required=True, help="picture to write: .png, .svg or .pdf")
    arguments = parser.parse_args()
    runs = {}
    for path in arguments.metrics:
        name = (path if path.is_dir() else path.parent).resolve().name
        if name in runs:
            raise RunError(f"{path}: there are two runs called {name!r}; rename a folder or draw them one by one")
        runs[name] = read_metrics(path)
    save_curves(runs, arguments.output)


if __name__ == "__main__":
    run_script(main)
