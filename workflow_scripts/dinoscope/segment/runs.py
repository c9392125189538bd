"""What the segmentation scripts do: a training, a measurement, a measurement of corrupted images.

Each takes where things lie and what is wanted, and writes whole files.
"""

import argparse
import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dinoscope.errors import ConfigError
from dinoscope.features.embedding import choose_device, choose_precision
from dinoscope.features.encoders import LoadedEncoder, load_encoder
from dinoscope.files import read_json, write_json
from dinoscope.models.weights import state_digest
from dinoscope.names import nearest
from dinoscope.segment.arguments import data_options, data_root, test_split
from dinoscope.segment.corruptions import (
    ALL_CORRUPTIONS,
    CORRUPTIONS,
    PATHOLOGY_CORRUPTIONS,
    SEVERITIES,
    corrupt,
    groups_of_kinds,
)
from dinoscope.segment.datasets import MaskDataset, open_dataset
from dinoscope.segment.evaluate import Measured, measure, predict_classes
from dinoscope.segment.files import SEGMENTER_NAME, load_segmenter
from dinoscope.segment.inference import Inference
from dinoscope.segment.pictures import Example, draw_examples, evenly_ranked
from dinoscope.segment.settings import SEAL_NAME, TrainSettings, rounded_img_dim, variant_name
from dinoscope.segment.setup import build_segmenter, data_digest, told_of_encoder
from dinoscope.segment.tables import write_table
from dinoscope.segment.train import TrainJob, train_segmenter
from dinoscope.segment.transforms import check_img_dim
from dinoscope.train.distributed import joined_world

if TYPE_CHECKING:
    from dinoscope.segment.model import Segmenter

__all__ = [
    "DataSource",
    "EncoderSource",
    "Question",
    "corruptions_run",
    "evaluate_run",
    "kinds_of",
    "question_of",
    "train_run",
]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncoderSource:
    """Where an encoder is loaded from, as `load_encoder` takes it."""

    weights: str | Path
    architecture: str | None = None
    files: tuple[Path, ...] = ()
    version: str = ""

    def load(self, device: torch.device) -> LoadedEncoder:
        """The encoder on a device; raises WeightsError."""
        return load_encoder(
            self.weights, architecture=self.architecture, device=device, files=self.files, version=self.version
        )


@dataclass(frozen=True)
class DataSource:
    """A data set: its kind, where it lies, and its options."""

    kind: str
    root: Path
    options: Mapping[str, Any] = field(default_factory=dict)

    def open(self, split: str) -> MaskDataset:
        """One split of it; raises DinoscopeError."""
        return open_dataset(self.kind, self.root, split, **self.options)


def train_run(
    settings: TrainSettings,
    encoder: EncoderSource,
    data: DataSource,
    run_dir: Path,
    *,
    round_img_dim: bool = False,
    start: Path | None = None,
    doublings: int = 2,
    mpp: float | None = None,
    workers: int = 2,
    debug: bool = False,
) -> dict[str, Any]:
    """Trains a segmenter in all processes that torchrun started, or in this one alone.

    Args:
        settings: All that changes its weights.
        encoder: What it is built on.
        data: Splits train and val are used.
        run_dir: Folder of the training.
        round_img_dim: Whether sizes that are no multiples of the patch are rounded, which is said, or refused.
        start: A trained segmenter that it begins with.
        doublings: Of the FPN decoder of `start`, where it is a .pt file of dinov2-finetune.
        mpp: Micrometres a pixel of the images.
        workers: Processes that draw views.
        debug: Whether pictures are drawn after each validation.

    Returns:
        What final.json says.

    Raises:
        DinoscopeError: One sentence on what is wrong with settings, encoder or data.
    """
    training, validation = data.open("train"), data.open("val")
    with joined_world() as world:
        loaded = encoder.load(world.device)
        if round_img_dim and loaded.model.patch_size:
            size, note = rounded_img_dim(settings.img_dim, loaded.model.patch_size)
            settings = replace(settings, img_dim=size)
            if note and world.is_main:
                _log.warning("%s", note)
        if world.is_main and not (run_dir / SEAL_NAME).is_file():  # the seal holds the digest of what was checked
            training.check()
            validation.check(allow_empty=True)
        if start is None:
            model = build_segmenter(loaded, len(training.classes), settings).to(world.device)
        else:
            model = load_segmenter(start, loaded, world.device, doublings=doublings)
            settings = _like(settings, model, len(training.classes), start)
        if world.is_main:
            _tell(model, settings, training, validation, world.size)
        digest = data_digest(training, validation) if world.is_main else ""
        begun_with = None if start is None else state_digest(model.trainable_state())
        job = TrainJob(settings, training, validation, run_dir, digest, mpp, workers, debug, start_sha256=begun_with)
        final = train_segmenter(model, job, world)
        if world.is_main:
            miou = final["validation"]["miou"]
            _log.info("best validation mIoU %.4f, after epoch %d of %d", miou, final["best_epoch"], final["epochs"])
    return final


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
    asked = _Asked(question)
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


