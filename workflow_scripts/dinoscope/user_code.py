"""Classes and functions of the user's own, named module:Name or FILE.py:name, and their errors in one line."""

import hashlib
import importlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["function_file", "is_class_name", "is_function_name", "load_class", "load_function", "told"]

_CLASS_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_FUNCTION_OF_FILE = re.compile(r".+\.py:[^\W\d]\w*")


def is_class_name(name: str) -> bool:
    """Whether `name` reads module:Class."""
    return bool(_CLASS_NAME.fullmatch(name))


def load_class(name: str) -> type:
    """The class; its module lies in the working directory or is installed. Raises whatever importing it raises."""
    module, _, class_name = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return getattr(importlib.import_module(module), class_name)


def is_function_name(name: str) -> bool:
    """Whether `name` reads module:function or path/to/file.py:function."""
    return is_class_name(name) or bool(_FUNCTION_OF_FILE.fullmatch(name))


def function_file(name: str) -> Path | None:
    """The file that a function comes from, as far as that can be told without importing anything.

    A module is looked for in the working directory alone; what is installed has a version of its own.
    """
    module, _, _ = name.rpartition(":")
    if module.endswith(".py"):
        return Path(module)
    path = Path(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def load_function(name: str) -> Callable[..., Any]:
    """The function of a module, or of a file, which gets a module name of its own. Raises whatever importing raises."""
    module, _, function_name = name.rpartition(":")
    if not module.endswith(".py"):
        return load_class(name)
    path = Path(module).resolve()
    if str(path.parent) not in sys.path:  # files beside it can be imported
        sys.path.insert(0, str(path.parent))
    unique = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(unique, path)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[unique] = loaded
    spec.loader.exec_module(loaded)
    return getattr(loaded, function_name)


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
