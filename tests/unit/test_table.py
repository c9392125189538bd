import itertools
import random
from collections import Counter
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from dinoscope.errors import ConfigError
from dinoscope.slides.find import find_slides, slide_files
from dinoscope.slides.table import (
    COLUMNS,
    SlideRecord,
    check_labels,
    read_rows,
    read_slide_table,
    split_cases,
)

REPOSITORY = Path(__file__).parents[2]


def write_table(tmp_path, *rows, header="slide_id\tpath"):
    table = tmp_path / "slides.tsv"
    table.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return table


def record(slide_id, case_id=None, use="train,features", site=None, stain=None):
    return SlideRecord(
        slide_id, Path(f"{slide_id}.svs"), case_id or slide_id, frozenset(use.split(",")), site, None, stain
    )


def test_reads_every_column_and_fills_in_what_is_left_out(tmp_path):
    table = write_table(
        tmp_path,
        "A 1 (ü)\tslides/A [1].svs\tp1\teval, features\tBern\tGT450\tIHC:CD3\t0.25",
        "# a comment",
        "",
        "B\tb.ndpi",
        header="\t".join(COLUMNS),
    )
    first, second = read_slide_table(table)
    use = frozenset({"eval", "features"})
    assert first == SlideRecord("A 1 (ü)", Path("slides/A [1].svs"), "p1", use, "Bern", "GT450", "IHC:CD3", 0.25)
    assert second == SlideRecord("B", Path("b.ndpi"), "B", frozenset({"train", "features"}))


def test_reads_what_spreadsheets_write(tmp_path):
    table = tmp_path / "slides.tsv"
    table.write_bytes('\ufeffslide_id\tpath\tsite\r\nA\t"a, b.svs"\t\r\n'.encode())
    (only,) = read_slide_table(table)
    assert (only.slide_id, only.path, only.site) == ("A", Path("a, b.svs"), None)


BAD_ROWS = [
    ("A\ta.svs\t\t\t\t\t\tabc", "mpp 'abc' (slide A) is not a positive number"),
    ("A\ta.svs\t\t\t\t\t\t-0.5", "mpp '-0.5' (slide A) is not a positive number"),
    ("A\ta.svs\t\t\t\t\t\tnan", "mpp 'nan' (slide A) is not a positive number"),
    ("A\ta.svs\t\t\t\t\t\t0,25", "mpp '0,25' (slide A) is not a positive number"),
    ("A\ta.svs\t\ttrian", "use 'trian' (slide A) is unknown; did you mean train?"),
    ("A\ta.svs\t\ttrain,", "use '' (slide A) is unknown"),
    ("A\t\t", "path is empty (slide A)"),
    ("\ta.svs", "slide_id is empty"),
    (".A\ta.svs", "slide_id '.A' cannot name files"),
    ("-A\ta.svs", "slide_id '-A' cannot name files"),
    ("A/B\ta.svs", "slide_id 'A/B' cannot name files"),
    ("A{x}\ta.svs", "slide_id 'A{x}' cannot name files"),
]


@pytest.mark.parametrize(("row", "sentence"), BAD_ROWS)
def test_a_bad_row_is_named_with_its_line(tmp_path, row, sentence):
    table = write_table(tmp_path, "fine\tf.svs", row, header="\t".join(COLUMNS))
    with pytest.raises(ConfigError) as error:
        read_slide_table(table)
    assert f"{table} line 3: " in str(error.value)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_schema_and_code_agree_on_rows(tmp_path):
    schema = yaml.safe_load((REPOSITORY / "config/schemas/slides.schema.yaml").read_text(encoding="utf-8"))
    assert tuple(schema["properties"]) == COLUMNS
    validator = Draft202012Validator(schema)
    good = ["A b (1)\ta.svs\tp\ttrain , features\tx\ty\tHE\t1e-1", "ü[2]\tb.svs", "x\tc.svs\t\tfeatures\t\t\t\t.25"]
    for row in good:
        table = write_table(tmp_path, row, header="\t".join(COLUMNS))
        assert len(read_slide_table(table)) == 1
        assert [*validator.iter_errors(read_rows(table)[1][0][1])] == []
    for row, _ in BAD_ROWS:
        table = write_table(tmp_path, row, header="\t".join(COLUMNS))
        assert not validator.is_valid(read_rows(table)[1][0][1]), row
    assert not validator.is_valid({"slide_id": "A", "path": "a.svs", "label": "tumour"})


