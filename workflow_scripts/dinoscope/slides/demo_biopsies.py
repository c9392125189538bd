"""Biopsies for the demo of the pilot: small drawn slides of two kinds of growth, from two sites that stain differently.

Epithelium grows in hollow glands or in solid nests; nothing else of a biopsy depends on the kind, so that what tells
them apart is shape rather than colour. Sites differ in the strength of the stain and in the glass, across both kinds.
"""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np

from dinoscope.errors import ConfigError
from dinoscope.files import atomic_path
from dinoscope.progress import progress
from dinoscope.slides.demo import DEMO_MPP
from dinoscope.slides.demo_histology import Section, draw_section, draw_textures
from dinoscope.slides.tiff_writer import encode_tiles, write_pyramid

__all__ = [
    "BIOPSY_PX",
    "biopsy_kind",
    "biopsy_name",
    "biopsy_number",
    "biopsy_site",
    "draw_biopsy",
    "make_demo_biopsies",
]

BIOPSY_PX = 768
_NUM_LEVELS = 2
_SALT = 1  # so that no biopsy shares the seed of a demo slide


def biopsy_name(number: int) -> str:
    """Its slide_id."""
    return f"demo_biopsy_{number:03d}"


def biopsy_number(name: str) -> int:
    """The number of a slide_id.

    Raises:
        ConfigError: It is no biopsy's.
    """
    found = re.fullmatch(r"demo_biopsy_(\d{3})", name)
    if found is None:
        raise ConfigError(f"{name} is no demo biopsy: give demo_biopsy_000 to demo_biopsy_999")
    return int(found[1])


def biopsy_kind(number: int) -> str:
    """What its epithelium grows in: glands or nests, in turn."""
    return ("glands", "nests")[number % 2]


def biopsy_site(number: int) -> str:
    """Where it is from: A or B, each with as many of both kinds."""
    return "AB"[number // 2 % 2]


def make_demo_biopsies(
    folder: str | Path, numbers: Sequence[int], seed: int = 0, processes: int | None = None
) -> list[Path]:
    """Writes `folder/demo_biopsy_NNN.tiff` for each number.

    Args:
        folder: Where to; made if need be.
        numbers: Of the biopsies.
        seed: Another seed gives other tissue of the same kinds.
        processes: How many to draw at once; as many as there are cores when not given.

    Returns:
        The files, in the order of the numbers.
    """
    processes = min(processes or len(os.sched_getaffinity(0)), len(numbers))
    paths = []
    with (
        progress("demo biopsies", len(numbers), unit="slides") as bar,
        ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool,
    ):
        for path in pool.map(partial(_make_biopsy, Path(folder), seed), numbers, chunksize=8):
            paths.append(path)
            bar.advance(note=path.stem)
    return paths


def draw_biopsy(number: int, seed: int = 0) -> np.ndarray:
    """Level 0 of a biopsy; uint8 (BIOPSY_PX, BIOPSY_PX, 3), RGB, 0.5 um a pixel."""
    seeds = (seed, _SALT, number)
    rng = np.random.default_rng((*seeds, _SALT))
    at_b = biopsy_site(number) == "B"
    section = Section(
        gland_px=rng.uniform(230, 330),
        lumen=0.85 if biopsy_kind(number) == "glands" else 0.0,
        epithelium=rng.uniform(0.3, 0.6),
        fat=rng.uniform(0.0, 0.15),
        lymphoid=rng.uniform(0.02, 0.15),
        strength=rng.uniform(0.85, 1.05) + 0.15 * at_b,
        ground=(240, 238, 244) if at_b else (244, 243, 246),
    )
    return draw_section(section, BIOPSY_PX, BIOPSY_PX, seeds, _textures(seed))


def _make_biopsy(folder: Path, seed: int, number: int) -> Path:
    levels = [draw_biopsy(number, seed)]
    while len(levels) < _NUM_LEVELS:
        levels.append(cv2.resize(levels[-1], None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA))
    encoded = [(level.shape[1], level.shape[0], encode_tiles(level, quality=90)) for level in levels]
    path = folder / f"{biopsy_name(number)}.tiff"
    with atomic_path(path) as temporary:
        write_pyramid(temporary, encoded, DEMO_MPP)
    return path


@cache
def _textures(seed: int) -> dict[str, np.ndarray]:
    """The same for all biopsies: to draw them for each would take most of its time."""
    return draw_textures(np.random.default_rng((seed, _SALT)))
