"""Biopsies of the pilot's demo: its tables say what is drawn, and there are enough of them to be judged."""

import csv
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

from dinoscope.errors import ConfigError
from dinoscope.evaluate.intervals import MIN_CASES
from dinoscope.slides.demo_biopsies import BIOPSY_PX, biopsy_kind, biopsy_name, biopsy_number, biopsy_site, draw_biopsy
from dinoscope.slides.reader import Slide

REPOSITORY = Path(__file__).parents[2]
DEMO = REPOSITORY / "config" / "demo_pilot"


def rows_of(name: str) -> list[dict[str, str]]:
    with open(DEMO / name) as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_tables_say_what_is_drawn() -> None:
    growth = {row["case_id"]: row["growth"] for row in rows_of("labels.tsv")}
    slides = rows_of("slides.tsv")
    assert [row["slide_id"] for row in slides] == [biopsy_name(number) for number in range(len(slides))]
    for number, row in enumerate(slides):
        assert row["path"] == f"results/demo_pilot/demo/{row['slide_id']}.tiff"
        assert (row["site"], growth[row["case_id"]]) == (biopsy_site(number), biopsy_kind(number))
        assert biopsy_number(row["slide_id"]) == number
    with pytest.raises(ConfigError, match="demo_he_1 is no demo biopsy: give demo_biopsy_000"):
        biopsy_number("demo_he_1")


def test_enough_of_both_kinds_from_both_sites_are_held_out() -> None:
    selection = yaml.safe_load((DEMO / "config.yaml").read_text())["evaluation"]["selection"]["cases"]
    growth = {row["case_id"]: row["growth"] for row in rows_of("labels.tsv")}
    held_out = [row for row in rows_of("slides.tsv") if "eval" in row["use"]]
    test = [row for row in held_out if row["case_id"] not in selection]
    assert min(Counter(growth[row["case_id"]] for row in test).values()) >= MIN_CASES
    assert len(set(Counter((growth[row["case_id"]], row["site"]) for row in test).values())) == 1
    assert {row["case_id"] for row in held_out} >= set(selection) and len(selection) >= 12


def test_they_are_the_same_for_the_same_seed_and_differ_in_kind() -> None:
    glands, nests, other = draw_biopsy(0), draw_biopsy(1), draw_biopsy(0, seed=1)
    assert glands.shape == (BIOPSY_PX, BIOPSY_PX, 3) and np.array_equal(glands, draw_biopsy(0))
    assert not np.array_equal(glands, other) and not np.array_equal(glands, nests)
    tissue = [(image.max(axis=2) < 235).mean() for image in (glands, nests, other)]
    assert all(0.25 < share < 0.75 for share in tissue)


def test_the_script_writes_slides(tmp_path: Path) -> None:
    script = REPOSITORY / "workflow_scripts" / "make_demo_slides.py"
    asked = ["--output-dir", tmp_path, "--processes", "1", "--biopsies", tmp_path / "demo_biopsy_005.tiff"]
    subprocess.run([sys.executable, script, *asked], check=True, capture_output=True)
    with Slide(tmp_path / "demo_biopsy_005.tiff") as slide:
        assert (slide.width, slide.height, slide.mpp, slide.level_downsamples) == (BIOPSY_PX, BIOPSY_PX, 0.5, (1, 2))
        read = slide.read_region(0, 0, 0, BIOPSY_PX, BIOPSY_PX).astype(int)
    assert np.abs(read - draw_biopsy(5)).mean() < 4  # what JPEG takes away
