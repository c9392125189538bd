"""Draws the tiles of a slide that changed copies are made of, and reads them where its manifest says."""

from pathlib import Path

from dinoscope.evaluate.inputs import sample_rows
from dinoscope.evaluate.samples import write_sample
from dinoscope.features.read_ahead import load_tiles
from dinoscope.slides.padding import read_tile
from dinoscope.slides.reader import Slide
from dinoscope.slides.skipping import Attempt, try_slide

__all__ = ["sample_slide"]


def sample_slide(attempt: Attempt, tiles: Path, output: Path, *, count: int, seed: int, reader: str | None) -> None:
    """Writes the sample of one slide; an empty one where the slide was skipped, or is now.

    Args:
        attempt: The slide, and whether it may be skipped.
        tiles: Its tile manifest.
        output: File to write.
        count: Tiles at most.
        seed: Which ones, by seed and the slide's name: other slides do not matter.
        reader: For formats that OpenSlide lacks.

    Raises:
        ManifestError: The manifest is missing or damaged.
        SlideError: The slide cannot be read, and must not be skipped.
    """
    table = load_tiles(tiles)
    rows = sample_rows(len(table), count, seed, table.slide_id)

    def work() -> None:
        with Slide(attempt.slide, table.slide_id, reader=reader) as slide:
            columns = (table.x, table.y, table.level, table.read_px)
            places = [tuple(int(column[row]) for column in columns) for row in rows]
            read = (read_tile(slide, *place, table.tile_px, table.footprint_px) for place in places)
            write_sample(output, table.slide_id, table.tile_px, rows, read)

    def give_up(_reason: str = "") -> None:
        write_sample(output, table.slide_id, table.tile_px, [], [])

    if table.skipped or not len(rows):
        give_up()
    else:
        try_slide(work, give_up, attempt)
