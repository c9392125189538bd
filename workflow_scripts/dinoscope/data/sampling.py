"""Which image sample number k is: in passes over all of them (uniform), or tempered over strata and slides.

Tempered, a step of G tiles makes V = G / t visits of t tiles each. A stratum (site × scanner × stain) gets a share that
goes with its number of tiles to the power of `exponent`, in equal parts for its slides; no slide gets more than
`max_tiles_per_slide` a step: what that takes from a stratum goes to the others, and where all slides together are too
few, the limit is raised for all alike. Slide i has V·w_i visits a step on average, and floor or ceil of that in each
(systematic sampling, Madow 1949: slides in an order drawn for the step, points 1/V apart from an offset drawn for it).
Weights are whole numbers of 2^-32 visits, so that these bounds hold exactly.

All of it follows from (seed, step, position in the step) and is never stored: O(slides) a step, O(1) a tile.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dinoscope.data.mpp_mix import MppMix
from dinoscope.data.sampler import mix64, permuted_index, tile_of_sample
from dinoscope.data.sources import TrainingImages
from dinoscope.data.tiles import SlideRows, SlideTiles
from dinoscope.errors import ConfigError

if TYPE_CHECKING:
    from dinoscope.config import SamplingConfig

__all__ = ["SampleOrder", "StratumShare", "TemperedOrder", "UniformOrder", "sample_order"]

_UNIT_BITS = 32
_MASK64 = (1 << 64) - 1
_STEP_STREAM, _TILE_STREAM = 1, 2
_SHOWN_STRATA = 30


class SampleOrder(Protocol):
    """Sample number -> number of the image; instances are pickled to all processes."""

    def __call__(self, sample: int) -> int:
        """Number of the image that a sample is cut from."""
        ...

    def shares(self, num_steps: int) -> "list[StratumShare]":
        """What the strata contribute to a run of that many steps; empty where nothing is weighted."""
        ...

    def story(self, num_steps: int) -> list[str]:
        """Lines for the log at the start of a run."""
        ...

    def digest(self) -> str | None:
        """Of what the order follows from besides settings and images; None where that is nothing."""
        ...


@dataclass(frozen=True)
class StratumShare:
    """What a stratum is of the tiles, and what it gives to a run.

    Attributes:
        stratum: Site, scanner and stain.
        slides: How many it has.
        tiles: How many it has.
        tile_share: Its share of all tiles.
        target_share: The share of the samples that `sampling.exponent` asks for.
        sample_share: The share it gets, on average over steps; another where the limit of tiles a slide demands it.
        passes: How often each of its tiles is seen in the run, on average.
    """

    stratum: str
    slides: int
    tiles: int
    tile_share: float
    target_share: float
    sample_share: float
    passes: float

    def __str__(self) -> str:
        differs = abs(self.sample_share - self.target_share) > 0.005
        target = f" (target {_percent(self.target_share)})" if differs else ""
        return (
            f"{self.stratum}: {_percent(self.tile_share)} of the tiles, {_percent(self.sample_share)} of the "
            f"samples{target}, {self.passes:.2g} passes"
        )


class UniformOrder:
    """Passes over all images, each seen once a pass, in another order every pass."""

    def __init__(self, num_images: int, seed: int) -> None:
        self.num_images, self.seed = num_images, seed

    def __call__(self, sample: int) -> int:
        """Number of the image."""
        return tile_of_sample(sample, self.num_images, self.seed)

    def shares(self, num_steps: int) -> list[StratumShare]:
        """None: every stratum has its share of the tiles."""
        return []

    def story(self, num_steps: int) -> list[str]:
        """Nothing to tell."""
        return []

    def digest(self) -> None:
        """There is nothing else."""
        return


class TemperedOrder:
    """The order that the module's docstring describes."""

    def __init__(
        self,
        slides: Sequence[SlideRows],
        *,
        seed: int,
        global_batch: int,
        exponent: float,
        max_tiles_per_slide: int,
        tiles_per_visit: int,
    ) -> None:
        """Takes the slides in the order of their rows; `global_batch` is a multiple of `tiles_per_visit`."""
        assert global_batch % tiles_per_visit == 0
        assert tiles_per_visit <= max_tiles_per_slide
        self.global_batch, self.tiles_per_visit, self.wanted_limit = global_batch, tiles_per_visit, max_tiles_per_slide
        self._num_visits = global_batch // tiles_per_visit
        self._starts = np.array([slide.start for slide in slides], np.int64)
        self._counts = np.array([slide.count for slide in slides], np.int64)
        self._strata, self._stratum_of_slide = np.unique([slide.stratum for slide in slides], return_inverse=True)
        self._slides_of = np.bincount(self._stratum_of_slide)
        self._tiles_of = np.bincount(self._stratum_of_slide, self._counts).astype(np.int64)
        enough = -(-self._num_visits // len(slides))
        self._limit = max(max_tiles_per_slide // tiles_per_visit, enough)
        self._targets = (self._tiles_of / self._tiles_of.max()) ** exponent
        self._targets /= self._targets.sum()
        self._stratum_units = _within_limit(self._targets, self._num_visits, self._slides_of * self._limit)
        self._units = _slide_units(self._stratum_units, self._stratum_of_slide)
        self._step_key = mix64(mix64(seed & _MASK64) ^ _STEP_STREAM)
        self._tile_key = mix64(mix64(seed & _MASK64) ^ _TILE_STREAM)
        self._latest: tuple[int, np.ndarray, np.ndarray] | None = None

    @property
    def limit(self) -> int:
        """The most tiles of one slide in a step."""
        return self._limit * self.tiles_per_visit

    def __call__(self, sample: int) -> int:
        """Row of the tile."""
        step, position = divmod(sample, self.global_batch)
        visit, turn = divmod(position, self.tiles_per_visit)
        if self._latest is None or self._latest[0] != step:
            self._latest = (step, *self._visits(step))
        slide, earlier = (int(values[visit]) for values in self._latest[1:])
        return int(self._starts[slide]) + self._tile(slide, step, earlier * self.tiles_per_visit + turn)

    def _visits(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """For every visit of a step its slide, and how many visits of that slide came before it in the step."""
        key = mix64(self._step_key ^ step)
        offset = mix64(key ^ _MASK64) >> (64 - _UNIT_BITS)
        # the mixing is one to one, so that there are no ties whose order could depend on the sorting
        order = np.argsort(_mix64_all(np.arange(len(self._units), dtype=np.uint64) ^ np.uint64(key)))
        points_passed = (np.cumsum(self._units[order]) - offset + (1 << _UNIT_BITS) - 1) >> _UNIT_BITS
        counts = np.diff(points_passed, prepend=0)
        before = np.cumsum(counts) - counts
        return np.repeat(order, counts), np.arange(self._num_visits) - np.repeat(before, counts)

    def _tile(self, slide: int, step: int, number: int) -> int:
        """Tile of a slide: `limit` numbers a step are set aside of a permutation, so that tiles recur late.

        Slides of fewer tiles than that repeat them in a step when they must.
        """
        count, seed = int(self._counts[slide]), mix64(self._tile_key ^ slide)
        steps_a_pass = count // self.limit
        if steps_a_pass == 0:
            return permuted_index(number % count, count, seed, step)
        round_, turn = divmod(step, steps_a_pass)
        return permuted_index(turn * self.limit + number, count, seed, round_)

    def shares(self, num_steps: int) -> list[StratumShare]:
        """What the strata contribute to a run of that many steps, those of most tiles first."""
        all_tiles, samples = int(self._tiles_of.sum()), num_steps * self.global_batch
        shares = []
        for index in np.argsort(-self._tiles_of, kind="stable"):
            tiles = int(self._tiles_of[index])
            share = int(self._stratum_units[index]) / (self._num_visits << _UNIT_BITS)
            shares.append(
                StratumShare(
                    stratum=str(self._strata[index]),
                    slides=int(self._slides_of[index]),
                    tiles=tiles,
                    tile_share=tiles / all_tiles,
                    target_share=float(self._targets[index]),
                    sample_share=share,
                    passes=share * samples / tiles,
                )
            )
        return shares

    def story(self, num_steps: int) -> list[str]:
        """The shares, and a note where the limit of tiles a slide could not be kept, or not without changing them."""
        shares = self.shares(num_steps)
        more = len(shares) - _SHOWN_STRATA
        rest = [f"… and {more} smaller strata"] if more > 0 else []
        return [*self._note(), *(str(share) for share in shares[:_SHOWN_STRATA]), *rest]

    def _note(self) -> list[str]:
        visits_wanted = self._num_visits * self._targets / self._slides_of
        needed = self.tiles_per_visit * int(np.ceil(visits_wanted.max() - 1e-9))
        notes = []
        if self.limit > self.wanted_limit:
            notes.append(
                f"{len(self._units)} slides are too few for sampling.max_tiles_per_slide {self.wanted_limit} in steps "
                f"of {self.global_batch} tiles: up to {self.limit} are taken of each slide"
            )
        if needed > self.limit:
            notes.append(
                f"at {self.limit} tiles of a slide in a step, strata of few slides give less than their target; "
                f"sampling.max_tiles_per_slide {needed} would let them"
            )
        return ["; ".join(notes)] if notes else []

    def digest(self) -> str:
        """Of the slides, their tiles and their strata, which the slide table names."""
        strata = self._strata[self._stratum_of_slide].tolist()
        content = json.dumps([strata, self._starts.tolist(), self._counts.tolist()])
        return hashlib.sha256(content.encode()).hexdigest()


def sample_order(
    images: TrainingImages, settings: "SamplingConfig", *, seed: int, batch_size: int, global_batch: int
) -> SampleOrder:
    """The order that a recipe asks for.

    Args:
        images: What the run is trained on.
        settings: Section `sampling` of the recipe.
        seed: Of the run's sample stream.
        batch_size: Tiles that a process loads together.
        global_batch: Tiles of a step over all processes.

    Raises:
        ConfigError: The images are not tiles of slides, or visits do not fill the batch of a process.
    """
    if settings.method == "uniform":
        if settings.mpp_shares is None:
            return UniformOrder(len(images), seed)
        if not isinstance(images, SlideTiles):
            raise ConfigError(
                "sampling.mpp_shares goes by the mpp of tiles, but train.dataset_path names other images: leave one out"
            )
        return MppMix(images.rows_of_mpps(), settings.mpp_shares, seed=seed, global_batch=global_batch)
    if not isinstance(images, SlideTiles):
        raise ConfigError(
            "sampling.method is tempered, which goes by site, scanner and stain of slides, but train.dataset_path "
            "names images without slides: set sampling.method: uniform"
        )
    if batch_size % settings.tiles_per_visit:
        fitting = [t for t in range(1, settings.max_tiles_per_slide + 1) if batch_size % t == 0]
        raise ConfigError(
            f"sampling.tiles_per_visit is {settings.tiles_per_visit}, which does not divide train.batch_size_per_gpu "
            f"{batch_size}: set it to {' or '.join(map(str, fitting))}, or change the batch"
        )
    return TemperedOrder(
        images.slide_rows(),
        seed=seed,
        global_batch=global_batch,
        exponent=settings.exponent,
        max_tiles_per_slide=settings.max_tiles_per_slide,
        tiles_per_visit=settings.tiles_per_visit,
    )


def _within_limit(targets: np.ndarray, num_visits: int, most_visits: np.ndarray) -> np.ndarray:
    """Units of 2^-32 visits a stratum: its target, or the most it can have; the others share what that leaves.

    Args:
        targets: Share of each stratum; their sum is 1.
        num_visits: Of a step.
        most_visits: That each stratum can have; together at least `num_visits`.
    """
    total, room = num_visits << _UNIT_BITS, most_visits.astype(np.int64) << _UNIT_BITS
    full = np.zeros(len(targets), bool)
    while True:
        left = total - int(room[full].sum())
        wanted = np.where(full, 0, targets / targets[~full].sum() * left) if not full.all() else np.zeros(len(targets))
        overfull = wanted > room
        if not overfull.any():
            break
        full |= overfull
    units = np.where(full, room, np.minimum(wanted.astype(np.int64), room))
    for index in np.flatnonzero(~full):  # what rounding lost or gained: a few units
        change = max(-int(units[index]), min(total - int(units.sum()), int(room[index] - units[index])))
        units[index] += change
    assert units.sum() == total
    return units


def _slide_units(stratum_units: np.ndarray, stratum_of_slide: np.ndarray) -> np.ndarray:
    """The units of each stratum in parts that differ by at most 1."""
    units = np.empty(len(stratum_of_slide), np.int64)
    for stratum, total in enumerate(stratum_units):
        slides = np.flatnonzero(stratum_of_slide == stratum)
        each, over = divmod(int(total), len(slides))
        units[slides] = each
        units[slides[:over]] += 1
    return units


def _mix64_all(values: np.ndarray) -> np.ndarray:
    """`mix64` of every element."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.2g} %"
