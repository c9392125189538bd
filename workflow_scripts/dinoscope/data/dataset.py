"""Tiles of slides as training samples."""

import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
from torch.utils.data import DataLoader, Dataset

from dinoscope.data.collate import Batch, Collate
from dinoscope.data.crops import AUGMENTATIONS, Augmentation, Crops, CropSizes, make_crops, sample_rng
from dinoscope.data.sampler import StepSampler, tile_of_sample
from dinoscope.data.tiles import MappedTiles
from dinoscope.errors import DinoscopeError
from dinoscope.processes import die_with_parent
from dinoscope.slides.reader import SlidePool

if TYPE_CHECKING:
    from dinoscope.config import RunConfig

__all__ = ["SlideCrops", "build_loader", "crop_settings"]


class SlideCrops(Dataset):
    """Sample number k -> crops of one tile; all random draws derive from (seed, k)."""

    def __init__(
        self,
        tiles: MappedTiles,
        slide_paths: Mapping[str, Path],
        slide_mpps: Mapping[str, float],
        sizes: CropSizes,
        augmentation: Augmentation,
        seed: int,
    ) -> None:
        self.tiles, self.sizes, self.augmentation, self.seed = tiles, sizes, augmentation, seed
        self.slides = SlidePool(slide_paths, slide_mpps)

    def __getitem__(self, sample: int) -> tuple[int, Crops] | DinoscopeError:
        """Number and crops of a sample, or the error that its slide gave (torch would bury a raised one)."""
        try:
            return sample, self._crops(sample)
        except DinoscopeError as error:
            return error

    def _crops(self, sample: int) -> Crops:
        tile = self.tiles[tile_of_sample(sample, len(self.tiles), self.seed)]
        kind = tile.kind
        slide = self.slides[kind.slide_id]
        image = slide.read_tile(tile.x, tile.y, kind.level, kind.read_px, kind.tile_px, kind.footprint_px)
        return make_crops(image, self.sizes, self.augmentation, sample_rng(self.seed, sample))


def crop_settings(config: "RunConfig") -> tuple[CropSizes, Augmentation]:
    """Sizes and distortions of the crops that a recipe asks for."""
    crops, changed = config.crops, dict(config.augmentation)
    augmentation = AUGMENTATIONS[changed.pop("recipe")]
    given = {key: value for key, value in changed.items() if value is not None}
    for key in ("blur_p", "blur_sigma"):
        if key in given:
            given[key] = tuple(given[key])
    sizes = CropSizes(
        global_px=crops.global_crops_size,
        local_px=crops.local_crops_size,
        num_local=crops.local_crops_number,
        gram_px=crops.gram_teacher_crops_size if config.gram.use_loss else None,
        global_scale=tuple(crops.global_crops_scale),
        local_scale=tuple(crops.local_crops_scale),
        gram_no_distortions=crops.gram_teacher_no_distortions,
    )
    return sizes, replace(augmentation, horizontal_flips=crops.horizontal_flips, **given)


def build_loader(
    dataset: SlideCrops, collate: Collate, *, first: int, last: int, rank: int, world_size: int, num_workers: int
) -> DataLoader[Batch]:
    """Batches of this rank for steps `first` to before `last`; the number of workers changes nothing but speed."""
    return DataLoader(
        dataset,
        batch_sampler=StepSampler(first, last, collate.batch_size, rank, world_size),
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=_start_worker,
        prefetch_factor=2 if num_workers else None,
    )


def _start_worker(worker: int) -> None:
    die_with_parent()
    # requests to stop reach the whole family; the trainer needs its loaders to the end of the step
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    cv2.setNumThreads(0)