def test_all_bad_rows_are_reported_in_one_pass(tmp_path):
    table = write_table(tmp_path, *(f"s{i}\tp\t{i - 10}" for i in range(25)), header="slide_id\tpath\tmpp")
    with pytest.raises(ConfigError) as error:
        read_slide_table(table)
    lines = str(error.value).splitlines()
    assert len(lines) == 11
    assert lines[-1] == "… and 1 more"


def test_duplicate_slide_ids_name_both_lines(tmp_path):
    table = write_table(tmp_path, "A\ta.svs", "B\tb.svs", "A\tc.svs")
    with pytest.raises(ConfigError, match=r"line 4: slide_id 'A' stands in line 2 already"):
        read_slide_table(table)


def test_a_case_in_train_and_eval_is_refused(tmp_path):
    table = write_table(tmp_path, "A\ta.svs\tp1\ttrain", "B\tb.svs\tp1\teval", header="slide_id\tpath\tcase_id\tuse")
    with pytest.raises(ConfigError, match=r"case p1 is in both train \(slide A\) and eval \(slide B\)"):
        read_slide_table(table)


@pytest.mark.parametrize(
    ("header", "sentence"),
    [
        ("slide_id\tpath\tlabel", "unknown column 'label'; labels live in config/labels.tsv"),
        ("slide_id\tpath\tscaner", "unknown column 'scaner'; did you mean scanner?"),
        ("slide_id\tfile", "has no column path"),
        ("slide_id,path", "columns must be separated by tabs"),
        ("slide_id\tpath\tpath", "column 'path' stands twice"),
    ],
)
def test_a_bad_header_is_explained(tmp_path, header, sentence):
    with pytest.raises(ConfigError) as error:
        read_slide_table(write_table(tmp_path, "A\ta.svs", header=header))
    assert sentence in str(error.value)


def test_tables_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        read_slide_table(tmp_path / "no.tsv")
    with pytest.raises(ConfigError, match="lists no slides"):
        read_slide_table(write_table(tmp_path))
    with pytest.raises(ConfigError, match="is empty"):
        read_slide_table(write_table(tmp_path, header=""))
    with pytest.raises(ConfigError, match="has 3 cells, but there are 2 columns"):
        read_slide_table(write_table(tmp_path, "A\ta.svs\tmore"))
    binary = tmp_path / "slide.tsv"
    binary.write_bytes(b"II*\x00\xff\xfe\x80")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        read_slide_table(binary)
    slide = tmp_path / "slide.svs"
    slide.touch()
    with pytest.raises(ConfigError, match="is a slide; give a table"):
        read_slide_table(slide)


@pytest.fixture
def collection(tmp_path):
    """A folder as scanners and people leave it: each kind of slide once, and much that is none."""
    root = tmp_path / "slides"
    names = ["b one.svs", "deep/er/c [1].ndpi", "deep/m.mrxs", "deep/m/Data0.dat", "deep/m/Slidedat.ini", "notes.txt"]
    names += ["dicom study/1.dcm", "dicom study/2.dcm", ".hidden/x.svs", ".y.svs", "thumb.jpg", "h.vms", "h(1,0).jpg"]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "h.vms").write_text("ImageFile(1,0)=h(1,0).jpg\n")
    (root / "deep" / "loop").symlink_to(root, target_is_directory=True)
    return root


def test_a_folder_lists_each_slide_once(collection):
    records = {record.slide_id: record.path.relative_to(collection) for record in read_slide_table(collection)}
    assert records == {
        "b one": Path("b one.svs"),
        "c [1]": Path("deep/er/c [1].ndpi"),
        "m": Path("deep/m.mrxs"),
        "dicom study": Path("dicom study"),
        "h": Path("h.vms"),
    }


def test_a_glob_lists_each_slide_once(collection):
    assert {path.name for path in find_slides(f"{collection}/*")} == {"b one.svs", "dicom study", "h.vms"}
    assert [path.name for path in find_slides(f"{collection}/*/*.dcm")] == ["dicom study"]
    assert {path.name for path in find_slides(f"{collection}/deep/*")} == {"m.mrxs"}


def test_slides_of_many_files(collection):
    def names(slide):
        return [path.name for path in slide_files(collection / slide)]

    assert names("deep/m.mrxs") == ["Data0.dat", "Slidedat.ini"]
    assert names("dicom study") == ["1.dcm", "2.dcm"]
    assert names("h.vms") == ["h(1,0).jpg"]
    assert names("b one.svs") == []


