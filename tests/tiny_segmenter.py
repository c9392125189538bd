"""Small encoders of both kinds, as `load_encoder` gives them, and segmenters on them, for tests."""

from pathlib import Path

import torch

from dinoscope.features.encoders import LoadedEncoder, load_encoder
from dinoscope.models.registry import ViTSettings
from dinoscope.models.vit import DinoVisionTransformer
from dinoscope.segment.model import Segmenter
from other_libraries import random_backbone, randomize, require, save_transformers

SETTINGS = ViTSettings(48, 4, 3, 96, num_storage_tokens=3, layerscale=0.5, mask_k_bias=True)


def own_encoder(seed: int = 0, settings: ViTSettings = SETTINGS) -> LoadedEncoder:
    """A backbone of ours, four blocks, patches of 16 px."""
    model = random_backbone(settings, seed)
    model.mean, model.std = (0.7, 0.5, 0.6), (0.2, 0.25, 0.15)
    return LoadedEncoder(model.requires_grad_(False), f"digest {seed}", f"backbone {settings.arch}")


def write_own_encoder(path: Path, seed: int = 0) -> Path:
    """The same, as a file that `load_encoder` opens."""
    torch.save({"teacher": {f"backbone.{k}": v for k, v in own_encoder(seed).model.state_dict().items()}}, path)
    return path


def write_dinov2(folder: Path, *, registers: int = 0, seed: int = 0) -> Path:
    """A Hugging Face folder of a small DINOv2, patches of 14 px, positions for 5 x 5 patches."""
    library = require("transformers")
    name = "Dinov2WithRegisters" if registers else "Dinov2"
    settings = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 96}
    settings |= {"image_size": 70, "patch_size": 14} | ({"num_register_tokens": registers} if registers else {})
    model = randomize(getattr(library, f"{name}Model")(getattr(library, f"{name}Config")(**settings)), seed)
    save_transformers(model, folder)
    return folder


def encoder_of(kind: str, folder: Path) -> LoadedEncoder:
    """An encoder of kind "own", "dinov2" or "registers"."""
    if kind == "own":
        return own_encoder()
    return load_encoder(write_dinov2(folder / kind, registers=4 * (kind == "registers")))


def plain_backbone() -> DinoVisionTransformer:
    """The backbone of `own_encoder`, anew."""
    return own_encoder().model


@torch.no_grad()
def trained(segmenter: Segmenter, seed: int = 3) -> Segmenter:
    """Changes all that training changes, so that it matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in segmenter.trainable_state().items():
        if tensor.is_floating_point() and not name.endswith("running_var"):
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    return segmenter


def some_images(height: int, width: int, count: int = 2, seed: int = 1) -> torch.Tensor:
    """Normalised images."""
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))
