"""A segmentation model with its adapters merged: an encoder that every tool opens, and the decoder beside it.

The folder holds the encoder as `load_encoder` takes it (`teacher.pth`, `teacher.safetensors` and `model.json` of a
backbone of ours; a Hugging Face folder of DINOv2), and the decoder as a segmentation model of its own on that encoder,
so that the same folder is given for both.
"""

import logging
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError

from dinoscope.errors import WeightsError
from dinoscope.export.exportable import quiet
from dinoscope.export.model_files import write_model
from dinoscope.features.encoders import load_encoder
from dinoscope.files import atomic_folder, writing
from dinoscope.models.card import backbone_card
from dinoscope.models.vit import DinoVisionTransformer
from dinoscope.models.weights import read_model_file
from dinoscope.segment.encoder_parts import blocks_of
from dinoscope.segment.files import load_segmenter, make_card, write_into
from dinoscope.segment.model import Segmenter

__all__ = ["export_merged"]

_log = logging.getLogger(__name__)
_LARGEST_DIFFERENCE = 1e-4


def export_merged(source: str | Path, encoder: str | Path, output: str | Path) -> float:
    """Writes the folder and checks that what is read back from it gives the same logits.

    Args:
        source: A model of `load_segmenter`.
        encoder: A file or folder: what the model was trained on.
        output: The folder, which appears when all is right; an earlier one is replaced.

    Returns:
        How far logits of random images are apart: the largest difference over the largest value.

    Raises:
        WeightsError: The model does not load, its encoder is of another kind, or the folder cannot be written.
    """
    segmenter = load_segmenter(source, encoder)
    blocks_of(segmenter.encoder)
    images = _random_images(segmenter)
    with torch.inference_mode():
        wanted = segmenter(images)
    segmenter.merge()
    with writing(output, WeightsError, SafetensorError), atomic_folder(output) as temporary:
        _write_encoder(segmenter, Path(encoder), temporary)
        merged = Segmenter(load_encoder(temporary), segmenter.num_classes, segmenter.decoder_name)
        merged.decoder.load_state_dict(segmenter.decoder.state_dict())
        old = segmenter.card
        card = make_card(merged, old.classes, old.palette, img_dim=old.img_dim, mpp=old.mpp, measures=old.measures)
        write_into(temporary, merged, card)
        difference = _difference(load_segmenter(temporary, temporary), images, wanted)
        if not difference < _LARGEST_DIFFERENCE:
            raise WeightsError(f"{output}: the merged model's logits differ by {difference:.2g} from those of {source}")
    _log.info("%s: merged; logits of random images differ by at most %.1e of the largest", output, difference)
    return difference


def _write_encoder(segmenter: Segmenter, source: Path, folder: Path) -> None:
    model = segmenter.encoder
    if isinstance(model, DinoVisionTransformer):
        origin = read_model_file(source).origin
        state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        card = backbone_card(model.settings, None, state, origin) | {"mean": list(model.mean), "std": list(model.std)}
        write_model(folder / "teacher.pth", {"teacher": {"backbone": state}}, card)
        return
    with quiet("transformers"):
        model.model.save_pretrained(folder)
    if (source / "preprocessor_config.json").is_file():
        shutil.copy(source / "preprocessor_config.json", folder)


def _random_images(segmenter: Segmenter) -> torch.Tensor:
    side = 12 * segmenter.patch_size
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def _difference(segmenter: Segmenter, images: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((segmenter(images) - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12)).item()
