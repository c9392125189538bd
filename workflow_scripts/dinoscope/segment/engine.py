"""One step of training a segmenter: what it sees, the loss over all processes, the gradient, the rate.

Processes that train together hold the same weights, see different images of a step, and add up their gradients. What is
trained is small (adapters and a decoder), so it is added up in one piece after the backward pass.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dinoscope.data.dataset import start_worker
from dinoscope.data.sampler import mix64, tile_of_sample
from dinoscope.errors import ConfigError, DinoscopeError
from dinoscope.names import nearest
from dinoscope.segment.losses import loss_sums
from dinoscope.segment.options import fitted
from dinoscope.segment.settings import TrainSettings
from dinoscope.segment.transforms import VIEWS, ViewSettings, training_view, view_rng

if TYPE_CHECKING:
    from dinoscope.segment.datasets import MaskDataset
    from dinoscope.segment.model import Segmenter
    from dinoscope.train.distributed import World

__all__ = [
    "TrainingViews",
    "class_weights_of",
    "images_of_step",
    "learning_rate_factor",
    "make_loader",
    "make_optimizer",
    "num_steps_of_epoch",
    "train_step",
    "view_settings",
]


def num_steps_of_epoch(num_images: int, batch_size: int) -> int:
    """Steps that count as one epoch: a pass over the images, rounded."""
    return max(1, round(num_images / batch_size))


def images_of_step(step: int, num_images: int, batch_size: int, seed: int) -> list[tuple[int, int]]:
    """(pass, image) of each image of a step: every pass takes all images in an order of its own."""
    samples = range(step * batch_size, (step + 1) * batch_size)
    return [(sample // num_images, tile_of_sample(sample, num_images, seed)) for sample in samples]


class TrainingViews(Dataset):
    """Views to train on, by (pass, image): the same whichever process or worker draws them."""

    def __init__(self, dataset: "MaskDataset", settings: TrainSettings) -> None:
        self._dataset, self._settings = dataset, settings
        self._views = view_settings(settings)

    def __getitem__(self, drawn: tuple[int, int]) -> tuple[np.ndarray, np.ndarray] | DinoscopeError:
        """A view (H, W, 3) uint8 and its mask (H, W) uint8; the error of a bad file in its place."""
        number, index = drawn
        try:
            sample = self._dataset[index]
            rng = view_rng(self._settings.seed, index, number)
            return training_view(sample.image, sample.mask, self._settings.img_dim, rng, self._views)
        except DinoscopeError as error:
            return error


def make_loader(
    views: TrainingViews,
    steps: range,
    num_images: int,
    settings: TrainSettings,
    world: "World",
    workers: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (b, H, W, 3) uint8 and masks (b, H, W) int64 of this process for every step.

    Raises:
        ConfigError: The processes cannot share a batch evenly.
        DinoscopeError: An image or a mask cannot be read.
    """
    if settings.batch_size % world.size:
        raise ConfigError(
            f"batch_size {settings.batch_size} (images a step over all processes) cannot be shared by {world.size} "
            f"processes; give a multiple of {world.size}, or start fewer processes"
        )
    batches = _Batches(steps, num_images, settings, world.rank, world.size)
    loader = DataLoader(
        views, batch_sampler=batches, num_workers=workers, collate_fn=_collate, worker_init_fn=start_worker
    )
    for batch in loader:
        if isinstance(batch, DinoscopeError):
            raise batch
        yield batch


class _Batches:
    """For every step, what this process draws."""

    def __init__(self, steps: range, num_images: int, settings: TrainSettings, rank: int, size: int) -> None:
        self._steps, self._num_images, self._settings, self._share = (
            steps,
            num_images,
            settings,
            slice(rank, None, size),
        )

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        settings = self._settings
        for step in self._steps:
            yield images_of_step(step, self._num_images, settings.batch_size, settings.seed)[self._share]


def _collate(views: Sequence[tuple[np.ndarray, np.ndarray] | DinoscopeError]) -> Any:
    errors = [view for view in views if isinstance(view, DinoscopeError)]
    if errors:
        return errors[0]
    images, masks = zip(*views, strict=True)
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(masks)).long()


def make_optimizer(model: "Segmenter", settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW over what is trained: the decoder by its own rate, vectors without weight decay."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = settings.decoder_lr if settings.decoder_lr and name.startswith("decoder.") else settings.lr
            decay = settings.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": rate, "highest_lr": rate, "weight_decay": decay}
            for (rate, decay), parameters in groups.items()
        ]
    )


