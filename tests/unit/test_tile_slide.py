"""The scripts of the slides part, run as a user runs them, and the overview that one of them draws."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dinoscope.slides.grid import TileSet, drop_blurred, make_grid
from dinoscope.slides.manifest import manifest_digest, read_metadata, read_tiles
from dinoscope.slides.quality import QualityLimits, quality_maps
from dinoscope.slides.reader import Slide
from dinoscope.slides.tissue import detect_tissue
from dinoscope.visualize.overview import brightened, draw_overview, scale_bar_mm
from synthetic_slides import blobs, write_lossless

SCRIPTS = Path(__file__).resolve().parents[2] / "workflow_scripts"
NAME = "S 1 [ß]; $(x)"


def run(script: str, *arguments: object, fails: bool = False) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(SCRIPTS / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode != 0) == fails, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done


def jpeg_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        assert image.format == "JPEG"
        return image.size


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    image = blobs(1500, 2000, [(700, 700, 500), (1600, 1000, 300)], (200, 120, 160), (243, 242, 244))
    return write_lossless(tmp_path_factory.mktemp("in put") / "Smith^John 1950.tiff", image, 1.0, (1, 4))


def tile(slide: Path, folder: Path, *more: object, fails: bool = False) -> subprocess.CompletedProcess[str]:
    sets = ["--set", "train", 256, 2.0, folder / "train.parquet", "--set", "features", 112, 1.5, folder / "f.parquet"]
    options = ["--slide", slide, "--slide-id", NAME, "--overview", folder / "o.jpg"]
    return run("tile_slide.py", *options, *sets, *more, fails=fails)


def test_manifests_of_both_sets(slide: Path, tmp_path: Path) -> None:
    done = tile(slide, tmp_path)
    assert "tiles kept" in done.stderr
    with Slide(slide, NAME) as opened:
        tissue = detect_tissue(opened)
        for name, tile_px, mpp, path in (("train", 256, 2.0, "train.parquet"), ("features", 112, 1.5, "f.parquet")):
            grid = make_grid(opened, tissue, TileSet(name, tile_px, mpp))
            tiles, metadata = read_tiles(tmp_path / path), read_metadata(tmp_path / path)
            assert tiles.num_rows == len(grid) > 3
            assert tiles["x"].to_pylist() == grid.x.tolist() and tiles["y"].to_pylist() == grid.y.tolist()
            constants = {"tile_px": tile_px, "mpp": mpp, "level": 0, "footprint_px": round(tile_px * mpp)}
            for column, value in constants.items():
                assert set(tiles[column].to_pylist()) == {value}
            assert set(tiles["slide_id"].to_pylist()) == {NAME}
            assert metadata["slide_id"] == NAME and metadata["tile_set"] == name
            assert (metadata["width"], metadata["height"], metadata["num_levels"]) == (2000, 1500, 2)
            assert (metadata["mpp_x"], metadata["mpp_y"], metadata["mpp_source"]) == (1.0, 1.0, "file")
            assert (metadata["requested_mpp"], metadata["stride_px"], metadata["min_tissue"]) == (mpp, tile_px, 0.5)
            assert metadata["tissue_method"] == "otsu" and metadata["tissue_method_reason"]
            assert set(metadata["software"]) == {"dinoscope", "openslide"}
    assert min(jpeg_size(tmp_path / "o.jpg")) > 700


def test_options_reach_the_grid(slide: Path, tmp_path: Path) -> None:
    tile(slide, tmp_path, "--min-tissue", "train=0.9", "features=0.1", "--stride", "train=128", "--slide-mpp", 1.02)
    train, features = (read_metadata(tmp_path / name) for name in ("train.parquet", "f.parquet"))
    assert (train["min_tissue"], train["stride_px"], train["mpp_source"]) == (0.9, 128, "table")
    assert (features["min_tissue"], features["stride_px"], features["mpp_x"]) == (0.1, 112, 1.02)
    tiles = read_tiles(tmp_path / "train.parquet")
    assert min(tiles["tissue_fraction"].to_pylist()) >= 0.9
    assert min(set(np.diff(sorted(set(tiles["x"].to_pylist()))))) == round(128 * 2 / 1.02)


def test_several_mpp_edges_and_limits_reach_the_manifest(slide: Path, tmp_path: Path) -> None:
    options = ["--set", "mix", 128, "4,2.0,1", tmp_path / "mix.parquet", "--edge", "mix=shift", "train=pad"]
    options += ["--max-white", 0.3, "--max-pen", 0.05, "--measure-focus", "--min-area-um2", 1000, "--max-hole-um2", 1]
    done = tile(slide, tmp_path, *options, "--outline", tmp_path / "o.geojson", "--max-upsample", "f=1.5", fails=True)
    assert "--max-upsample f=...: there is no --set of this name" in done.stderr
    tile(slide, tmp_path, *options, "--outline", tmp_path / "o.geojson", "--max-upsample", "features=1.5")
    metadata, tiles = read_metadata(tmp_path / "mix.parquet"), read_tiles(tmp_path / "mix.parquet")
    assert metadata["requested_mpp"] == [4.0, 2.0, 1.0] and metadata["edge"] == "shift"
    assert (metadata["max_white"], metadata["max_pen"], metadata["max_grey"]) == (0.3, 0.05, None)
    assert (metadata["tissue_min_area_um2"], metadata["tissue_max_hole_um2"]) == (1000, 1)
    rows = tiles.to_pandas()
    assert sorted(set(rows.mpp)) == [1, 2, 4] and rows.mpp.is_monotonic_increasing
    assert (rows.footprint_px == 128 * rows.mpp).all() and (rows.level == (rows.mpp == 4)).all()
    assert (rows.white_fraction <= 0.3).all() and (rows.section_id > 0).all() and (rows.focus > 0).all()
    assert rows[["black_fraction", "grey_fraction", "pen_fraction"]].notna().all(axis=None)
    train = read_metadata(tmp_path / "train.parquet")
    assert train["edge"] == "pad" and train["num_candidates"] == 12
    assert np.isnan(read_tiles(tmp_path / "f.parquet")["focus"].to_numpy()).sum() == 0


def test_limits_that_no_tile_keeps_are_a_warning(slide: Path, tmp_path: Path) -> None:
    done = tile(slide, tmp_path, "--min-focus", 1e9)
    assert "tiles with enough tissue fail the limits of quality, most of them that of focus" in done.stderr
    assert read_tiles(tmp_path / "train.parquet").num_rows == 0


def test_the_outline_comes_back_as_annotations(slide: Path, tmp_path: Path) -> None:
    outline = tmp_path / "outline.geojson"
    tile(slide, tmp_path / "a", "--outline", outline)
    document = json.loads(outline.read_text())
    options = ["--tissue-method", "annotations", "--annotations", outline]
    tile(slide, tmp_path / "b", *options)
    first, again = (read_tiles(tmp_path / name / "train.parquet").to_pandas() for name in "ab")
    assert read_metadata(tmp_path / "b/train.parquet")["tissue_method"] == "annotations"
    assert set(zip(first.x, first.y, strict=True)) == set(zip(again.x, again.y, strict=True))
    assert np.allclose(first.tissue_fraction, again.tissue_fraction, atol=0.01)
    # somebody cuts a quarter out in QuPath
    ring = [[0, 0], [1000, 0], [1000, 700], [0, 700], [0, 0]]
    cut = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}}
    document["features"].append(cut | {"properties": {"classification": {"name": "Fold"}}})
    outline.write_text(json.dumps(document))
    tile(slide, tmp_path / "c", *options, "--include", "Tissue", "--exclude", "Fold", "Ink")
    edited = read_tiles(tmp_path / "c/train.parquet").to_pandas()
    assert 0 < len(edited) < len(first) and not ((edited.x + 512 <= 1000) & (edited.y + 512 <= 700)).any()


def test_results_hold_no_path_and_no_file_name(slide: Path, tmp_path: Path) -> None:
    tile(slide, tmp_path, "--outline", tmp_path / "o.geojson")
    outputs = ["--output", tmp_path / "s.json", "--thumbnail", tmp_path / "s.jpg"]
    run("inspect_slide.py", "--slide", slide, "--slide-id", "S", *outputs)
    for path in tmp_path.iterdir():
        content = path.read_bytes()
        for secret in (b"Smith", str(slide.parent).encode(), b"1950"):
            assert secret not in content, path.name


def test_a_set_without_tiles_is_a_warning_and_an_empty_table(slide: Path, tmp_path: Path) -> None:
    image = blobs(1500, 2000, [(700, 700, 60)], (200, 120, 160), (243, 242, 244))
    done = tile(write_lossless(tmp_path / "small.tiff", image, 1.0), tmp_path)
    assert "tile set train: no tile of 256 px at mpp 2 has at least 0.5 tissue" in done.stderr
    assert read_tiles(tmp_path / "train.parquet").num_rows == 0 and (tmp_path / "o.jpg").exists()


def test_errors_are_one_sentence_and_leave_nothing(slide: Path, tmp_path: Path) -> None:
    blank = write_lossless(tmp_path / "blank.tiff", np.full((1000, 1000, 3), 240, np.uint8), 1.0)
    no_mpp = write_lossless(tmp_path / "no_mpp.tiff", np.full((1000, 1000, 3), 240, np.uint8), None)
    output = tmp_path / "out"
    cases = {
        "no tissue found": tile(blank, output, fails=True),
        "column mpp of slides.tsv": tile(no_mpp, output, fails=True),
        "does not exist": tile(tmp_path / "nothing.svs", output, fails=True),
        "would have to be enlarged": tile(slide, output, "--set", "x", 64, 0.5, output / "x", fails=True),
        "only 2000 x 1500": tile(slide, output, "--set", "x", 3000, 1.0, output / "x", fails=True),
        "there is no --set of this name": tile(slide, output, "--min-tissue", "trian=0.5", fails=True),
        "wanted NAME=a share": tile(slide, output, "--min-tissue", "train=1.5", fails=True),
        "give each mpp once": tile(slide, output, "--set", "x", 64, "1,1", output / "x", fails=True),
        "wanted NAME=drop or shift or pad": tile(slide, output, "--edge", "train=cut", fails=True),
        "need each other": tile(slide, output, "--tissue-method", "annotations", fails=True),
        "annotations no.geojson do not exist": tile(
            slide, output, "--tissue-method", "annotations", "--annotations", "no.geojson", fails=True
        ),
        "wanted whole pixels": tile(slide, output, "--set", "x", "big", 0.5, output / "x", fails=True),
    }
    for sentence, done in cases.items():
        assert sentence in done.stderr and "error: " in done.stderr, done.stderr
    assert not output.exists()


def test_tiling_imports_nothing_heavy(slide: Path, tmp_path: Path) -> None:
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__');"
        "heavy = {'torch', 'pandas', 'sklearn', 'matplotlib', 'scipy', 'snakemake'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    arguments = ["--slide", slide, "--slide-id", "S", "--set", "t", "256", "2", tmp_path / "t.parquet"]
    arguments += ["--overview", tmp_path / "o.jpg"]
    command = [sys.executable, "-c", code, SCRIPTS / "tile_slide.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(SCRIPTS)})
    assert done.returncode == 0, done.stderr


def test_inspect_and_report(slide: Path, tmp_path: Path) -> None:
    image = np.full((600, 500, 3), 240, np.uint8)
    slides = {
        "good": slide,
        "no mpp": write_lossless(tmp_path / "a.tiff", image, None),
        "uneven": write_lossless(tmp_path / "b.tiff", image, (0.5, 0.6)),
        "missing": tmp_path / "secret name.svs",
        "text": tmp_path / "t.svs",
    }
    slides["text"].write_text("no slide")
    documents = []
    for name, path in slides.items():
        documents.append(tmp_path / f"{name}.json")
        outputs = ["--output", documents[-1], "--thumbnail", tmp_path / f"{name}.jpg"]
        run("inspect_slide.py", "--slide", path, "--slide-id", name, *outputs, "--keep-going")
        assert max(jpeg_size(tmp_path / f"{name}.jpg")) <= 2048
    good = json.loads(documents[0].read_text())
    assert good.pop("looks")["bright"] > 0.4 and len(good.pop("content")) == 32
    assert good == {
        "slide_id": "good",
        "width": 2000,
        "height": 1500,
        "bounds": [0, 0, 2000, 1500],
        "mpp_x": 1.0,
        "mpp_y": 1.0,
        "mpp_source": "file",
        "mpp_problem": None,
        "scanner": None,
        "focal_planes": {"count": 1, "used": 1, "source": "1 image of full size in the file"},
        "vendor": "generic-tiff",
        "num_levels": 2,
        "level_dimensions": [[2000, 1500], [500, 375]],
        "level_downsamples": [1.0, 4.0],
        "objective_power": None,
        "has_icc_profile": False,
        "warnings": [],
    }
    assert json.loads((tmp_path / "no mpp.json").read_text())["mpp_x"] is None
    missing = json.loads((tmp_path / "missing.json").read_text())
    assert missing == {
        "slide_id": "missing",
        "error": "slide 'missing' does not exist: correct column path of slides.tsv",
    }
    (tmp_path / "list.txt").write_text("\n".join(map(str, documents)))
    done = run("report_slides.py", "--output", tmp_path / "r.tsv", f"@{tmp_path / 'list.txt'}")
    assert "4 of 5 slides have problems" in done.stderr
    header, *rows = [line.split("\t") for line in (tmp_path / "r.tsv").read_text().splitlines()]
    assert header[:2] == ["slide_id", "problems"] and len(rows) == 5 and all(len(row) == len(header) for row in rows)
    problems = {row[0]: row[1] for row in rows}
    assert problems["good"] == "none" and "column mpp" in problems["no mpp"] and "0.6 vertically" in problems["uneven"]
    assert "does not exist" in problems["missing"] and "not a slide that OpenSlide can open" in problems["text"]
    assert str(tmp_path) not in (tmp_path / "r.tsv").read_text() and "secret" not in (tmp_path / "r.tsv").read_text()


def test_inspect_fails_without_keep_going(tmp_path: Path) -> None:
    outputs = ["--output", tmp_path / "a.json", "--thumbnail", tmp_path / "a.jpg"]
    done = run("inspect_slide.py", "--slide", tmp_path / "a.svs", "--slide-id", "A", *outputs, fails=True)
    assert done.stderr == "error: slide 'A' (file a.svs) does not exist: correct column path of slides.tsv\n"
    assert not list(tmp_path.iterdir())


def test_merge(slide: Path, tmp_path: Path) -> None:
    table = tmp_path / "slides.tsv"
    table.write_text(f"slide_id\tpath\tcase_id\tstain\nA\t{slide}\tcase 1\tHE\nB\t{slide}\tcase 2\tHE\n")
    for name in "AB":
        sets = ["--set", "train", 256, 2.0, tmp_path / f"{name}.parquet"]
        run("tile_slide.py", "--slide", slide, "--slide-id", name, *sets, "--overview", tmp_path / "o.jpg")
    inputs = [tmp_path / "B.parquet", tmp_path / "A.parquet"]
    more = ["--slides-output", tmp_path / "slides.parquet", "--slides", table]
    run("merge_manifest.py", "--output", tmp_path / "m.parquet", *more, *inputs)
    merged = read_tiles(tmp_path / "m.parquet")
    assert merged["slide_id"].unique().to_pylist() == ["A", "B"]
    rows = pq.read_table(tmp_path / "slides.parquet").to_pylist()
    assert [(row["slide_id"], row["use"], row["num_tiles"]) for row in rows] == [
        (name, "train,features", merged.num_rows // 2) for name in "AB"
    ]
    (tmp_path / "list.txt").write_text("\n".join(map(str, inputs[::-1])))
    run("merge_manifest.py", "--output", tmp_path / "n.parquet", f"@{tmp_path / 'list.txt'}")
    assert manifest_digest(tmp_path / "n.parquet") == manifest_digest(tmp_path / "m.parquet")
    done = run("merge_manifest.py", "--output", tmp_path / "n.parquet", *inputs, inputs[0], fails=True)
    assert "slide 'B' is in both" in done.stderr


@pytest.mark.parametrize(
    "script", ["make_demo_slides", "inspect_slide", "report_slides", "tile_slide", "merge_manifest"]
)
def test_help(script: str) -> None:
    assert "usage:" in run(f"{script}.py", "--help").stdout


# the overview


def test_tiles_and_outline_are_drawn_where_they_are(slide: Path) -> None:
    with Slide(slide, "S") as opened:
        tissue = detect_tissue(opened)
        grid = make_grid(opened, tissue, TileSet("t", 256, 2.0))
        with_tiles, without = draw_overview(opened, tissue, [grid]), draw_overview(opened, tissue, [])
        scale = 1600 / opened.width
    left, top = 16, 2 * 16 + 24
    picture = with_tiles[top : top + 1200, left : left + 1600].astype(int)
    plain = without[top : top + 1200, left : left + 1600].astype(int)
    changed = np.abs(picture - plain).max(axis=2) > 40
    kept, dropped = np.zeros((2, 1200, 1600), np.uint8)
    side = 512 * scale
    assert list(grid.dropped) == ["tissue"]
    for mask, places, thickness in (
        (kept, zip(grid.x, grid.y, strict=True), 1),
        (dropped, grid.dropped["tissue"], cv2.FILLED),
    ):
        for x, y in places:
            corners = [round(x * scale), round(y * scale)], [round(x * scale + side) - 1, round(y * scale + side) - 1]
            cv2.rectangle(mask, *corners, 1, thickness)
    assert (changed & (kept == 0) & (dropped == 0)).sum() == 0
    assert changed[kept > 0].mean() > 0.8 and changed[(dropped > 0) & (kept == 0)].mean() > 0.8
    assert (picture - plain)[(dropped > 0) & (kept == 0)].mean(axis=0).argmin() == 2  # orange: less blue
    green = (np.abs(plain - (0, 158, 115)).max(axis=2) < 12).nonzero()
    distance = np.hypot(green[1] - 700 * scale, green[0] - 700 * scale)
    ring = np.abs(distance - 500 * scale) < 25
    other = np.abs(np.hypot(green[1] - 1600 * scale, green[0] - 1000 * scale) - 300 * scale) < 25
    assert len(green[0]) > 3000 and (ring | other).all()


def test_every_set_and_reason_has_its_place(slide: Path) -> None:
    """Two sets are two pictures side by side; the reasons that there are stand in the legend."""
    with Slide(slide, "S") as opened:
        tissue = detect_tissue(opened)
        maps = quality_maps(opened, tissue)
        sets = [TileSet("a", 256, 2.0), TileSet("b", 112, 1.5)]
        plain = [make_grid(opened, tissue, one, maps) for one in sets]
        strict = [make_grid(opened, tissue, one, maps, QualityLimits(max_white=0.2)) for one in sets]
        strict = [drop_blurred(grid, np.arange(len(grid), dtype=float), 2.0) for grid in strict]
        first, second = draw_overview(opened, tissue, plain), draw_overview(opened, tissue, strict)
    assert set(strict[1].dropped) == {"tissue", "white", "focus"}
    assert first.shape == second.shape and first.shape[1] > 2 * 1100
    for colour, least in (((86, 200, 255), 500), ((250, 235, 40), 100)):
        found = [(np.abs(picture.astype(int) - colour).max(axis=2) < 25).sum() for picture in (first, second)]
        assert found[1] > found[0] + least


@pytest.mark.parametrize(
    ("width_mm", "bar_mm"), [(2.8, 0.5), (33.0, 5.0), (4.0, 1.0), (0.9, 0.2), (0.35, 0.05), (150.0, 20.0)]
)
def test_scale_bar(width_mm: float, bar_mm: float) -> None:
    assert scale_bar_mm(width_mm) == pytest.approx(bar_mm)


def test_dark_slides_are_brightened() -> None:
    dark = np.random.default_rng(0).integers(0, 30, (50, 60, 3), dtype=np.uint8)
    assert brightened(dark).mean() > 100 and brightened(np.zeros((5, 5, 3), np.uint8)).max() == 0


def test_real_slides(shared: Path, tmp_path: Path) -> None:
    for name, slide_id, train, features in (
        ("CMU-1-Small-Region.svs", "CMU", (6, 12), (40, 65)),
        ("test3-DAPI-2-(387).ndpi", "test3-DAPI-2-(387)", (8, 12), (55, 72)),
    ):
        outputs = [tmp_path / "t.parquet", tmp_path / "f.parquet"]
        sets = ["--set", "train", 512, 0.5, outputs[0], "--set", "features", 224, 0.5, outputs[1]]
        path = shared / "data" / "wsi" / name
        run("tile_slide.py", "--slide", path, "--slide-id", slide_id, *sets, "--overview", tmp_path / "o.jpg")
        for output, (least, most) in zip(outputs, (train, features), strict=True):
            assert least <= read_metadata(output)["num_tiles"] <= most
