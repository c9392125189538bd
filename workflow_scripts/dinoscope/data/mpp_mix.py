"""A mix of resolutions: which image sample number k is where tiles of each mpp have a share of the samples of its own.

Every step of G tiles has n tiles of an mpp of share p, n being floor(p·G·(s + 1)) − floor(p·G·s) in step s, so that
after any number of steps each mpp has had its share to within one tile; the mpp of the largest share takes the rest.
Places in a step are dealt out at random, and the tiles of an mpp are gone through in passes, each once a pass, in
another order every pass. All of it follows from (seed, step, position in the step): O(log of the slides) a tile.
"""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from dinoscope.data.sampler import mix64, permuted_index, tile_of_sample
from dinoscope.errors import ConfigError

if TYPE_CHECKING:
    from dinoscope.data.sampling import StratumShare

__all__ = ["MppMix", "check_shares"]

_MASK64 = (1 << 64) - 1
_PLACE_STREAM = 3


class MppMix:
    """A `SampleOrder` that the module's docstring describes."""

    def __init__(
        self,
        runs: Mapping[float, Sequence[tuple[int, int]]],
        shares: Sequence[float],
        *,
        seed: int,
        global_batch: int,
    ) -> None:
        """Takes the rows of every mpp as (first row, number of rows), and the shares in rising order of the mpp.

        Raises:
            ConfigError: There are not as many shares as mpps, or more mpps than tiles in a step.
        """
        self.mpps, self.global_batch, self._seed = sorted(runs), global_batch, seed
        check_shares(shares, self.mpps, global_batch)
        total = sum(map(Fraction, shares))
        self.shares_of_samples = [Fraction(share) / total for share in shares]
        self._rest = self.shares_of_samples.index(max(self.shares_of_samples))
        self._starts = [np.array([start for start, _ in runs[mpp]], np.int64) for mpp in self.mpps]
        self._ends = [np.cumsum([count for _, count in runs[mpp]]) for mpp in self.mpps]
        self._seeds = [mix64(mix64(seed & _MASK64) ^ number) for number in range(len(self.mpps))]
        self._place_seed = mix64(mix64(seed & _MASK64) ^ (_PLACE_STREAM << 32))

    def __call__(self, sample: int) -> int:
        """Row of the tile."""
        step, position = divmod(sample, self.global_batch)
        place = permuted_index(position, self.global_batch, self._place_seed, step)
        before, after = self._counts(step), self._counts(step + 1)
        for number, (earlier, later) in enumerate(zip(before, after, strict=True)):
            if place < later - earlier:
                return self._row(number, earlier + place)
            place -= later - earlier
        raise AssertionError

    def _counts(self, steps: int) -> list[int]:
        """Tiles of every mpp in the first steps together."""
        samples = steps * self.global_batch
        counts = [math.floor(share * samples) for share in self.shares_of_samples]
        counts[self._rest] += samples - sum(counts)
        return counts

    def _row(self, number: int, turn: int) -> int:
        """Row of the tile that an mpp gives when it is its turn for the `turn`-th time."""
        ends = self._ends[number]
        tile = tile_of_sample(turn, int(ends[-1]), self._seeds[number])
        run = int(np.searchsorted(ends, tile, "right"))
        return int(self._starts[number][run]) + tile - (int(ends[run - 1]) if run else 0)

    def shares(self, num_steps: int) -> "list[StratumShare]":
        """None: nothing goes by strata."""
        return []

    def story(self, num_steps: int) -> list[str]:
        """What each mpp is of the tiles, and what of the samples."""
        counts = [int(ends[-1]) for ends in self._ends]
        lines = []
        for mpp, count, share in zip(self.mpps, counts, self.shares_of_samples, strict=True):
            passes = float(share) * num_steps * self.global_batch / count
            of_tiles, of_samples = 100 * count / sum(counts), 100 * float(share)
            lines.append(
                f"mpp {mpp:g}: {of_tiles:.3g} % of the tiles, {of_samples:.3g} % of the samples, {passes:.2g} passes"
            )
        return lines

    def digest(self) -> None:
        """There is nothing besides settings and tiles."""
        return


def check_shares(shares: Sequence[float], mpps: Sequence[float], global_batch: int) -> None:
    """Refuses shares that do not fit the tiles.

    Raises:
        ConfigError: Says how many are wanted, and for which mpps.
    """
    if len(shares) != len(mpps):
        raise ConfigError(
            f"sampling.mpp_shares has {len(shares)} shares, and the tiles are of {len(mpps)} mpp "
            f"({', '.join(f'{mpp:g}' for mpp in mpps)}): give one share each, the finest first, or null for shares as "
            "the tiles have them"
        )
    least = len(mpps) * max(len(mpps) - 1, 1)  # so that the largest share is never less than what the others round up
    if global_batch < least:
        raise ConfigError(
            f"sampling.mpp_shares mixes {len(mpps)} mpp in steps of {global_batch} tiles: make them at least {least}"
        )
