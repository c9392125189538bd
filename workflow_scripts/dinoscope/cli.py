"""What all scripts share: one sentence instead of a traceback when the input is wrong, plain log lines."""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable

from dinoscope.errors import DinoscopeError

__all__ = ["ERROR_FILE_VARIABLE", "HelpFormatter", "record_error", "run_script"]

ERROR_FILE_VARIABLE = "DINOSCOPE_ERROR_FILE"  # launch.py reads there what its processes died of


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the layout of the description and shows every default."""


def record_error(sentence: str) -> None:
    """Leaves the reason why one of several processes ends to the launcher; the first one counts."""
    if error_file := os.environ.get(ERROR_FILE_VARIABLE):
        with contextlib.suppress(FileExistsError), open(error_file, "x", encoding="utf-8") as file:
            file.write(sentence)


def run_script(main: Callable[[], None]) -> None:
    """Runs `main` and exits: 0 when it returns, 1 with one sentence on stderr for a user's error.

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
        record_error(str(error))
        sys.exit(1)
