"""What the configured run will take, before its first job: tiles, disk space, GPU memory, hours, number of jobs.

    python workflow_scripts/budget.py --config config/config.yaml
    python workflow_scripts/budget.py --config config/config.yaml --gpu h100 --gpus 16 --gpus-per-machine 8
    python workflow_scripts/budget.py --config config/config.yaml --measure

Tiles are counted where slides are tiled, else estimated from the tissue on the thumbnails of inspected slides
(snakemake inspect), else from their size. Ends with status 1 and a sentence that says which setting to change when disk
space, quota or GPU memory are short. Also written as RESULTS/budget.tsv and budget.json.
"""

import argparse
import sys
from pathlib import Path

import yaml

from dinoscope.cli import HelpFormatter, run_script
from dinoscope.errors import ConfigError
from dinoscope.files import write_json, write_text

_WORKFLOW = Path(__file__).resolve().parents[1]


def main() -> None:
    """Parses the command line, writes and prints the budget."""
    arguments = _parser().parse_args()
    from dinoscope.budget.budget import make_budget
    from dinoscope.budget.report import as_table, as_tsv, shortages
    from dinoscope.plan import make_plan

    try:
        config = yaml.safe_load(arguments.config.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {arguments.config} cannot be read ({error}); give the workflow's config") from None
    plan = make_plan(config, _WORKFLOW, check_files=False)
    groups = dict(part.split("=", 1) for part in arguments.group)
    profiles = arguments.profile or sorted((_WORKFLOW / "profiles").iterdir())
    budget = make_budget(
        plan, groups=groups, profiles=profiles, gpu=arguments.gpu, gpus=arguments.gpus,
        per_machine=arguments.gpus_per_machine, measured=arguments.measure,
    )  # fmt: skip
    print(as_table(budget))
    sys.stdout.flush()
    folder = arguments.output_dir or plan.results
    write_text(folder / "budget.tsv", as_tsv(budget))
    write_json(folder / "budget.json", budget.as_dict())
    short = shortages(budget)
    if short:
        raise ConfigError("\nerror: ".join(short))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="config of the workflow (YAML or JSON)")
    parser.add_argument("--output-dir", type=Path, help="where budget.tsv and budget.json go (default: the results)")
    parser.add_argument("--gpu", metavar="KIND", help="GPUs that the run will have, such as a100 (default: as here)")
    parser.add_argument("--gpus", type=int, metavar="N", help="their number, over all machines")
    parser.add_argument("--gpus-per-machine", type=int, metavar="N", help="of them on a machine (default: all)")
    parser.add_argument("--measure", action="store_true", help="time a few passes of the backbone on this machine")
    parser.add_argument(
        "--profile", type=Path, nargs="+", metavar="DIR", help="profiles whose submitted jobs are counted"
    )
    parser.add_argument(
        "--group", nargs="+", default=[], metavar="RULE=GROUP", help="groups of the workflow's rules, or local"
    )
    return parser


if __name__ == "__main__":
    run_script(main)