def corruptions_run(
    question: Question,
    output: Path,
    *,
    kinds: Sequence[str],
    severities: Sequence[int],
    seed: int = 0,
    table: Path | None = None,
    picture: Path | None = None,
) -> dict[str, Any]:
    """Measures a segmenter on corrupted images.

    Args:
        question: Segmenter and images.
        output: Means and all measures as JSON.
        kinds: Names of corruptions, or of groups of them.
        severities: Of each kind, 1 to 5.
        seed: Of the corruptions.
        table: A row a kind and severity.
        picture: One image in all kinds at the highest severity.

    Returns:
        What `output` says.

    Raises:
        DinoscopeError: An unknown kind, or as `evaluate_run`.
    """
    names, severities = kinds_of(kinds), sorted(set(severities))
    asked = _Asked(question)
    clean = asked.measure("measuring images as they are").matrix.miou()
    rows = []
    for kind in names:
        for severity in severities:
            change = functools.partial(_corrupted, kind=kind, severity=severity, seed=seed)
            miou = asked.measure(f"{kind}, severity {severity}", change).matrix.miou()
            rows.append({"kind": kind, "severity": severity, "miou": miou, "relative_drop": drop_of(miou, clean)})
    told = {"miou_clean": clean, "seed": seed, **means_of(rows, clean), "rows": rows, **asked.told}
    if table is not None:
        write_table(table, ("kind", "severity", "miou", "relative_drop"), rows)
    if picture is not None:
        _draw_corruptions(picture, asked, names, severities[-1], seed)
    write_json(output, told)
    return told


def means_of(rows: Sequence[Mapping[str, Any]], clean: float) -> dict[str, float | None]:
    """Means over kinds at the highest severity, and the share of the clean mIoU that is lost there.

    The fifteen common kinds and those of slides are told apart: the first are what the public tool's tables mean.

    Args:
        rows: With kind, severity and miou.
        clean: The mIoU of images as they are.
    """
    told: dict[str, float | None] = {}
    for prefix, kinds in (("", CORRUPTIONS), ("pathology_", PATHOLOGY_CORRUPTIONS)):
        hardest = [row["miou"] for row in rows if row["severity"] == max(SEVERITIES) and row["kind"] in kinds]
        mean = float(np.mean(hardest)) if hardest else None
        told[f"{prefix}miou_level_5"] = mean
        told[f"{prefix}relative_drop"] = None if mean is None else drop_of(mean, clean)
    return told


def drop_of(miou: float, clean: float) -> float | None:
    """The share of the clean mIoU that is lost; None where there was none to lose."""
    return 1 - miou / clean if clean else None


def kinds_of(wanted: Sequence[str]) -> list[str]:
    """Names of corruptions, groups of them written out, each once.

    Raises:
        ConfigError: A name is unknown, with the nearest known one.
    """
    groups = {"common": CORRUPTIONS, **groups_of_kinds(), "all": ALL_CORRUPTIONS}
    names: list[str] = []
    for name in wanted:
        if name not in groups and name not in ALL_CORRUPTIONS:
            raise ConfigError(
                f"corruption {name!r} is unknown{nearest(name, [*groups, *ALL_CORRUPTIONS])}; groups are "
                f"{', '.join(groups)}, kinds {', '.join(ALL_CORRUPTIONS)}"
            )
        names += groups.get(name, (name,))
    return list(dict.fromkeys(names))


class _Asked:
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


def _corrupted(image: np.ndarray, index: int, kind: str, severity: int, seed: int) -> np.ndarray:
    return corrupt(image, kind, severity, seed, index)


def _draw_corruptions(picture: Path, asked: _Asked, kinds: Sequence[str], severity: int, seed: int) -> None:
    index = 0
    examples = []
    for kind in kinds:
        change = functools.partial(_corrupted, kind=kind, severity=severity, seed=seed)
        examples.append(replace(asked.example(index, change=change), name=kind.replace("_", " ")))
    draw_examples(
        picture,
        examples,
        asked.data.classes,
        asked.data.palette,
        title=f"{asked.label}: {asked.data.names[index]}, corrupted",
        subtitle=f"severity {severity} of 5",
    )


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


def _like(settings: TrainSettings, model: "Segmenter", num_classes: int, source: Path) -> TrainSettings:
    """The settings, with what a trained segmenter is already."""
    if model.num_classes != num_classes:
        raise ConfigError(f"{source} has {model.num_classes} classes, the data set {num_classes}; give another of both")
    same = replace(settings, decoder=model.decoder_name, trainable=model.trainable, last_n=model.last_n)
    if model.lora is None:
        return same
    lora = model.lora
    return replace(same, rank=lora.rank, alpha=lora.alpha, targets=tuple(lora.targets), blocks=lora.blocks)


def _tell(
    model: "Segmenter", settings: TrainSettings, training: MaskDataset, validation: MaskDataset, processes: int
) -> None:
    trained = sum(parameter.numel() for parameter in model.trainable_parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    what = {"lora": f"LoRA of rank {settings.rank} on {', '.join(settings.targets)} and the", "decoder": "the"}
    _log.info(
        "%s %s decoder on %s: %s of %s parameters (%.2f %%) are trained on %d images, %d validate, %d processes",
        *(what.get(settings.trainable, f"{settings.trainable} and the"), settings.decoder, model.encoder_kind),
        *(f"{trained:,}", f"{total:,}", 100 * trained / total, len(training), len(validation), processes),
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
