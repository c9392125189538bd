"""Classes of the user's own, named module:Class in config or recipe, and their errors in one line."""

import importlib
import os
import re
import sys
import traceback
from pathlib import Path

__all__ = ["is_class_name", "load_class", "told"]

_CLASS_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def is_class_name(name: str) -> bool:
    """Whether `name` reads module:Class."""
    return bool(_CLASS_NAME.fullmatch(name))


def load_class(name: str) -> type:
    """The class; its module lies in the working directory or is installed. Raises whatever importing it raises."""
    module, _, class_name = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return getattr(importlib.import_module(module), class_name)


def told(error: Exception, called_from: str) -> str:
    """An error of the user's code in one line, with the place it came from.

    Args:
        error: What was raised.
        called_from: The module (`__file__`) that called the user's code; its own lines are passed over.
    """
    stack = traceback.extract_tb(error.__traceback__)
    ours = (called_from, __file__)
    frames = [frame for frame in stack if frame.filename not in ours and not frame.filename.startswith("<")]
    own = [frame for frame in frames if frame.filename.startswith(os.getcwd())] or frames
    place = f" ({Path(own[-1].filename).name} line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"
