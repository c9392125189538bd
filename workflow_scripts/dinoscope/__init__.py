"""dinoscope: from a folder of whole-slide images to a DINOv3 backbone adapted to them.

from dinoscope import load_backbone
model = load_backbone("results/models/pretrain/teacher.pth")
out = model.forward_features(images)  # dict of cls (B, D), storage (B, R, D), patches (B, P, D)
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load_backbone"]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; tiling and planning never need it
    if name == "load_backbone":
        from dinoscope.models.weights import load_backbone

        return load_backbone
    raise AttributeError(f"module 'dinoscope' has no attribute {name!r}")
