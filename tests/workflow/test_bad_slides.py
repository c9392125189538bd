"""Slides that cannot be used, under Snakemake: each named with its reason, the others done, nothing half written."""

import csv

import numpy as np
import pytest

from snakemake_runs import plan, snakemake
from synthetic_slides import write_lossless
from tiny_slides import write_slide

CONFIG = """
slides: {source: slides.tsv}
tiling: {sets: {train: {tile_px: 128, mpp: 1.0}, features: {tile_px: 112, mpp: 1.0}}}
runs: {pretrain: {recipe: root.yaml}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad slides")
    (folder / "config").mkdir()
    (folder / "config" / "config.yaml").write_text(CONFIG)
    (folder / "root.yaml").write_text("student: {arch: vit_nano}\ncrops: {global_crops_size: 96, local_crops_size: 48}")
    write_slide(folder / "good (1).tiff", seed=0)
    (folder / "empty.svs").touch()
    noise = np.random.default_rng(0).integers(0, 255, (600, 600, 3), np.uint8)
    write_lossless(folder / "unscaled.tiff", noise, mpp=None)
    names = ["good (1).tiff", "empty.svs", "unscaled.tiff"]
    rows = "".join(f"{name.rpartition('.')[0]}\t{name}\t\n" for name in names)
    (folder / "slides.tsv").write_text(f"slide_id\tpath\tmpp\n{rows}")
    return folder


def test_one_pass_finds_all_problems(folder):
    snakemake(folder, "inspect")
    with open(folder / "results" / "slides_report.tsv", newline="") as file:
        problems = {row["slide_id"]: row["problems"] for row in csv.DictReader(file, delimiter="\t")}
    assert "is empty (0 bytes)" in problems["empty"]
    assert "give it in column mpp of slides.tsv" in problems["unscaled"]
    assert problems["good (1)"] == "none"


def test_a_bad_slide_fails_and_the_others_are_done(folder):
    done = snakemake(folder, "tiles", check=False)
    assert done.returncode == 1
    text = done.stdout + done.stderr
    assert "error: slide 'empty' (file empty.svs) is empty (0 bytes): copy it again from the scanner" in text
    assert "error: slide 'unscaled' (file unscaled.tiff) does not say how many micrometres a pixel has" in text
    made = {path.name for path in (folder / "results" / "tiles").rglob("*") if path.is_file()}
    assert made == {"good (1).parquet", "good (1).jpg", "good (1).geojson"}


def test_what_the_sentence_asks_for_helps(folder):
    table = folder / "slides.tsv"
    rows = table.read_text().replace("unscaled.tiff\t", "unscaled.tiff\t0.5").splitlines()
    table.write_text("\n".join(row for row in rows if not row.startswith("empty")) + "\n")
    assert plan(folder, "tiles")[0] == {"tile_slide": 1, "tiles": 1}
    snakemake(folder, "tiles")
    assert (folder / "results" / "tiles" / "features" / "unscaled.parquet").is_file()


def test_all_files_of_a_slide_are_inputs(folder, tmp_path):
    """A changed member, not only the file that is opened, tiles the slide again; staging takes all of them."""
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.yaml").write_text(CONFIG)
    (tmp_path / "root.yaml").write_text((folder / "root.yaml").read_text())
    for name in ("m [1].mrxs", "m [1]/Slidedat.ini", "m [1]/Data0000.dat", "o.vsi", "_o_/stack1/frame_t.ets"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "slides.tsv").write_text("slide_id\tpath\nM\tm [1].mrxs\nO\to.vsi\n")
    text = plan(tmp_path, "tiles")[1]
    assert "input: m [1].mrxs, m [1]/Data0000.dat, m [1]/Slidedat.ini" in text
    assert "input: o.vsi, _o_/stack1/frame_t.ets" in text
