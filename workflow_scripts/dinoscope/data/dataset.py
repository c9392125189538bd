"""Images of any kind as training samples."""

import functools
import hashlib
import json
import signal
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
from torch.utils.data import DataLoader, Dataset

from dinoscope.data.collate import Batch, Collate
from dinoscope.data.crops import AUGMENTATIONS, Augmentation, Crops, CropSizes, for_stain, make_crops, sample_rng
from dinoscope.data.images import map_images
from dinoscope.data.packed import PackedTiles, open_packed
from dinoscope.data.sampler import StepSampler
from dinoscope.data.sampling import SampleOrder, UniformOrder
from dinoscope.data.sources import TrainingImages, UserImages, is_class_name
from dinoscope.data.tiles import SlideAccess, SlideTiles, open_tiles
from dinoscope.errors import ConfigError, DinoscopeError, SealError
from dinoscope.processes import die_with_parent, keep_freed_memory
from dinoscope.resolutions import choice_of_step, resolutions

if TYPE_CHECKING:
    from dinoscope.config import RunConfig

__all__ = [
    *("ImageCrops", "StepSizes", "build_loader", "crop_settings", "open_images", "pixels_digest", "stains_digest"),
    "start_worker",
]


@dataclass(frozen=True)
class StepSizes:
    """Sizes of the crops: all samples of a step have the same.

    Attributes:
        choices: What a step may have.
        shares: How often it has each; they make 1.
    """

    choices: tuple[CropSizes, ...]
    shares: tuple[float, ...] = (1.0,)

    def of_step(self, seed: int, step: int) -> CropSizes:
        """What a step has; derives from (seed, step)."""
        return self.choices[choice_of_step(self.shares, seed, step)]


