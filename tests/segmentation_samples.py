"""A small data set to segment, and trainings on it, for tests."""

from pathlib import Path

import cv2
import numpy as np
import torch

from dinoscope.features.encoders import load_encoder
from dinoscope.segment.datasets import open_dataset
from dinoscope.segment.settings import TrainSettings
from dinoscope.segment.setup import build_segmenter, data_digest
from dinoscope.segment.train import TrainJob
from dinoscope.train.distributed import World
from tiny_segmenter import write_own_encoder

ALONE = World(0, 0, 1, torch.device("cpu"))
OPTIONS = {"instance": "disc"}
QUICK = {"img_dim": (48, 64), "epochs": 4, "batch_size": 4, "lr": 3e-3, "overlap": 0.25, "data": OPTIONS}
SPLITS = ("train",) * 6 + ("val",) * 2 + ("test",) * 3


def write_discs(root: Path, splits: tuple[str, ...] = SPLITS, size_hw: tuple[int, int] = (60, 90)) -> Path:
    """Dark discs on a bright ground with noise, an instance map each, and a table of splits."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows = ["name\tsplit\tcase"]
    for number, split in enumerate(splits):
        image = rng.integers(190, 240, (*size_hw, 3)).astype(np.uint8)
        mask = np.zeros(size_hw, np.uint8)
        for value in range(1, 4):
            centre = tuple(int(rng.integers(10, side - 10)) for side in size_hw[::-1])
            cv2.circle(mask, centre, int(rng.integers(6, 12)), value, -1)
        image[mask > 0] = rng.integers(60, 110, (int((mask > 0).sum()), 3))
        cv2.imwrite(str(root / "images" / f"d{number:02d}.png"), image)
        cv2.imwrite(str(root / "masks" / f"d{number:02d}.png"), mask)
        rows.append(f"d{number:02d}\t{split}\tcase{number // 2}")
    (root / "splits.tsv").write_text("\n".join(rows) + "\n")
    return root


def job_on(root: Path, run_dir: Path, *, workers: int = 0, **settings: object) -> TrainJob:
    """A training on `write_discs`."""
    training, validation = (open_dataset("folder", root, split, **OPTIONS) for split in ("train", "val"))
    digest = data_digest(training, validation)
    return TrainJob(TrainSettings(**QUICK | settings), training, validation, run_dir, digest, workers=workers)


def fresh_segmenter(folder: Path, settings: TrainSettings):
    """On the small encoder of tiny_segmenter, which is written to `folder` if need be."""
    file = folder / "encoder.pth"
    if not file.is_file():
        write_own_encoder(file)
    return build_segmenter(load_encoder(file), 2, settings)
