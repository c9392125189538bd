"""A short trial of what adaptation is worth: table, curves, and one sentence of advice from what came of its arms.

The workflow plans the arms, trains and measures them: snakemake --cores all pilot. By hand, on what it left:
    python workflow_scripts/pilot.py summary --comparisons results/pilot/*/comparison.npz --runs results/runs \\
        --arms pilot-lora=lora=1e12 pilot-full=full=1.4e12 --table summary.tsv --curves curves.tsv \\
        --advice advice.txt --figure pilot.png
"""

import argparse
import logging
from pathlib import Path

from dinoscope.cli import HelpFormatter, run_script

_log = logging.getLogger(__name__)


def main() -> None:
    """Runs one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(required=True)
    add_summary(commands.add_parser("summary", help="table, curves and advice", formatter_class=HelpFormatter))
    arguments = parser.parse_args()
    arguments.run(arguments)


def add_summary(parser: argparse.ArgumentParser) -> None:
    """Options of `summary`."""
    add = parser.add_argument
    add("--comparisons", type=Path, nargs="+", required=True, help="files of evaluate.py compare, one a task")
    add("--runs", type=Path, required=True, help="folder of the runs")
    add(
        "--base",
        type=Path,
        metavar="FILE",
        help="the starting weights, which arms must have begun from",
    )
    add("--arms", nargs="+", required=True, metavar="RUN=TRAINED=FLOPS", help="arms, with operations of a step")
    add("--encoders", nargs="*", default=[], help="which of the models are of other origin")
    add("--baselines", nargs="*", default=[], help="which of them are no candidates")
    add("--starting-weights", choices=("published", "random"), default="published", help="what all arms start from")
    add("--primary", help="TASK/MEASURE that the advice rests on; the first linear probe when not given")
    add("--margin", type=float, default=0.02, help="differences below it do not matter")
    add("--table", type=Path, required=True, help="summary.tsv to write")
    add("--curves", type=Path, required=True, help="learning curves (.tsv) to write")
    add("--advice", type=Path, required=True, help="text file for the sentence; the report's .json lies beside it")
    add("--figure", type=Path, required=True, help="PNG to write")
    parser.set_defaults(run=summarise)


def summarise(arguments: argparse.Namespace) -> None:
    """Writes table, curves, figure and advice."""
    from dinoscope.evaluate.comparing import read_comparison
    from dinoscope.evaluate.pilot import Arm, advise, costs_of, read_curves, with_site, write_pilot
    from dinoscope.evaluate.pilot_figure import draw_pilot
    from dinoscope.evaluate.pilot_starts import check_starts
    from dinoscope.evaluate.verdicts import primary_of

    tasks = [read_comparison(path) for path in arguments.comparisons]
    primary = primary_of(tasks, arguments.primary)
    arms = [Arm.parse(text) for text in arguments.arms]
    if arguments.base is not None:
        check_starts(arguments.runs, arms, arguments.base)
    curves = read_curves(arguments.runs, arms)
    advice = advise(
        tasks,
        primary,
        arms,
        arguments.encoders,
        margin=arguments.margin,
        start=f"{arguments.starting_weights} weights",
    )
    sentence = with_site(advice, tasks, primary)
    kinds = dict.fromkeys(arguments.baselines, "baseline") | dict.fromkeys(arguments.encoders, "encoder")
    write_pilot(
        tasks,
        primary,
        arms,
        advice,
        curves,
        sentence=sentence,
        kinds=kinds,
        costs=costs_of(arguments.runs, arms),
        table=arguments.table,
        curves_file=arguments.curves,
        advice_file=arguments.advice,
    )
    draw_pilot(tasks, primary, arms, curves, arguments.figure, margin=arguments.margin)
    _log.info("%s", sentence)


if __name__ == "__main__":
    run_script(main)
