"""Model files: what they hold, which backbone they are of, and how to load them.

Readable kinds:
- a published DINOv3 file: a flat dictionary with the names of DinoVisionTransformer,
- a teacher export or `teacher.pth` of ours: {"teacher": {"backbone.…", "dino_head.…", "ibot_head.…"}},
- a timm state dict, a flat dictionary with timm's names,
- any of them as `.safetensors`,
- a Hugging Face folder (`model.safetensors`, or shards with their index, and `config.json`),
- a folder `results/models/NAME` that holds a teacher.pth, or a finished run's folder (`results/runs/NAME`).

Which kind it is, shapes, depth, heads, FFN, storage tokens, biases and norms are read off the tensors, never off a
file's name. What no tensor tells (norm eps, RoPE settings, normalisation of the images) comes from a `model.json` or
Hugging Face's `config.json` beside the file, else the published defaults are taken, which one log line says.
"""

import functools
import hashlib
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinoscope.errors import WeightsError
from dinoscope.files import read_json
from dinoscope.models.foreign import Dialect, detect_dialect, foreign_card, from_foreign, without_filled
from dinoscope.models.registry import ARCHS, ViTSettings
from dinoscope.models.settings_of_tensors import PUBLISHED_DEFAULTS, infer_settings, rope_periods
from dinoscope.models.tensor_files import KINDS, find_weights, listed, read_tensors
from dinoscope.models.vit import DinoVisionTransformer

__all__ = ["ModelFile", "load_backbone", "load_strictly", "read_model_file", "state_digest"]

_log = logging.getLogger(__name__)
_CHILDREN = ("backbone", "dino_head", "ibot_head")


@dataclass
class ModelFile:
    """Tensors and what is known beside them.

    `backbone` has the names of DinoVisionTransformer and is whole; `heads` maps "dino_head" and "ibot_head" to their
    tensors, as far as the file has them; `card` is the content of model.json, or what a foreign config.json says in its
    terms, empty if there is neither; `kind` is for people; `foreign`: the tensors had the names of another library;
    `completed` names what such a file lacked.
    """

    path: Path
    backbone: dict[str, Tensor]
    heads: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)
    kind: str = "DINOv3 backbone"
    foreign: bool = False
    completed: tuple[str, ...] = ()

    @functools.cached_property
    def settings(self) -> ViTSettings:
        """The settings of the backbone: from the tensors, completed from the card or the published defaults."""
        if assumed := self.assumed:
            _log.warning("%s: no tensor and no file beside it tells %s", self.path.name, ", ".join(assumed))
        return infer_settings(self.backbone, self.card.get("backbone", {}), self.path)

    @property
    def assumed(self) -> list[str]:
        """What was assumed, each with its value, because neither the tensors nor a card tell it."""
        told = self.card.get("backbone", {})
        untold = [key for key in PUBLISHED_DEFAULTS if key not in told and key != "rope_base"]  # the periods tell it
        defaults = [f"{key} (taken: {PUBLISHED_DEFAULTS[key]})" for key in untold]
        images = [] if {"mean", "std"} <= self.card.keys() else ["mean and std of the images (taken: ImageNet's)"]
        return [*self.completed, *defaults, *images]


def load_backbone(path: str | Path, device: str | torch.device = "cpu") -> DinoVisionTransformer:
    """Loads a backbone for inference.

    Args:
        path: Any kind of file or folder that the docstring of this module lists.
        device: Where the model shall live.

    Returns:
        The model in eval mode, float32, with `mean` and `std` as it was trained with.

    Raises:
        WeightsError: No such file, not one of the kinds, or its tensors do not make a whole backbone.
    """
    file = read_model_file(path)
    model = _empty_model(file.settings, file.path)
    load_strictly(model, file.backbone, file.path)
    model.mean = tuple(file.card.get("mean", model.mean))
    model.std = tuple(file.card.get("std", model.std))
    return model.to(device).eval().requires_grad_(False)


def load_strictly(model: DinoVisionTransformer, state: dict[str, Tensor], path: Path | str) -> None:
    """Makes `state` the weights of a model on the meta device; every tensor must fit, none may be left over."""
    _check_whole(model, state, path)
    rope_dtype = model.rope_embed.dtype
    state = {k: v.to(rope_dtype if k == "rope_embed.periods" else torch.float32) for k, v in state.items()}
    model.load_state_dict(state, strict=True, assign=True)


