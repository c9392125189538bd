"""Published encoders by family and size, in the folder that the user put them in. Nothing here imports torch."""

import os
from collections.abc import Iterator
from pathlib import Path

from dinoscope.errors import WeightsError

__all__ = ["MODELS_VARIABLE", "published_encoder"]

MODELS_VARIABLE = "DINOSCOPE_MODELS"
# Files and folders as they are downloaded, by family and size; of several the first in this order is taken.
_DINOV3 = {"small": "s16", "base": "b16", "large": "l16", "huge": "h16plus", "giant": "7b16"}
_DINOV2 = ("small", "base", "large", "giant")


def published_encoder(dino_type: str, size: str, folder: str | Path | None = None) -> Path:
    """The published encoder of a size, where it was put.

    Args:
        dino_type: dinov3 or dinov2.
        size: small, base, large or giant; of dinov3 huge as well, giant being its 7B.
        folder: Where files and Hugging Face folders lie; None: what the variable DINOSCOPE_MODELS says, else models.

    Raises:
        WeightsError: There is none of that size; the sentence says where to put it.
    """
    folder = Path(folder or os.environ.get(MODELS_VARIABLE) or "models")
    if size not in (_DINOV3 if dino_type == "dinov3" else _DINOV2):
        known = ", ".join(_DINOV3 if dino_type == "dinov3" else _DINOV2)
        raise WeightsError(f"--size {size} is none of {dino_type}; choose from {known}")
    patterns = list(_patterns(dino_type, size))
    for pattern in patterns:
        if found := sorted(folder.glob(pattern)):
            return found[0]
    raise WeightsError(
        f"no {dino_type} of size {size} lies in {folder}: put {' or '.join(patterns)} there, name another folder "
        f"(--models-dir, or the variable {MODELS_VARIABLE}), or give a file or folder itself with --weights"
    )


def _patterns(dino_type: str, size: str) -> Iterator[str]:
    if dino_type == "dinov3":
        name = _DINOV3[size]
        yield f"dinov3_vit{name}_pretrain_lvd*.pth"
        yield f"dinov3-vit{name}-pretrain-lvd*"
    else:
        yield f"dinov2-with-registers-{size}"
        yield f"dinov2-{size}"
