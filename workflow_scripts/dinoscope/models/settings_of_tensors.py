"""Which backbone some tensors are of: settings read off shapes, names and RoPE periods.

What no tensor tells comes from a card, else it is as in the published weights.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinoscope.errors import WeightsError
from dinoscope.models.registry import ViTSettings
from dinoscope.models.rope import RotaryEmbedding2d

__all__ = ["PUBLISHED_DEFAULTS", "infer_settings", "periods_fit", "rope_periods"]

# Of the published weights; what no tensor tells.
PUBLISHED_DEFAULTS = {
    "norm_layer": "layernormbf16",
    "rope_base": 100.0,
    "rope_normalize_coords": "separate",
    "rope_dtype": "fp32",
    "rope_rescale": 2.0,
}


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
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise WeightsError(f"{path} holds no complete DINOv3 backbone: {error} is missing or misshapen") from None
    for key, value in seen.items():
        if key in card and key != "layerscale" and card[key] != value:
            beside = "model.json" if (path.parent / "model.json").is_file() else "config.json"
            raise WeightsError(f"{path}: its tensors say {key} = {value}, but {beside} says {card[key]}")
    told = PUBLISHED_DEFAULTS | {key: card[key] for key in ViTSettings.__dataclass_fields__ if key in card}
    settings = ViTSettings(**(told | seen | {"layerscale": seen["layerscale"] and card.get("layerscale", 1e-5)}))
    return settings if periods_fit(settings, state) else _with_periods(settings, state, card, path)


def _seen_settings(state: dict[str, Tensor]) -> dict[str, Any]:
    """What the tensors of a backbone tell, with the names of ViTSettings."""
    depth = 1 + max((int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name))), default=-1)
    width = state["cls_token"].shape[-1]
    block = {name.removeprefix("blocks.0."): tensor for name, tensor in state.items() if name.startswith("blocks.0.")}
    heads, rest = divmod(width, 4 * state["rope_embed.periods"].shape[0])
    if rest:
        raise KeyError("rope_embed.periods")
    swiglu = "mlp.w1.weight" in block
    return {
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
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


def periods_fit(settings: ViTSettings, state: dict[str, Tensor]) -> bool:
    """Whether the RoPE periods of `state` are those of the settings, up to the rounding of bf16."""
    wanted, found = rope_periods(settings), state["rope_embed.periods"].float()
    return wanted.shape == found.shape and torch.allclose(wanted, found, rtol=0.03)


def rope_periods(settings: ViTSettings) -> Tensor:
    """The RoPE periods that the settings ask for, float32."""
    rope = RotaryEmbedding2d(
        settings.embed_dim // settings.num_heads,
        base=settings.rope_base,
        min_period=settings.rope_min_period,
        max_period=settings.rope_max_period,
    )
    rope.reset_parameters()
    return rope.periods


def _with_periods(settings: ViTSettings, state: dict[str, Tensor], card: dict[str, Any], path: Path) -> ViTSettings:
    """The settings with the periods that the tensors hold, where no card says others."""
    first, last = state["rope_embed.periods"].float()[[0, -1]].tolist()
    read = dataclasses.replace(settings, rope_base=None, rope_min_period=first, rope_max_period=last)
    if card.keys() & {"rope_base", "rope_min_period"} or not periods_fit(read, state):
        base, ends = settings.rope_base, (settings.rope_min_period, settings.rope_max_period)
        raise WeightsError(
            f"{path}: its RoPE periods go from {first:g} to {last:g}, but its settings say base {base}, or geometric "
            f"periods from {ends[0]} to {ends[1]} in place of a base; correct the card beside it"
        )
    return read
