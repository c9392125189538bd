"""Trains one run: DINOv3 self-supervised learning on tiles of slides or images, with or without gram anchoring.

One GPU box:     python workflow_scripts/launch.py -- workflow_scripts/pretrain.py ARGUMENTS
the same:        torchrun --standalone --nproc-per-node gpu workflow_scripts/pretrain.py ARGUMENTS
one process:     python workflow_scripts/pretrain.py ARGUMENTS
what it takes:   python workflow_scripts/pretrain.py ARGUMENTS --plan

A run resumes from its newest complete checkpoint when the same command is given again.
"""

import argparse
import functools
import os
from pathlib import Path

from dinoscope.cli import HelpFormatter, run_script


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--config", required=True, type=Path, help="recipe of the run (YAML)")
    parser.add_argument("--manifest", type=Path, help="merged tile manifest; none where the recipe names images")
    parser.add_argument("--slides", help="where the manifest's slides are: slides.tsv, a folder or a glob")
    parser.add_argument("--slide-reader", metavar="MODULE:CLASS", help="reader of your own, for other slide formats")
    parser.add_argument("--on-error", choices=("fail", "skip"), default="fail", help="skip: replace unreadable tiles")
    parser.add_argument("--skip-records", type=Path, metavar="DIR", help="where to write which slides have such tiles")
    parser.add_argument("--packed", type=Path, help="index of packed tiles, to read these and not the slides")
    parser.add_argument("--run-dir", required=True, type=Path, help="folder of the run; its name is the run's name")
    parser.add_argument("--weights", help="backbone file to start from; wins over the recipe's MODEL.WEIGHTS")
    parser.add_argument("--continues", type=Path, help="final.json of the run that is continued, optimizer included")
    parser.add_argument("--gram-teacher", help="last | iteration of an export of that run | exported teacher file")
    parser.add_argument(
        "--keep-exports", type=int, nargs="+", default=[], metavar="N", help="iterations whose exported teacher stays"
    )
    parser.add_argument("--name-hosts", action="store_true", help="names of machines go into provenance.json")
    parser.add_argument("--probe", type=Path, help="images that the teacher is asked about (evaluate.py probe)")
    parser.add_argument("--plan", action="store_true", help="print what the run will take, and change nothing")
    parser.add_argument("--processes", default="auto", help="with --plan: auto (as launch.py) | gpu | a number")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the recipe")
    return parser.parse_args()


def main() -> None:
    """Joins the process group and trains, or plans."""
    arguments = parse_arguments()
    from dinoscope.data.tiles import SlideAccess
    from dinoscope.recipe import load_recipe, require_weights
    from dinoscope.recipe_checks import check_processes
    from dinoscope.train.distributed import joined_world
    from dinoscope.train.starting import resolve_start
    from dinoscope.train.trainer import RunInputs, train_run

    config = load_recipe(arguments.config, arguments.overrides)
    if arguments.weights is None and arguments.continues is None:
        require_weights(arguments.config, config)
    start = functools.partial(resolve_start, config, arguments.weights, arguments.continues, arguments.gram_teacher)
    how = (arguments.slide_reader, arguments.on_error, arguments.skip_records, arguments.run_dir.name)
    inputs = RunInputs(
        config,
        arguments.manifest,
        arguments.slides,
        start,
        arguments.run_dir,
        tuple(arguments.keep_exports),
        SlideAccess(*how),
        arguments.packed,
        arguments.name_hosts,
        arguments.probe,
    )
    if arguments.plan:
        from dinoscope.train.planning import plan_run

        print(plan_run(inputs, arguments.config, arguments.overrides, arguments.processes))
        return
    check_processes(config, int(os.environ.get("WORLD_SIZE", 1)))
    with joined_world(config.train.hang_minutes) as world:
        train_run(inputs, world)


if __name__ == "__main__":
    run_script(main)
