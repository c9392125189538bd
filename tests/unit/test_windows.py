"""Crops against the windows that they are cut from."""

import math
from dataclasses import asdict

import pytest

from dinoscope.data.crops import CropSizes
from dinoscope.data.sources import Window
from dinoscope.data.windows import crop_ranges
from dinoscope.errors import ConfigError


def sizes(**changes) -> CropSizes:
    values = {"global_px": 96, "local_px": 48, "num_local": 4, "gram_px": None, "global_scale": (0.25, 1.0)}
    values |= {"local_scale": (0.0625, 0.25), "gram_no_distortions": False}
    return CropSizes(**(values | changes))


def test_effective_resolution_of_crops() -> None:
    """A 96-px crop of a quarter to all of a 192-px window at 0.5: 96 to 192 px at 0.5 in 96 px."""
    (whole, local) = crop_ranges([Window(192, 192, 0.5)], [sizes()])
    assert (whole.finest_mpp, whole.coarsest_mpp, whole.upsampled) == (0.5, 1.0, False)
    assert (local.finest_mpp, local.coarsest_mpp, local.upsampled) == (0.5, 1.0, False)
    (enlarged, _) = crop_ranges([Window(128, 128, 0.5)], [sizes()])
    assert enlarged.upsampled
    assert enlarged.finest_mpp == pytest.approx(0.5 * 64 / 96)
    assert str(enlarged) == "global crops 96 px, 0.333 to 0.667 µm/px (the smallest ones are upsampled)"


def test_the_range_spans_all_windows() -> None:
    (whole, _) = crop_ranges([Window(192, 192, 0.5), Window(384, 384, 0.25), Window(192, 192, 2.0)], [sizes()])
    assert (whole.finest_mpp, whole.coarsest_mpp) == (0.5, 4.0)


def test_without_a_known_resolution_sizes_are_all_there_is_to_say() -> None:
    (whole, local) = crop_ranges([Window(192, 192), Window(192, 192, 0.5)], [sizes()])
    assert asdict(whole) == {
        "name": "global",
        "crop_px": 96,
        "finest_mpp": None,
        "coarsest_mpp": None,
        "upsampled": False,
    }
    assert str(local) == "local crops 48 px, magnification unknown"


def test_what_is_no_square_is_upsampled_by_its_area() -> None:
    """A quarter of 128 × 288 px is a crop of 96 px squared."""
    assert math.sqrt(128 * 288 / 4) == 96
    assert not crop_ranges([Window(128, 288)], [sizes()])[0].upsampled
    assert crop_ranges([Window(128, 287)], [sizes()])[0].upsampled


def test_a_crop_larger_than_its_window_is_refused() -> None:
    with pytest.raises(ConfigError, match="gram teacher crops are 256 px but the tiles only 192 px"):
        crop_ranges([Window(192, 192, 0.5)], [sizes(gram_px=256)])
    crop_ranges([Window(500, 96, name="image wide.png")], [sizes()])
    with pytest.raises(ConfigError, match=r"global crops are 96 px but image a/b\.png only 500 × 95 px; use images of"):
        crop_ranges([Window(192, 192), Window(500, 95, name="image a/b.png")], [sizes()])
