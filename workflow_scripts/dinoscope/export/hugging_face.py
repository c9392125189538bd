"""A backbone as a folder that transformers opens: AutoModel.from_pretrained and AutoImageProcessor.from_pretrained."""

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from dinoscope.export.exportable import Exportable, image_size
from dinoscope.files import write_json
from dinoscope.models.foreign import HUGGING_FACE, to_foreign
from dinoscope.models.registry import ViTSettings

__all__ = ["write_hugging_face"]

_BILINEAR = 2  # of Pillow


def write_hugging_face(model: Exportable, folder: Path) -> dict[str, Any]:
    """Writes config.json, model.safetensors and preprocessor_config.json.

    Args:
        model: What is exported.
        folder: An existing folder.

    Returns:
        What model.json says of the export.
    """
    tensors = {name: tensor.contiguous() for name, tensor in to_foreign(model.state, HUGGING_FACE).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", _config(model.settings))
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors lets only the owner read
    write_json(folder / "preprocessor_config.json", _preprocessor(model))
    return {"model_type": "dinov3_vit", "class": "DINOv3ViTModel"}


def _config(settings: ViTSettings) -> dict[str, Any]:
    swiglu = settings.ffn_layer == "swiglu"
    return {
        "architectures": ["DINOv3ViTModel"],
        "model_type": "dinov3_vit",
        "dtype": "float32",
        "patch_size": settings.patch_size,
        "num_channels": settings.in_chans,
        "image_size": image_size(settings),
        "hidden_size": settings.embed_dim,
        "intermediate_size": settings.ffn_hidden,
        "num_hidden_layers": settings.depth,
        "num_attention_heads": settings.num_heads,
        "num_register_tokens": settings.num_storage_tokens,
        "use_gated_mlp": swiglu,
        "hidden_act": "silu" if swiglu else "gelu",
        "layer_norm_eps": 1e-5 if settings.norm_layer == "layernormbf16" else 1e-6,
        "query_bias": settings.qkv_bias,
        "key_bias": settings.qkv_bias and not settings.mask_k_bias,
        "value_bias": settings.qkv_bias,
        "proj_bias": settings.proj_bias,
        "mlp_bias": settings.ffn_bias,
        "layerscale_value": settings.layerscale or 1.0,
        "drop_path_rate": settings.drop_path_rate,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "rope_theta": settings.rope_base,
        "pos_embed_shift": settings.rope_shift,
        "pos_embed_jitter": settings.rope_jitter,
        "pos_embed_rescale": settings.rope_rescale,
    }


def _preprocessor(model: Exportable) -> dict[str, Any]:
    """ViTImageProcessor: unlike DINOv3ViTImageProcessor, transformers has it without torchvision as well.

    Both do the same with tiles of the right size; with others, this one rounds to 8 bits after resizing.
    """
    side = image_size(model.settings)
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": _BILINEAR,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": model.card["mean"],
        "image_std": model.card["std"],
    }
