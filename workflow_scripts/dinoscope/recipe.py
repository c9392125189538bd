"""From a recipe's YAML file to the checked settings of a training run.

A recipe holds only what differs from the defaults in config.py:

    extends: vits16_lvd.yaml        # one parent, relative to this file; no cycles
    train: {batch_size_per_gpu: 32}

YAML files of the published trainer load as they are. Nothing here imports torch.
"""

import dataclasses
import difflib
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dinoscope.config import RunConfig
from dinoscope.errors import ConfigError
from dinoscope.recipe_checks import check_recipe
from dinoscope.recipe_keys import IGNORED_KEYS, ONLY_VALUES, REPLACED_BY_SCHEDULES

__all__ = ["flatten", "load_recipe", "recipe_chain", "require_weights", "resolve_recipe"]

_log = logging.getLogger(__name__)
# How published recipes name a data set, e.g. ImageNet:split=TRAIN.
_PUBLISHED_DATASET = re.compile(r"\w+(:\w+=[^:]*)+")


def recipe_chain(path: str | Path) -> list[Path]:
    """The recipe file and the files it extends, the most basic first.

    Raises:
        ConfigError: A file is missing, is not YAML, or the chain comes back to itself.
    """
    chain: list[Path] = []
    current: Path | None = Path(path)
    while current is not None:
        if current.resolve() in (seen.resolve() for seen in chain):
            raise ConfigError(f"{path}: `extends` comes back to {current.name}; a recipe cannot extend itself")
        if chain and not current.is_file():
            raise ConfigError(f"recipe {chain[-1]} extends {current.name}, but {current} does not exist")
        chain.append(current)
        parent = _read_yaml(current).get("extends")
        current = current.parent / str(parent) if parent is not None else None
    return chain[::-1]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a recipe with all that it extends into checked settings.

    Args:
        path: The recipe's YAML file.
        overrides: `key=value` pairs as on a command line, e.g. `optim.lr=1e-4`; they win over the files.

    Returns:
        An OmegaConf object with the fields of RunConfig, read-only, wherever no file says otherwise at its defaults.

    Raises:
        ConfigError: An unknown key (with the nearest known one), a wrong type or value, or settings that exclude each
            other.
    """
    layers = []
    for file in recipe_chain(path):
        layer = _read_yaml(file)
        layer.pop("extends", None)
        layers.append((file.name, layer))
    layers += [("the command line", _parse_override(text)) for text in overrides]
    return resolve_recipe(layers, Path(path).name)


def resolve_recipe(layers: Iterable[tuple[str, dict[str, Any]]], name: str) -> RunConfig:
    """Merges nested dictionaries, each with the name of where it came from, over the defaults and checks the result."""
    merged = OmegaConf.structured(RunConfig)
    left_null: dict[str, str] = {}
    for source, layer in layers:
        known = _honoured(layer, source)
        left_null |= {
            key: source for key, value in flatten(layer).items() if value is None and key in REPLACED_BY_SCHEDULES
        }
        try:
            merged = OmegaConf.merge(merged, known)
        except OmegaConfBaseException as error:
            raise ConfigError(_type_sentence(error, known, source)) from None
    for key, source in left_null.items():
        if merged.schedules is None:
            raise ConfigError(
                f"{source}: {key} is null, but there is no section `schedules` to replace it; give a number"
            )
    check_recipe(merged, flatten(merged), name)
    OmegaConf.set_readonly(merged, True)
    return merged


def require_weights(recipe: str | Path, config: RunConfig) -> None:
    """Refuses a recipe without weights that is made for some.

    That is one made for published weights (it, or one that it extends, is named *_lvd), or one that trains only a part
    of the backbone.

    Raises:
        ConfigError: Says what to set.
    """
    if not config.MODEL.WEIGHTS and config.student.trainable != "full":
        raise ConfigError(
            f"recipe {recipe}: student.trainable {config.student.trainable} leaves most of the backbone as it is, but "
            "MODEL.WEIGHTS is empty: name the weights to start from, or set student.trainable to full"
        )
    made_for = [path for path in recipe_chain(recipe) if path.stem.endswith("_lvd")]
    if made_for and not config.MODEL.WEIGHTS:
        raise ConfigError(
            f"recipe {recipe} continues from published weights, but MODEL.WEIGHTS is empty: set it to the file "
            f"(docs/weights.md says where to get it); to start from scratch, extend a copy of {made_for[-1].name} "
            "under a name without _lvd"
        )


def flatten(config: Any) -> dict[str, Any]:
    """Dotted key -> value of an OmegaConf object or nested dictionary; lists and None are values."""
    container = OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config
    return dict(_items(container, ""))


def _items(node: dict[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        what = "is a folder; give a file, in the folder of a run its config.yaml" if path.is_dir() else "does not exist"
        raise ConfigError(f"recipe {path} {what}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_RecipeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content or {}, dict):
        raise ConfigError(f"recipe {path} must hold keys and values, but holds a {type(content).__name__}")
    return content or {}


class _RecipeLoader(yaml.SafeLoader):
    """Reads 1e-4 as a number (YAML 1.1 takes it for text) and refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"key {key!r} stands twice in line {node.start_mark.line + 1} or below")
        return super().construct_mapping(node, deep)


