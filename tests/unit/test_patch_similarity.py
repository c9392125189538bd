"""Gram distances of two models: the formula in float64, what cannot be compared, and the way through the files."""

import csv
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dinoscope.errors import FeaturesError, SlideError
from dinoscope.evaluate import patch_similarity
from dinoscope.evaluate.embedding import ImageFeatures, write_features
from dinoscope.evaluate.patch_similarity import embed_patches, gram_distances, read_patches
from dinoscope.features.encoders import LoadedEncoder
from dinoscope.models.weights import load_backbone
from dinoscope.slides.manifest import tile_table, write_tiles
from dinoscope.train.probing import read_probe_set
from feature_samples import write_sample
from tiny_backbone import tiny_backbone
from tiny_slides import write_slide

SCRIPT = Path(__file__).parents[2] / "workflow_scripts" / "evaluate.py"
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


def test_from_slides_to_the_table_by_the_steps_of_the_script(tmp_path, monkeypatch):
    """Tiles of two slides, their patches by two models, and the number in summary.tsv against float64."""
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("evaluate_script", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        script.main()

    rows = ["slide_id\tpath\tcase_id"]
    for seed, slide in enumerate(("a", "b")):
        write_slide(tmp_path / f"{slide}.tiff", seed, side=256)
        rows.append(f"{slide}\t{slide}.tiff\tcase_{slide}")
        write_tiles_of(tmp_path / "tiles" / f"{slide}.parquet", slide)
    (tmp_path / "slides.tsv").write_text("\n".join(rows) + "\n")
    called = ["--described", "a", "b", "--slides", "slides.tsv"]
    call("tiles", *called, "--tiles", "tiles", "--seed", 3, "--output", "tiles.npz")
    images = read_probe_set(tmp_path / "tiles.npz").images
    assert images.shape == (32, 64, 64, 3) and len(np.unique(images.reshape(32, -1), axis=0)) > 25
    # the images of a probe are taken by the same way
    call(
        "probe", "--slides", "slides.tsv", "--probed", "a", "b", "--tiles", "tiles", "--images", 6, "--output", "p.npz"
    )
    probe = read_probe_set(tmp_path / "p.npz")
    assert probe.groups.tolist() == [0, 0, 0, 1, 1, 1] and len(probe.labels) == 0
    assert all((probe.images[row] == images[16 * (row // 3) :][:16]).all(axis=(1, 2, 3)).sum() == 1 for row in range(6))
    call("units", "--task", "descriptive", *called, "--output", "units.json")
    expected = {}
    for seed, name in enumerate(("base", "run")):
        model = tiny_backbone()
        torch.manual_seed(seed)
        model.init_weights()
        (tmp_path / name).mkdir()
        state = {f"backbone.{key}": value for key, value in model.state_dict().items()}
        torch.save({"teacher": state}, tmp_path / name / "teacher.pth")
        model = load_backbone(tmp_path / name / "teacher.pth")
        call("patches", "--weights", f"{name}/teacher.pth", "--model-name", name, "--sampled", "tiles.npz",
             "--device", "cpu", "--output", f"{name}.npz")  # fmt: skip
        with torch.inference_mode():
            mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (model.mean, model.std))
            pixels = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std
            expected[name] = model.forward_features(pixels)["patches"].double().numpy()
        features = [write_sample(tmp_path / name / f"{s}.h5", np.random.default_rng(0).normal(size=(16, 8))
                                 .astype(np.float32), slide_id=s, model=name) for s in ("a", "b")]  # fmt: skip
        given = [] if name == "base" else ["--patches", "run.npz", "--patches-from", "base=base.npz"]
        call("measure", "--units", "units.json", "--features", *features, "--model-name", name, *given,
             "--slides", "slides.tsv", "--output", f"answers_{name}.npz")  # fmt: skip
    call("compare", "--units", "units.json", "--answers", "answers_base.npz", "answers_run.npz", "--models", "base",
         "run", "--output", "compared.npz", "--figure", "figure.png")  # fmt: skip
    call("summary", "--comparisons", "compared.npz", "--table", "s.tsv", "--document", "s.json", "--measures", "m")
    units = [rows / np.linalg.norm(rows, axis=2, keepdims=True) for rows in expected.values()]
    truth = np.square(units[0] @ units[0].mT - units[1] @ units[1].mT).mean()
    with open(tmp_path / "s.tsv") as file:
        (found,) = [row for row in csv.DictReader(file, delimiter="\t") if row["score"].startswith("gram_distance")]
    assert (found["model"], found["score"], found["verdict"]) == ("run", "gram_distance_from_base", "")
    assert float(found["value"]) == pytest.approx(truth, rel=1e-3, abs=1e-6) and truth > 1e-4
    assert "gram_distance_from_base" in (tmp_path / "s.json").read_text()
    # a slide that can no longer be read costs the others nothing, where slides may be skipped
    (tmp_path / "b.tiff").write_bytes((tmp_path / "b.tiff").read_bytes()[:1000])
    with pytest.raises(SlideError, match="slide 'b'"):
        call("tiles", *called, "--tiles", "tiles", "--seed", 3, "--output", "fewer.npz")
    call("tiles", *called, "--tiles", "tiles", "--seed", 3, "--on-error", "skip", "--output", "fewer.npz")
    fewer = read_probe_set(tmp_path / "fewer.npz")
    np.testing.assert_array_equal(fewer.images, images[read_probe_set(tmp_path / "tiles.npz").groups == 0])


def write_tiles_of(path, slide):
    """A manifest of 16 tiles of 64 px of a slide of 256 px."""
    y, x = (axis.ravel() for axis in np.mgrid[0:256:64, 0:256:64])
    columns = {"x": x, "y": y, "level": 0, "read_px": 64, "tile_px": 64, "mpp": 0.5, "footprint_px": 64}
    about = {"slide_id": slide, "tile_set": "features", "tile_px": 64, "requested_mpp": 0.5, "stride_px": 64}
    about |= {"width": 256, "height": 256, "mpp_x": 0.5, "mpp_y": 0.5}
    path.parent.mkdir(exist_ok=True)
    write_tiles(path, tile_table(slide, columns | {"tissue_fraction": 1.0}), about)
