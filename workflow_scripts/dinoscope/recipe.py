"""From a recipe's YAML file to the checked settings of a training run.

A recipe holds only what differs from the defaults in config.py:

    extends: vits16.yaml        # one parent, relative to this file; no cycles
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

__all__ = ["IGNORED_KEYS", "flatten", "load_recipe", "recipe_chain", "resolve_recipe"]

_log = logging.getLogger(__name__)

# Keys of the published trainer that have nothing to do here: read, named once in the log, without effect.
IGNORED_KEYS = {
    "MODEL.DEVICE": "the device is whatever the machine has",
    "MODEL.DTYPE": "see compute_precision",
    "evaluation.config_files": "evaluation belongs to the workflow",
    "evaluation.low_freq_every": "evaluation belongs to the workflow",
    "gram.compute_stats": "not measured",
    "optim.dump_fsdp_weights_path": "checkpoints hold the weights",
    "optim.multi_tensor_optim": "the optimizer always works on lists of tensors",
    "train.cache_dataset": "the manifest is memory-mapped",
    "train.dataset_path": "the workflow's manifest is the data set",
    "train.monitor_gradient_norm": "gradient norms are always logged",
    "train.output_dir": "the workflow's run folder is used",
    "train.saveckp_freq": "see checkpointing.period",
    "train.sharded_eval_checkpoint": "teacher exports are single files",
}

# Keys that are honoured at one value only.
_ONLY_VALUE = {
    "MODEL.META_ARCHITECTURE": "SSLMetaArch",
    "crops.global_local_crop_pairs_ratios": 1.0,
    "crops.localcrops_subset_of_globalcrops": False,
    "crops.share_color_jitter": False,
    "crops.teacher_to_student_resolution_scale": 1.0,
    "dino.force_weight_norm": False,
    "dino.head_norm_last_layer": False,
    "dino.koleo_distributed_replicas": 0,
    "dino.koleo_distributed_loss_group_data": True,
    "distillation.enabled": False,
    "distillation.checkpoint_path": "",
    "distillation.full_cfg_path": "",
    "hrft.enabled": False,
    "hrft.checkpoint_path": "",
    "ibot.force_masking_even_with_zero_weight": False,
    "ibot.head_norm_last_layer": False,
    "ibot.separate_head": True,
    "multidistillation.enabled": False,
    "student.ffn_ratio": 4.0,
    "student.fp8_enabled": False,
    "student.fp8_filter": "blocks",
    "student.pos_embed_type": "rope",
    "student.pretrained_weights": "",
    "student.resume_from_teacher_chkpt": "",
    "teacher.in_chans": 3,
    "train.centering": "sinkhorn_knopp",
    "train.chunk_schedule": [],
    "train.cudagraphs": False,
    "train.data_config": None,
    "train.learn_from_teacher_tokens": False,
    "train.use_teacher_head": True,
}


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
    for source, layer in layers:
        known = _honoured(layer, source)
        try:
            merged = OmegaConf.merge(merged, known)
        except OmegaConfBaseException as error:
            raise ConfigError(_type_sentence(error, known, source)) from None
    check_recipe(merged, flatten(merged), name)
    OmegaConf.set_readonly(merged, True)
    return merged


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
        raise ConfigError(f"recipe {path} does not exist")
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
        if key in _ONLY_VALUE and value != _ONLY_VALUE[key]:
            raise ConfigError(f"{source}: {key} is {value!r}, but only {_ONLY_VALUE[key]!r} is supported")
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
            kept[key] = value
        elif not _has_no_effect(dotted, value):
            raise ConfigError(f"{source}: unknown key {dotted}{_nearest(dotted)}")
        elif dotted in IGNORED_KEYS:
            _log.info("%s: %s has no effect here (%s)", source, dotted, IGNORED_KEYS[dotted])
    return kept


def _section(annotation: Any) -> type | None:
    """The dataclass in an annotation such as `X` or `X | None`, if there is one."""
    candidates = getattr(annotation, "__args__", (annotation,))
    return next((c for c in candidates if dataclasses.is_dataclass(c)), None)


def _has_no_effect(dotted: str, value: Any) -> bool:
    keys = flatten({dotted: value}) if isinstance(value, dict) else {dotted: value}
    return all(key in _ONLY_VALUE or any(key == k or key.startswith(k + ".") for k in IGNORED_KEYS) for key in keys)


def _nearest(dotted: str) -> str:
    known = [*_known_keys(RunConfig, ""), *_ONLY_VALUE, *IGNORED_KEYS]
    leaf = dotted.rpartition(".")[2]
    same_leaf = [key for key in known if key.rpartition(".")[2] == leaf]
    matches = (
        difflib.get_close_matches(dotted, known, 1, 0.75)
        or same_leaf[:1]
        or difflib.get_close_matches(dotted, known, 1)
    )
    return f"; did you mean {matches[0]}?" if matches else ""


def _known_keys(schema: type, prefix: str) -> Iterable[str]:
    for entry in dataclasses.fields(schema):
        yield prefix + entry.name
        if (section := _section(entry.type)) is not None:
            yield from _known_keys(section, f"{prefix}{entry.name}.")


def _type_sentence(error: OmegaConfBaseException, layer: dict[str, Any], source: str) -> str:
    key = error.full_key or "?"
    value = flatten(layer).get(key, "?")
    reason = str(error.msg or error).split("\n")[0]
    return f"{source}: {key} is {value!r}, which does not fit: {reason}"
