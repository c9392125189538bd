"""Hints for mistyped names."""

import difflib
from collections.abc import Iterable

__all__ = ["nearest"]


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean X?" with the most similar known name, or nothing if none is similar."""
    matches = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {matches[0]}?" if matches else ""
