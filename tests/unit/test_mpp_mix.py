"""Shares of the samples by mpp: exact, in passes, and from seed and number alone."""

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dinoscope.config import SamplingConfig
from dinoscope.data.mpp_mix import MppMix
from dinoscope.data.sampling import sample_order
from dinoscope.data.tiles import SlideTiles, map_manifest
from dinoscope.errors import ConfigError
from dinoscope.recipe import load_recipe
from dinoscope.slides.manifest import merge_manifests, tile_table, write_tiles
from dinoscope.slides.table import SlideRecord

RECIPE = Path(__file__).resolve().parents[2] / "config" / "runs" / "tiny.yaml"
RUNS = {0.5: [(10, 7), (30, 23)], 0.25: [(0, 10), (53, 47)], 1.0: [(17, 13)]}  # 30, 57 and 13 of 100 rows
MPP_OF_ROW = {row: mpp for mpp, runs in RUNS.items() for start, count in runs for row in range(start, start + count)}


@pytest.mark.parametrize("shares", [(1, 1, 1), (1, 2, 1), (0.7, 0.2, 0.1), (5, 1, 93), (1e-3, 1, 1)])
def test_every_mpp_has_its_share_at_any_time(shares: tuple[float, ...]) -> None:
    order = MppMix(RUNS, shares, seed=4, global_batch=12)
    seen = Counter()
    for step in range(200):
        seen.update(MPP_OF_ROW[order(sample)] for sample in range(12 * step, 12 * (step + 1)))
        for mpp, share in zip((0.25, 0.5, 1.0), shares, strict=True):
            assert abs(seen[mpp] - 12 * (step + 1) * share / sum(shares)) < 2


def test_tiles_of_an_mpp_are_seen_once_a_pass() -> None:
    order = MppMix(RUNS, (1, 1, 1), seed=4, global_batch=12)
    of_mpp: dict[float, list[int]] = {mpp: [] for mpp in RUNS}
    for step in range(300):
        # within a step the order is random, so passes are compared at the ends of steps
        for row in sorted(order(sample) for sample in range(12 * step, 12 * (step + 1))):
            of_mpp[MPP_OF_ROW[row]].append(row)
    for mpp, rows in of_mpp.items():
        size = sum(count for _, count in RUNS[mpp])
        times = Counter(rows)
        assert len(times) == size
        assert max(times.values()) - min(times.values()) <= 1
        first, second = rows[:size], rows[size : 2 * size]
        assert first != second


def test_places_in_a_step_are_dealt_out() -> None:
    """No place of a step, and so no rank, has more of one mpp than another."""
    order = MppMix(RUNS, (1, 1, 1), seed=4, global_batch=12)
    counts = np.zeros((12, 3))
    for sample in range(12 * 1000):
        counts[sample % 12, (0.25, 0.5, 1.0).index(MPP_OF_ROW[order(sample)])] += 1
    assert counts.sum() == 12_000
    chi_square = ((counts - 1000 / 3) ** 2 / (1000 / 3)).sum()
    assert chi_square < 55  # 22 degrees of freedom, 99.99 %


def test_it_follows_from_the_seed() -> None:
    one, same, other = (MppMix(RUNS, (1, 2, 1), seed=seed, global_batch=12) for seed in (4, 4, 5))
    numbers = list(range(500))
    assert [one(k) for k in numbers] == [same(k) for k in reversed(numbers)][::-1]
    assert [one(k) for k in numbers] == [pickle.loads(pickle.dumps(one))(k) for k in numbers]
    assert [one(k) for k in numbers] != [other(k) for k in numbers]


def tiles_of(folder: Path, mpps: tuple[float, ...]) -> SlideTiles:
    """Two slides with 9 tiles of the first mpp, 18 of the next, and so on."""
    paths = []
    for name in ("a", "b"):
        parts = [(mpp, 9 * (number + 1)) for number, mpp in enumerate(mpps)]
        columns = {"mpp": np.concatenate([np.full(count, mpp) for mpp, count in parts])}
        columns["x"] = np.concatenate([np.arange(count) * 64 for _, count in parts])
        columns |= {"y": 0, "level": 0, "read_px": 64, "tile_px": 64}
        columns["footprint_px"] = np.round(64 * columns["mpp"] / 0.25).astype(int)
        about = {"slide_id": name, "tile_set": "train", "tile_px": 64, "requested_mpp": 0.5, "stride_px": 64}
        paths.append(folder / f"{name}.parquet")
        write_tiles(paths[-1], tile_table(name, columns | {"tissue_fraction": 1.0}), about)
    merge_manifests(paths, folder / "train.parquet")
    records = [SlideRecord(name, Path(name), name, frozenset()) for name in ("a", "b")]
    return SlideTiles(map_manifest(folder / "train.parquet", folder), records, "digest")


def test_the_recipe_mixes_the_manifest(tmp_path: Path) -> None:
    tiles = tiles_of(tmp_path, (0.25, 0.5, 1.0))
    assert {mpp: sum(count for _, count in runs) for mpp, runs in tiles.rows_of_mpps().items()} == {
        0.25: 18,
        0.5: 36,
        1.0: 54,
    }
    settings = SamplingConfig(mpp_shares=[2, 1, 1])
    order = sample_order(tiles, settings, seed=1, batch_size=8, global_batch=16)
    seen = Counter(tiles.tiles[order(sample)].kind.mpp for sample in range(1600))
    assert seen == {0.25: 800, 0.5: 400, 1.0: 400}
    assert order.story(100) == [
        "mpp 0.25: 16.7 % of the tiles, 50 % of the samples, 44 passes",
        "mpp 0.5: 33.3 % of the tiles, 25 % of the samples, 11 passes",
        "mpp 1: 50 % of the tiles, 25 % of the samples, 7.4 passes",
    ]
    plain = sample_order(tiles, SamplingConfig(), seed=1, batch_size=8, global_batch=16)
    counts = Counter(tiles.tiles[plain(sample)].kind.mpp for sample in range(108))
    assert counts == {0.25: 18, 0.5: 36, 1.0: 54}  # without shares, as the tiles have them


def test_shares_that_do_not_fit_are_told(tmp_path: Path) -> None:
    tiles = tiles_of(tmp_path, (0.25, 0.5))
    where = {"seed": 1, "batch_size": 8, "global_batch": 16}
    with pytest.raises(ConfigError, match=r"mpp_shares has 3 shares, and the tiles are of 2 mpp \(0\.25, 0\.5\): give"):
        sample_order(tiles, SamplingConfig(mpp_shares=[1, 1, 1]), **where)
    with pytest.raises(ConfigError, match=r"mixes 2 mpp in steps of 1 tiles: make them at least 2"):
        sample_order(tiles, SamplingConfig(mpp_shares=[1, 1]), seed=1, batch_size=1, global_batch=1)
    with pytest.raises(ConfigError, match=r"sampling\.mpp_shares is \[1\.0, 0\.0\]; wanted is a number above 0"):
        load_recipe(RECIPE, ["sampling.mpp_shares=[1,0]"])
    with pytest.raises(ConfigError, match=r"goes with sampling\.method uniform, not with tempered"):
        load_recipe(RECIPE, ["sampling.mpp_shares=[1,1]", "sampling.method=tempered"])
    assert list(load_recipe(RECIPE, ["sampling.mpp_shares=[1,2]"]).sampling.mpp_shares) == [1, 2]
