"""dinoscope: from a folder of whole-slide images to a DINOv3 backbone adapted to them.

from dinoscope import load_backbone
model = load_backbone("results/models/pretrain/teacher.pth")
out = model.forward_features(images)  # dict of cls (B, D), storage (B, R, D), patches (B, P, D)
"""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "build_backbone", "load_backbone"]

# torch takes seconds to import; tiling and planning never need it
_LAZY = {"build_backbone": "dinoscope.models.build", "load_backbone": "dinoscope.models.weights"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'dinoscope' has no attribute {name!r}")
