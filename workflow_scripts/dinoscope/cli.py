"""What all scripts share: one sentence instead of a traceback when the input is wrong, plain log lines."""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from dinoscope.errors import DinoscopeError

__all__ = ["ERROR_FILE_VARIABLE", "HelpFormatter", "record_error", "recorded_error", "run_script"]

ERROR_FILE_VARIABLE = "DINOSCOPE_ERROR_FILE"  # launch.py reads there what its processes died of


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the layout of the description and shows every default."""


def record_error(sentence: str, status: int = 1) -> None:
    """Leaves to the launcher why one of several processes ends, and its exit status; the first one counts."""
    if error_file := os.environ.get(ERROR_FILE_VARIABLE):
        with contextlib.suppress(FileExistsError), open(error_file, "x", encoding="utf-8") as file:
            file.write(f"{status} {sentence}")


def recorded_error(error_file: Path) -> tuple[str, int] | None:
    """The sentence and the exit status that were left, None if there are none."""
    if not error_file.is_file():
        return None
    status, _, sentence = error_file.read_text(encoding="utf-8").partition(" ")
    return sentence, int(status or 1)


def run_script(main: Callable[[], None]) -> None:
    """Runs `main` and exits: 0 when it returns; with one sentence on stderr 1 for a user's error, 75 for "try again".

    Set DINOSCOPE_TRACEBACK=1 to see the traceback of a user's error as well. Any other exception is a defect of ours
    and keeps its traceback.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        main()
    except DinoscopeError as error:
        if os.environ.get("DINOSCOPE_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        record_error(str(error), error.exit_status)
        sys.exit(error.exit_status)
