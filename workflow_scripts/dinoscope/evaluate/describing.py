"""What the features of a collection are like: numbers without a better direction, and so without a verdict."""

import numpy as np

from dinoscope.evaluate.answers import Answers
from dinoscope.evaluate.descriptive import describe, neighbour_origins
from dinoscope.evaluate.folds import balanced_rows
from dinoscope.evaluate.inputs import UnitFeatures
from dinoscope.evaluate.units import Units

__all__ = ["MAX_TILES", "describe_slides"]

MAX_TILES = 10_000  # RankMe and neighbours' origins depend on the number of tiles: the same ones for all models


def describe_slides(units: Units, features: UnitFeatures, seed: int) -> Answers:
    """Ranks, cosines, and where nearest neighbours come from.

    Args:
        units: Slides.
        features: Of their tiles.
        seed: Which tiles are taken where there are more than `MAX_TILES`, as equal as possible a slide.
    """
    counts = [len(bag) for bag in features.bags]
    unit_of = np.repeat(np.arange(len(counts)), counts)
    taken = balanced_rows(unit_of, MAX_TILES, seed)
    rows = np.concatenate(features.bags)[taken].astype(np.float32)
    slides = np.concatenate(features.slides)[taken]
    notes = [f"of {len(taken):,} tiles of {len(np.unique(slides))} slides, as equal as possible a slide"]
    numbers: dict[str, float] = {}
    if len(rows) > 2:
        numbers |= describe(rows)
        sites = None if units.sites is None else units.sites[unit_of[taken]]
        centres = np.concatenate(features.corners_um)[taken]
        origins = neighbour_origins(rows, slides, units.groups[unit_of[taken]], sites, centres)
        kinds = [kind for kind, chance in origins.chance.items() if chance > 0 or origins.shares[kind]]
        numbers |= {f"neighbours_{kind.replace(' ', '_')}": origins.shares[kind] for kind in kinds}
        by_chance = ", ".join(f"{kind} {100 * origins.chance[kind]:.0f} %" for kind in kinds)
        notes.append(f"{origins.k} nearest neighbours of each tile; by chance they would come from: {by_chance}")
    sets = sorted({unit.set for unit in units.units})
    if "training" in sets:
        notes.append("too few test cases to describe alone, so the slides of training are among these (transductive)")
    return Answers(
        {}, np.zeros(len(units), dtype=np.int8), numbers={k: float(v) for k, v in numbers.items()}, notes=notes
    )
