"""A backbone as a folder that timm opens: timm.create_model("local-dir:FOLDER", pretrained=True).

Published sizes have a name in timm, with which `timm.create_model(name)` loads model.safetensors strictly; all others
are told by `model_args` in config.json.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dinoscope.export.exportable import Exportable, image_size
from dinoscope.files import write_json
from dinoscope.models.card import PUBLISHED_ORIGIN
from dinoscope.models.foreign import TIMM, to_foreign
from dinoscope.models.registry import ViTSettings

__all__ = ["timm_name", "write_timm"]

# What timm calls our archs, by FFN; "_qkvb" follows where there are biases of queries and values.
_NAMES = {
    ("vit_tiny", "mlp"): "vit_tiny_patch16_dinov3",
    ("vit_small", "mlp"): "vit_small_patch16_dinov3",
    ("vit_small_plus", "swiglu"): "vit_small_plus_patch16_dinov3",
    ("vit_base", "mlp"): "vit_base_patch16_dinov3",
    ("vit_large", "mlp"): "vit_large_patch16_dinov3",
    ("vit_huge_plus", "swiglu"): "vit_huge_plus_patch16_dinov3",
    ("vit_7b", "swiglu"): "vit_7b_patch16_dinov3",
}
_MISSING = ("vit_tiny_patch16_dinov3", "vit_7b_patch16_dinov3_qkvb")  # timm has these two with and without biases alone
_ANY_SIZE = "vit_small_patch16_dinov3_qkvb"  # what other sizes are told by
# Norms with eps 1e-6 cannot be asked for by arguments that a JSON file holds; this model of the same class has them.
_ANY_SIZE_EPS_6 = "eva02_tiny_patch14_224"


def write_timm(model: Exportable, folder: Path) -> dict[str, Any]:
    """Writes config.json and model.safetensors.

    Args:
        model: What is exported.
        folder: An existing folder.

    Returns:
        What model.json says of the export: timm's name, and the arguments beside it.
    """
    tensors = to_foreign(model.state, TIMM)
    tensors |= _always_there(tensors, model.settings)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    name, arguments = timm_name(model.settings)
    write_json(folder / "config.json", _config(model, name, arguments))
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors lets only the owner read
    return {"timm_name": name, "timm_arguments": arguments}


def timm_name(settings: ViTSettings) -> tuple[str, dict[str, Any]]:
    """timm's name of a backbone, and the arguments that create_model needs beside it (none for published sizes)."""
    name = _NAMES.get((settings.arch, settings.ffn_layer), "") + ("_qkvb" if settings.qkv_bias else "")
    published = ViTSettings(
        settings.embed_dim, settings.depth, settings.num_heads, settings.ffn_hidden, num_storage_tokens=4
    )
    same = ("patch_size", "in_chans", "num_storage_tokens", "rope_base")
    if (
        name.startswith("vit_")
        and name not in _MISSING
        and settings.norm_layer == "layernormbf16"
        and all(getattr(settings, key) == getattr(published, key) for key in same)
    ):
        return name, {}
    return (_ANY_SIZE if settings.norm_layer == "layernormbf16" else _ANY_SIZE_EPS_6), _arguments(settings)


def _arguments(settings: ViTSettings) -> dict[str, Any]:
    """All that makes timm's class the backbone, whichever model's defaults they replace."""
    ratio = settings.ffn_hidden / settings.embed_dim
    if int(settings.embed_dim * ratio) != settings.ffn_hidden:  # as timm computes the width
        ratio = (settings.ffn_hidden + 0.5) / settings.embed_dim
    return {
        "patch_size": settings.patch_size,
        "in_chans": settings.in_chans,
        "img_size": image_size(settings),
        "dynamic_img_size": True,
        "embed_dim": settings.embed_dim,
        "depth": settings.depth,
        "num_heads": settings.num_heads,
        "mlp_ratio": ratio,
        "swiglu_mlp": settings.ffn_layer == "swiglu",
        "swiglu_align_to": 1 if settings.ffn_layer == "swiglu" else 0,  # 0 would pack gate and value into one tensor
        "scale_mlp": False,
        "qkv_bias": settings.qkv_bias,
        "qkv_fused": True,
        "init_values": settings.layerscale or 1.0,
        "num_reg_tokens": settings.num_storage_tokens,
        "use_abs_pos_emb": False,
        "use_rot_pos_emb": True,
        "rope_type": "dinov3",
        "rope_temperature": settings.rope_base,
        "rope_rotate_half": True,
        "use_fc_norm": False,
    }


def _config(model: Exportable, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    settings = model.settings
    side = image_size(settings)
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": settings.embed_dim,
        "global_pool": "token",
        "model_args": arguments | {"global_pool": "token", "num_classes": 0, "dynamic_img_size": True},
        "pretrained_cfg": {
            "tag": "dinoscope",
            "custom_load": False,
            "input_size": [settings.in_chans, side, side],
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": model.card["mean"],
            "std": model.card["std"],
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "dinov3-license" if PUBLISHED_ORIGIN in model.card["origin"] else "other",
        },
    }


def _always_there(tensors: dict[str, Tensor], settings: ViTSettings) -> dict[str, Tensor]:
    """What timm's model has in any case: LayerScale, if only of ones, and biases, if only of zeros."""
    width, hidden = settings.embed_dim, settings.ffn_hidden
    ffn = {"fc1_g": hidden, "fc1_x": hidden} if settings.ffn_layer == "swiglu" else {"fc1": hidden}
    zeros = {"attn.proj.bias": width, **{f"mlp.{name}.bias": size for name, size in ffn.items()}, "mlp.fc2.bias": width}
    extra = {}
    for index in range(settings.depth):
        extra |= {f"blocks.{index}.{name}": torch.zeros(size) for name, size in zeros.items()}
        extra |= {f"blocks.{index}.gamma_{number}": torch.ones(width) for number in (1, 2)}
    return {name: tensor for name, tensor in extra.items() if name not in tensors}
