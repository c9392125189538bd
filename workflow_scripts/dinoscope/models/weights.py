"""Model files: what they hold, which backbone they are of, and how to load them.

Readable kinds:
- a published DINOv3 file: a flat dictionary with the names of DinoVisionTransformer,
- a teacher export or `teacher.pth` of ours: {"teacher": {"backbone.…", "dino_head.…", "ibot_head.…"}},
- either of them as `.safetensors`,
- a folder `results/models/NAME` that holds a teacher.pth, or a finished run's folder (`results/runs/NAME`).

Shapes, depth, heads, FFN, storage tokens, biases and norms are read off the tensors, never off a file's name. What no
tensor tells (norm eps, RoPE settings, normalisation of the images) comes from a `model.json` beside the file, else the
published defaults are taken, which one log line says.
"""

import hashlib
import json
import logging
import pickle
import re
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinoscope.errors import WeightsError
from dinoscope.files import read_json
from dinoscope.models.registry import ViTSettings
from dinoscope.models.vit import DinoVisionTransformer

__all__ = ["ModelFile", "infer_settings", "load_backbone", "read_model_file", "state_digest"]

_log = logging.getLogger(__name__)
_KINDS = (
    "a published DINOv3 file, a teacher.pth or teacher export, either as .safetensors, or a model's or run's folder"
)
_CHILDREN = ("backbone", "dino_head", "ibot_head")


@dataclass
class ModelFile:
    """Tensors and what is known beside them.

    `backbone` has the names of DinoVisionTransformer; `heads` maps "dino_head" and "ibot_head" to their tensors, as far
    as the file has them; `card` is the content of model.json, empty if there is none.
    """

    path: Path
    backbone: dict[str, Tensor]
    heads: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> ViTSettings:
        """The settings of the backbone: from the tensors, completed from the card or the published defaults."""
        return infer_settings(self.backbone, self.card.get("backbone", {}), self.path)


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
    with torch.device("meta"):
        model = DinoVisionTransformer(file.settings)
    load_strictly(model, file.backbone, file.path)
    model.mean = tuple(file.card.get("mean", model.mean))
    model.std = tuple(file.card.get("std", model.std))
    return model.to(device).eval().requires_grad_(False)


def load_strictly(model: DinoVisionTransformer, state: dict[str, Tensor], path: Path) -> None:
    """Makes `state` the weights of a model on the meta device; every tensor must fit, none may be left over."""
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    missing = sorted(wanted.keys() - state.keys())
    unexpected = sorted(state.keys() - wanted.keys())
    misshapen = [name for name in wanted.keys() & state.keys() if wanted[name] != state[name].shape]
    for names, what in ((missing, "lacks"), (unexpected, "has unknown"), (misshapen, "has wrongly shaped")):
        if names:
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            raise WeightsError(f"{path} {what} tensors for a {model.settings.arch} backbone: {shown}")
    rope_dtype = model.rope_embed.dtype
    state = {k: v.to(rope_dtype if k == "rope_embed.periods" else torch.float32) for k, v in state.items()}
    model.load_state_dict(state, strict=True, assign=True)


def read_model_file(path: str | Path) -> ModelFile:
    """Reads a model file of any known kind onto the CPU.

    Raises:
        WeightsError: No such file, not one of the kinds, or a tensor that is not finite.
    """
    path = _resolve(Path(path).expanduser())
    tensors = _read_tensors(path)
    if isinstance(tensors.get("teacher"), dict):
        tensors = tensors["teacher"]
    tensors = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
    parts = {child: _with_prefix(tensors, f"{child}.") for child in _CHILDREN}
    backbone = parts.pop("backbone") or tensors
    if "cls_token" not in backbone:
        if any(name.startswith(("student.", "teacher.", "model_ema.")) for name in tensors):
            raise WeightsError(
                f"{path} is a whole training state; give the exported teacher instead (eval/training_<it>/"
                "teacher_checkpoint.pth), or convert it with convert_checkpoint.py"
            )
        raise WeightsError(f"{path} holds no DINOv3 backbone (no tensor cls_token); wanted: {_KINDS}")
    for name, tensor in backbone.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise WeightsError(f"{path}: tensor {name} holds values that are not finite; the file is damaged")
    card_path = path.parent / "model.json"
    card = read_json(card_path) if card_path.is_file() else {}
    return ModelFile(path, backbone, {name: part for name, part in parts.items() if part}, card)


