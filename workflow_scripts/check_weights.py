"""Says what a model file is: its kind, architecture and settings, and the recipe section that fits it.

With --config it says whether a recipe fits the file, too. Exit code 0: readable, and it fits; 1: not.
"""

import argparse
from pathlib import Path

from dinoscope.cli import HelpFormatter, run_script


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("file", type=Path, help="model file or folder, any kind that MODEL.WEIGHTS takes")
    parser.add_argument("--config", type=Path, help="recipe of a run (YAML)")
    arguments = parser.parse_args()
    from dinoscope.export.describe import describe_file, describe_fit, fitting_sections
    from dinoscope.models.weights import read_model_file
    from dinoscope.recipe import load_recipe

    file = read_model_file(arguments.file)
    print(describe_file(file))
    print(f"\nA recipe that starts from it says:\n\n{fitting_sections(file)}")
    if arguments.config is not None:
        notes = list(describe_fit(file, load_recipe(arguments.config, [f"MODEL.WEIGHTS={arguments.file}"])))
        print("\n".join([f"\n{arguments.config} fits this file", *(f"note: {note}" for note in notes)]))


if __name__ == "__main__":
    run_script(main)
