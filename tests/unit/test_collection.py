"""The preflight of a whole collection: all problems of all slides in one pass."""

import csv
import json
import time
from pathlib import Path
from typing import Any

import pytest

from dinoscope.slides.collection import REPORT_COLUMNS, report_rows, write_report
from dinoscope.slides.grid import TileSet
from dinoscope.slides.table import COLLECTION, SlideRecord

PINK = {"dark": 0.0, "bright": 0.6, "stained": 0.4, "brown": 0.0, "green": 0.0, "blue": 0.0, "purple": 0.3, "pink": 0.7}


def inspected(slide_id: str, mpp: float | None = 0.25, **changes: Any) -> dict[str, Any]:
    """What describe_slide says of a slide without problems, changed."""
    document = {
        "slide_id": slide_id,
        "width": 40_000,
        "height": 30_000,
        "mpp_x": mpp,
        "mpp_y": mpp,
        "mpp_source": None if mpp is None else "file",
        "vendor": "aperio",
        "scanner": "Aperio AT2",
        "num_levels": 2,
        "level_dimensions": [[40_000, 30_000], [10_000, 7_500]],
        "level_downsamples": [1.0, 4.0],
        "objective_power": 40.0,
        "has_icc_profile": True,
        "focal_planes": {"count": 1, "used": 1, "source": ""},
        "looks": PINK,
        "content": slide_id,
        "warnings": [],
    }
    return document | changes


def record(slide_id: str, **changes: Any) -> SlideRecord:
    given = {"case_id": slide_id, "use": frozenset({"train"})} | changes
    return SlideRecord(slide_id=slide_id, path=Path(f"{slide_id}.svs"), **given)


def problems(documents: list[dict], records: list[SlideRecord] = (), sets: list[TileSet] = ()) -> dict[str, str]:
    rows = report_rows(documents, records, sets)
    return {row["slide_id"]: row["problems"] for row in rows if row["problems"] != "none"}


def test_a_collection_without_problems_has_none() -> None:
    documents = [inspected(name) for name in "ABCD"]
    records = [record(name, site="X", stain="HE") for name in "ABCD"]
    assert problems(documents, records, [TileSet("t", 256, 0.5)]) == {}


def test_every_problem_of_every_slide_is_told_at_once() -> None:
    documents = [
        {"slide_id": "broken", "error": "slide 'broken' is empty"},
        inspected("one", None, warnings=["w1", "w2"], looks=PINK | {"brown": 0.9, "pink": 0.0, "purple": 0.0}),
        inspected("two", width=100, content="one"),
        *(inspected(f"ok{number}") for number in range(3)),
    ]
    documents[1]["content"] = "one"
    records = [record("one", stain="HE", case_id="c", site="X"), record("two", case_id="c", site="Y")]
    found = problems(documents, records, [TileSet("t", 512, 0.5)])
    assert set(found) == {"broken", "one", "two"}
    for words in ("w1", "w2", "4 other slides of Aperio AT2 at 40x have mpp 0.25", "those of two", "brown", "X and Y"):
        assert words in found["one"], words
    for words in ("those of one", "X and Y", "tile set t: a tile of 512 px at mpp 0.5 covers 1024 x 1024"):
        assert words in found["two"], words


def test_an_mpp_is_suggested_by_the_same_scanner_alone() -> None:
    documents = [inspected("A"), inspected("B", 0.251), inspected("none", None)]
    assert "2 other slides of Aperio AT2 at 40x have mpp 0.2505" in problems(documents)["none"]
    assert "if it is right" in problems(documents)["none"]  # and is not applied:
    assert next(row for row in report_rows(documents) if row["slide_id"] == "none")["mpp_x"] == ""
    assert problems([*documents[:2], inspected("none", None, scanner="Ventana DP 200")]) == {}
    assert problems([*documents[:2], inspected("none", None, objective_power=20.0)]) == {}
    assert problems([inspected("A"), inspected("B", 0.5), inspected("none", None)]) == {}  # they disagree
    table = [record("A", scanner="mine"), record("none", scanner="mine"), record("B", scanner="other")]
    assert "1 other slide of mine at 40x has mpp 0.25" in problems(documents, table)["none"]
    guessed = inspected("guess", 0.25, mpp_source="objective")
    assert "have mpp 0.2505" in problems([*documents[:2], guessed])["guess"]


def test_an_odd_mpp_is_told_by_three_others_that_agree() -> None:
    others = [inspected(name) for name in "ABC"]
    assert (
        "mpp 0.5 is odd: 3 other slides of Aperio AT2 at 40x have 0.25"
        in problems([*others, inspected("odd", 0.5)])["odd"]
    )
    assert problems([*others[:2], inspected("odd", 0.5)]) == {}
    assert problems([*others, inspected("near", 0.262)]) == {}


