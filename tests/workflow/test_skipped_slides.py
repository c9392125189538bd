"""slides.on_error under Snakemake: one bad slide costs no other; it is told, and tried again when that makes sense."""

import csv
import os
import shutil

import numpy as np
import pytest
import yaml

from dinoscope.features.writers import read_features
from dinoscope.slides.manifest import read_metadata
from snakemake_runs import NANO_RECIPE, SKIPPING_CONFIG, plan, snakemake
from synthetic_slides import write_lossless
from tiny_slides import write_slide

pytestmark = pytest.mark.long

BAD = {"cut", "unscaled", "gone", "link"}


def configure(folder, on_error, **changes):
    changed = SKIPPING_CONFIG | {"slides": SKIPPING_CONFIG["slides"] | {"on_error": on_error}} | changes
    (folder / "config" / "config.yaml").write_text(yaml.safe_dump(changed))


def failed(folder):
    with open(folder / "results" / "failed_slides.tsv", newline="", encoding="utf-8") as file:
        return {row["slide_id"]: row["reason"] for row in csv.DictReader(file, delimiter="\t")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A good slide, and four that cannot be used; everything but training was asked for."""
    folder = tmp_path_factory.mktemp("skipped [ß] slides")
    (folder / "config").mkdir()
    (folder / "root.yaml").write_text(NANO_RECIPE)
    names = {name: f"{name} [ß].tiff" for name in ("good", *sorted(BAD))}
    write_slide(folder / names["good"], seed=0)
    whole = write_slide(folder / "whole.tiff", seed=2).read_bytes()
    (folder / names["cut"]).write_bytes(whole[: len(whole) // 2])
    write_lossless(folder / names["unscaled"], np.full((600, 600, 3), 99, np.uint8), mpp=None)
    (folder / names["link"]).symlink_to(folder / "nowhere.tiff")
    uses = {"unscaled": "train", "link": "train"}  # features of some are enough
    rows = "".join(f"{slide_id}\t{name}\t{uses.get(slide_id, '')}\n" for slide_id, name in names.items())
    (folder / "slides.tsv").write_text(f"slide_id\tpath\tuse\n{rows}")
    configure(folder, "skip")
    done = snakemake(folder)
    folder.joinpath("said.txt").write_text(done.stdout + done.stderr)
    return folder


def test_the_others_are_done_and_the_bad_ones_told(folder):
    reasons = failed(folder)
    assert set(reasons) == BAD
    assert "it is damaged" in reasons["cut"] or "cut short" in reasons["cut"]
    assert "column mpp" in reasons["unscaled"] and "does not exist" in reasons["gone"]
    assert "is a link to a file that is gone" in reasons["link"]
    said = (folder / "said.txt").read_text()
    assert "note: 4 of 5 slides were skipped (tiles 4)" in said
    assert "note: 4 of 5 inspected slides have problems: see results/slides_report.tsv" in said
    page = (folder / "results" / "report.html").read_text(encoding="utf-8")
    assert "4 of 5 slides were skipped" in page
    assert all(reason.replace("'", "&#39;") in page for reason in reasons.values())
    results = folder / "results"
    for name in ("good", *BAD):
        for tile_set in ("train", "features"):
            metadata = read_metadata(results / "tiles" / tile_set / f"{name}.parquet")
            assert (metadata["num_tiles"] > 0) == (name == "good")
    for name in ("good", "cut", "gone"):
        features = read_features(results / "features" / "base" / f"{name}.h5").features
        assert (len(features) > 0) == (name == "good")
        assert (results / "pca" / "base" / f"{name}.png").is_file()


def test_nothing_is_left_to_do(folder):
    assert plan(folder)[0] == {}


def test_other_tiles_are_tiled(folder):
    sets = SKIPPING_CONFIG["tiling"]["sets"]
    configure(folder, "skip", tiling={"sets": sets | {"features": {"tile_px": 112, "mpp": 2.0}}})
    assert plan(folder, "tiles")[0] == {"tile_slide": 5, "tiles": 1}
    configure(folder, "skip")
    assert plan(folder, "tiles")[0] == {}


def test_a_repaired_file_is_tiled_even_with_an_old_date(folder):
    path = folder / "cut [ß].tiff"
    shutil.copyfile(folder / "whole.tiff", path)
    os.utime(path, (1e9, 1e9))
    jobs = plan(folder, "tiles")[0]
    assert jobs == {"tile_slide": 1, "tiles": 1}
    snakemake(folder, "tiles")
    assert "cut" not in failed(folder)
    assert read_metadata(folder / "results" / "tiles" / "features" / "cut.parquet")["num_tiles"] > 0
    assert plan(folder, "tiles")[0] == {}


def test_a_slide_that_comes_back_is_tiled(folder):
    shutil.copyfile(folder / "whole.tiff", folder / "gone [ß].tiff")
    assert plan(folder, "tiles")[0] == {"tile_slide": 1, "tiles": 1}
    snakemake(folder, "tiles")
    assert set(failed(folder)) == {"unscaled", "link"}


def test_switched_back_to_fail_only_the_skipped_ones_are_tried(folder):
    (folder / "link [ß].tiff").unlink()
    (folder / "link [ß].tiff").symlink_to(folder / "whole.tiff")
    configure(folder, "fail")
    assert plan(folder, "tiles")[0] == {"tile_slide": 2, "tiles": 1}
    done = snakemake(folder, "tiles", check=False)
    assert done.returncode == 1
    text = done.stdout + done.stderr
    assert "error: slide 'unscaled' (file unscaled [ß].tiff) does not say how many micrometres" in text
    assert not (folder / "results" / "tiles" / "features" / "unscaled.parquet").exists()
    assert read_metadata(folder / "results" / "tiles" / "features" / "link.parquet")["num_tiles"] > 0
    configure(folder, "skip")
    snakemake(folder, "tiles")
    assert set(failed(folder)) == {"unscaled"}
    assert plan(folder, "tiles")[0] == {}


def test_without_skipping_missing_slides_stop_what_needs_them_but_not_the_preflight(folder):
    (folder / "gone [ß].tiff").unlink()
    configure(folder, "fail")
    done = snakemake(folder, "tiles", "--dry-run", check=False)
    assert done.returncode == 1 and "slide gone: gone [ß].tiff does not exist" in done.stderr
    done = snakemake(folder, "inspect")
    assert "inspected slides have problems: see results/slides_report.tsv" in done.stdout + done.stderr
    with open(folder / "results" / "slides_report.tsv", newline="", encoding="utf-8") as file:
        problems = {row["slide_id"]: row["problems"] for row in csv.DictReader(file, delimiter="\t")}
    assert "does not exist" in problems["gone"] and problems["good"] == "none"
    assert "its pixels are those of" in problems["cut"]  # a copy of the same slide as link's
