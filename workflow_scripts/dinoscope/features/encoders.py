"""Encoders: what turns tiles into features, ours or anybody's.

Kinds (`ENCODER_KINDS` says the same to users):
- everything that `load_backbone` reads (published DINOv3 files, teachers of ours, finished runs, DINOv3 of Hugging Face
  and timm),
- a local Hugging Face folder of a ViT, DeiT, DINOv2 or DINOv2 with registers, with the mean, std and input size of its
  preprocessor_config.json,
- a timm checkpoint: a folder with timm's config.json, or a file together with the name of its architecture,
- a function of the user's own, module:function or FILE.py:function, that returns a torch module.

Shapes: B images, D width, R storage (register) tokens, P patches, row by row.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dinoscope import user_code
from dinoscope.errors import WeightsError
from dinoscope.features.foreign_encoders import ENCODER_KINDS, from_function, from_hugging_face, from_timm, timm_folder
from dinoscope.files import read_json, sha256_file
from dinoscope.models.tensor_files import KINDS
from dinoscope.models.weights import load_backbone, state_digest

__all__ = ["ENCODER_KINDS", "Encoder", "LoadedEncoder", "load_encoder"]

_log = logging.getLogger(__name__)


class Encoder(Protocol):
    """What features are taken with: a torch module in evaluation mode. Our backbones are encoders as they are.

    Attributes:
        embed_dim: D, the width of one token.
        patch_size: Side of a patch in pixels of the encoder's input; None where it gives no patch tokens.
        num_storage_tokens: R.
        mean: Of the images that it was trained on, RGB in 0..1.
        std: Likewise.
    """

    embed_dim: int
    patch_size: int | None
    num_storage_tokens: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def forward_features(self, images: Tensor) -> Mapping[str, Tensor]:
        """Normalised images (B, 3, H, W) -> cls (B, D), storage (B, R, D) and, if it has patches, patches (B, P, D)."""
        ...


@dataclass(frozen=True)
class LoadedEncoder:
    """An encoder and what it is.

    Attributes:
        model: The encoder, on the CPU or where it was asked for.
        sha256: Digest of its weights and of what else changes its features; the same wherever the files lie.
        kind: For people, e.g. "Hugging Face dinov2".
        image_px: Side that tiles are resized to; None: they are taken as they are.
    """

    model: Encoder
    sha256: str
    kind: str
    image_px: int | None = None


def load_encoder(
    source: str | Path,
    *,
    architecture: str | None = None,
    device: str | torch.device = "cpu",
    files: Iterable[Path] = (),
    version: str = "",
) -> LoadedEncoder:
    """Loads an encoder of any kind.

    Args:
        source: A file or folder, or module:function or FILE.py:function.
        architecture: timm's name of the model, where the file is a timm checkpoint without a config.json.
        device: Where it shall live.
        files: What else it reads, files or folders; their contents count for its digest.
        version: Anything; counts for its digest as well.

    Raises:
        WeightsError: No such file or function, one of `files` is missing, none of the kinds, or it does not load.
    """
    path, beside = Path(source).expanduser(), [version, *map(_content_digest, files)]
    if user_code.is_function_name(str(source)) and not path.exists():
        # kinds stand in results, which hold no places on disk
        loaded, kind, further = from_function(str(source)), f"function {path.name}", _source_digest(str(source))
    elif architecture is not None:
        loaded, kind, further = from_timm(path, architecture), f"timm {architecture}", architecture
    elif (config := _foreign_config(path)) is not None:
        if timm_folder(config):
            loaded, kind = from_timm(path), f"timm {config['architecture']}"
        else:
            loaded, kind = from_hugging_face(path, config), f"Hugging Face {config['model_type']}"
        further = {key: value for key, value in config.items() if key not in _SAYING_NOTHING}
    else:
        return _own_encoder(path, device, beside)
    digest = _digest(loaded, loaded.image_px, loaded.version, further, *beside)
    return LoadedEncoder(loaded.to(device).eval().requires_grad_(False), digest, kind, loaded.image_px)


# Of a foreign config.json, what changes no feature: a place, who wrote it, and the type of the tensors in the file.
_SAYING_NOTHING = {"_name_or_path", "transformers_version", "torch_dtype", "dtype"}


def _own_encoder(path: Path, device: str | torch.device, beside: list[str]) -> LoadedEncoder:
    try:
        model = load_backbone(path, device=device)
    except WeightsError as error:
        # the sentence of our kinds names them; a path that is none of ours may have been meant as another kind
        raise WeightsError(str(error).replace(KINDS, ENCODER_KINDS)) from None
    kind = f"backbone {model.settings.arch}"
    # settings, mean and std come from the card, which may change while the tensors stay
    return LoadedEncoder(model, _digest(model, model.settings.as_dict(), *beside), kind)


def _digest(model: Any, *further: Any) -> str:
    """Of an encoder's tensors, its mean and std, and of what else changes its features."""
    document = [state_digest(model.state_dict()), list(model.mean), list(model.std), *further]
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _content_digest(path: Path) -> str:
    """Of a file, or of all files of a folder with their names in it."""
    if not path.exists():
        raise WeightsError(f"{path}, a file that the encoder reads, does not exist; correct its name or put it there")
    if not path.is_dir():
        return sha256_file(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return json.dumps([[str(file.relative_to(path)), sha256_file(file)] for file in files])


def _foreign_config(path: Path) -> dict[str, Any] | None:
    """config.json of a folder that holds another model than DINOv3."""
    file = path / "config.json"
    if not path.is_dir() or not file.is_file():
        return None
    try:
        config = read_json(file)
    except ValueError as error:
        raise WeightsError(f"{file} is no JSON ({error}); copy the folder again") from None
    is_dinov3 = config.get("model_type") == "dinov3_vit" or "dinov3" in str(config.get("architecture", ""))
    return None if is_dinov3 or not ({"model_type", "architecture"} & config.keys()) else config


def _source_digest(name: str) -> str:
    file = user_code.function_file(name)
    return sha256_file(file) if file is not None and file.is_file() else name
