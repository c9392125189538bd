"""Options of a user's as the fields of a dataclass: values of other kinds are refused before they are met deep inside.

Nothing here imports torch.
"""

import types
import typing
from collections.abc import Mapping
from typing import Any

from dinoscope.errors import ConfigError

__all__ = ["fitted"]

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", types.NoneType: "nothing"}


def fitted(settings: type, values: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Values as the fields of a dataclass want them: lists as tuples, whole numbers as texts where texts are wanted.

    Args:
        settings: The dataclass.
        values: By names of its fields.
        what: What messages call a field, such as "augmentation.".

    Raises:
        ConfigError: A value is of another kind; names the field, the value and what is wanted.
    """
    hints = typing.get_type_hints(settings)
    made = {}
    for name, value in values.items():
        try:
            made[name] = _as(value, hints[name])
        except TypeError:
            raise ConfigError(f"{what}{name} is {value!r}; {_in_words(hints[name])} is wanted") from None
    return made


def _as(value: Any, hint: Any) -> Any:
    """Raises TypeError when the value is of another kind than the hint."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if type(value) in parts:
            return value
        fitting = [part for part in parts if _fits(value, part)]
        return _as(value, fitting[0] if fitting else parts[0])
    if origin is tuple and isinstance(value, list | tuple) and len(value) == len(parts):
        return tuple(_as(item, part) for item, part in zip(value, parts, strict=True))
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return value
    if hint is str and type(value) is int:  # YAML's 2012
        return str(value)
    if type(value) is hint or (hint is float and type(value) is int):
        return value
    raise TypeError(value)


def _fits(value: Any, hint: Any) -> bool:
    try:
        _as(value, hint)
    except TypeError:
        return False
    return True


def _in_words(hint: Any) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_in_words(part) for part in parts)
    if origin is tuple:
        return f"[{', '.join(_in_words(part) for part in parts)}]"
    return _WORDS.get(hint, "a mapping {key: value}")
