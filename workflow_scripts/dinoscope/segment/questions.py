"""A trained segmenter and the images that it is asked about, and its measures on images as they are."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dinoscope.errors import ConfigError
from dinoscope.features.embedding import choose_device, choose_precision
from dinoscope.files import read_json, write_json
from dinoscope.segment.arguments import data_options, data_root, test_split
from dinoscope.segment.datasets import MaskDataset
from dinoscope.segment.evaluate import Measured, measure, predict_classes
from dinoscope.segment.files import SEGMENTER_NAME, load_segmenter
from dinoscope.segment.inference import Inference
from dinoscope.segment.pictures import Example, draw_examples, evenly_ranked
from dinoscope.segment.runs import DataSource, EncoderSource
from dinoscope.segment.settings import SEAL_NAME, TrainSettings, variant_name
from dinoscope.segment.setup import told_of_encoder
from dinoscope.segment.tables import write_table
from dinoscope.segment.transforms import check_img_dim

if TYPE_CHECKING:
    from dinoscope.segment.model import Segmenter

__all__ = ["Asked", "Question", "evaluate_run", "question_of"]


@dataclass(frozen=True)
class Question:
    """A trained segmenter and the images that it is asked about.

    Attributes:
        segmenter: Run folder, folder of a segmenter, or a .pt file of dinov2-finetune.
        encoder: What it was trained on.
        data: The images.
        split: Of the data set.
        img_dim: Height and width of a window, px; None: as trained.
        inference: slide or resize; None: as trained.
        overlap: Likewise.
        batch_size: Windows a forward pass.
        device: auto, cpu, cuda:1 …
        precision: auto, float32 or bfloat16.
        doublings: Of the FPN decoder of a .pt file (`PublicFPNDecoder`).
    """

    segmenter: Path
    encoder: EncoderSource
    data: DataSource
    split: str
    img_dim: tuple[int, int] | None = None
    inference: str | None = None
    overlap: float | None = None
    batch_size: int = 8
    device: str = "auto"
    precision: str = "auto"
    doublings: int = 2


def question_of(arguments: argparse.Namespace) -> Question:
    """What a command line with `add_segmenter_arguments` asks."""
    given = arguments
    return Question(
        given.segmenter,
        EncoderSource(given.weights, given.architecture, tuple(given.encoder_files), given.encoder_version),
        DataSource(given.dataset, data_root(given.dataset, given.data_root), data_options(given.data_option)),
        test_split(given.dataset, given.split),
        None if given.img_dim is None else tuple(given.img_dim),
        given.inference,
        given.overlap,
        given.batch_size,
        given.device,
        given.precision,
        given.fpn_doublings,
    )


def evaluate_run(
    question: Question,
    output: Path,
    *,
    model_name: str | None = None,
    classes_table: Path | None = None,
    images_table: Path | None = None,
    picture: Path | None = None,
    pictured: int = 4,
) -> dict[str, Any]:
    """Measures a segmenter on images as they are.

    Args:
        question: Segmenter and images.
        output: All measures as JSON.
        model_name: What tables call the encoder.
        classes_table: A row a class.
        images_table: A row an image.
        picture: Some images, from the worst to the best.
        pictured: How many.

    Returns:
        What `output` says.

    Raises:
        DinoscopeError: Segmenter, encoder or images cannot be used, or do not belong together.
    """
    if picture is not None and pictured < 1:
        raise ConfigError(f"{pictured} images are to be pictured; give at least 1, or no picture to write")
    asked = Asked(question)
    measured = asked.measure(f"measuring {asked.label}")
    told = measured.summary(asked.data.classes) | asked.told | {"model_name": model_name or asked.encoder_kind}
    if classes_table is not None:
        write_table(classes_table, ("class", "iou", "dice", "pixels"), _class_rows(told, measured))
    mious = measured.image_miou()
    if images_table is not None:
        rows = zip(measured.names, measured.groups, mious.tolist(), strict=True)
        named = [dict(zip(("image", "group", "miou"), row, strict=True)) for row in rows]
        write_table(images_table, ("image", "group", "miou"), named)
    if picture is not None:
        chosen = evenly_ranked(mious, pictured)
        title = f"{told['model_name']}: {asked.label}"
        words = (
            f"split {question.split}, mIoU {told['miou']:.3f} over all {len(mious)} images; from the worst to the best"
        )
        draw_examples(
            picture,
            [asked.example(index, f"mIoU {mious[index]:.3f}") for index in chosen],
            asked.data.classes,
            asked.data.palette,
            title=title,
            subtitle=words,
        )
    write_json(output, told)
    return told


class Asked:
    """A loaded question."""

    def __init__(self, question: Question) -> None:
        self.question, self.device = question, choose_device(question.device)
        folder = question.segmenter
        run = next((each for each in (folder, folder.parent) if _is_training(each, folder)), None)
        self.settings = {} if run is None else read_json(run / SEAL_NAME)["settings"]
        encoder = question.encoder.load(self.device)
        self.encoder_kind, about = encoder.kind, told_of_encoder(encoder)
        self.model = load_segmenter(folder, encoder, self.device, doublings=question.doublings)
        self.data = question.data.open(question.split)
        _check_classes(self.model, self.data, folder)
        self.how = self._inference()
        card, self.names = self.model.card, _names(run or folder, self.settings)
        self.told = {
            "task": self.names[0],
            "file": folder.name if folder.is_file() else "/".join(self.names),
            "split": question.split,
            **about,
            "trained_parameters": sum(tensor.numel() for tensor in self.model.trainable_state().values()),
            "settings": {"trainable": card.trainable, "decoder": card.decoder, **self.settings},
            "validation_miou": card.measures.get("validation_miou"),
            "best_epoch": card.measures.get("epoch"),
            "img_dim": list(self.how.window_hw),
            "inference": self.how.mode,
        }

    @property
    def label(self) -> str:
        """Of pictures and progress."""
        return " ".join(self.names)

    def _inference(self) -> Inference:
        question, card = self.question, self.model.card
        size = question.img_dim or card.img_dim
        if size is None:
            raise ConfigError(f"{question.segmenter.name} does not say which size it was trained on; give --img-dim")
        check_img_dim(*size, self.model.patch_size)
        precision = choose_precision(self.device, question.precision)
        overlap = self.settings.get("overlap", TrainSettings.overlap) if question.overlap is None else question.overlap
        return Inference(
            tuple(size),
            question.inference or self.settings.get("inference", "slide"),
            overlap,
            question.batch_size,
            None if precision == torch.float32 else precision,
        )

    def measure(self, description: str, change: Any = None) -> Measured:
        """Counts over all images."""
        return measure(self.model, self.data, self.how, self.device, change=change, description=description)

    def example(self, index: int, note: str = "", change: Any = None) -> Example:
        """An image with its prediction."""
        sample = self.data[index]
        image = sample.image if change is None else change(sample.image, index)
        return Example(image, sample.mask, predict_classes(self.model, image, self.how, self.device), sample.name, note)


def _class_rows(told: Mapping[str, Any], measured: Measured) -> list[dict[str, Any]]:
    pixels = measured.matrix.counts.sum(axis=1).tolist()
    columns = zip(told["classes"], told["iou_per_class"], told["dice_per_class"], pixels, strict=True)
    return [dict(zip(("class", "iou", "dice", "pixels"), row, strict=True)) for row in columns]


def _check_classes(model: "Segmenter", data: MaskDataset, source: Path) -> None:
    """Raises ConfigError when segmenter and data set do not mean the same classes."""
    classes = tuple(model.card.classes)
    unnamed = all(name == f"class {index}" for index, name in enumerate(classes))
    if len(classes) != len(data.classes) or not (unnamed or classes == tuple(data.classes)):
        raise ConfigError(
            f"{source} tells {len(classes)} classes apart ({_first(classes)}), but the data set has "
            f"{len(data.classes)} ({_first(data.classes)}); give the data set (--data-option) that it was trained for"
        )


def _is_training(folder: Path, asked: Path) -> bool:
    """Whether a segmenter's settings stand in a folder: in what is asked about, or above a training's best."""
    return (folder / SEAL_NAME).is_file() and (folder == asked or asked.name == SEGMENTER_NAME)


def _names(source: Path, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """What results call a segmenter: task, model and variant of the workflow's, else the last name of its path alone.

    What is above is the user's: results hold no places on disk.
    """
    source = source.absolute()
    of_workflow = settings and source.name == variant_name(*(settings[key] for key in ("trainable", "decoder", "seed")))
    return source.parts[-3:] if of_workflow else (source.stem if source.is_file() else source.name,)


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
