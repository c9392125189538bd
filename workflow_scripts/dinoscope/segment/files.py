"""A trained segmentation model on disk: a folder with `segmenter.safetensors` and its card `segmenter.json`.

Only what training changed is stored (adapters and decoder: a few MB); the encoder is loaded from where it lies, and is
refused if it is another one than the model was trained on. Files of dinov2-finetune load as well (public_tool.py).
"""

import dataclasses
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dinoscope import __version__
from dinoscope.errors import WeightsError
from dinoscope.features.encoders import LoadedEncoder, load_encoder
from dinoscope.files import atomic_folder, write_json, writing
from dinoscope.models.tensor_files import read_object, read_tensors
from dinoscope.models.weights import state_digest
from dinoscope.segment.adapters import LoraSettings
from dinoscope.segment.model import Segmenter
from dinoscope.segment.palettes import default_palette
from dinoscope.segment.public_fpn import PublicFPNDecoder
from dinoscope.segment.public_tool import is_public_state, segmenter_of_public

__all__ = [
    "CARD_NAME",
    "SEGMENTER_NAME",
    "TENSORS_NAME",
    "SegmenterCard",
    "load_segmenter",
    "make_card",
    "read_card",
    "save_segmenter",
    "write_into",
]

_log = logging.getLogger(__name__)
CARD_NAME, TENSORS_NAME = "segmenter.json", "segmenter.safetensors"
SEGMENTER_NAME = "segmenter"  # folder of the best one in that of a training
_FORMAT = "dinoscope segmenter"


@dataclass(frozen=True)
class SegmenterCard:
    """What a model is, beside its tensors.

    Attributes:
        encoder_sha256, encoder_kind: Of the encoder that it was trained on (`LoadedEncoder`).
        classes: Names, in the order of the indices.
        palette: RGB of each class, 0..255.
        mean, std: Normalisation of the images.
        decoder, lora, trainable, last_n: As in `Segmenter`.
        img_dim: Height and width of the training images in pixels, or None.
        mpp: Micrometres a pixel of the training images, or None.
        measures: Numbers by name, e.g. the validation mIoU.
    """

    encoder_sha256: str
    encoder_kind: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    decoder: str
    lora: LoraSettings | None
    trainable: str = "lora"
    last_n: int = 1
    img_dim: tuple[int, int] | None = None
    mpp: float | None = None
    measures: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        told = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return told | {
            "palette": [list(color) for color in self.palette],
            "lora": None if self.lora is None else self.lora.as_dict(),
            "measures": dict(self.measures),
        }

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> "SegmenterCard":
        """The inverse of `as_dict`; keys that it does not know are left alone."""
        known = {item.name: told[item.name] for item in dataclasses.fields(cls) if item.name in told}
        for name in ("classes", "mean", "std"):
            known[name] = tuple(known[name])
        known["palette"] = tuple(tuple(color) for color in known["palette"])
        known["lora"] = None if known["lora"] is None else LoraSettings.from_dict(known["lora"])
        known["img_dim"] = None if known.get("img_dim") is None else tuple(known["img_dim"])
        return cls(**known)


def make_card(
    segmenter: Segmenter,
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
    *,
    img_dim: tuple[int, int] | None = None,
    mpp: float | None = None,
    measures: Mapping[str, Any] | None = None,
) -> SegmenterCard:
    """The card of a model; all that the model itself tells is taken from it."""
    assert len(classes) == len(palette) == segmenter.num_classes
    return SegmenterCard(
        segmenter.encoder_sha256,
        segmenter.encoder_kind,
        tuple(classes),
        tuple(tuple(int(value) for value in color) for color in palette),
        segmenter.mean,
        segmenter.std,
        segmenter.decoder_name,
        segmenter.lora,
        segmenter.trainable,
        segmenter.last_n,
        img_dim,
        mpp,
        measures or {},
    )


def save_segmenter(folder: str | Path, segmenter: Segmenter, card: SegmenterCard) -> None:
    """Writes a model's folder; it takes the place of an earlier one when it is whole.

    Raises:
        WeightsError: It cannot be written.
    """
    with writing(folder, WeightsError, SafetensorError), atomic_folder(folder) as temporary:
        write_into(temporary, segmenter, card)


def write_into(folder: Path, segmenter: Segmenter, card: SegmenterCard) -> None:
    """Writes a model's two files into a folder that is being filled."""
    state = {name: tensor.cpu().contiguous() for name, tensor in segmenter.trainable_state().items()}
    about = {"format": _FORMAT, "version": 1, "made_with": f"dinoscope {__version__}"}
    save_file(state, folder / TENSORS_NAME, {"format": "pt"})
    write_json(folder / CARD_NAME, {**about, **card.as_dict(), "weights_sha256": state_digest(state)})
    shutil.copymode(folder / CARD_NAME, folder / TENSORS_NAME)  # safetensors lets only the owner read