_FLOAT = r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"
_RecipeLoader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
yaml.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+.0123456789"), Loader=_RecipeLoader)


def _parse_override(text: str) -> dict[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ConfigError(f"cannot read override {text!r}: write key=value, e.g. optim.lr=1e-4")
    try:
        nested: Any = yaml.load(value, Loader=_RecipeLoader)
    except yaml.YAMLError:
        raise ConfigError(f"cannot read override {text!r}: its value is not valid YAML") from None
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return nested


def _honoured(layer: dict[str, Any], source: str) -> dict[str, Any]:
    """The keys of a layer that the schema has; published keys without effect are dropped, all others refused."""
    for key, value in flatten(layer).items():
        if key in ONLY_VALUES and value != (only := ONLY_VALUES[key]).value:
            raise ConfigError(f"{source}: {key} is {value!r}, but only {only.value!r} is supported: {only.instead}")
    return _strip(layer, RunConfig, "", source)


def _strip(layer: dict[str, Any], schema: type, prefix: str, source: str) -> dict[str, Any]:
    fields = {f.name: _section(f.type) for f in dataclasses.fields(schema)}
    kept = {}
    for key, value in layer.items():
        dotted = f"{prefix}{key}"
        if key in fields and fields[key] is not None and value is not None:
            if not isinstance(value, dict):
                raise ConfigError(f"{source}: {dotted} holds keys of its own, but is {value!r}")
            kept[key] = _strip(value, fields[key], f"{dotted}.", source)
        elif key in fields:
            if not _says_nothing(dotted, value, source):
                kept[key] = value
        elif not _has_no_effect(dotted, value, source):
            raise ConfigError(f"{source}: unknown key {dotted}{_nearest(dotted)}")
    return kept


def _says_nothing(key: str, value: Any, source: str) -> bool:
    """Values of published recipes that stand for "not given here"."""
    if key == "train.dataset_path" and _PUBLISHED_DATASET.fullmatch(str(value)):
        _log.info("%s: %s %s has no effect here (it names a data set of the published trainer)", source, key, value)
        return True
    return value is None and key in REPLACED_BY_SCHEDULES


def _section(annotation: Any) -> type | None:
    """The dataclass in an annotation such as `X` or `X | None`, if there is one."""
    candidates = getattr(annotation, "__args__", (annotation,))
    return next((c for c in candidates if dataclasses.is_dataclass(c)), None)


def _has_no_effect(dotted: str, value: Any, source: str) -> bool:
    """Whether all keys of a value are ones without effect; those that had one elsewhere are named in the log."""
    keys = flatten({dotted: value}) if isinstance(value, dict) else {dotted: value}
    ignored = {key: _ignored_under(key) for key in keys if key not in ONLY_VALUES}
    if None in ignored.values():
        return False
    for name in dict.fromkeys(ignored.values()):
        _log.info("%s: %s has no effect here (%s)", source, name, IGNORED_KEYS[name])
    return True


def _ignored_under(key: str) -> str | None:
    return next((name for name in IGNORED_KEYS if key == name or key.startswith(f"{name}.")), None)


def _nearest(dotted: str) -> str:
    known = [*_known_keys(RunConfig, ""), *ONLY_VALUES, *IGNORED_KEYS]
    leaf = dotted.rpartition(".")[2]
    same_leaf = [key for key in known if key.rpartition(".")[2] == leaf]
    matches = (
        difflib.get_close_matches(dotted, known, 1, 0.75)
        or same_leaf[:1]
        or (difflib.get_close_matches(dotted, known, 1) if "." not in dotted else [])
    )
    if matches:
        return f"; did you mean {matches[0]}?"
    section = dotted.rpartition(".")[0]
    siblings = [key.rpartition(".")[2] for key in _known_keys(RunConfig, "") if key.rpartition(".")[0] == section]
    return f"; {section} has {', '.join(siblings)}" if siblings else ""


def _known_keys(schema: type, prefix: str) -> Iterable[str]:
    for entry in dataclasses.fields(schema):
        yield prefix + entry.name
        if (section := _section(entry.type)) is not None:
            yield from _known_keys(section, f"{prefix}{entry.name}.")


_WANTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _type_sentence(error: OmegaConfBaseException, layer: dict[str, Any], source: str) -> str:
    key = re.sub(r"\[\d+\]$", "", error.full_key or "?")
    value = flatten(layer).get(key, "?")
    return f"{source}: {key} is {value!r}; wanted is {_wanted(key)}"


def _wanted(key: str) -> str:
    """What the schema says a key holds, in words."""
    annotation: Any = RunConfig
    for part in key.split("."):
        section = _section(annotation) or annotation
        annotation = {f.name: f.type for f in dataclasses.fields(section)}[part]
    kinds = [kind for kind in getattr(annotation, "__args__", (annotation,)) if kind is not type(None)]
    optional = " or null" if type(None) in getattr(annotation, "__args__", ()) else ""
    if getattr(annotation, "__origin__", None) is list or getattr(kinds[0], "__origin__", None) is list:
        item = (getattr(kinds[0], "__args__", None) or kinds)[0]
        return f"a list, each {_WANTED[item]}{optional}"
    return _WANTED.get(kinds[0], "a section with keys of its own") + optional
