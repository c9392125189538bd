"""Demo slides: small pyramidal TIFFs of drawn tissue, the same bytes for the same seed.

Nothing in them is from a patient. Each shows several kinds of tissue with textures of their own, from the size of
nuclei to regions of half a millimetre, so that training has something to learn and a PCA map something to show.
"""

import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np

from dinoscope.files import atomic_path
from dinoscope.progress import progress
from dinoscope.slides.demo_cytology import draw_smear
from dinoscope.slides.demo_histology import Section, draw_section
from dinoscope.slides.tiff_writer import encode_tiles, write_pyramid

__all__ = ["DEMO_MPP", "DEMO_SLIDES", "draw_demo_slide", "make_demo_slide", "make_demo_slides"]

DEMO_MPP = 0.5
_NUM_LEVELS = 4
_SECTIONS = {
    "demo_he_1": (4608, 5632, Section()),
    "demo_he_2": (4608, 5120, Section(gland_px=480, lumen=0.0, epithelium=0.5, fat=0.03, lymphoid=0.12, strength=1.1)),
    "demo_he_3": (
        4352,
        5632,
        Section(gland_px=330, epithelium=0.4, fat=0.16, lymphoid=0.04, strength=0.88, ground=(240, 237, 243)),
    ),
    "demo_ihc_1": (4608, 5120, Section(epithelium=0.5, fat=0.05, ground=(243, 243, 244), ihc=True)),
}
_SMEAR = "demo_cyto_1"
DEMO_SLIDES = (*_SECTIONS, _SMEAR)


def make_demo_slides(folder: str | Path, seed: int = 0, processes: int | None = None) -> list[Path]:
    """Writes all demo slides as `folder/NAME.tiff`.

    Args:
        folder: Where to; made if need be.
        seed: Another seed gives other tissue of the same kinds.
        processes: How many to draw at once, at most one a slide; as many as there are cores when not given.

    Returns:
        The files, in the order of `DEMO_SLIDES`.
    """
    processes = min(processes or len(os.sched_getaffinity(0)), len(DEMO_SLIDES))
    with (
        progress("demo slides", len(DEMO_SLIDES), unit="slides") as bar,
        ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool,
    ):
        jobs = {pool.submit(partial(make_demo_slide, name, folder, seed)): name for name in DEMO_SLIDES}
        for job in as_completed(jobs):
            job.result()
            bar.advance(note=jobs[job])
    return [Path(folder) / f"{name}.tiff" for name in DEMO_SLIDES]


def make_demo_slide(name: str, folder: str | Path, seed: int = 0) -> Path:
    """Draws one of `DEMO_SLIDES` and writes it as a pyramid of four levels at 0.5 um a pixel."""
    image = draw_demo_slide(name, seed)
    levels = [image]
    while len(levels) < _NUM_LEVELS:
        height, width = levels[-1].shape[:2]
        levels.append(cv2.resize(levels[-1], (width // 2, height // 2), interpolation=cv2.INTER_AREA))
    path = Path(folder) / f"{name}.tiff"
    # the coarser a level, the finer its detail in pixels and the more JPEG would take away
    qualities = (85, *[95] * (_NUM_LEVELS - 1))
    encoded = [
        (level.shape[1], level.shape[0], encode_tiles(level, quality=quality))
        for level, quality in zip(levels, qualities, strict=True)
    ]
    with atomic_path(path) as temporary:
        write_pyramid(temporary, encoded, DEMO_MPP)
    return path


def draw_demo_slide(name: str, seed: int = 0) -> np.ndarray:
    """Level 0 of one of `DEMO_SLIDES`; uint8 (height, width, 3), RGB."""
    seeds = (seed, DEMO_SLIDES.index(name))
    if name == _SMEAR:
        return draw_smear(4096, 4608, num_cells=700, num_sheets=16, seed=seeds)
    height, width, section = _SECTIONS[name]
    return draw_section(section, height, width, seeds)
