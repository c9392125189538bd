"""Tempered sampling: shares, limits, and that it follows from seed and step alone."""

import math
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dinoscope.config import SamplingConfig
from dinoscope.data.collate import Collate
from dinoscope.data.crops import AUGMENTATIONS, CropSizes
from dinoscope.data.dataset import ImageCrops, StepSizes, build_loader
from dinoscope.data.sampler import mix64, permuted_index, tile_of_sample
from dinoscope.data.sampling import TemperedOrder, UniformOrder, sample_order
from dinoscope.data.sources import Window
from dinoscope.data.tiles import SlideRows, SlideTiles, map_manifest
from dinoscope.errors import ConfigError
from dinoscope.slides.table import SlideRecord
from tiny_slides import write_manifest

ORDER = {"seed": 3, "global_batch": 32, "exponent": 0.5, "max_tiles_per_slide": 2, "tiles_per_visit": 1}


def slides_of(**strata: list[int]) -> list[SlideRows]:
    """Slides with these numbers of tiles, dealt out so that strata are not contiguous."""
    named = [(stratum, count) for stratum, counts in strata.items() for count in counts]
    mixed = [named[i] for i in np.random.default_rng(1).permutation(len(named))]
    starts = np.cumsum([0, *(count for _, count in mixed)])
    return [SlideRows(f"s{i}", stratum, int(starts[i]), count) for i, (stratum, count) in enumerate(mixed)]


def order_of(slides: list[SlideRows], **changes) -> TemperedOrder:
    return TemperedOrder(slides, **(ORDER | changes))


def slide_numbers(slides: list[SlideRows], rows: np.ndarray) -> np.ndarray:
    return np.searchsorted([slide.start for slide in slides], rows, side="right") - 1


def steps(order: TemperedOrder, first: int, last: int) -> np.ndarray:
    batch = order.global_batch
    return np.array([[order(sample) for sample in range(s * batch, (s + 1) * batch)] for s in range(first, last)])


