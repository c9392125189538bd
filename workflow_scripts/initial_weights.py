"""Makes the starting weights of a workflow, which every run begins with and which "base" features come from.

Takes the recipe's MODEL.WEIGHTS if there is one, else initialises the recipe's backbone from train.seed.
"""

import argparse
from pathlib import Path

from dinoscope.cli import HelpFormatter, run_script


def main() -> None:
    """Writes teacher.pth and, beside it, model.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--config", required=True, type=Path, help="recipe of the run (YAML)")
    parser.add_argument("--output", required=True, type=Path, help="teacher.pth to write")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the recipe")
    arguments = parser.parse_args()
    from dinoscope.export.convert import write_initial_weights
    from dinoscope.recipe import load_recipe, require_weights

    config = load_recipe(arguments.config, arguments.overrides)
    require_weights(arguments.config, config)
    write_initial_weights(config, arguments.output)


if __name__ == "__main__":
    run_script(main)
