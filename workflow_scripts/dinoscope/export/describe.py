"""Says for a person what a model file is, which recipe fits it, and whether a given one does."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import yaml

from dinoscope.config import RunConfig, StudentConfig
from dinoscope.errors import WeightsError
from dinoscope.models.registry import ARCHS, settings_from_config
from dinoscope.models.settings_of_tensors import PUBLISHED_DEFAULTS
from dinoscope.models.vit import IMAGENET_MEAN, IMAGENET_STD
from dinoscope.models.weights import ModelFile, state_digest
from dinoscope.train.starting import check_fit

__all__ = ["describe_file", "describe_fit", "fitting_sections"]

# Settings -> keys of a recipe's student section, where the names differ.
_RECIPE_KEYS = {
    "num_storage_tokens": "n_storage_tokens",
    "rope_base": "pos_embed_rope_base",
    "rope_min_period": "pos_embed_rope_min_period",
    "rope_max_period": "pos_embed_rope_max_period",
    "rope_normalize_coords": "pos_embed_rope_normalize_coords",
    "rope_dtype": "pos_embed_rope_dtype",
    "rope_shift": "pos_embed_rope_shift_coords",
    "rope_jitter": "pos_embed_rope_jitter_coords",
    "rope_rescale": "pos_embed_rope_rescale_coords",
}
_TRAINING_ONLY = ("layerscale", "rope_shift", "rope_jitter", "rope_rescale", "drop_path_rate")
_IN_NO_TENSOR = ("norm_layer", "rope_normalize_coords", "rope_dtype", *_TRAINING_ONLY)
_IN_NO_FOREIGN_TENSOR = ("num_heads", "rope_base", "rope_min_period", "rope_max_period")
_OF_ARCH = ("embed_dim", "depth", "num_heads", "ffn_hidden", "ffn_layer")


def describe_file(file: ModelFile) -> str:
    """A table of what the file holds, and of every setting with where it was read."""
    tensors = file.backbone.values()
    heads = [f"{name} ({part['last_layer.weight'].shape[0]} prototypes)" for name, part in sorted(file.heads.items())]
    mean, std = file.card.get("mean", IMAGENET_MEAN), file.card.get("std", IMAGENET_STD)
    parameters = sum(t.numel() for name, t in file.backbone.items() if not name.endswith(("bias_mask", "periods")))
    rows = [
        ("file", file.path, ""),
        ("kind", file.kind, ""),
        ("architecture", file.settings.arch, ""),
        ("backbone tensors", len(file.backbone), ""),
        ("parameters", f"{parameters:,}", ""),
        ("number format", ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors})), ""),
        ("heads", ", ".join(heads) or "none", ""),
        ("sha256 of the backbone", state_digest(file.backbone), ""),
        ("mean of the images", _numbers(mean), _card_name(file) if "mean" in file.card else "assumed: ImageNet's"),
        ("std of the images", _numbers(std), _card_name(file) if "std" in file.card else "assumed: ImageNet's"),
    ]
    settings = dataclasses.asdict(file.settings).items()
    rows += [
        (name, value, _source(file, name)) for name, value in settings if value is not None or name == "layerscale"
    ]
    return "\n".join(f"{name:<34}{value!s:<20} {source}".rstrip() for name, value, source in rows)


def fitting_sections(file: ModelFile) -> str:
    """The sections of a recipe that fit the file, as YAML: what differs from the defaults.

    Raises:
        WeightsError: No row of the table of architectures has these numbers.
    """
    found = dataclasses.asdict(file.settings)
    values: dict[str, Any] = dict(zip(("arch", "ffn_layer"), _arch_and_ffn(file), strict=True))
    values |= {_RECIPE_KEYS.get(name, name): value for name, value in found.items() if name not in _OF_ARCH}
    del values["drop_path_rate"]  # of a training, not of its weights
    defaults = {field.name: field.default for field in dataclasses.fields(StudentConfig)}
    student = {key: value for key, value in values.items() if key == "arch" or value != defaults[key]}
    sections: dict[str, Any] = {"student": student}
    for key, published in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
        if tuple(file.card.get(key, published)) != published:
            sections.setdefault("crops", {})[f"rgb_{key}"] = list(file.card[key])
    return yaml.safe_dump(sections, sort_keys=False).rstrip()


def describe_fit(file: ModelFile, config: RunConfig) -> Iterator[str]:
    """What of a recipe differs from what the file's card tells, without being wrong: the recipe's values count.

    Raises:
        WeightsError: The recipe contradicts the file; names the keys and both values.
    """
    wanted = settings_from_config(config.student)
    check_fit(file, wanted)
    told = file.card.get("backbone", {})
    for name in sorted(PUBLISHED_DEFAULTS.keys() - {"rope_base"}):
        ours, theirs = getattr(wanted, name), getattr(file.settings, name)
        if ours != theirs:
            made = f"the weights were made with {theirs}" if name in told else f"published models have {theirs}"
            yield f"student.{_RECIPE_KEYS.get(name, name)} is {ours} in the recipe, but {made}"
    for key in ("mean", "std"):
        ours, theirs = list(getattr(config.crops, f"rgb_{key}")), list(file.card.get(key, ()))
        if theirs and ours != theirs:
            yield f"crops.rgb_{key} is {_numbers(ours)} in the recipe, but {_numbers(theirs)} was used for the weights"


def _arch_and_ffn(file: ModelFile) -> tuple[str, str]:
    """The row of ARCHS and the FFN kind that give the file's sizes."""
    wanted = [getattr(file.settings, name) for name in _OF_ARCH]
    kinds = ("mlp", "swiglu", "swiglu32", "swiglu64", "swiglu128")
    for name in ARCHS:
        for kind in kinds:
            settings = settings_from_config(StudentConfig(arch=name, ffn_layer=kind))
            if [getattr(settings, key) for key in _OF_ARCH] == wanted:
                return name, StudentConfig.ffn_layer if ARCHS[name].ffn else kind
    sizes = ", ".join(f"{key} {value}" for key, value in zip(_OF_ARCH, wanted, strict=True))
    raise WeightsError(f"no recipe can train this backbone: student.arch has no architecture with {sizes}")


def _source(file: ModelFile, name: str) -> str:
    """Where a setting comes from."""
    if any(entry.startswith(f"{name} ") for entry in file.assumed):
        return "assumed: nothing tells it"
    if name == "layerscale" and file.settings.layerscale is None:
        return "tensors: there are none"
    if name not in (*_IN_NO_TENSOR, *(_IN_NO_FOREIGN_TENSOR if file.foreign else ())):
        return "tensors"
    source = _card_name(file) if name in file.card.get("backbone", {}) else "default"
    return f"{source}; acts in training only" if name in _TRAINING_ONLY else source


def _card_name(file: ModelFile) -> str:
    return "model.json" if file.path.with_name("model.json").is_file() else "config.json"


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
