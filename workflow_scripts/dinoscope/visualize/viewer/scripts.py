"""Data as JavaScript files: all that a page which was opened from disk may load besides pictures.

Browsers let such a page read no other file (no fetch, no XMLHttpRequest), but they run scripts. So each file is one
call, `viewerData(KIND, KEY, {…})`, of a function of the page. Numbers are base64 of little-endian arrays.
"""

import base64
import json
import os
from typing import Any

import numpy as np

from dinoscope.files import write_text

__all__ = ["as_json", "packed", "read_script", "write_script"]

_CALL = "viewerData("


def as_json(value: Any) -> str:
    """JSON that may stand inside a script of an HTML page as well; NaN is refused."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def packed(array: np.ndarray) -> str:
    """Base64 of an array's numbers, row by row, little-endian."""
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return base64.b64encode(little.tobytes()).decode()


def write_script(path: str | os.PathLike[str], kind: str, key: str, value: Any) -> None:
    """Writes a file that hands `value` to the page.

    Args:
        path: The .js file.
        kind: "pyramid", "tiles" or "sample".
        key: What it is of: a slide, a model, or both ("model/slide").
        value: Anything that JSON can hold.
    """
    write_text(path, f"{_CALL}{as_json(kind)},{as_json(key)},{as_json(value)});\n")


def read_script(path: str | os.PathLike[str]) -> tuple[str, str, Any]:
    """Kind, key and value of a file that `write_script` wrote."""
    with open(path, encoding="utf-8") as file:
        text = file.read().strip()
    kind, key, value = json.loads(f"[{text.removeprefix(_CALL).removesuffix(');')}]")
    return kind, key, value
