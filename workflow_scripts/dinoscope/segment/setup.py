"""Segmenters as settings describe them, and what identifies data and encoders."""

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dinoscope.files import sha256_file
from dinoscope.segment.adapters import LoraSettings
from dinoscope.segment.model import Segmenter
from dinoscope.segment.settings import TrainSettings

if TYPE_CHECKING:
    from dinoscope.features.encoders import LoadedEncoder
    from dinoscope.segment.datasets import MaskDataset

__all__ = ["build_segmenter", "data_digest", "told_of_encoder"]


def build_segmenter(encoder: "LoadedEncoder", num_classes: int, settings: TrainSettings) -> Segmenter:
    """A fresh segmenter as the settings say; the same for the same seed."""
    adapters = LoraSettings(settings.rank, settings.alpha, settings.targets, settings.blocks)
    return Segmenter(
        encoder,
        num_classes,
        settings.decoder,
        adapters if settings.trainable == "lora" else None,
        settings.seed,
        trainable=settings.trainable,
        last_n=settings.last_n,
    )


def data_digest(*datasets: "MaskDataset") -> str:
    """SHA-256 of what is in data sets: names, groups, classes, and every image and mask."""
    digest = hashlib.sha256()
    for data in datasets:
        digest.update(json.dumps([list(data.names), [str(g) for g in data.groups], list(data.classes)]).encode())
        for index in range(len(data)):
            digest.update(_content(data, index))
    return digest.hexdigest()


def _content(data: "MaskDataset", index: int) -> bytes:
    if hasattr(data, "files"):  # faster than decoding
        return "".join(sha256_file(file) for file in data.files(index)).encode()
    if hasattr(data, "content"):  # tiles: reading them all again would take as long as an epoch
        return data.content(index)
    sample = data[index]
    return hashlib.sha256(sample.image.tobytes() + sample.mask.tobytes()).digest()


def architecture_name(encoder: Any) -> str:
    """As papers write it, such as ViT-L/16, by width, depth and patch."""
    depth = len(getattr(encoder, "blocks", ())) or None
    letters = {384: "S", 768: "B", 1024: "L", 1152: "So400m", 1280: "H", 1536: "g", 4096: "7B"}
    width = encoder.embed_dim
    small = {64: "nano", 128: "micro", 192: "Ti"}
    letter = letters.get(width) or small.get(width) or (f"{width}x{depth}" if depth else str(width))
    return f"ViT-{letter}/{encoder.patch_size}"


def told_of_encoder(encoder: "LoadedEncoder") -> Mapping[str, Any]:
    """What result tables say of an encoder."""
    model = encoder.model
    return {
        "encoder_kind": encoder.kind,
        "encoder_sha256": encoder.sha256,
        "architecture": architecture_name(model),
        "encoder_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "registers": int(model.num_storage_tokens),
    }
