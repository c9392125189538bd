"""A backbone of two blocks for tests, with weights from a seed and colours of its own."""

import torch

from dinoscope.models.registry import ViTSettings
from dinoscope.models.vit import DinoVisionTransformer


def tiny_backbone() -> DinoVisionTransformer:
    """48 wide, three storage tokens, in evaluation mode."""
    torch.manual_seed(0)
    settings = ViTSettings(embed_dim=48, depth=2, num_heads=3, ffn_hidden=96, num_storage_tokens=3, layerscale=0.5)
    model = DinoVisionTransformer(settings)
    model.init_weights()
    model.mean, model.std = (0.7, 0.5, 0.6), (0.2, 0.25, 0.15)
    return model.eval()