def chi_square_bound(freedom: int) -> float:
    """About the 99.99 % quantile of chi-square (Wilson & Hilferty 1931)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3


MIXED = slides_of(a=[400] * 40, b=[25, 50, 75] * 10, c=[10] * 30)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_strata_and_slides_get_their_shares(exponent: float) -> None:
    """Against shares worked out here; the counts of a step differ from their mean by less than one visit a slide."""
    tiles = {"a": 16_000, "b": 1_500, "c": 300}
    share = {name: count**exponent for name, count in tiles.items()}
    share = {name: value / sum(share.values()) for name, value in share.items()}
    slides_in = Counter(slide.stratum for slide in MIXED)
    order = order_of(MIXED, exponent=exponent)
    assert order.limit == 2
    rows = steps(order, 0, 600)
    counts = np.stack([np.bincount(slide_numbers(MIXED, step), minlength=len(MIXED)) for step in rows])
    expected = np.array([32 * share[slide.stratum] / slides_in[slide.stratum] for slide in MIXED])
    assert np.all((counts == np.floor(expected)) | (counts == np.ceil(expected)))
    variance = np.maximum((expected % 1) * (1 - expected % 1), 1e-9)
    deviations = (counts.sum(0) - 600 * expected) ** 2 / (600 * variance)
    assert deviations.sum() < chi_square_bound(len(MIXED))
    told = {told.stratum: told for told in order.shares(600)}
    for name in tiles:
        assert told[name].sample_share == pytest.approx(share[name], abs=1e-6)
        assert told[name].target_share == pytest.approx(share[name], abs=1e-9)
        assert told[name].passes == pytest.approx(share[name] * 600 * 32 / tiles[name], rel=1e-5)
        of_stratum = [slide.stratum == name for slide in MIXED]
        mean = 600 * 32 * share[name]
        assert abs(counts[:, of_stratum].sum() - mean) < 4 * math.sqrt(mean)


def test_tiles_of_a_slide_are_drawn_alike() -> None:
    """One slide visited in every step: chi-square over its tiles, rounds of 7 steps and a tile left over."""
    slides = slides_of(a=[15], b=[90] * 20)
    rows = steps(order_of(slides, exponent=0, global_batch=4, max_tiles_per_slide=2), 0, 3000)
    own = next(slide for slide in slides if slide.stratum == "a")
    tiles = rows[(rows >= own.start) & (rows < own.start + own.count)] - own.start
    counts, mean = np.bincount(tiles, minlength=15), len(tiles) / 15
    assert len(tiles) == 6000
    assert ((counts - mean) ** 2 / mean).sum() < chi_square_bound(14)
    for first in range(0, 210, 7):  # within a round no tile recurs
        assert len(np.unique(tiles[2 * first : 2 * first + 14])) == 14


def test_no_slide_gives_more_than_its_limit_and_the_shares_yield() -> None:
    """Stratum b would give 5.9 tiles of each of its slides; what it cannot, a and c give in proportion."""
    slides = slides_of(a=[1000] * 60, b=[10_000] * 4, c=[250] * 40)
    order = order_of(slides, global_batch=64)
    rows = steps(order, 0, 300)
    assert max(max(Counter(slide_numbers(slides, step)).values()) for step in rows) == 2
    shares = {share.stratum: share for share in order.shares(300)}
    assert shares["b"].target_share > 0.3
    assert shares["b"].sample_share == pytest.approx(8 / 64)
    assert shares["a"].sample_share / shares["c"].sample_share == pytest.approx(math.sqrt(60_000 / 10_000), rel=1e-6)
    note, *_ = order.story(300)
    needed = math.ceil(64 * shares["b"].target_share / 4)
    assert note == (
        "at 2 tiles of a slide in a step, strata of few slides give less than their target; "
        f"sampling.max_tiles_per_slide {needed} would let them"
    )
    kept = order_of(slides, global_batch=64, max_tiles_per_slide=needed)
    assert not any("sampling." in line for line in kept.story(300))
    assert {s.stratum: s.sample_share for s in kept.shares(300)}["b"] == pytest.approx(shares["b"].target_share)


def test_the_limit_gives_way_evenly_where_slides_are_too_few() -> None:
    slides = slides_of(a=[500] * 8, b=[40] * 2)
    order = order_of(slides)
    counts = [np.bincount(slide_numbers(slides, step), minlength=10) for step in steps(order, 0, 100)]
    assert (order.limit, int(np.max(counts))) == (4, 4)
    notes = [line for line in order.story(100) if "sampling." in line]
    assert notes == [
        "10 slides are too few for sampling.max_tiles_per_slide 2 in steps of 32 tiles: up to 4 are taken of each slide"
    ]
    exactly = order_of(slides, global_batch=20)
    assert all(set(Counter(slide_numbers(slides, step)).values()) == {2} for step in steps(exactly, 0, 50))


@pytest.mark.parametrize("tiles_per_visit", [1, 2, 4])
def test_visits_read_distinct_tiles_of_one_slide_in_a_row(tiles_per_visit: int) -> None:
    order = order_of(MIXED, tiles_per_visit=tiles_per_visit, max_tiles_per_slide=4)
    for step in steps(order, 0, 200):
        of_slide = slide_numbers(MIXED, step).reshape(-1, tiles_per_visit)
        assert (of_slide == of_slide[:, :1]).all()
        assert len(np.unique(step)) == len(step)
        assert max(Counter(of_slide.ravel()).values()) <= 4


def test_slides_of_fewer_tiles_than_wanted_repeat_them_evenly() -> None:
    slides = slides_of(a=[3], b=[1])
    for step in steps(order_of(slides, exponent=0, global_batch=8), 0, 30):
        counts = Counter(step)
        assert sorted(counts) == [0, 1, 2, 3]
        assert sorted(counts.values()) == [1, 1, 2, 4]


def test_a_step_follows_from_seed_and_number_alone() -> None:
    whole = steps(order_of(MIXED), 0, 40)
    again = pickle.loads(pickle.dumps(order_of(MIXED)))
    assert np.array_equal(steps(again, 25, 40), whole[25:])
    assert [again(sample) for sample in (700, 3, 1279, 4, 700)] == [whole.flat[k] for k in (700, 3, 1279, 4, 700)]
    assert not np.array_equal(steps(order_of(MIXED, seed=4), 0, 40), whole)
    assert len(np.unique(np.sort(slide_numbers(MIXED, whole), axis=1), axis=0)) == 40


def test_other_strata_are_noticed() -> None:
    slides = slides_of(a=[40] * 20, b=[40] * 20)
    assert order_of(slides).digest() == order_of(slides, seed=9).digest()
    renamed = [replace(slide, stratum="c") if slide.slide_id == "s7" else slide for slide in slides]
    longer = [*slides[:-1], replace(slides[-1], count=41)]
    assert len({order_of(each).digest() for each in (slides, renamed, longer)}) == 3


def test_slides_meet_as_often_as_chance_has_it() -> None:
    """Pairs of slides in a step: with one order for all steps, neighbours would never meet."""
    slides = slides_of(a=[50] * 12)
    together = np.zeros((12, 12))
    for step in steps(order_of(slides, global_batch=4), 0, 3000):
        present = np.bincount(slide_numbers(slides, step), minlength=12)
        together += np.outer(present, present)
    pairs = together[np.triu_indices(12, 1)]
    expected = 3000 * (4 * 3) / (12 * 11)
    assert abs(pairs.mean() - expected) < 1e-9
    assert np.abs(pairs - expected).max() < 5 * math.sqrt(expected)


def reference(slides: list[SlideRows], sample: int, limit: int) -> int:
    """The definition once more, in Python's integers, for one stratum or equal weights and 1 tile a visit."""
    (step, position), unit = divmod(sample, 32), 1 << 32
    step_key = mix64(mix64(mix64(3) ^ 1) ^ step)
    offset = mix64(step_key ^ (unit * unit - 1)) // unit
    units = [32 * unit // len(slides) + (i < 32 * unit % len(slides)) for i in range(len(slides))]
    reached, visited = 0, []
    for slide in sorted(range(len(slides)), key=lambda i: mix64(i ^ step_key)):
        points = [j for j in range(32) if reached <= offset + j * unit < reached + units[slide]]
        visited += [(slide, nth) for nth in range(len(points))]
        reached += units[slide]
    slide, nth = visited[position]
    count = slides[slide].count
    round_, turn = divmod(step, count // limit)
    seed = mix64(mix64(mix64(3) ^ 2) ^ slide)
    return slides[slide].start + permuted_index(turn * limit + nth, count, seed, round_)


def test_agrees_with_the_definition_in_plain_integers() -> None:
    slides = slides_of(a=[40 + i for i in range(21)])
    order = order_of(slides)
    samples = [*range(96), 32_000, 10**12 + 7]
    assert [order(sample) for sample in samples] == [reference(slides, sample, 2) for sample in samples]


def test_shares_read_well() -> None:
    slides = [SlideRows("s", "A / Aperio / HE", 0, 62), SlideRows("t", "unknown", 62, 38)]
    first, second = order_of(slides, exponent=1, global_batch=2, max_tiles_per_slide=2).story(155)
    assert first == "A / Aperio / HE: 62 % of the tiles, 62 % of the samples, 3.1 passes"
    assert second == "unknown: 38 % of the tiles, 38 % of the samples, 3.1 passes"
    many = order_of(slides_of(**{f"s{i}": [10 + i] for i in range(50)})).story(10)
    assert (len(many), many[-1]) == (
        31 + len([line for line in many if "sampling." in line]),
        "… and 20 smaller strata",
    )


class Plain:
    """Images without slides that are nothing but their number."""

    windows, slide_ids = (Window(64, 64),), ()

    def __len__(self) -> int:
        return 30

    def read(self, index: int) -> tuple[np.ndarray, str]:
        return np.full((64, 64, 3), index, np.uint8), str(index)

    def stain(self, index: int) -> None:
        return None


class PlainTiles(SlideTiles):
    """Tiles whose images are nothing but their number."""

    def read(self, index: int) -> tuple[np.ndarray, str]:
        return np.full((64, 64, 3), index, np.uint8), str(index)


@pytest.fixture
def tiles(tmp_path: Path) -> SlideTiles:
    names = [f"s{i}" for i in range(12)]
    write_manifest(tmp_path / "train.parquet", names, slide_px=256, tile_px=64)
    records = [SlideRecord(name, Path(name), name, frozenset(), site="AB"[i > 8]) for i, name in enumerate(names)]
    return PlainTiles(map_manifest(tmp_path / "train.parquet", tmp_path), records, "digest")


def settings(**changes) -> SamplingConfig:
    return SamplingConfig(**({"method": "tempered"} | changes))


def test_the_recipe_chooses_the_order(tiles: SlideTiles) -> None:
    where = {"seed": 5, "batch_size": 6, "global_batch": 12}
    uniform = sample_order(tiles, SamplingConfig(), **where)
    assert isinstance(uniform, UniformOrder)
    assert [uniform(k) for k in range(400)] == [tile_of_sample(k, 192, 5) for k in range(400)]
    assert (uniform.story(9), uniform.shares(9)) == ([], [])
    assert isinstance(sample_order(Plain(), SamplingConfig(), **where), UniformOrder)
    tempered = sample_order(tiles, settings(exponent=0, max_tiles_per_slide=2, tiles_per_visit=2), **where)
    assert [share.stratum for share in tempered.shares(1)] == ["A / unknown / unknown", "B / unknown / unknown"]
    assert [share.sample_share for share in tempered.shares(1)] == pytest.approx([0.5, 0.5])
    with pytest.raises(ConfigError, match=r"names images without slides: set sampling\.method: uniform"):
        sample_order(Plain(), settings(), **where)
    with pytest.raises(
        ConfigError, match=r"is 4, which does not divide train\.batch_size_per_gpu 6: set it to 1 or 2 or 3"
    ):
        sample_order(tiles, settings(max_tiles_per_slide=4, tiles_per_visit=4), **where)


def loaded(tiles: SlideTiles, *, rank: int, ranks: int, num_workers: int = 0, first: int = 0) -> list[list[int]]:
    """Numbers of the tiles that each step of a rank reads, found in the crops themselves."""
    order = sample_order(tiles, settings(tiles_per_visit=2), seed=5, batch_size=12 // ranks, global_batch=12)
    plain = {"color_jitter_p": 0, "grayscale_p": 0, "blur_p": (0, 0, 0), "solarize_p": 0, "hed_p": 0}
    crops = ImageCrops(tiles, StepSizes((CropSizes(32, 16, 1),)), replace(AUGMENTATIONS["dinov3"], **plain), 5, order)
    collate = Collate(12 // ranks, 16, 0.5, (0.1, 0.5), False, seed=5)
    where = {"first": first, "last": 5, "rank": rank, "world_size": ranks, "num_workers": num_workers}
    batches = list(build_loader(crops, collate, **where))
    assert all(isinstance(batch.global_crops, torch.Tensor) for batch in batches)
    return [batch.global_crops[: 12 // ranks, 0, 0, 0].tolist() for batch in batches]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4:UserWarning")
def test_workers_ranks_and_resuming_change_nothing(tiles: SlideTiles) -> None:
    order = sample_order(tiles, settings(tiles_per_visit=2), seed=5, batch_size=12, global_batch=12)
    alone = loaded(tiles, rank=0, ranks=1)
    assert alone == steps(order, 0, 5).tolist()
    assert loaded(tiles, rank=0, ranks=1, num_workers=4) == alone
    assert loaded(tiles, rank=0, ranks=1, num_workers=1, first=3) == alone[3:]
    parts = [loaded(tiles, rank=rank, ranks=3) for rank in range(3)]
    assert [[*first, *second, *third] for first, second, third in zip(*parts, strict=True)] == alone
