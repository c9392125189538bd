"""Curves of one or more training runs: losses, schedules, gradient norms, throughput, signs of collapse.

    python workflow_scripts/plot_metrics.py --metrics results/runs/pretrain results/runs/gram --output curves.png

Reads what this trainer and the published one write, also while a run is going on, from the folder of a run or from a
file alone. A run is called by its folder, a file that is not called training_metrics.json by its own name. Thin
vertical lines mark restarts, extensions and updates of the gram teacher, ticks at the bottom skipped steps and losses
that are no finite numbers. Quantities that are not known here are drawn last, under their names in the file.
"""

import argparse
from pathlib import Path

from dinoscope.cli import HelpFormatter, run_script
from dinoscope.errors import RunError
from dinoscope.train.metrics import METRICS_NAME, read_metrics
from dinoscope.visualize.curves import save_curves


def run_name(path: Path) -> str:
    """What the run of a folder or file is called."""
    if path.is_dir() or path.name == METRICS_NAME:
        return (path if path.is_dir() else path.parent).resolve().name or "run"
    return path.stem


def main() -> None:
    """Reads the metrics and draws them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--metrics", nargs="+", type=Path, required=True, help="folders of runs, or training_metrics.json files")
    add("--output", type=Path, required=True, help="picture to write: .png, .svg or .pdf")
    arguments = parser.parse_args()
    runs = {}
    for path in arguments.metrics:
        name = run_name(path)
        if name in runs:
            raise RunError(f"{path}: there are two runs called {name!r}; rename a folder or draw them one by one")
        runs[name] = read_metrics(path)
    save_curves(runs, arguments.output)


if __name__ == "__main__":
    run_script(main)
