"""A training of a segmenter from where things lie, as segment_train.py asks for it."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dinoscope.errors import ConfigError
from dinoscope.features.encoders import LoadedEncoder, load_encoder
from dinoscope.models.weights import state_digest
from dinoscope.segment.datasets import MaskDataset, open_dataset
from dinoscope.segment.files import load_segmenter
from dinoscope.segment.settings import SEAL_NAME, TrainSettings, rounded_img_dim
from dinoscope.segment.setup import build_segmenter, data_digest
from dinoscope.segment.train import TrainJob, train_segmenter
from dinoscope.train.distributed import joined_world

if TYPE_CHECKING:
    from dinoscope.segment.model import Segmenter

__all__ = ["DataSource", "EncoderSource", "train_run"]

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