def test_folders_that_cannot_be_a_table(collection, tmp_path):
    (collection / "deep" / "b one.tiff").touch()
    with pytest.raises(ConfigError, match="would both be slide 'b one'"):
        read_slide_table(collection)
    with pytest.raises(ConfigError, match=r"no slides in .*looked for files ending in .svs"):
        read_slide_table(f"{tmp_path}/*.svs")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "a{1}.svs").touch()
    with pytest.raises(ConfigError, match="name it in a slide table instead"):
        read_slide_table(tmp_path / "odd")


def test_labels_are_checked_against_the_slides(tmp_path):
    records = [record("A", "case_1"), record("B", "case_1")]
    labels = tmp_path / "labels.tsv"
    labels.write_text("case_id\tgrade\ncase_1\t3\n")
    check_labels(labels, records)
    for text, sentence in [
        ("case_id\tgrade\ncase_2\t3\n", "case_id 'case_2' is not in the slide table; did you mean case_1?"),
        ("slide_id\tgrade\nA\t3\nA\t2\n", "slide_id 'A' stands twice"),
        ("slide_id\tcase_id\tgrade\nA\tp1\t3\n", "must have one of the columns"),
        ("grade\n3\n", "must have one of the columns"),
        ("slide_id\nA\n", "has no column but slide_id"),
        ("slide_id\tgrade\n\t3\n", "line 2 has no slide_id"),
    ]:
        labels.write_text(text)
        with pytest.raises(ConfigError) as error:
            check_labels(labels, records)
        assert sentence in str(error.value)


def test_eval_slides_of_the_table_are_followed():
    records = [record("A"), record("B", use="eval"), record("C", use="features"), *(record(f"D{i}") for i in range(9))]
    split = split_cases(records, 0.5, seed=0)
    assert split == {"A": "train", "B": "eval"} | {f"D{i}": "train" for i in range(9)}


@pytest.mark.parametrize(("num_cases", "held_out"), [(1, 0), (2, 0), (3, 1), (5, 1), (10, 2), (20, 3), (100, 15)])
def test_the_held_out_share(num_cases, held_out):
    split = split_cases([record(f"s{i}") for i in range(num_cases)], 0.15, seed=3)
    assert Counter(split.values())["eval"] == held_out


def test_nothing_is_held_out_at_zero():
    assert set(split_cases([record(f"s{i}") for i in range(9)], 0.0, seed=0).values()) == {"train"}


def test_cases_stay_together_and_strata_give_their_share():
    rng = random.Random(0)
    cases = [
        (f"{site}-{stain}-{i}", site, stain)
        for (site, stain), number in zip(itertools.product("XY", ["HE", "IHC"]), [40, 20, 20, 20], strict=True)
        for i in range(number)
    ]
    records = [
        record(f"{case_id}-{k}", case_id, site=site, stain=stain)
        for case_id, site, stain in cases
        for k in range(rng.randint(1, 4))
    ]
    split = split_cases(records, 0.2, seed=1)
    use_of_case = {r.case_id: split[r.slide_id] for r in records}
    assert all(split[r.slide_id] == use_of_case[r.case_id] for r in records)
    held_out = Counter((site, stain) for case_id, site, stain in cases if use_of_case[case_id] == "eval")
    assert held_out == {("X", "HE"): 8, ("X", "IHC"): 4, ("Y", "HE"): 4, ("Y", "IHC"): 4}


def test_the_split_depends_on_the_seed_alone():
    records = [record(f"s{i}") for i in range(60)]
    split = split_cases(records, 0.15, seed=0)
    assert split == split_cases(records[::-1], 0.15, seed=0)
    assert split != split_cases(records, 0.15, seed=1)
    assert split == {k: v for k, v in split_cases([*records, record("f", use="features")], 0.15, 0).items() if k != "f"}


def test_a_case_that_comes_moves_few_others():
    records = [record(f"s{i}") for i in range(200)]
    before, after = split_cases(records, 0.15, 0), split_cases([*records, record("new")], 0.15, 0)
    assert sum(before[slide_id] != after[slide_id] for slide_id in before) <= 1


def test_every_case_is_held_out_by_some_seed_equally_often():
    records = [record(f"s{i}") for i in range(10)]
    counts = Counter(
        slide_id for seed in range(1000) for slide_id, use in split_cases(records, 0.1, seed).items() if use == "eval"
    )
    assert sum(counts.values()) == 1000
    assert all(60 <= counts[f"s{i}"] <= 145 for i in range(10))
