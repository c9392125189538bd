"""Sampled tiles of slides: which they are, that they are the slide's own, and what is asked of their changed copies."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dinoscope.errors import FeaturesError, SlideError
from dinoscope.evaluate.answers import Answers, read_answers
from dinoscope.evaluate.baselines import color_histogram
from dinoscope.evaluate.embedding import ImageFeatures, read_sampled_features
from dinoscope.evaluate.folds import grouped_folds, strata_of_values
from dinoscope.evaluate.measuring import Settings
from dinoscope.evaluate.probe import linear_probe, ridge_probe
from dinoscope.evaluate.robustness import retention
from dinoscope.evaluate.sampled_answers import add_sampled
from dinoscope.evaluate.samples import SampledTiles
from dinoscope.evaluate.sampling import sample_slide
from dinoscope.evaluate.shifts import shifted
from dinoscope.evaluate.units import Unit, Units, write_units
from dinoscope.features.read_ahead import load_tiles
from dinoscope.slides.grid import TileSet
from dinoscope.slides.manifest import read_metadata, read_tiles, write_tiles
from dinoscope.slides.padding import read_tile
from dinoscope.slides.reader import Slide
from dinoscope.slides.skipped_tiles import write_skipped
from dinoscope.slides.skipping import Attempt
from feature_samples import write_sample as write_feature_file
from tiny_slides import write_manifest, write_slide

SCRIPT = Path(__file__).parents[2] / "workflow_scripts" / "evaluate.py"
HOW = {"count": 5, "seed": 0, "reader": None}
SIDE, TILE = 256, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight slides of 16 tiles each, with their manifests."""
    folder = tmp_path_factory.mktemp("slides")
    names = [f"s{index}" for index in range(8)]
    for index, name in enumerate(names):
        write_slide(folder / f"{name}.tiff", seed=index, side=SIDE)
    write_manifest(folder / "all.parquet", names, SIDE, TILE)
    for name in names:
        path = folder / f"{name}.parquet"
        write_tiles(path, read_tiles(path), read_metadata(path) | {"mpp_x": 0.5, "mpp_y": 0.5})
    return folder


def sampled(folder, name, output, **changes):
    attempt = Attempt(folder / f"{name}.tiff", name, "samples", changes.pop("on_error", "fail"))
    sample_slide(attempt, folder / f"{name}.parquet", output, **HOW | changes)
    return output


def test_a_sample_is_of_the_slides_own_tiles(folder, tmp_path):
    files = [sampled(folder, name, tmp_path / f"{name}.npz") for name in ("s0", "s1")]
    tiles = SampledTiles(files)
    assert len(tiles) == 10 and tiles.tile_px == TILE and tiles.slides == ["s0"] * 5 + ["s1"] * 5
    for index in (0, 4, 5, 9, 3):
        slide_id, row = tiles.files[index].split("/")
        table = load_tiles(folder / f"{slide_id}.parquet")
        where = (int(column[int(row)]) for column in (table.x, table.y, table.level, table.read_px))
        with Slide(folder / f"{slide_id}.tiff", slide_id) as slide:
            assert np.array_equal(tiles.pixels(index), read_tile(slide, *where, TILE, table.footprint_px))
    # drawn by seed and name, in all of the slide
    rows = [name.partition("/")[2] for name in tiles.files]
    assert rows[:5] != rows[5:]
    again = SampledTiles([sampled(folder, "s0", tmp_path / "again.npz")])
    other = SampledTiles([sampled(folder, "s0", tmp_path / "other.npz", seed=1)])
    assert again.files == tiles.files[:5] and other.files != again.files
    assert len(SampledTiles([sampled(folder, "s0", tmp_path / "whole.npz", count=99)])) == 16


