"""What `model.json` beside a weight file says of a backbone."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from dinoscope import __version__
from dinoscope.models.registry import ViTSettings
from dinoscope.models.vit import IMAGENET_MEAN, IMAGENET_STD
from dinoscope.models.weights import state_digest

if TYPE_CHECKING:
    from dinoscope.config import RunConfig

__all__ = ["PUBLISHED_ORIGIN", "UNKNOWN_ORIGIN", "backbone_card", "license_note"]

PUBLISHED_ORIGIN = "published weights"
UNKNOWN_ORIGIN = "not recorded"
_LICENSE_NOTE = (
    "Derived from weights published by Meta; they and what is derived from them stay under the DINOv3 License, "
    "a copy of which goes with them. Built with DINOv3."
)
_UNKNOWN_NOTE = "If the training started from weights published by Meta, the DINOv3 License goes with these."


def license_note(origin: str | None) -> str | None:
    """What a card says of the licence of weights that come from there in the end; None where nothing is to be said."""
    if origin is None or origin == UNKNOWN_ORIGIN:
        return _UNKNOWN_NOTE
    return _LICENSE_NOTE if PUBLISHED_ORIGIN in origin else None


def backbone_card(
    settings: ViTSettings, config: "RunConfig | None", backbone: dict[str, Tensor], origin: str | None
) -> dict[str, Any]:
    """What loading needs beyond the tensors, and what they are.

    Args:
        settings: Of the backbone.
        config: The recipe, for the normalisation of images; without one ImageNet's is assumed.
        backbone: Tensors with the names of DinoVisionTransformer.
        origin: Where the weights come from in the end.
    """
    mean, std = (config.crops.rgb_mean, config.crops.rgb_std) if config else (IMAGENET_MEAN, IMAGENET_STD)
    return {
        "format": "dinoscope model card",
        "version": 1,
        "made_with": f"dinoscope {__version__}",
        "origin": origin,
        "license_note": license_note(origin),
        "backbone": settings.as_dict(),
        "embed_dim": settings.embed_dim,
        "patch_size": settings.patch_size,
        "mean": list(mean),
        "std": list(std),
        "weights_sha256": state_digest(backbone),
    }