class ImageCrops(Dataset):
    """Sample number k -> crops of one image; all random draws derive from (seed, k), sizes from k's step.

    Attributes:
        order: Sample number -> number of the image; uniform unless another is given.
        global_batch: Samples of a step over all processes.
    """

    def __init__(
        self,
        images: TrainingImages,
        sizes: StepSizes,
        augmentation: Augmentation,
        seed: int,
        order: SampleOrder | None = None,
        global_batch: int = 1,
    ) -> None:
        self.images, self.sizes, self.augmentation, self.seed = images, sizes, augmentation, seed
        self.order, self.global_batch = order or UniformOrder(len(images), seed), global_batch

    def __getitem__(self, sample: int) -> tuple[int, Crops] | DinoscopeError:
        """Number and crops of a sample, or the error that its image gave (torch would bury a raised one)."""
        try:
            return sample, self._crops(sample)
        except DinoscopeError as error:
            return error

    def sample_ids(self, samples: list[int]) -> list[str]:
        """What messages call the images of these samples."""
        return [self.images.sample_id(self.order(sample)) for sample in samples]

    def _crops(self, sample: int) -> Crops:
        index = self.order(sample)
        image, sample_id = self.images.read(index)
        height, width = image.shape[:2]
        sizes = self.sizes.of_step(self.seed, sample // self.global_batch)
        largest_px = max(sizes.global_px, sizes.local_px, sizes.gram_px or 0)
        if min(height, width) < largest_px:
            raise DinoscopeError(
                f"image {sample_id} is {width} × {height} px, but crops are {largest_px} px; take images out that are "
                "smaller on either side, or use smaller crops"
            )
        augmentation = _for_stain(self.augmentation, self.images.stain(index))
        return make_crops(image, sizes, augmentation, sample_rng(self.seed, sample))


_for_stain = functools.cache(for_stain)


def open_images(
    dataset_path: str | None,
    *,
    manifest: Path | None,
    slides: str | None,
    run_dir: Path,
    packed: Path | None = None,
    sealed: Mapping[str, str | None] | None = None,
    access: SlideAccess | None = None,
) -> TrainingImages:
    """What a run is trained on.

    Args:
        dataset_path: `train.dataset_path` of the recipe: a folder of images, module:Class, or None for the manifest.
        manifest: The merged tile manifest; needed where `dataset_path` is None, and only there.
        slides: Where the manifest's slides are.
        packed: Index of the manifest's tiles packed as JPEG, to read these in place of the slides.
        run_dir: The run's folder, which keeps the list of images that it begins with.
        sealed: Digests under "manifest" and "images" that the run was started with, when it goes on.
        access: How slides are opened, and what becomes of tiles that cannot be read.

    Raises:
        ConfigError: Nothing to train on, or too much.
        DinoscopeError: It cannot be read, or is no longer what the run was started with.
    """
    sealed = sealed or {}
    if dataset_path is None:
        if manifest is None or slides is None:
            raise ConfigError("nothing to train on: give --manifest and --slides, or set train.dataset_path")
        if packed is not None:
            return open_packed(manifest, slides, packed, sealed.get("manifest"), access)
        return open_tiles(manifest, slides, sealed.get("manifest"), access)
    if manifest is not None:
        raise ConfigError(
            f"both --manifest {manifest.name} and train.dataset_path {dataset_path} say what to train on: leave one out"
        )
    if Path(dataset_path).is_dir():
        return map_images(Path(dataset_path), run_dir / ".mapped", sealed.get("images"))
    if not is_class_name(dataset_path):
        raise ConfigError(
            f"train.dataset_path {dataset_path} is neither a folder of images that exists nor module:Class, a data set "
            "of your own"
        )
    images = UserImages(dataset_path)
    if sealed.get("images") not in (None, images.digest()):
        raise SealError(
            f"run {run_dir.name} was started on other images of {dataset_path}: its digest was {sealed['images'][:8]} "
            f"and is now {images.digest()[:8]}; restore them, or give a new run name"
        )
    return images


def crop_settings(config: "RunConfig") -> tuple[StepSizes, Augmentation]:
    """Sizes and distortions of the crops that a recipe asks for."""
    crops, changed = config.crops, dict(config.augmentation)
    augmentation = AUGMENTATIONS[changed.pop("recipe")]
    given = {key: value for key, value in changed.items() if value is not None}
    for key in ("blur_p", "blur_sigma"):
        if key in given:
            given[key] = tuple(given[key])
    choices = resolutions(config)
    sizes = [
        CropSizes(
            global_px=chosen.global_px,
            local_px=chosen.local_px,
            num_local=crops.local_crops_number,
            gram_px=chosen.gram_px,
            global_scale=tuple(crops.global_crops_scale),
            local_scale=tuple(crops.local_crops_scale),
            gram_no_distortions=crops.gram_teacher_no_distortions,
        )
        for chosen in choices
    ]
    return StepSizes(tuple(sizes), tuple(chosen.share for chosen in choices)), replace(
        augmentation, horizontal_flips=crops.horizontal_flips, **given
    )


def stains_digest(images: TrainingImages, config: "RunConfig") -> str | None:
    """Of the slides' stains, where distortions go by them; None where nothing depends on a stain."""
    if not isinstance(images, SlideTiles) or not crop_settings(config)[1].by_stain:
        return None
    kinds = {slide: (stain or "").partition(":")[0].casefold() for slide, stain in images.slide_stains().items()}
    return hashlib.sha256(json.dumps(sorted(kinds.items())).encode()).hexdigest()


def pixels_digest(images: TrainingImages) -> str | None:
    """Of the tiles' pixels where these were packed; None where they are those of slides or images themselves."""
    return images.index.pixels if isinstance(images, PackedTiles) else None


def reader_digest(images: TrainingImages) -> str | None:
    """Of the user's own slide reader, where it gives pixels; None where OpenSlide or none does."""
    return images.reader_digest() if isinstance(images, SlideTiles) else None


def build_loader(
    dataset: ImageCrops, collate: Collate, *, first: int, last: int, rank: int, world_size: int, num_workers: int
) -> DataLoader[Batch]:
    """Batches of this rank for steps `first` to before `last`; the number of workers changes nothing but speed."""
    return DataLoader(
        dataset,
        batch_sampler=StepSampler(first, last, collate.batch_size, rank, world_size),
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=start_worker,
        prefetch_factor=2 if num_workers else None,
    )


def start_worker(worker: int) -> None:
    """Prepares a process that loads images for a training."""
    die_with_parent()
    # requests to stop reach the whole family; the trainer needs its loaders to the end of the step
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    cv2.setNumThreads(0)
    keep_freed_memory()