def read_model_file(path: str | Path) -> ModelFile:
    """Reads a model file of any known kind onto the CPU.

    Raises:
        WeightsError: No such file, not one of the kinds, a tensor that is not finite, or not a whole backbone.
    """
    path = find_weights(Path(path).expanduser())
    kind, backbone, heads = _parts(read_tensors(path), path)
    dialect = detect_dialect(backbone)
    card = _read_card(path.parent, foreign=dialect is not None)
    completed: tuple[str, ...] = ()
    if dialect is not None:
        kind = f"{dialect.name} backbone"
        backbone = without_filled(from_foreign(backbone, dialect, path), card.get("backbone", {}))
        completed = _complete(backbone, dialect, card, path)
    elif "cls_token" not in backbone:
        raise WeightsError(f"{path} holds no DINOv3 backbone (no tensor cls_token); wanted: {KINDS}")
    for name, tensor in backbone.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise WeightsError(f"{path}: tensor {name} holds values that are not finite; the file is damaged")
    settings = infer_settings(backbone, card.get("backbone", {}), path)
    _check_whole(_empty_model(settings, path), backbone, path)
    return ModelFile(path, backbone, heads, card, kind, dialect is not None, completed)


def state_digest(state: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values in the order of the names: the same whatever the file format."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _parts(tensors: dict[str, Any], path: Path) -> tuple[str, dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Kind, backbone and heads of a file's dictionary."""
    exported = isinstance(tensors.get("teacher"), dict)
    tensors = tensors["teacher"] if exported else tensors
    tensors = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
    parts = {child: _with_prefix(tensors, f"{child}.") for child in _CHILDREN}
    backbone = parts.pop("backbone")
    if not backbone:
        if any(name.startswith(("student.", "teacher.", "model_ema.")) for name in tensors):
            raise WeightsError(
                f"{path} is a whole training state; give the exported teacher instead (eval/training_<it>/"
                "teacher_checkpoint.pth), or convert it with convert_checkpoint.py"
            )
        return "DINOv3 backbone, as published", tensors, {}
    if unknown := sorted(name for name in tensors if not name.startswith(tuple(f"{child}." for child in _CHILDREN))):
        raise WeightsError(f"{path} has tensors beside the backbone that are unknown: {listed(unknown)}")
    return "teacher export", backbone, {name: part for name, part in parts.items() if part}


def _read_card(folder: Path, foreign: bool) -> dict[str, Any]:
    """What lies beside a weight file: model.json, and for foreign tensors config.json, which model.json overrules."""
    card: dict[str, Any] = {}
    if foreign and (folder / "config.json").is_file():
        preprocessor = folder / "preprocessor_config.json"
        images = read_json(preprocessor) if preprocessor.is_file() else {}
        card = foreign_card(read_json(folder / "config.json"), images, folder / "config.json")
    own = read_json(folder / "model.json") if (folder / "model.json").is_file() else {}
    both = {"backbone": card.get("backbone", {}) | own.get("backbone", {})}
    return card | own | (both if both["backbone"] else {})


def _complete(state: dict[str, Tensor], dialect: Dialect, card: dict[str, Any], path: Path) -> tuple[str, ...]:
    """Adds what a foreign state dict does not store; names what was assumed in doing so."""
    completed = []
    width = state["cls_token"].shape[-1]
    told = PUBLISHED_DEFAULTS | card.get("backbone", {})
    heads = told.get("num_heads")
    if heads is None:
        heads = next((arch.num_heads for arch in ARCHS.values() if arch.embed_dim == width), None)
        completed.append(f"num_heads (taken: {heads}, as every published backbone of width {width})")
    if heads is None or width % (4 * heads):
        raise WeightsError(
            f"{path}: no tensor of a {dialect.name} backbone tells the number of heads, and {heads} cannot be it at "
            f'width {width}; write it into a model.json beside the file: {{"backbone": {{"num_heads": …}}}}'
        )
    if "mask_token" not in state:
        completed.append("mask_token (taken: zeros)")
        state["mask_token"] = torch.zeros(1, width)
    if "rope_base" not in card.get("backbone", {}):
        completed.append(f"rope_base (taken: {told['rope_base']})")
    given = {key: told[key] for key in ("rope_base", "rope_min_period", "rope_max_period") if key in told}
    state["rope_embed.periods"] = rope_periods(ViTSettings(width, 0, heads, 0, **given))
    return tuple(completed)


def _empty_model(settings: ViTSettings, path: Path) -> DinoVisionTransformer:
    """A model on the meta device."""
    try:
        with torch.device("meta"):
            return DinoVisionTransformer(settings)
    except (KeyError, ValueError) as error:  # numbers that do not go together, names from a model.json
        raise WeightsError(f"{path}: no backbone has the settings {settings}: {error}") from None


def _check_whole(model: DinoVisionTransformer, state: dict[str, Tensor], path: Path | str) -> None:
    """Every tensor must fit, none may be missing or left over."""
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    missing = sorted(wanted.keys() - state.keys())
    unexpected = sorted(state.keys() - wanted.keys())
    misshapen = sorted(name for name in wanted.keys() & state.keys() if wanted[name] != state[name].shape)
    for names, what in ((missing, "lacks"), (unexpected, "has unknown"), (misshapen, "has wrongly shaped")):
        if names:
            raise WeightsError(f"{path} {what} tensors for a {model.settings.arch} backbone: {listed(names)}")


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
