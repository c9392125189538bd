"""What of a backbone another library's format holds: the rest is refused by name, or left out with a note."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinoscope.errors import WeightsError
from dinoscope.models.card import PUBLISHED_ORIGIN, license_note
from dinoscope.models.registry import ViTSettings
from dinoscope.models.settings_of_tensors import rope_periods
from dinoscope.models.vit import IMAGENET_MEAN, IMAGENET_STD, DinoVisionTransformer
from dinoscope.models.weights import ModelFile, load_strictly, state_digest

__all__ = ["FORMAT_NAMES", "Exportable", "as_exportable", "image_size", "model_of", "quiet"]

FORMAT_NAMES = {"hf": "Hugging Face", "timm": "timm", "onnx": "ONNX"}
_TILE_PX = 224  # side of the tiles that features are extracted from, unless the config says otherwise
# Setting, the values that a format holds, and what it has instead, for the formats with arithmetic of their own.
_OF_OTHER_LIBRARIES: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("untie_cls_and_patch_norms", (False,), "it has one final norm for all tokens"),
    ("norm_layer", ("layernorm", "layernormbf16"), "it has layernorm and layernormbf16"),
    ("rope_min_period", (None,), "its RoPE periods come from a base"),
    ("rope_normalize_coords", ("separate",), "it has separate"),
)
_RECIPE_KEY = {"rope_min_period": "pos_embed_rope_min_period", "rope_dtype": "pos_embed_rope_dtype"}
_RECIPE_KEY["rope_normalize_coords"] = "pos_embed_rope_normalize_coords"


@dataclass(frozen=True)
class Exportable:
    """A backbone as another library will compute it.

    Attributes:
        state: float32, with the names of DinoVisionTransformer; what is read back from the export, where it can be.
        card: The content of the export's model.json.
        notes: What was left out or changed, a sentence each.
        rounded_periods: The RoPE periods of the file, where the format will have others than these.
    """

    settings: ViTSettings
    state: dict[str, Tensor]
    card: dict[str, Any]
    notes: tuple[str, ...]
    rounded_periods: Tensor | None = None


def as_exportable(file: ModelFile, format: str) -> Exportable:
    """The backbone of a model file, without what the format has no place for.

    Args:
        file: What was read.
        format: "hf", "timm" or "onnx".

    Raises:
        WeightsError: A setting that the format cannot express; all of them are named.
    """
    _refuse_inexpressible(file, format)
    settings, notes = file.settings, []
    state = {name: tensor.float() for name, tensor in file.backbone.items()}
    if settings.untie_global_and_local_cls_norm:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("local_cls_norm.")}
        settings = dataclasses.replace(settings, untie_global_and_local_cls_norm=False)
        notes.append("local_cls_norm is left out: it is used in training only, so the features are the same")
    for name in [name for name in state if name.endswith(".bias_mask")]:
        bias = name.removesuffix("_mask")
        state[bias] = state[bias].where(state[name] != 0, 0.0)  # what is masked is stored nowhere else
    if format == "timm" and state["mask_token"].any():
        state["mask_token"] = torch.zeros_like(state["mask_token"])
        notes.append("mask_token is left out: it is used in training only, and timm has none")
    rounded = None
    if format != "onnx":
        found, state["rope_embed.periods"] = state["rope_embed.periods"], rope_periods(settings)
        if not torch.allclose(found, state["rope_embed.periods"], rtol=1e-6):
            rounded = found
            notes.append(
                f"the RoPE periods are rounded to bf16, as in published files, but {FORMAT_NAMES[format]} computes "
                "them exactly; verification.json says how far features differ by that"
            )
    return Exportable(settings, state, _card(file, settings, state), tuple(notes), rounded)


def model_of(settings: ViTSettings, state: dict[str, Tensor], file: ModelFile) -> DinoVisionTransformer:
    """A model of ours with these weights, in eval mode."""
    with torch.device("meta"):
        model = DinoVisionTransformer(settings)
    load_strictly(model, state, file.path)
    return model.eval().requires_grad_(False)


def image_size(settings: ViTSettings) -> int:
    """Side of the images that another library resizes to: as tiles have it, in whole patches."""
    return max(1, round(_TILE_PX / settings.patch_size)) * settings.patch_size


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Lets loggers of other libraries say errors alone."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _refuse_inexpressible(file: ModelFile, format: str) -> None:
    name, settings, found = FORMAT_NAMES[format], file.settings, []
    for key, held, has in _OF_OTHER_LIBRARIES if format != "onnx" else ():
        if (value := getattr(settings, key)) not in held:
            found.append(f"{_key(key)} = {value} ({has})")
    if format == "timm" and settings.qkv_bias and not settings.mask_k_bias and _has_key_biases(file.backbone):
        found.append(f"{_key('mask_k_bias')} = False (it has no bias of keys)")
    if settings.rope_dtype != "fp32":
        found.append(
            f"{_key('rope_dtype')} = {settings.rope_dtype} (it computes RoPE in float32; to accept features that "
            'differ by that, write "rope_dtype": "fp32" into "backbone" of the model.json beside the weights)'
        )
    if found:
        way_out = "; --format onnx can" if format != "onnx" and settings.rope_dtype == "fp32" else ""
        raise WeightsError(f"{file.path} cannot be exported: {name} cannot express {', '.join(found)}{way_out}")


def _key(setting: str) -> str:
    return f"student.{_RECIPE_KEY.get(setting, setting)}"


def _has_key_biases(backbone: dict[str, Tensor]) -> bool:
    return any(bool(tensor.chunk(3)[1].any()) for name, tensor in backbone.items() if name.endswith("qkv.bias"))


def _card(file: ModelFile, settings: ViTSettings, state: dict[str, Tensor]) -> dict[str, Any]:
    """The file's own card, completed with what another library's user must know."""
    origin = file.card.get("origin") or PUBLISHED_ORIGIN
    known = {"format": "dinoscope model card", "version": 1, "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
    return {
        **known,
        "license_note": license_note(origin),
        **file.card,
        "origin": origin,
        "backbone": settings.as_dict(),
        "embed_dim": settings.embed_dim,
        "patch_size": settings.patch_size,
        "weights_sha256": state_digest(state),
    }
