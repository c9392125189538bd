"""A picture of the crops that a recipe makes of its tiles."""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from dinoscope.data.crops import contact_sheet
from dinoscope.data.dataset import ImageCrops, crop_settings, open_images
from dinoscope.data.windows import crop_ranges
from dinoscope.errors import DinoscopeError
from dinoscope.files import atomic_path

if TYPE_CHECKING:
    from dinoscope.config import RunConfig

__all__ = ["save_crop_sheet"]

_GAP_PX = 12


def save_crop_sheet(
    config: "RunConfig", manifest: Path | None, slides: str | None, samples: Iterable[int], output: Path
) -> None:
    """Writes a PNG with the crops of samples, one below the other; see `contact_sheet` for one of them.

    The tiles come in the uniform order of `train.seed`, distorted by the stain of their slide as in training. A run
    draws from its own name as well: it sees other crops of the same kind.

    Args:
        config: The recipe.
        manifest: Merged tile manifest, None where the recipe names images.
        slides: Where the manifest's slides are.
        samples: Numbers of the samples.
        output: The picture.

    Raises:
        DinoscopeError: Nothing to cut from, or an image is unreadable or smaller than its crops.
    """
    with tempfile.TemporaryDirectory() as listing:
        images = open_images(config.train.dataset_path, manifest=manifest, slides=slides, run_dir=Path(listing))
        sizes, augmentation = crop_settings(config)
        crop_ranges(images.windows, sizes.choices)
        dataset = ImageCrops(images, sizes, augmentation, config.train.seed)
        sheets = [_sheet(dataset[sample]) for sample in samples]
    with atomic_path(output) as temporary:
        Image.fromarray(_stacked(sheets)).save(temporary, format="PNG")


def _sheet(sample: tuple | DinoscopeError) -> np.ndarray:
    if isinstance(sample, DinoscopeError):
        raise sample
    return contact_sheet(sample[1])


def _stacked(sheets: list[np.ndarray]) -> np.ndarray:
    width = max(sheet.shape[1] for sheet in sheets)
    gap = np.full((_GAP_PX, width, 3), 255, np.uint8)
    wide = [np.pad(s, ((0, 0), (0, width - s.shape[1]), (0, 0)), constant_values=255) for s in sheets]
    rows = [part for sheet in wide for part in (sheet, gap)]
    return np.concatenate(rows[:-1])
