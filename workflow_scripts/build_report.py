"""One self-contained HTML report of a results folder: slides, training curves, PCA maps, settings, versions.

    python workflow_scripts/build_report.py --results results --models base pretrain gram --runs pretrain gram \\
        --output results/report.html

Stages that have not run yet are left out.
"""

import argparse
from pathlib import Path

from dinoscope.cli import HelpFormatter, run_script
from dinoscope.errors import ConfigError
from dinoscope.visualize.report import MAX_SLIDES_SHOWN, build_report


def main() -> None:
    """Builds the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--results", type=Path, required=True, help="folder of the results")
    add("--models", nargs="*", default=[], help="models in the order of their maps, e.g. base pretrain gram")
    add("--runs", nargs="*", default=[], help="training runs, e.g. pretrain gram")
    add("--regions", nargs="*", help="regions shown at the scale of cells; all that there are when not given")
    add("--tasks", nargs="*", help="tasks of segmentation that are shown; all that there are when not given")
    add("--workflow-config", type=Path, help="config.yaml of the workflow, shown without its paths")
    add("--max-slides", type=int, default=MAX_SLIDES_SHOWN, help="slides shown with pictures, evenly chosen")
    add("--output", type=Path, required=True, help="the HTML file to write")
    arguments = parser.parse_args()
    if not arguments.results.is_dir():
        raise ConfigError(f"{arguments.results}: no such folder; give the folder of the workflow's results")
    build_report(
        arguments.results,
        arguments.models,
        arguments.runs,
        arguments.output,
        workflow_config=arguments.workflow_config,
        max_slides=arguments.max_slides,
        regions=arguments.regions,
        tasks=arguments.tasks,
    )


if __name__ == "__main__":
    run_script(main)
