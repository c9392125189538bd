"""Who is measured: sets of cases, labels, tile sets, and what models have seen."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinoscope.errors import ConfigError
from dinoscope.evaluate.cohort import SEEN, make_cohort, seen
from dinoscope.evaluate.inputs import History, groups_seen
from dinoscope.evaluate.labels import labels_of_units, read_labels
from dinoscope.evaluate.tile_sets import list_masks, list_tiles
from dinoscope.evaluate.units import read_units, units_of_images, units_of_label, units_of_slides, write_units
from dinoscope.slides.table import SlideRecord, split_cases


def record(slide, case, use="train,features", site=None):
    return SlideRecord(slide, Path(f"{slide}.svs"), case, frozenset(use.split(",")), site)


def collection(num_train=6, num_eval=8):
    train = [record(f"t{i}", f"T{i}") for i in range(num_train)]
    held_out = [record(f"e{i}{part}", f"E{i}", "eval,features") for i in range(num_eval) for part in "ab"]
    return [*train, *held_out, record("f", "F", "features")]


def cohort_of(records, **changes):
    settings = {"fraction": 0.25, "seed": 0} | changes
    return make_cohort(records, split_cases(records, 0.15, 0), **settings)


def test_three_sets_share_no_case_and_all_slides_of_a_case_are_in_one():
    records = collection()
    cohort = cohort_of(records)
    sets = [set(cohort.cases(name)) for name in ("training", "selection", "test")]
    assert list(map(len, sets)) == [6, 2, 6]
    assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]
    for case in sets[1]:
        assert sum(cohort.case_of[slide] == case for slide in cohort.slides_of("selection")) == 2
    assert "f" not in cohort.slides


def test_the_selection_is_drawn_by_seed_or_given():
    records = collection()
    drawn = {tuple(cohort_of(records, seed=seed).cases("selection")) for seed in range(8)}
    assert len(drawn) > 1
    assert cohort_of(records, selection=["E7"]).cases("selection") == ["E7"]
    assert cohort_of(records, fraction=0).cases("selection") == []


def test_a_planted_leak_is_refused():
    records = collection()
    split = split_cases(records, 0.15, 0) | {"e0a": "train"}  # one patient on both sides
    with pytest.raises(ConfigError, match=r"case E0 is in both training \(slide e0a\) and evaluation \(slide e0b\)"):
        make_cohort(records, split, fraction=0.25, seed=0)
    with pytest.raises(ConfigError, match=r"names 'T1', which training sees"):
        cohort_of(records, selection=["T1"])
    with pytest.raises(ConfigError, match=r"names 'E77', which is no case .*; did you mean 'E7'|names 'E77'"):
        cohort_of(records, selection=["E77"])
    with pytest.raises(ConfigError, match="all 8 eval cases are for selection"):
        cohort_of(records, selection=[f"E{i}" for i in range(8)])


def test_what_training_has_seen_is_told_by_case():
    cohort = cohort_of(collection())
    # a run was trained on one slide of an eval case, before that was held out
    assert seen(cohort, ["E1", "E2"], ["t0", "e1b"]) == {"E1": "yes", "E2": "no"}
    assert seen(cohort, ["E1"], None) == {"E1": "unknown"}


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "labels.tsv"
    rows = ["slide_id\tgrade\tki67\tos_time\tos_event"]
    rows += [
        f"e{i}{part}\t{'low' if i < 4 else 'high'}\t{i + 0.5}\t{i + 1}\t{i % 2}" for i in range(8) for part in "ab"
    ]
    path.write_text("\n".join(rows) + "\n")
    return path


def test_labels_are_classes_numbers_and_survival_by_name(table):
    grade, ki67, survival = read_labels(table)
    assert (grade.name, grade.kind, grade.classes) == ("grade", "classes", ["high", "low"])
    assert (ki67.kind, ki67.values["e3a"]) == ("number", 3.5)
    assert (survival.name, survival.kind, survival.values["e3a"]) == ("os", "survival", (4.0, True))
    with pytest.raises(ConfigError, match=r"names 'grad', which is no label of .*grade"):
        read_labels(table, ["grad"])
    table.write_text("case_id\tos_time\nE1\t3\n")
    with pytest.raises(ConfigError, match=r"has a column os_time but no os_event"):
        read_labels(table)
    table.write_text("case_id\tos_time\tos_event\nE1\t3\tyes\n")
    with pytest.raises(ConfigError, match=r"line 2: os_event is 'yes'"):
        read_labels(table)


def test_units_are_cases_where_their_slides_agree_and_slides_where_not(table):
    cohort, records = cohort_of(collection()), {record.slide_id: record for record in collection()}
    grade, *_ = read_labels(table)
    units = units_of_label("label-grade", grade, cohort, records)
    # no more than the features that the workflow makes for it: those of the test slides
    assert {slide for unit in units.units for slide in unit.slides} == set(cohort.slides_of("test"))
    assert {unit.set for unit in units.units} == {"test"}
    assert len(units) == 6 and all(len(unit.slides) == 2 for unit in units.units)
    table.write_text(table.read_text().replace("e2b\tlow", "e2b\thigh"))
    grade, *_ = read_labels(table)
    found = labels_of_units(grade, cohort.slides_of("test"), cohort.case_of)
    assert all(len(unit.slides) == 1 for unit in found)


def write_image(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def tiles(tmp_path):
    for index in range(12):
        write_image(tmp_path / "tiles" / ("a" if index % 2 else "b") / f"p{index // 3}_{index}.png", index)
    return tmp_path / "tiles"


def test_tiles_of_a_parent_are_one_group(tiles, tmp_path):
    images = list_tiles("mine", tiles, r"(p\d)_")
    assert len(images) == 12 and set(images.groups) == {"p0", "p1", "p2", "p3"}
    rows = ["file,group", *(f"{file.rpartition('/')[2]},{file[2:4]}" for file in images.files)]
    (tmp_path / "groups.csv").write_text("\n".join(rows))
    assert list_tiles("mine", tiles, str(tmp_path / "groups.csv")).groups == [file[2:4] for file in images.files]
    with pytest.raises(ConfigError, match=r"matches nothing in a/p0_1\.png"):
        list_tiles("mine", tiles, "q[0-9]")
    (tmp_path / "groups.csv").write_text("\n".join(rows[:5]))
    with pytest.raises(ConfigError, match="has no group for"):
        list_tiles("mine", tiles, str(tmp_path / "groups.csv"))
    with pytest.raises(ConfigError, match="no mask of that name"):
        list_masks("mine", tiles, tiles / "a", None)


def test_a_group_is_seen_by_content_and_by_its_parents_name(tiles, tmp_path):
    images = list_tiles("mine", tiles, r"p\d")
    units = units_of_images("tiles-mine", images, 0, 0)
    write_units(tmp_path / "units.json", units)
    assert read_units(tmp_path / "units.json") == units
    assert "p0" not in (tmp_path / "units.json").read_text()  # no name of a file in results
    copied = tmp_path / "train" / "renamed.png"
    copied.parent.mkdir()
    copied.write_bytes((tiles / images.files[0]).read_bytes())
    history = History(folders=(copied.parent,))
    told = [SEEN[number] for number in groups_seen(units, history, {}, images)]
    assert [t == "yes" for t in told] == [group == images.groups[0] for group in images.groups]
    write_image(tmp_path / "train" / "p3_another_crop.png", 99)
    told = [SEEN[number] for number in groups_seen(units, history, {}, images, r"p\d")]
    assert [t == "yes" for t in told] == [group in (images.groups[0], "p3") for group in images.groups]
    assert set(groups_seen(units, History(is_known=False), {}, images)) == {SEEN.index("unknown")}


def test_what_training_saw_is_unknown_of_slides_that_left_the_table():
    cohort, records = cohort_of(collection()), {record.slide_id: record for record in collection()}
    units = units_of_slides("descriptive", ["e1a", "e2a"], cohort, records)
    told = {
        slides: [SEEN[number] for number in groups_seen(units, History(frozenset(slides)), cohort.case_of)]
        for slides in (("t0",), ("e1b", "t0"), ("e1b", "gone"))
    }
    assert list(told.values()) == [["no", "no"], ["yes", "no"], ["yes", "unknown"]]
