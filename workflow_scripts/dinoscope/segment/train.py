"""Trains a segmenter: the loop, its validations, what it saves and how it goes on.

A run folder holds `run_config.json` (the seal), `state.pt` (weights, moments and place of the last save),
`segmenter/` (the best by validation mIoU), `training_metrics.json`, `provenance.json` (who made it), and `final.json`,
which is written last. All appear by rename, so that a kill leaves the state before or after a save. On the CPU a
training that was interrupted ends with the very weights of one that was not.
"""

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dinoscope.errors import CheckpointError, ConfigError, StoppedError
from dinoscope.features.embedding import choose_precision
from dinoscope.files import atomic_path, read_json, write_json, writing
from dinoscope.progress import Progress, progress
from dinoscope.segment.engine import (
    TrainingViews,
    class_weights_of,
    learning_rate_factor,
    make_loader,
    make_optimizer,
    num_steps_of_epoch,
    train_step,
)
from dinoscope.segment.evaluate import predict_classes, validate
from dinoscope.segment.files import SEGMENTER_NAME, make_card, save_segmenter
from dinoscope.segment.inference import Inference
from dinoscope.segment.settings import FINAL_NAME, STATE_NAME, TrainSettings, seal_segmenter
from dinoscope.segment.transforms import check_img_dim
from dinoscope.train.metrics import append_metrics
from dinoscope.train.provenance import write_provenance
from dinoscope.train.stopping import stop_requests

if TYPE_CHECKING:
    from dinoscope.segment.datasets import MaskDataset
    from dinoscope.segment.model import Segmenter
    from dinoscope.train.distributed import World

__all__ = ["TrainJob", "inference_of", "train_segmenter"]

_log = logging.getLogger(__name__)
SAVE_SECONDS = 300.0
LOG_EVERY = 10
DEBUG_IMAGES = 4


@dataclass(frozen=True)
class TrainJob:
    """What a training works with.

    Attributes:
        settings: All that changes its weights.
        training: Images to train on.
        validation: Images that choose the best weights.
        run_dir: Where it writes.
        data_sha256: Digest of what is in both sets.
        mpp: Micrometres a pixel of the images, if known.
        workers: Processes that draw views; change nothing but speed.
        debug: Whether pictures of the validation are written.
        save_seconds: Between two saves, besides those after each validation.
        start_sha256: Digest of the weights of the segmenter that it begins with, if any.
    """

    settings: TrainSettings
    training: "MaskDataset"
    validation: "MaskDataset"
    run_dir: Path
    data_sha256: str
    mpp: float | None = None
    workers: int = 2
    debug: bool = False
    save_seconds: float = SAVE_SECONDS
    start_sha256: str | None = None


@dataclass
class _Progress:
    """Where a training is, and what was best so far."""

    next_step: int = 0
    best_miou: float = -1.0
    best_epoch: int = 0
    best_measures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def train_segmenter(model: "Segmenter", job: TrainJob, world: "World") -> dict[str, Any]:
    """Trains to the last epoch, going on where an earlier call was interrupted.

    Args:
        model: Fresh (or begun with other weights), on the device of this process; the same on all.
        job: What it is trained on and how.
        world: The processes that train together.

    Returns:
        What final.json says.

    Raises:
        SealError: The folder holds a training of other settings, encoder or data.
        StoppedError: It was asked to stop, and has saved where it was.
        DinoscopeError: Data or settings are wrong.
    """
    settings = job.settings
    check_img_dim(*settings.img_dim, model.patch_size)
    if world.size > 1 and any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        raise ConfigError(
            f"decoder {settings.decoder} has batch norm, which would see a share of each batch in {world.size} "
            "processes and end with other weights than in one: train it in one process, or take decoder fpn"
        )
    if world.is_main:
        job.run_dir.mkdir(parents=True, exist_ok=True)
        seal_segmenter(job.run_dir, settings, model.encoder_sha256, job.data_sha256, job.start_sha256)
    if (job.run_dir / FINAL_NAME).is_file():  # also where state.pt was deleted to save space
        return read_json(job.run_dir / FINAL_NAME)
    training = _Training(model, job, world)
    write_provenance(job.run_dir, world, training.at.next_step, name_hosts=False)
    return training.run()