def test_slides_that_cannot_be_read_stop_nothing_where_they_may_be_skipped(folder, tmp_path):
    whole = (folder / "s2.tiff").read_bytes()
    (tmp_path / "s2.tiff").write_bytes(whole[: len(whole) // 3])
    (tmp_path / "s2.parquet").write_bytes((folder / "s2.parquet").read_bytes())
    with pytest.raises(SlideError):
        sampled(tmp_path, "s2", tmp_path / "s2.npz")
    assert not (tmp_path / "s2.npz").exists()
    sampled(tmp_path, "s2", tmp_path / "s2.npz", on_error="skip")
    write_skipped("gone", [(TileSet("features", TILE, 0.5), tmp_path / "gone.parquet")], "it is gone")
    sampled(tmp_path, "gone", tmp_path / "gone.npz")
    good = sampled(folder, "s3", tmp_path / "s3.npz")
    assert SampledTiles([tmp_path / "s2.npz", good, tmp_path / "gone.npz"]).slides == ["s3"] * 5
    with pytest.raises(FeaturesError, match="the samples of 2 slides hold no tile at all"):
        SampledTiles([tmp_path / "s2.npz", tmp_path / "gone.npz"])
    good.write_bytes(good.read_bytes()[:200])
    with pytest.raises(FeaturesError, match=r"s3\.npz: no whole sample of a slide's tiles"):
        SampledTiles([good])


def sample_of(slides: list[str], rng: np.random.Generator, width: int = 6) -> ImageFeatures:
    rows = rng.normal(size=(len(slides), width)).astype(np.float32)
    copies = {"stain": (rows + rng.normal(size=rows.shape)).astype(np.float32)}
    return ImageFeatures({"slides": slides, "most": 3}, rows, np.zeros((0, 2)), copies)


def task_of(kind: str, values: list[object]) -> Units:
    """Cases of two slides each; the last is for selection."""
    units = [
        Unit(f"C{index}", f"C{index}", "test", value, (f"a{index}", f"b{index}")) for index, value in enumerate(values)
    ]
    units.append(Unit("CX", "CX", "selection", values[0], ("ax",)))
    return Units("label-x", kind, units, ["p", "q"] if kind == "classes" else [])


def test_a_case_is_the_mean_of_its_sampled_tiles_of_all_slides():
    rng, num = np.random.default_rng(0), 20
    units = task_of("classes", ["pq"[index % 2] for index in range(num)])
    # of case 7 nothing could be sampled, of case 3 one slide alone; others are no test slides
    slides = [f"a{i}" for i in range(num) if i != 7 for _ in range(3)] + ["ax", "elsewhere"]
    slides += [f"b{i}" for i in range(num) if i not in (3, 7)]
    sample = sample_of(slides, rng)
    settings = Settings(folds=3, repeats=2, attention=False)
    before = Answers({}, np.zeros(len(units), np.int8), {"linear": np.zeros((2, len(units), 2))}, notes=["a note"])
    found = add_sampled(before, units, sample, settings)
    case = np.array([int(name[1:]) if name[1:].isdigit() else -1 for name in slides])
    asked = np.setdiff1d(np.arange(num), [7])
    means = {
        name: np.stack([of[case == index].mean(0) for index in asked])
        for name, of in (("clean", sample.features), ("stain", sample.shifted["stain"]))
    }
    labels = asked % 2
    folds = grouped_folds(labels, asked, folds=3, repeats=2, seed=0)
    probed = linear_probe(means["clean"], labels, asked, folds, tested={"stain": means["stain"]}).predictions
    for name, measure in (("clean", "linear~unchanged"), ("stain", "linear~stain")):
        np.testing.assert_allclose(found.said[measure][:, asked], probed[name].said, atol=1e-3)
        assert np.isnan(found.said[measure][:, [7, num]]).all()
    assert found.said["linear"] is before.said["linear"]  # on all tiles, as before
    assert {"knn_5~unchanged", "knn_5~stain"} <= found.said.keys() and not any("few" in name for name in found.said)
    assert "linear_change~stain" in found.measures
    taken = case >= 0
    kept = retention(sample.features[taken], sample.shifted["stain"][taken], case[taken], labels=case[taken] % 2)
    sums = found.sums["retained~stain"]
    assert sums[:, 1].tolist() == [*np.bincount(case[taken], minlength=num), 0]
    np.testing.assert_allclose(sums[:, 0].sum() / sums[:, 1].sum(), kept.retained.mean())
    assert found.numbers["chance~stain"] == pytest.approx(kept.chance)
    assert found.notes[0] == "a note" and found.notes[1].startswith(
        "changed copies (~stain, ~blur, …) are of 75 sampled"
    )
    assert found.notes[2] == "not asked about changed copies, since no tile could be sampled: C7"


def test_numbers_of_cases_are_asked_too():
    rng, num = np.random.default_rng(1), 24
    values = rng.normal(size=num)
    units = task_of("number", values.tolist())
    sample = sample_of([f"a{i}" for i in range(num)], rng)
    settings = Settings(folds=3, repeats=1, attention=False)
    found = add_sampled(Answers({}, np.zeros(num + 1, np.int8)), units, sample, settings)
    folds = grouped_folds(strata_of_values(values), np.arange(num), folds=3, repeats=1, seed=0)
    how = {"tested": {"stain": sample.shifted["stain"]}}
    probed = ridge_probe(sample.features, values, np.arange(num), folds, **how).predictions
    np.testing.assert_allclose(found.said["ridge~stain"][:, :num], probed["stain"].said, rtol=1e-4)
    assert found.measures == ["ridge~unchanged", "ridge~stain", "ridge_change~stain", "retained~stain"]
    assert "alike~stain" not in found.numbers


def as_seen(pixels: np.ndarray) -> np.ndarray:
    """At the side of the encoder's input."""
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    large = F.interpolate(image, (224, 224), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return (large[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()


def test_from_slides_to_answers_by_the_script(folder, tmp_path, monkeypatch):
    """The colour baseline on sampled tiles, as the workflow calls it."""
    spec = importlib.util.spec_from_file_location("evaluate_script", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        script.main()

    names = [f"s{index}" for index in range(8)]
    for name in names:
        where = ["--slide", folder / f"{name}.tiff", "--slide-id", name, "--tiles", folder / f"{name}.parquet"]
        call("sample", *where, "--count", 4, "--output", tmp_path / f"{name}.npz")
    files = [tmp_path / f"{name}.npz" for name in names]
    encoder = ["--weights", "dinoscope.evaluate.baseline_encoders:color_histogram", "--model-name", "color-histogram"]
    call("embed", *encoder, "--sampled", *files, "--shifts", "grey", "stain", "--output", tmp_path / "features.npz")
    found, tiles = read_sampled_features(tmp_path / "features.npz"), SampledTiles(files)
    for index in (0, 13, 31):
        pixels = tiles.pixels(index)
        np.testing.assert_allclose(found.features[index], color_histogram(as_seen(pixels)), atol=1e-6)
        copy = shifted(pixels, "stain", index)
        np.testing.assert_allclose(found.shifted["stain"][index], color_histogram(as_seen(copy)), atol=1e-6)
    units = [Unit(f"C{i}", f"C{i}", "test", "pq"[i % 2], (name,)) for i, name in enumerate(names)]
    write_units(tmp_path / "units.json", Units("label-x", "classes", units, ["p", "q"]))
    rng = np.random.default_rng(0)
    of_slides = [
        write_feature_file(tmp_path / f"{name}.h5", rng.normal(size=(16, 48)).astype(np.float32), slide_id=name)
        for name in names
    ]
    asked = ["--units", tmp_path / "units.json", "--features", *of_slides, "--model-name", "color-histogram"]
    how = ["--folds", 2, "--repeats", 1, "--no-attention", "--sampled", tmp_path / "features.npz"]
    call("measure", *asked, *how, "--output", tmp_path / "answers.npz")
    answers = read_answers(tmp_path / "answers.npz")
    assert {"linear", "linear~unchanged", "linear~grey", "linear~stain", "linear_change~grey"} <= set(answers.measures)
    assert answers.sums["retained~grey"].shape == (8, 2) and (answers.sums["retained~grey"][:, 1] == 4).all()
