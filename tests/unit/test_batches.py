"""From sample numbers to the tensors of a step: crops, masks, draws."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from dinoscope.data.collate import Collate, mask_tensors
from dinoscope.data.dataset import ImageCrops, build_loader, crop_settings
from dinoscope.data.tiles import open_tiles
from dinoscope.models.registry import ViTSettings
from dinoscope.recipe import load_recipe
from dinoscope.train.draws import step_draws
from tiny_slides import write_manifest, write_slide

RECIPE = Path(__file__).resolve().parents[2] / "config" / "runs" / "tiny.yaml"
SMALL = ["crops.global_crops_size=64", "crops.local_crops_size=32", "crops.local_crops_number=3"]


@pytest.fixture
def dataset(tmp_path: Path) -> ImageCrops:
    slide = write_slide(tmp_path / "one.tiff", 0, side=512)
    write_manifest(tmp_path / "train.parquet", ["one"], slide_px=512, tile_px=128)
    crop_sizes, augmentation = crop_settings(load_recipe(RECIPE, SMALL))
    (tmp_path / "slides.tsv").write_text(f"slide_id\tpath\none\t{slide}\n")
    tiles = open_tiles(tmp_path / "train.parquet", str(tmp_path / "slides.tsv"))
    return ImageCrops(tiles, crop_sizes, augmentation, 5)


def collate(batch_size: int = 4) -> Collate:
    return Collate(batch_size, 16, 0.5, (0.1, 0.5), False, seed=5)


def batches(dataset: ImageCrops, **loader) -> list:
    return list(build_loader(dataset, collate(), **({"rank": 0, "world_size": 1, "first": 0, "last": 3} | loader)))


def equal(first, second) -> bool:
    pairs = zip(vars(first).values(), vars(second).values(), strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def test_shapes_and_order(dataset: ImageCrops) -> None:
    batch = batches(dataset, num_workers=0)[1]
    assert batch.samples == [4, 5, 6, 7]
    assert batch.global_crops.shape == (8, 64, 64, 3)
    assert batch.local_crops.shape == (12, 32, 32, 3)
    assert batch.gram_crops is None
    _, crops = dataset[6]
    assert np.array_equal(batch.global_crops[4 + 2].numpy(), crops.global_crops[1])  # crop 1 of the third tile
    assert np.array_equal(batch.local_crops[2 * 4 + 2].numpy(), crops.local_crops[2])


def test_batches_depend_on_nothing_but_seed_and_step(dataset: ImageCrops) -> None:
    plain = batches(dataset, num_workers=0)
    for other in (batches(dataset, num_workers=2), batches(dataset, num_workers=0)):
        assert all(equal(a, b) for a, b in zip(plain, other, strict=True))
    assert equal(plain[2], batches(dataset, num_workers=1, first=2)[0])
    assert not torch.equal(plain[0].masks, plain[1].masks)


def test_a_loader_writes_crops_into_shared_memory_at_once(dataset: ImageCrops, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [dataset[sample] for sample in range(4)]
    plain = collate()(samples)
    assert not plain.global_crops.is_shared()
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: "in a loader")
    shared = collate()(samples)
    assert shared.global_crops.is_shared()
    assert shared.local_crops.is_shared()
    assert equal(plain, shared)


def test_masks_are_as_many_and_as_large_as_asked() -> None:
    batch = mask_tensors(collate()._masks(0, 8, 4))
    counts = batch["masks"].sum(1)
    # the upper edges of four intervals over 10 to 50 % of 16 patches
    assert sorted(counts[counts > 0].tolist()) == [int(16 * p) for p in (0.2, 0.3, 0.4, 0.5)]
    assert batch["mask_indices"].tolist() == batch["masks"].flatten().nonzero().flatten().tolist()
    rows = batch["mask_indices"] // 16
    for row in rows.unique():
        assert batch["mask_weights"][rows == row].sum().item() == pytest.approx(1.0)


def test_recipe_numbers_win_over_the_preset() -> None:
    changed = [*SMALL, "augmentation.hue=0.0", "augmentation.blur_p=[0,0,1]", "crops.horizontal_flips=false"]
    _, preset = crop_settings(load_recipe(RECIPE, SMALL))
    _, augmentation = crop_settings(load_recipe(RECIPE, changed))
    expected = dataclasses.replace(preset, hue=0.0, blur_p=(0, 0, 1), horizontal_flips=False)
    assert augmentation == expected


ROPE = ViTSettings(32, 3, 2, 128, rope_rescale=2.0, rope_shift=0.5, drop_path_rate=0.3)


def draw(**changes) -> list:
    where = {"seed": 1, "step": 2, "rank": 0, "device": torch.device("cpu")} | changes
    return step_draws(ROPE, [10, 4], **where)


def test_draws_derive_from_seed_step_and_rank() -> None:
    first = draw()
    again = draw()
    assert all(
        torch.equal(a.attn, b.attn) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True)
    )
    for changes in ({"seed": 2}, {"step": 3}, {"rank": 1}):
        assert not torch.equal(first[0][0].rope.scale, draw(**changes)[0][0].rope.scale)


def test_draws_have_the_published_sizes_and_ranges() -> None:
    draws = [draw(step=step) for step in range(300)]
    assert {block[group].attn.numel() for step in draws for block in step for group in (0,)} == {7}
    assert {block[1].ffn.numel() for step in draws for block in step} == {2}
    scales = torch.stack([block[0].rope.scale for step in draws for block in step])
    shifts = torch.stack([block[0].rope.shift for step in draws for block in step])
    assert torch.equal(scales[:, 0], scales[:, 1])  # rescaling is one draw for both axes; jitter is off
    assert 0.5 <= scales.min() < 0.51 < 1.95 < scales.max() <= 2.0
    assert scales.log().mean().abs() < 0.05
    assert -0.5 <= shifts.min() < -0.49 < 0.49 < shifts.max() <= 0.5


def test_nothing_is_drawn_when_nothing_is_random() -> None:
    settings = dataclasses.replace(ROPE, rope_rescale=None, rope_shift=None, drop_path_rate=0.0)
    assert step_draws(settings, [4], seed=0, step=0, rank=0, device=torch.device("cpu")) is None