def read_card(folder: str | Path) -> SegmenterCard:
    """The card of a model's folder.

    Raises:
        WeightsError: There is none, or it is damaged.
    """
    path = Path(folder) / CARD_NAME
    if not path.is_file():
        raise WeightsError(
            f"{folder} is no segmentation model: it has no {CARD_NAME}; give the folder of a trained model, or a .pt "
            "file of dinov2-finetune"
        )
    told = read_object(path)
    try:
        return SegmenterCard.from_dict(told)
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} is no whole card of a segmentation model ({error}); copy it anew") from None


def load_segmenter(
    source: str | Path, encoder: str | Path | LoadedEncoder, device: str | torch.device = "cpu", **options: Any
) -> Segmenter:
    """Loads a model for inference or further training.

    Args:
        source: A folder of `save_segmenter`, a training's folder (its best), or a .pt file of dinov2-finetune.
        encoder: What it was trained on: a source of `load_encoder`, or the encoder itself.
        device: Where the model shall live.
        options: For a file of dinov2-finetune, `doublings` of its fpn decoder (`PublicFPNDecoder`).

    Returns:
        The model in evaluation mode; its `card` is what is known of it.

    Raises:
        WeightsError: Nothing readable, another encoder, or tensors without a place.
    """
    source = Path(source)
    if not source.exists():
        raise WeightsError(f"{source} does not exist; give a trained model's folder or a .pt file of dinov2-finetune")
    loaded = encoder if isinstance(encoder, LoadedEncoder) else load_encoder(encoder, device=device)
    if not (source / CARD_NAME).is_file() and (source / SEGMENTER_NAME / CARD_NAME).is_file():
        source = source / SEGMENTER_NAME
    segmenter = _own(source, loaded) if source.is_dir() else _foreign(source, loaded, options)
    return segmenter.to(device).eval()


def _own(folder: Path, encoder: LoadedEncoder) -> Segmenter:
    card = read_card(folder)
    if card.encoder_sha256 != encoder.sha256:
        raise WeightsError(
            f"{folder} was trained on another encoder ({card.encoder_kind}, sha256 {card.encoder_sha256[:12]}…) than "
            f"the one given ({encoder.kind}, sha256 {encoder.sha256[:12]}…); give that one"
        )
    state = read_tensors(folder / TENSORS_NAME)
    _check_digest(folder, state)
    segmenter = Segmenter(
        encoder, len(card.classes), card.decoder, card.lora, trainable=card.trainable, last_n=card.last_n
    )
    segmenter.load_trainable(state, str(folder))
    segmenter.card = card
    return segmenter


def _foreign(file: Path, encoder: LoadedEncoder, options: Mapping[str, Any]) -> Segmenter:
    state: dict[str, Tensor] = read_tensors(file)
    if not is_public_state(state):
        raise WeightsError(
            f"{file} is no segmentation model: it has neither classifier.weight nor conv5.0.weight as the files of "
            f"dinov2-finetune have; a model of dinoscope is a folder with {CARD_NAME}"
        )
    segmenter = segmenter_of_public(state, encoder, str(file), **options)
    said, names = _classes_of_public(segmenter.num_classes)
    segmenter.card = make_card(segmenter, names, default_palette(len(names)))
    _log.warning(
        "%s does not say which encoder it was trained on, nor what its %d classes are; taken is the encoder given "
        "(%s), with its mean and std, and the classes are %s",
        *(file.name, len(names), encoder.kind, said),
    )
    if isinstance(segmenter.decoder, PublicFPNDecoder):
        _log.warning(
            "%s does not say how often its FPN decoder doubles the map, in which versions of that tool differ; taken "
            "is %d times (--fpn-doublings)",
            *(file.name, segmenter.decoder.doublings),
        )
    return segmenter


def _classes_of_public(count: int) -> tuple[str, Sequence[str]]:
    """What the classes of a file of dinov2-finetune are, which was trained on two data sets, and their names."""
    from dinoscope.segment.ade20k import ADE20K_CLASSES
    from dinoscope.segment.voc import VOC_CLASSES

    for name, classes in (("Pascal VOC", VOC_CLASSES), ("ADE20K", ADE20K_CLASSES)):
        if len(classes) == count:
            return f"those of {name}", classes
    return "numbered", [f"class {index}" for index in range(count)]


def _check_digest(folder: Path, state: dict[str, Tensor]) -> None:
    if state_digest(state) != read_object(folder / CARD_NAME).get("weights_sha256"):
        raise WeightsError(f"{folder}: {TENSORS_NAME} is not the file that {CARD_NAME} describes; copy both anew")