def learning_rate_factor(step: int, num_steps: int, num_warmup: int, lowest: float) -> float:
    """Share of the highest rate in a step: a linear rise, then half a cosine down to `lowest`."""
    if step < num_warmup:
        return (step + 1) / num_warmup
    done = (step - num_warmup) / max(1, num_steps - num_warmup)
    return lowest + (1 - lowest) * (1 + math.cos(math.pi * done)) / 2


def train_step(
    model: "Segmenter",
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    step: int,
    settings: TrainSettings,
    world: "World",
    *,
    class_weights: Tensor | None = None,
    autocast: torch.dtype | None = None,
) -> Tensor:
    """Makes one step; the rates are those that the optimizer's groups have.

    Returns:
        The loss of the whole step, of all processes, on the device.
    """
    # layers that draw, such as dropout, draw the same in a training that was interrupted
    torch.manual_seed(mix64(mix64(settings.seed) ^ (step * world.size + world.rank)) >> 1)
    images, masks = (each.to(world.device, non_blocking=True) for each in batch)
    with torch.autocast(world.device.type, autocast, enabled=autocast is not None):
        logits = model(model.normalised(images))
    sums = loss_sums(logits, masks, class_weights, with_dice=settings.dice_weight > 0)
    pixels, counted = _added(torch.stack([sums.pixels, sums.images.to(sums.pixels.dtype)]), world).clamp(min=1e-6)
    loss = sums.cross_entropy / pixels + settings.dice_weight * sums.dice / counted
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    _add_gradients(trained, world)
    if settings.clip_grad > 0:
        torch.nn.utils.clip_grad_norm_(trained, settings.clip_grad)
    optimizer.step()
    return _added(loss.detach(), world)


def _added(values: Tensor, world: "World") -> Tensor:
    """The sum over all processes."""
    return world.reduce(values, dist.ReduceOp.SUM) if world.size > 1 else values


def _add_gradients(parameters: Iterable[nn.Parameter], world: "World") -> None:
    """Replaces each gradient by its sum over all processes; those that no process has stay as they are."""
    if world.size == 1:
        return
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([parameter.grad.reshape(-1).float() for parameter in with_gradient])
    dist.all_reduce(flat)
    for parameter, summed in zip(with_gradient, flat.split([p.numel() for p in with_gradient]), strict=True):
        parameter.grad.copy_(summed.view_as(parameter))


def class_weights_of(dataset: "MaskDataset", wanted: str | Sequence[float] | None) -> Tensor | None:
    """A weight a class for cross-entropy, or None for equal ones.

    Args:
        dataset: The training images; all masks are read for "balanced".
        wanted: None, numbers, or "balanced": the inverse of each class's share of the pixels, scaled so that the mean
            weight of a pixel is 1; classes without pixels weigh nothing.

    Raises:
        ConfigError: There are not as many numbers as classes.
    """
    if wanted is None:
        return None
    num_classes = len(dataset.classes)
    if not isinstance(wanted, str):
        if len(wanted) != num_classes:
            raise ConfigError(
                f"class_weights has {len(wanted)} numbers, but there are {num_classes} classes "
                f"({', '.join(dataset.classes[:5])}, …); give one a class"
            )
        return torch.tensor(list(wanted), dtype=torch.float32)
    counts = dataset.check(allow_empty=True)
    shares = counts / counts.sum()
    present = shares > 0
    weights = np.where(present, 1 / (np.maximum(shares, 1e-12) * present.sum()), 0.0)
    return torch.from_numpy(weights).float()


def view_settings(settings: TrainSettings) -> ViewSettings:
    """How the views of a training are drawn.

    Raises:
        ConfigError: An unknown setting, with the nearest known one, or a value that cannot be meant.
    """
    if settings.views not in VIEWS:
        raise ConfigError(f"views is {settings.views!r}; choose from {', '.join(VIEWS)}")
    known = [field.name for field in dataclasses.fields(ViewSettings)]
    for name in settings.augmentation:
        if name not in known:
            raise ConfigError(f"augmentation.{name} is unknown{nearest(name, known)}; known are {', '.join(known)}")
    return dataclasses.replace(VIEWS[settings.views], **fitted(ViewSettings, settings.augmentation, "augmentation."))
