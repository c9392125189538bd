"""A JSON schema's verdict in sentences that a person can act on, with its defaults filled in."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from dinoscope.errors import ConfigError
from dinoscope.names import nearest

__all__ = ["problems", "read_schema", "with_defaults"]

_TYPES = {
    "array": "a list",
    "boolean": "true or false",
    "integer": "a whole number",
    "null": "null",
    "number": "a number",
    "object": "a section with keys of its own",
    "string": "text",
}


def read_schema(path: Path) -> dict[str, Any]:
    """Reads a JSON schema (draft 2020-12) from a YAML file.

    Raises:
        ConfigError: The file is missing.
    """
    try:
        # planning waits for it: the parser in C takes a tenth of the time
        return yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing; restore it, it belongs to the workflow") from None


def with_defaults(value: Any, schema: dict[str, Any]) -> Any:
    """A copy of `value` with missing keys, at every level, set to the schema's defaults; all keys become text.

    A section left empty counts as missing. What does not fit the schema is kept as it is, for `problems` to name.
    """
    if value is None and schema.get("type") == "object":
        value = copy.deepcopy(schema.get("default", {}))
    if not isinstance(value, dict):
        return value
    filled = {str(key): child for key, child in value.items()}
    parts = dict(schema.get("properties", {}))
    for part in schema.get("patternProperties", {}).values():
        parts |= {key: part for key in filled if key not in parts}
    for key, part in parts.items():
        if key in filled or "default" in part:
            filled[key] = with_defaults(filled.get(key, copy.deepcopy(part.get("default"))), part)
    return filled


def problems(value: Any, schema: dict[str, Any]) -> list[str]:
    """One sentence for each place where `value` breaks the schema: the key, what it is and what it must be.

    The schema may use type, enum, anyOf, bounds, lengths, pattern, items, minItems, uniqueItems, required,
    minProperties, properties, patternProperties and additionalProperties: false.
    """
    errors = sorted(Draft202012Validator(schema).iter_errors(value), key=lambda error: [*map(str, error.absolute_path)])
    return [sentence for error in errors for sentence in _sentences(error, schema)]


def _sentences(error: ValidationError, root: dict[str, Any]) -> Iterator[str]:
    key = ".".join(map(str, error.absolute_path))
    if error.validator == "additionalProperties":
        yield from _unknown_keys(error, key, root)
    elif error.validator == "required":
        missing = next(name for name in error.validator_value if name not in error.instance)
        about = error.schema["properties"][missing].get("description", "")
        yield f"{_join(key, missing)} is missing; give it: {about}"
    else:
        about = error.schema.get("description", "")
        hint = _text_hint(error.instance)
        yield f"{key} is {_shown(error.instance)}, but must be {_wanted(error)}{hint}" + (
            f" ({about})" if about else ""
        )


def _text_hint(value: Any) -> str:
    """A hint where a number or the like was given as text, as Snakemake passes on what stands in braces."""
    try:
        is_more = isinstance(value, str) and value and not isinstance(yaml.safe_load(value), str)
    except yaml.YAMLError:
        is_more = False
    return "; within braces --config makes texts of all values, so write it into a --configfile" if is_more else ""


def _unknown_keys(error: ValidationError, key: str, root: dict[str, Any]) -> Iterator[str]:
    known = list(error.schema.get("properties", {}))
    named = "patternProperties" in error.schema
    for name in error.instance:
        if name in known:
            continue
        if named:
            pattern = next(iter(error.schema["patternProperties"]))
            if Draft202012Validator({"type": "string", "pattern": pattern}).is_valid(name):
                continue
            yield f"{_join(key, name)}: a name may hold letters, digits, _ and -, and starts with a letter or digit"
            continue
        hint = nearest(str(name), known) or _elsewhere(str(name), root)
        yield f"unknown key {_join(key, name)}{hint}" + ("" if hint else f"; known here: {', '.join(known)}")


def _elsewhere(name: str, root: dict[str, Any]) -> str:
    """A hint when a key of this name stands in another section."""
    dotted = [known for known in _known_keys(root, "") if known.rpartition(".")[2] == name]
    return f"; did you mean {dotted[0]}?" if dotted else ""


def _known_keys(schema: dict[str, Any], prefix: str) -> Iterator[str]:
    for key, part in schema.get("properties", {}).items():
        yield f"{prefix}{key}"
        yield from _known_keys(part, f"{prefix}{key}.")
    for part in schema.get("patternProperties", {}).values():
        yield from _known_keys(part, f"{prefix}NAME.")


def _wanted(error: ValidationError) -> str:
    value = error.validator_value
    match error.validator:
        case "type":
            kinds = [_TYPES[kind] for kind in ([value] if isinstance(value, str) else value)]
            return " or ".join(kinds)
        case "enum":
            return value[0] if len(value) == 1 else f"one of {', '.join(map(str, value))}"
        case "anyOf":
            return " or ".join(_wanted_by(option) for option in value)
        case "minimum":
            return f"at least {value}"
        case "exclusiveMinimum":
            return f"more than {value}"
        case "maximum":
            return f"at most {value}"
        case "minLength":
            return "given"
        case "minProperties":
            return "a section with at least one entry"
        case "minItems":
            return "a list with at least one entry"
        case "uniqueItems":
            return "a list without repeats"
    return f"as the schema says ({error.validator} {value})"


def _wanted_by(option: dict[str, Any]) -> str:
    if "enum" in option:
        return ", ".join(map(str, option["enum"]))
    return _TYPES[option["type"]] + (f" of at least {option['minimum']}" if "minimum" in option else "")


def _join(prefix: str, name: object) -> str:
    return f"{prefix}.{name}" if prefix else str(name)


def _shown(value: Any) -> str:
    return "empty" if value is None or value == "" else repr(value)
