"""Data sets for segmentation, opened by kind.

    data = open_dataset("folder", "nuclei", "train", instance="nucleus", groups=r"(case\\d+)_")
    pixels = data.check()  # reads all masks; says in one message what is wrong with any of them
    image, mask = data[0].image, data[0].mask

Kinds: `voc` (VOCdevkit), `ade20k` (ADEChallengeData2016), `folder` (images/ and masks/ of one's own) and `slides`
(tiles of slides with QuPath annotations). What each takes as options are the fields of its settings.
"""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

from dinoscope.errors import ConfigError, MasksError
from dinoscope.names import nearest
from dinoscope.segment.folders import SPLITS
from dinoscope.segment.masks import MaskDataset, Sample
from dinoscope.segment.options import fitted

__all__ = ["KINDS", "MaskDataset", "Sample", "dataset_settings", "open_dataset"]

# of each kind the module, its class of settings, and its function (root, split, settings)
_OPENERS = {
    "voc": ("voc", "VocSettings", "open_voc"),
    "ade20k": ("ade20k", "Ade20kSettings", "open_ade20k"),
    "folder": ("folders", "FolderSettings", "open_folder"),
    "slides": ("annotated_slides", "SlidesSettings", "open_slides"),
}
KINDS = tuple(_OPENERS)


def open_dataset(kind: str, root: str | Path, split: str, **options: Any) -> MaskDataset:
    """Opens one split of a data set; lists its files and reads no image.

    Args:
        kind: One of `KINDS`.
        root: Its folder; of `slides`, the manifest of tiles.
        split: "train", "val" or "test".
        **options: Fields of the kind's settings, see `dataset_settings`.

    Raises:
        ConfigError: The kind, the split or an option is unknown or wrong.
        MasksError: Files are missing or have no partner.
    """
    settings = dataset_settings(kind, options)
    if split not in SPLITS:
        raise ConfigError(f"split {split!r} is none of {', '.join(SPLITS)}")
    if not Path(root).exists():
        raise MasksError(f"{root} does not exist: give the folder of a data set of kind {kind}")
    module, _, function = _OPENERS[kind]
    return getattr(_module(module), function)(Path(root), split, settings)


def dataset_settings(kind: str, options: dict[str, Any]) -> Any:
    """The settings of a kind of data set, checked for names and kinds of values.

    Raises:
        ConfigError: The kind or an option is unknown, and the nearest is named, or a value is of another kind.
    """
    if kind not in _OPENERS:
        raise ConfigError(f"data set kind {kind!r} is none of {', '.join(KINDS)}{nearest(kind, KINDS)}")
    module, settings, _ = _OPENERS[kind]
    settings = getattr(_module(module), settings)
    known = [field.name for field in dataclasses.fields(settings)]
    for name in options:
        if name not in known:
            raise ConfigError(
                f"a data set of kind {kind} has no option {name!r}{nearest(name, known)} (there are {', '.join(known)})"
            )
    return settings(**fitted(settings, options, f"a data set of kind {kind}: "))


def _module(name: str) -> Any:
    return importlib.import_module(f"dinoscope.segment.{name}")
