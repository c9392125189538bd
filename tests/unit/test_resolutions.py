"""Lists of crop sizes: which steps have which, and what depends on it."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from dinoscope.data.collate import Collate
from dinoscope.data.crops import Crops
from dinoscope.data.dataset import ImageCrops, build_loader, crop_settings
from dinoscope.data.sources import Window
from dinoscope.data.windows import crop_ranges
from dinoscope.errors import ConfigError
from dinoscope.models.registry import settings_from_config
from dinoscope.recipe import resolve_recipe
from dinoscope.resolutions import Resolution, choice_of_step, resolutions
from dinoscope.train.flops import num_masked_patches, step_flops
from dinoscope.train.forecast import forecast
from dinoscope.train.traced_memory import step_memory

SIZES = {"global_crops_size": [64, 96], "local_crops_size": [32, 48], "global_local_crop_pairs_ratios": [3, 1]}


def recipe(crops: dict, **sections):
    crops = {"local_crops_number": 2} | crops
    layers = {"student": {"arch": "vit_nano"}, "crops": crops, "train": {"batch_size_per_gpu": 2}} | sections
    return resolve_recipe([("test", layers)], "test")


class Noise:
    """A few images of 128 px."""

    windows, slide_ids = [Window(128, 128)], []

    def __len__(self) -> int:
        return 10

    def read(self, index: int) -> tuple[np.ndarray, str]:
        return np.random.default_rng(index).integers(0, 256, (128, 128, 3), np.uint8), str(index)

    def stain(self, index: int) -> None:
        return None


def test_one_number_stands_for_all_and_shares_make_one() -> None:
    config = recipe({"global_crops_size": [512, 768], "local_crops_size": 112})
    assert resolutions(config) == [Resolution(512, 112, None, 0.5), Resolution(768, 112, None, 0.5)]
    (single,) = resolutions(recipe({}))
    assert single == Resolution(224, 96, None, 1.0)
    gram = recipe(SIZES | {"gram_teacher_crops_size": [96, 128]}, gram={"use_loss": True, "ema_teacher": True})
    assert resolutions(gram) == [Resolution(64, 32, 96, 0.75), Resolution(96, 48, 128, 0.25)]


def test_shares_are_reached_and_differ_by_seed() -> None:
    shares = (0.5, 0.3, 0.2)
    drawn = [choice_of_step(shares, 7, step) for step in range(20_000)]
    counts = Counter(drawn)
    for index, share in enumerate(shares):  # within 5 standard deviations of a binomial
        assert counts[index] == pytest.approx(20_000 * share, abs=5 * (20_000 * share * (1 - share)) ** 0.5)
    assert drawn != [choice_of_step(shares, 8, step) for step in range(20_000)]
    # one step says nothing of the next
    pairs = Counter(itertools.pairwise(drawn))
    assert pairs[0, 0] == pytest.approx(20_000 * 0.25, abs=5 * (20_000 * 0.25 * 0.75) ** 0.5)


@pytest.mark.parametrize("workers", [0, 1])
def test_all_ranks_have_the_sizes_of_their_step(workers: int) -> None:
    config = recipe(SIZES)
    dataset = ImageCrops(Noise(), *crop_settings(config), seed=3, global_batch=4)
    collate = Collate(2, 16, 0.5, (0.1, 0.5), False, seed=3)
    per_rank = [
        [
            (b.global_crops.shape, b.local_crops.shape, b.masks.shape)
            for b in build_loader(dataset, collate, first=0, last=8, rank=rank, world_size=2, num_workers=workers)
        ]
        for rank in range(2)
    ]
    assert per_rank[0] == per_rank[1]
    small, large = ((4, s, s, 3) for s in (64, 96))
    assert {shapes[0] for shapes in per_rank[0]} == {small, large}
    for step, (of_global, of_local, of_masks) in enumerate(per_rank[0]):
        chosen = resolutions(config)[choice_of_step((0.75, 0.25), 3, step)]
        assert of_global == (4, chosen.global_px, chosen.global_px, 3)
        assert of_local == (4, chosen.local_px, chosen.local_px, 3)
        assert of_masks == (4, (chosen.global_px // 16) ** 2)


def test_every_size_is_held_against_the_windows() -> None:
    ranges = crop_ranges([Window(128, 128, 0.5)], crop_settings(recipe(SIZES))[0].choices)
    assert [(entry.name, entry.crop_px) for entry in ranges] == [
        *(("global", 64), ("global", 96)),
        *(("local", 32), ("local", 48)),
    ]
    with pytest.raises(ConfigError, match="global crops are 256 px but the tiles only 128 px"):
        crop_ranges([Window(128, 128, 0.5)], crop_settings(recipe(SIZES | {"global_crops_size": [64, 256]}))[0].choices)


def test_forecast_counts_operations_by_share_and_memory_by_the_largest() -> None:
    config, settings = recipe(SIZES), settings_from_config(recipe(SIZES).student)
    single = [recipe({"global_crops_size": g, "local_crops_size": s}) for g, s in ((64, 32), (96, 48))]
    flops = [forecast(one, settings, 1, 10, "cpu").flops_per_tile for one in single]
    assert forecast(config, settings, 1, 10, "cpu").flops_per_tile == pytest.approx(0.75 * flops[0] + 0.25 * flops[1])
    assert step_memory(config, settings, "cpu") == step_memory(single[1], settings, "cpu")
    assert step_memory(config, settings, "cpu").peak > step_memory(single[0], settings, "cpu").peak
    first, second = resolutions(config)
    masked = [num_masked_patches(config, 2, sizes) for sizes in (first, second)]
    assert step_flops(config, settings, 2, masked[1], second) / 2 == pytest.approx(flops[1])
    assert masked[1] > masked[0]


@pytest.mark.parametrize(
    ("crops", "message"),
    [
        ({"global_crops_size": [64, 250]}, "crops.global_crops_size is 250 px, not a multiple of the patch size 16"),
        (
            {"global_crops_size": []},
            r"crops.global_crops_size is \[\]; wanted is a whole number of pixels above 0, or a",
        ),
        ({"local_crops_size": "96px"}, "crops.local_crops_size is '96px'; wanted is a whole number of pixels"),
        ({"local_crops_size": {"px": 96}}, r"crops.local_crops_size is \{'px': 96\}; wanted is a whole number"),
        ({"local_crops_size": None}, "crops.local_crops_size is None; wanted is a whole number"),
        (
            {"global_crops_size": [64, 96, 128], "local_crops_size": [32, 48]},
            "has 3 values, crops.local_crops_size has 2",
        ),
        (
            {"global_local_crop_pairs_ratios": [1, 1]},
            "crops.global_local_crop_pairs_ratios is a list, but no crop size",
        ),
        (SIZES | {"global_local_crop_pairs_ratios": [1, 0]}, r"pairs_ratios is \[1, 0\]; wanted is a number above 0"),
        (SIZES | {"gram_teacher_crops_size": [96, 64]}, r"gram_teacher_crops_size \(64\) is smaller than .* \(96\)"),
    ],
)
def test_lists_that_do_not_go_together_are_refused(crops: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(crops)


def test_published_high_resolution_lists_load() -> None:
    """The lists of a published recipe, shortened."""
    config = recipe(
        {
            "global_crops_size": [512, 768, 768],
            "local_crops_size": [112, 112, 336],
            "gram_teacher_crops_size": [768, 1152, 1152],
            "global_local_crop_pairs_ratios": [0.3, 0.3, 0.4],
        },
        gram={"use_loss": True, "it_load_ema_teacher": 0},
    )
    assert [round(entry.share, 6) for entry in resolutions(config)] == [0.3, 0.3, 0.4]
    sizes = crop_settings(config)[0]
    assert (sizes.choices[2].global_px, sizes.choices[2].local_px, sizes.choices[2].gram_px) == (768, 336, 1152)


def test_masks_fit_the_crops_whatever_their_size() -> None:
    collate = Collate(1, 16, 0.5, (0.5, 0.5), False, seed=0)
    for side in (64, 96):
        crops = Crops(np.zeros((2, side, side, 3), np.uint8), np.zeros((2, 32, 32, 3), np.uint8), None)
        batch = collate([(0, crops)])
        assert batch.masks.shape == (2, (side // 16) ** 2)
        assert batch.masks.sum() == (side // 16) ** 2 // 2
        assert torch.equal(batch.mask_indices, batch.masks.flatten().nonzero().flatten())
