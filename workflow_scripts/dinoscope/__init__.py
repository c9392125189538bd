"""dinoscope: from a folder of whole-slide images to a DINOv3 backbone adapted to them.

from dinoscope import load_backbone
model = load_backbone("results/models/pretrain/teacher.pth")
out = model.forward_features(images)  # dict of cls (B, D), storage (B, R, D), patches (B, P, D)

torch, which takes seconds to import, is imported when one of these functions is called: tiling and planning never
need it.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from dinoscope.models.build import BuiltBackbone
    from dinoscope.models.vit import DinoVisionTransformer

__version__ = "0.1.0"
__all__ = ["__version__", "build_backbone", "load_backbone"]


def load_backbone(path: "str | Path", device: "str | torch.device" = "cpu") -> "DinoVisionTransformer":
    """Loads a backbone for inference, in eval mode and float32; see `dinoscope.models.weights.load_backbone`.

    Args:
        path: A published file, a teacher.pth or teacher export, a timm state dict, any of them as .safetensors, or the
            folder of a model, of a finished run or of Hugging Face.
        device: Where the model shall live.

    Raises:
        WeightsError: No such file, not one of the kinds, or its tensors do not make a whole backbone.
    """
    from dinoscope.models import weights

    return weights.load_backbone(path, device)


def build_backbone(config: "str | Path") -> "BuiltBackbone":
    """Student, teacher and width from a run's config, randomly initialised; see `dinoscope.models.build`.

    Args:
        config: A recipe, or config.yaml in the folder of a run.

    Raises:
        ConfigError: The recipe is wrong.
    """
    from dinoscope.models import build

    return build.build_backbone(config)
