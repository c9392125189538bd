"""DINOv3 of transformers and of timm, built from their configurations with random weights; nothing is downloaded.

`require` imports them, or skips the tests.
"""

import importlib
from typing import Any

import pytest
import torch

from dinoscope.models.registry import ViTSettings
from dinoscope.models.vit import DinoVisionTransformer

# ours -> what transformers' DINOv3ViTConfig calls it
_GATED = {"intermediate_size": 1536, "use_gated_mlp": True, "hidden_act": "silu"}
TRANSFORMERS = {
    "vit_nano": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256},
    "vit_small": {},
    "vit_small_plus": _GATED,
    "vit_base": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
    "vit_large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}
TIMM = {
    "vit_small": "vit_small_patch16_dinov3",
    "vit_small_plus": "vit_small_plus_patch16_dinov3",
    "vit_base": "vit_base_patch16_dinov3",
    "vit_large": "vit_large_patch16_dinov3",
}


def require(name: str) -> Any:
    """Imports a library, or skips the tests where it is not installed."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed", allow_module_level=True)
    if importlib.util.find_spec("torchvision") is not None:
        try:
            importlib.import_module("torchvision")
        except RuntimeError:  # a CUDA wheel beside a CPU build of torch
            importlib.import_module("torchvision_on_cpu_torch")
            importlib.import_module("torchvision")
    return importlib.import_module(name)


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Fills every parameter so that each matters: attention that is not uniform, gammas and biases far from zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(drawn * (0.5 if "token" in name else 1.3 / parameter.flatten(1).shape[1] ** 0.5))
        else:
            parameter.copy_(drawn * 0.3 + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return model.eval()


def random_backbone(settings: ViTSettings, seed: int = 0) -> DinoVisionTransformer:
    """A backbone of ours with such weights."""
    model = DinoVisionTransformer(settings)
    model.init_weights()
    return randomize(model, seed)


def transformers_model(arch: str, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A DINOv3ViTModel with four register tokens and random weights."""
    library = require("transformers")
    config = library.DINOv3ViTConfig(**({"num_register_tokens": 4} | TRANSFORMERS[arch] | changes))
    return randomize(library.DINOv3ViTModel(config), seed)


def timm_model(arch: str, seed: int = 0, suffix: str = "", **changes: Any) -> torch.nn.Module:
    """A model of timm with random weights; the suffix _qkvb gives it biases of queries and values."""
    return randomize(require("timm").create_model(TIMM[arch] + suffix, pretrained=False, **changes), seed)


def save_transformers(model: torch.nn.Module, folder: Any, **options: Any) -> None:
    """save_pretrained without its progress bar."""
    require("transformers").utils.logging.disable_progress_bar()
    model.save_pretrained(folder, **options)


def tokens_of(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Normed tokens (B, 1 + R + P, D) of a model of ours, of transformers or of timm."""
    with torch.no_grad():
        if hasattr(model, "get_intermediate_layers"):
            out = model.forward_features(images)
            return torch.cat([out["cls"][:, None], out["storage"], out["patches"]], 1)
        if hasattr(model, "config"):
            return model(images).last_hidden_state
        return model.forward_features(images)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute value."""
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