@pytest.mark.parametrize(
    ("tile_set", "words"),
    [
        (TileSet("fine", 256, 0.1), "tile set fine: tiles at mpp 0.1 would have to be enlarged 2.5 times"),
        (TileSet("large", 20_000, 0.5), "tile set large: a tile of 20000 px at mpp 0.5 covers 40000 x 40000"),
        (TileSet("good", 256, 0.5), None),
        (TileSet("fine", 256, 0.1, max_upsample=3), None),
    ],
)
def test_too_coarse_and_too_small(tile_set: TileSet, words: str | None) -> None:
    found = problems([inspected("A")], sets=[tile_set])
    assert (found == {}) if words is None else (words in found["A"])


def test_uneven_mpp_is_no_misfit_of_each_set() -> None:
    uneven = inspected("A", mpp_y=0.3, warnings=["mpp is uneven"])
    assert problems([uneven], sets=[TileSet("a", 256, 0.5), TileSet("b", 256, 1.0)]) == {"A": "mpp is uneven"}


def sites(counts: dict[str, dict[float, int]]) -> tuple[list[dict], list[SlideRecord]]:
    documents, records = [], []
    for site, mpps in counts.items():
        for mpp, count in mpps.items():
            for number in range(count):
                name = f"{site} {mpp} {number}"
                documents.append(inspected(name, mpp, objective_power=10 / mpp))
                records.append(record(name, site=site))
    return documents, records


@pytest.mark.parametrize(
    ("counts", "confounded"),
    [
        ({"X": {0.25: 10}, "Y": {0.5: 10}}, True),
        ({"X": {0.25: 10, 0.5: 1}, "Y": {0.5: 9, 0.25: 1}}, True),
        ({"X": {0.25: 5, 0.5: 5}, "Y": {0.25: 5, 0.5: 5}}, False),
        ({"X": {0.25: 10}, "Y": {0.252: 10}}, False),  # one mpp for all practical purposes
        ({"X": {0.25: 10, 0.5: 10}}, False),
        ({"X": {0.25: 2}, "Y": {0.5: 9}}, False),  # too few to tell
        ({"X": {0.25: 20}, "Y": {0.25: 5, 0.5: 2}}, False),
    ],
)
def test_confounded_sites(counts: dict[str, dict[float, int]], confounded: bool) -> None:
    rows = report_rows(*sites(counts))
    first = rows[0]
    assert (first["slide_id"] == COLLECTION) == confounded
    assert not confounded or ("site and mpp are confounded" in first["problems"] and "X 0.25" in first["problems"])
    assert len(rows) == sum(sum(mpps.values()) for mpps in counts.values()) + confounded


def test_a_case_with_contradicting_rows() -> None:
    records = [record("A", case_id="c", use=frozenset({"train"})), record("B", case_id="c", use=frozenset({"eval"}))]
    found = problems([inspected("A"), inspected("B")], records)
    assert all("case c is in both train and eval" in found[name] for name in "AB")


def test_the_table_is_one_that_a_person_can_read(tmp_path: Path) -> None:
    documents, records = sites({"X": {0.25: 3}, "Y": {0.5: 3}})
    documents[4]["warnings"] = ["a\ttab and\na line"]
    documents.append({"slide_id": "bad", "error": "cannot\nbe read"})
    paths = []
    for document in documents:
        paths.append(tmp_path / f"{document['slide_id']}.json")
        paths[-1].write_text(json.dumps(document))
    write_report(tmp_path / "r.tsv", paths, records)
    with open(tmp_path / "r.tsv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert tuple(rows[0]) == REPORT_COLUMNS and [row["slide_id"] for row in rows[:3]] == ["*", "Y 0.5 1", "bad"]
    assert rows[1]["problems"] == "a tab and a line" and rows[2]["problems"] == "cannot be read"
    assert rows[1]["site"] == "Y" and rows[1]["focal_planes"] == "1" and rows[1]["has_icc_profile"] == "yes"
    assert all(row["problems"] == "none" for row in rows[3:])


def test_ten_thousand_slides_take_seconds() -> None:
    documents = [inspected(f"s{number}", 0.25 if number % 7 else None) for number in range(10_000)]
    records = [record(f"s{number}", site=f"site {number % 5}", stain="HE") for number in range(10_000)]
    start = time.perf_counter()
    rows = report_rows(documents, records, [TileSet("a", 256, 0.5), TileSet("b", 512, 1.0)])
    assert time.perf_counter() - start < 20 and len(rows) == 10_000
