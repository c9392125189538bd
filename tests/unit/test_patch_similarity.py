"""Gram distances of two models: the formula in float64, what cannot be compared, and the way through the files."""

import numpy as np
import pytest
import torch

from dinoscope.errors import FeaturesError
from dinoscope.evaluate import patch_similarity
from dinoscope.evaluate.embedding import ImageFeatures, write_features
from dinoscope.evaluate.patch_similarity import embed_patches, gram_distances, read_patches
from dinoscope.features.encoders import LoadedEncoder
from tiny_backbone import tiny_backbone

CPU = torch.device("cpu")


def patches(model, seed, grids, width, images="same", dtype=np.float16):
    """Made-up patches that share a direction, so that cosines are of all sizes."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(int(np.prod(grids, axis=1).sum()), width)) + 1.5 * rng.normal(size=width)
    return ImageFeatures({"model": model, "images": images}, rows.astype(dtype), np.array(grids, np.int32))


def by_hand(one, other, images, taken):
    """‖G - G'‖² / P², mean over images, by double loops in float64."""
    found, starts = [], np.cumsum([0, *np.prod(one.grids, axis=1)])
    for image in images:
        place = starts[image] + taken[image]
        a, b = (of.features[place].astype(np.float64) for of in (one, other))
        total = 0.0
        for i in range(len(place)):
            for j in range(len(place)):
                mine = a[i] @ a[j] / np.sqrt(a[i] @ a[i]) / np.sqrt(a[j] @ a[j])
                theirs = b[i] @ b[j] / np.sqrt(b[i] @ b[i]) / np.sqrt(b[j] @ b[j])
                total += (mine - theirs) ** 2
        found.append(total / len(place) ** 2)
    return np.mean(found)


def test_distance_is_its_formula_on_images_of_several_sizes():
    grids = [(3, 4), (2, 5), (4, 4)]
    one, other = patches("one", 0, grids, 12), patches("base", 1, grids, 20)
    numbers, notes = gram_distances(one, {"from_base": other, "from_itself": one}, 0)
    expected = by_hand(one, other, range(3), [np.arange(n) for n in (12, 10, 16)])
    assert numbers["from_base"] == pytest.approx(expected, rel=1e-5) and expected > 0.01
    assert numbers["from_itself"] == 0 and notes == []


def test_many_images_and_large_ones_are_sampled_alike_for_all_models(monkeypatch):
    monkeypatch.setattr(patch_similarity, "MAX_IMAGES", 4)
    monkeypatch.setattr(patch_similarity, "MAX_PATCHES", 6)
    grids = [(3, 4)] * 9
    one, other = patches("one", 0, grids, 8), patches("base", 1, grids, 8)
    found = gram_distances(one, {"d": other}, 5)[0]["d"]
    images = np.sort(np.random.default_rng([5]).permutation(9)[:4])
    taken = {image: np.sort(np.random.default_rng([5, image]).permutation(12)[:6]) for image in images}
    assert found == pytest.approx(by_hand(one, other, images, taken), rel=1e-5)
    assert gram_distances(one, {"d": one}, 5)[0]["d"] == 0


def test_float16_changes_a_distance_by_less_than_a_millionth():
    grids = [(14, 14)] * 4
    exact = [patches("m", seed, grids, 64, dtype=np.float64) for seed in (0, 1)]
    rounded = [ImageFeatures(p.about, p.features.astype(np.float16), p.grids) for p in exact]
    near = ImageFeatures(exact[0].about, exact[0].features + 0.02 * exact[1].features, exact[0].grids)
    near16 = ImageFeatures(near.about, near.features.astype(np.float16), near.grids)
    for (a, b), (a16, b16) in (((exact), (rounded)), ((exact[0], near), (rounded[0], near16))):
        units = [p.features.reshape(4, 196, 64) for p in (a, b)]
        grams = [(u / np.linalg.norm(u, axis=2, keepdims=True)) for u in units]
        expected = np.square(grams[0] @ grams[0].mT - grams[1] @ grams[1].mT).mean()
        assert gram_distances(a16, {"d": b16}, 0)[0]["d"] == pytest.approx(expected, abs=1e-6)
        assert expected > 1e-6  # or nothing would be tested


def test_other_grids_are_not_comparable_and_other_images_refused():
    one = patches("vit", 0, [(3, 4)] * 2, 8)
    numbers, notes = gram_distances(one, {"d": patches("base", 0, [(4, 4)] * 2, 8)}, 0)
    assert numbers == {}
    assert notes == ["gram distance: vit and base cut images into different patches, not comparable"]
    with pytest.raises(FeaturesError, match="model 'vit' are of other images than those of 'base'"):
        gram_distances(one, {"d": patches("base", 0, [(3, 4)] * 2, 8, images="others")}, 0)


@pytest.mark.parametrize("image_px", [None, 32])
def test_patches_of_a_model_by_way_of_the_file(tmp_path, image_px):
    model = tiny_backbone()
    encoder = LoadedEncoder(model, "0" * 64, "test", image_px)
    images = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    write_features(tmp_path / "p.npz", embed_patches(encoder, images, {"model": "m", "pooling": "patches"}, CPU))
    found = read_patches(tmp_path / "p.npz")
    side = 4 if image_px is None else 2
    assert found.grids.tolist() == [[side, side]] * 20 and found.features.shape == (20 * side**2, 48)
    if image_px is None:
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (model.mean, model.std))
        with torch.inference_mode():
            pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
            expected = model.forward_features((pixels - mean) / std)["patches"].reshape(-1, 48)
        np.testing.assert_allclose(found.features, expected, atol=2e-3, rtol=1e-3)
    (tmp_path / "p.npz").write_bytes((tmp_path / "p.npz").read_bytes()[:500])
    with pytest.raises(FeaturesError, match="no whole patches of images"):
        read_patches(tmp_path / "p.npz")


def test_a_tile_of_no_whole_patches_is_not_comparable():
    encoder = LoadedEncoder(tiny_backbone(), "0" * 64, "test", None)
    images = np.zeros((3, 40, 40, 3), np.uint8)
    found = embed_patches(encoder, images, {"model": "m", "pooling": "patches"}, CPU)
    assert found.grids.tolist() == [[0, 0]] * 3 and len(found.features) == 0
    other = patches("base", 0, [(2, 2)] * 3, 8, images=found.about["images"])
    assert gram_distances(found, {"d": other}, 0)[0] == {}
    assert gram_distances(found, {"d": found}, 0) == ({}, [])  # nothing to compare, and nothing to say
