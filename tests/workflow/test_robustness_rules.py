"""Robustness of slides in Snakemake itself: sampled tiles, changed copies, and verdicts beside the clean figure."""

import csv

import cv2
import numpy as np
import pytest
import yaml

from dinoscope.evaluate.samples import SampledTiles
from dinoscope.files import read_json
from dinoscope.plan_evaluation import SHIFTS
from dinoscope.slides.tiff_writer import encode_tiles, write_pyramid
from snakemake_runs import plan, snakemake

RECIPE = "student: {arch: vit_nano}\ncrops: {global_crops_size: 64, local_crops_size: 32}\n"
NUM, TILES = 6, 4
CONFIG = {
    "slides": {"source": "slides.tsv", "on_error": "skip"},
    "labels": "labels.tsv",
    "tissue": {"method": "none"},
    "tiling": {"sets": {"train": {"tile_px": 64, "mpp": 0.5}, "features": {"tile_px": 64, "mpp": 0.5}}},
    "runs": {"pretrain": {"recipe": "root.yaml"}},
    "features": {"models": ["base"], "pooling": "mean"},
    "viewer": {"enabled": False},
    "evaluation": {
        "attention": False, "repeats": 1, "folds": 2, "bootstraps": 200, "descriptive": False, "robustness": True,
        "robustness_tiles": TILES, "selection": {"fraction": 0},
    },
}  # fmt: skip


def write_stripes(path, seed, *, upright):
    """A slide of stripes of one of two directions, 3 x 3 tiles."""
    rng = np.random.default_rng(seed)
    across = np.repeat(rng.integers(40, 240, (24, 1, 3), dtype=np.uint8), 8, axis=0)
    image = np.ascontiguousarray(np.broadcast_to(across, (192, 192, 3)))
    image = np.ascontiguousarray(image.transpose(1, 0, 2)) if upright else image
    small = cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    write_pyramid(path, [(each.shape[1], each.shape[0], encode_tiles(each)) for each in (image, small)], 0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("robust")
    (folder / "config").mkdir()
    (folder / "root.yaml").write_text(RECIPE)
    rows, labels = ["slide_id\tpath\tcase_id\tuse\tsite"], ["case_id\tdirection"]
    for index in range(NUM + 1):
        write_stripes(folder / f"s{index}.tiff", index, upright=bool(index % 2))
        use = "eval,features" if index < NUM else "train"
        rows.append(f"s{index}\ts{index}.tiff\tC{index}\t{use}\t{'AB'[index % 2]}")
        labels.append(f"C{index}\t{'upright' if index % 2 else 'level'}")
    whole = (folder / "s0.tiff").read_bytes()
    (folder / "s0.tiff").write_bytes(whole[: len(whole) // 2])
    (folder / "slides.tsv").write_text("\n".join(rows) + "\n")
    (folder / "labels.tsv").write_text("\n".join(labels) + "\n")
    (folder / "config" / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


def test_samples_are_planned_where_robustness_is_asked_and_not_else(folder):
    jobs, _ = plan(folder, "evaluate")
    # base, which is a random initialisation, colour histogram and thumbnail: of one tile set
    assert (jobs["sample_tiles"], jobs["embed_samples"], jobs["measure_model"]) == (NUM, 3, 3)
    config = CONFIG | {"evaluation": CONFIG["evaluation"] | {"robustness": False}}
    (folder / "config" / "config.yaml").write_text(yaml.safe_dump(config))
    jobs, _ = plan(folder, "evaluate")
    (folder / "config" / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    assert (jobs["sample_tiles"], jobs["embed_samples"], jobs["measure_model"]) == (0, 0, 3)


@pytest.mark.long
def test_cases_are_asked_about_changed_copies_and_a_skipped_slide_stops_nothing(folder):
    snakemake(folder, "evaluate", timeout=600)
    results = folder / "results" / "evaluation"
    tiles = SampledTiles([results / "sampled" / "features" / f"s{index}.npz" for index in range(NUM)])
    assert tiles.slides == [f"s{index}" for index in range(1, NUM) for _ in range(TILES)]
    with open(results / "summary.tsv") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    models = {"base", "color-histogram", "thumbnail"}
    for measure in [f"linear~{kind}" for kind in ("unchanged", *SHIFTS)]:
        found = {row["model"]: row for row in rows if (row["measure"], row["score"]) == (measure, "balanced_accuracy")}
        assert set(found) == models and all(row["cases"] == str(NUM - 1) for row in found.values())
        assert all(row["clean"] and row["color_histogram"] for row in found.values())
    changes = [row for row in rows if row["score"] == "change" and row["model"] == "thumbnail"]
    assert len(changes) == len(SHIFTS) and {row["verdict"] for row in changes} == {"too few to judge"}
    kept = {row["model"]: row for row in rows if row["measure"] == "retained~stain"}
    assert set(kept) == models and all(0 <= float(row["value"]) <= 1 and row["chance"] for row in kept.values())
    (task,) = read_json(results / "summary.json")["tasks"]
    notes = "\n".join(task["notes"])
    assert "left out, since no tile was found or read: C0" in notes
    # each direction is from one site alone: refused with a reason, and nothing stops
    assert "robustness index: classes and sites do not cross" in notes and "site read-out: the site cannot" in notes
    assert not [row for row in rows if row["measure"] in ("site_readout", "robustness_index")]
    assert plan(folder, "evaluate")[0] == {}