def inference_of(settings: TrainSettings, precision: torch.dtype | None = None) -> Inference:
    """How a training's segmenter looks at images."""
    return Inference(settings.img_dim, settings.inference, settings.overlap, autocast=precision)


class _Training:
    def __init__(self, model: "Segmenter", job: TrainJob, world: "World") -> None:
        self.model, self.job, self.world, settings = model, job, world, job.settings
        self.settings = settings
        self.optimizer = make_optimizer(model, settings)
        self.steps_of_epoch = num_steps_of_epoch(len(job.training), settings.batch_size)
        self.num_steps = settings.epochs * self.steps_of_epoch
        self.num_warmup = round(settings.warmup_epochs * self.steps_of_epoch)
        precision = choose_precision(world.device, settings.precision)
        self.autocast = None if precision == torch.float32 else precision
        weights = class_weights_of(job.training, settings.class_weights)
        self.class_weights = None if weights is None else weights.to(world.device)
        self.at, self.last_loss = _Progress(), None
        self._resume()

    def run(self) -> dict[str, Any]:
        """All steps that are left, then final.json."""
        begun, before = time.monotonic(), self.at.seconds
        self._event("resume" if self.at.next_step else "start")
        with stop_requests() as stop, self._shown() as shown:
            since, saved = time.monotonic(), time.monotonic()
            losses: list[Tensor] = []
            for step, batch in zip(self._steps_left(), self._batches(), strict=True):
                losses.append(self._step(step, batch))
                self.at.next_step, self.at.seconds = step + 1, before + time.monotonic() - begun
                if len(losses) == LOG_EVERY or self._epoch_ends(step):
                    since = self._log(step, losses, since, shown)
                    losses = []
                shown.advance(note=self._note())
                if self._is_validated_after(step):
                    self._validate()
                    saved = self._save()
                stopped = (self.world.size > 1 and self.world.any(bool(stop))) or bool(stop)
                if stopped or time.monotonic() - saved > self.job.save_seconds:
                    saved = self._save()
                if stopped and self.at.next_step < self.num_steps:
                    raise StoppedError(
                        f"the training of {self.job.run_dir.name} was asked to stop and saved its state after step "
                        f"{step + 1} of {self.num_steps}; give the same command again to go on"
                    )
        return self._finish()

    def _steps_left(self) -> range:
        return range(self.at.next_step, self.num_steps)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        views = TrainingViews(self.job.training, self.settings)
        return make_loader(
            views, self._steps_left(), len(self.job.training), self.settings, self.world, self.job.workers
        )

    def _step(self, step: int, batch: tuple[Tensor, Tensor]) -> Tensor:
        factor = learning_rate_factor(step, self.num_steps, self.num_warmup, self.settings.min_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = factor * group["highest_lr"]
        self.model.train()
        return train_step(
            self.model,
            self.optimizer,
            batch,
            step,
            self.settings,
            self.world,
            class_weights=self.class_weights,
            autocast=self.autocast,
        )

    def _epoch_ends(self, step: int) -> bool:
        return (step + 1) % self.steps_of_epoch == 0

    def _is_validated_after(self, step: int) -> bool:
        epoch = (step + 1) // self.steps_of_epoch
        return self._epoch_ends(step) and (epoch % self.settings.eval_epochs == 0 or step + 1 == self.num_steps)

    def _validate(self) -> None:
        """Measures the validation images, and keeps the weights if none were better."""
        self.model.eval()
        how, epoch = inference_of(self.settings, self.autocast), self.at.next_step // self.steps_of_epoch
        matrix = validate(self.model, self.job.validation, how, self.world)
        miou = matrix.miou()
        measures = {"miou": miou, "dice": matrix.mean_dice(), "pixel_accuracy": matrix.pixel_accuracy()}
        if not self.world.is_main:
            return
        line = {"iteration": self.at.next_step - 1, "epoch": epoch}
        append_metrics(self.job.run_dir, line | {f"validation_{key}": value for key, value in measures.items()})
        if self.job.debug:
            self._draw(how, epoch)
        if miou > self.at.best_miou or not (self.job.run_dir / SEGMENTER_NAME).is_dir():  # a kill may have taken it
            self.at.best_miou, self.at.best_epoch, self.at.best_measures = miou, epoch, measures
            classes, palette = self.job.validation.classes, self.job.validation.palette
            told = {"validation_miou": miou, "epoch": epoch}
            card = make_card(
                self.model, classes, palette, img_dim=self.settings.img_dim, mpp=self.job.mpp, measures=told
            )
            save_segmenter(self.job.run_dir / SEGMENTER_NAME, self.model, card)

    def _draw(self, how: Inference, epoch: int) -> None:
        from dinoscope.segment.pictures import Example, draw_examples  # matplotlib takes its time

        data = self.job.validation
        samples = [data[index] for index in range(min(DEBUG_IMAGES, len(data)))]
        examples = [
            Example(sample.image, sample.mask, predict_classes(self.model, sample.image, how, self.world.device), name)
            for sample in samples
            for name in [sample.name]
        ]
        output = self.job.run_dir / "debug" / f"epoch_{epoch:04d}.png"
        title = f"{self.job.run_dir.name}, epoch {epoch}"
        draw_examples(output, examples, data.classes, data.palette, title=title, subtitle="validation images")

    def _log(self, step: int, losses: list[Tensor], since: float, shown: Progress) -> float:
        """Writes a line, at the cost of waiting for the device; returns the time."""
        loss, now = float(torch.stack(losses).mean()), time.monotonic()
        if self.world.is_main:
            rate = self.optimizer.param_groups[0]["lr"]
            seconds = (now - since) / len(losses)
            line = {"iteration": step, "loss": loss, "lr": rate, "seconds_a_step": seconds}
            append_metrics(self.job.run_dir, line)
        if not math.isfinite(loss):
            raise ConfigError(
                f"the loss of {self.job.run_dir.name} is {loss} at step {step + 1}: lower lr "
                f"({self.settings.lr}), or look at the images and masks of the data set"
            )
        self.last_loss = loss
        return now

    def _note(self) -> str:
        parts = [] if self.last_loss is None else [f"loss {self.last_loss:.3f}"]
        return ", ".join(parts + ([f"best mIoU {self.at.best_miou:.3f}"] if self.at.best_miou >= 0 else []))

    def _shown(self) -> contextlib.AbstractContextManager[Progress]:
        label, done = f"training {self.job.run_dir.name}", self.at.next_step
        if self.world.is_main:
            return progress(label, self.num_steps, start=done, unit="steps")
        return contextlib.nullcontext(_Silent())

    def _event(self, name: str) -> None:
        if self.world.is_main and self.at.next_step < self.num_steps:
            append_metrics(self.job.run_dir, {"event": name, "iteration": self.at.next_step})

    def _save(self) -> float:
        """Saves weights, moments and place; returns the time."""
        if self.world.is_main:
            state = {
                "version": 1,
                "at": vars(self.at),
                "model": {name: tensor.cpu() for name, tensor in self.model.trainable_state().items()},
                "optimizer": self.optimizer.state_dict(),
            }
            path = self.job.run_dir / STATE_NAME
            with writing(path, CheckpointError, RuntimeError), atomic_path(path) as temporary:
                torch.save(state, temporary)
        return time.monotonic()

    def _resume(self) -> None:
        path = self.job.run_dir / STATE_NAME
        if not path.is_file():
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.at = _Progress(**state["at"])
        except Exception as error:
            raise CheckpointError(
                f"{path} cannot be read ({type(error).__name__}); delete this folder to start over"
            ) from None
        self.model.load_trainable(state["model"], str(path))
        self.optimizer.load_state_dict(state["optimizer"])
        _log.info("%s goes on at step %d of %d", self.job.run_dir.name, self.at.next_step + 1, self.num_steps)

    def _finish(self) -> dict[str, Any]:
        """Writes final.json; all processes return it."""
        steps = max(1, self.num_steps)
        final = {
            "version": 1,
            "segmenter": SEGMENTER_NAME,
            "epochs": self.settings.epochs,
            "steps": self.num_steps,
            "best_epoch": self.at.best_epoch,
            "validation": self.at.best_measures,
            "trainable_parameters": sum(parameter.numel() for parameter in self.model.trainable_parameters()),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "seconds": round(self.at.seconds, 1),
            "seconds_an_epoch": round(self.at.seconds / steps * self.steps_of_epoch, 3),
            "encoder_sha256": self.model.encoder_sha256,
        }
        path = self.job.run_dir / FINAL_NAME
        if self.world.is_main:
            write_json(path, final)
        return final


class _Silent:
    """Stands for the progress of processes that show none."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """Does nothing."""