def infer_settings(state: dict[str, Tensor], card: dict[str, Any], path: Path) -> ViTSettings:
    """Reads the settings of a backbone off its tensors.

    Args:
        state: Tensors with the names of DinoVisionTransformer.
        card: What no tensor tells: norm_layer, rope_* and drop_path_rate as in ViTSettings.
        path: For messages.

    Raises:
        WeightsError: The tensors do not make a backbone, or contradict the card.
    """
    try:
        seen = _seen_settings(state)
    except (KeyError, ValueError) as error:
        raise WeightsError(f"{path} holds no complete DINOv3 backbone: {error} is missing or misshapen") from None
    for key, value in seen.items():
        if key in card and key != "layerscale" and card[key] != value:
            raise WeightsError(f"{path}: its tensors say {key} = {value}, but model.json says {card[key]}")
    if not card:
        card = {"norm_layer": "layernormbf16", "rope_base": 100.0, "rope_rescale": 2.0}
        _log.warning("%s: no model.json beside it; norm eps and RoPE settings are the published defaults", path.name)
    untold = {key: card[key] for key in ViTSettings.__dataclass_fields__ if key in card and key not in seen}
    return ViTSettings(**(seen | untold | {"layerscale": card.get("layerscale", seen["layerscale"])}))


def _seen_settings(state: dict[str, Tensor]) -> dict[str, Any]:
    depth = 1 + max(int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name)))
    width = state["cls_token"].shape[-1]
    block = _with_prefix(state, "blocks.0.")
    swiglu = "mlp.w1.weight" in block
    return {
        "embed_dim": width,
        "depth": depth,
        "num_heads": width // (4 * state["rope_embed.periods"].shape[0]),
        "ffn_hidden": block["mlp.w1.weight" if swiglu else "mlp.fc1.weight"].shape[0],
        "ffn_layer": "swiglu" if swiglu else "mlp",
        "patch_size": state["patch_embed.proj.weight"].shape[-1],
        "in_chans": state["patch_embed.proj.weight"].shape[1],
        "num_storage_tokens": state["storage_tokens"].shape[1] if "storage_tokens" in state else 0,
        "qkv_bias": "attn.qkv.bias" in block,
        "proj_bias": "attn.proj.bias" in block,
        "ffn_bias": ("mlp.w1.bias" if swiglu else "mlp.fc1.bias") in block,
        "mask_k_bias": "attn.qkv.bias_mask" in block,
        "layerscale": 1e-5 if "ls1.gamma" in block else None,  # the initial value: no tensor tells it
        "untie_cls_and_patch_norms": "cls_norm.weight" in state,
        "untie_global_and_local_cls_norm": "local_cls_norm.weight" in state,
    }


def state_digest(state: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values in the order of the names: the same whatever the file format."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _resolve(path: Path) -> Path:
    """The file that a folder stands for."""
    if not path.exists():
        raise WeightsError(f"{path} does not exist; wanted: {_KINDS}")
    if not path.is_dir():
        return path
    if (path / "final.json").is_file():
        return path / read_json(path / "final.json")["teacher"]
    for name in ("teacher.pth", "teacher_checkpoint.pth"):
        if (path / name).is_file():
            return path / name
    if (path / ".metadata").is_file():
        raise WeightsError(
            f"{path} is a training checkpoint (DCP); give the exported teacher instead (eval/training_<it>/"
            "teacher_checkpoint.pth), or convert it with convert_checkpoint.py"
        )
    raise WeightsError(
        f"folder {path} holds neither teacher.pth nor the final.json of a finished run; wanted: {_KINDS}"
    )


def _read_tensors(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise WeightsError(
                f"{path} cannot be read as safetensors ({error}); the file is damaged or cut short"
            ) from None
    if path.stat().st_size == 0:
        raise WeightsError(f"{path} cannot be read: it is empty")
    refused = (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        AttributeError,
        IndexError,
    )
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's own, of files that are none of its
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except refused:
        raise WeightsError(
            f"{path} cannot be read as a torch file of tensors alone: it is damaged, cut short, of another kind, or "
            f"holds code; wanted: {_KINDS}"
        ) from None
    if not isinstance(content, dict):
        raise WeightsError(
            f"{path} holds an object of type {type(content).__name__}, not a dictionary of tensors; wanted: {_KINDS}"
        )
    return content


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
