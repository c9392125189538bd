"""Slides of many files, odd names and storage that cannot be written to."""

import os
import shutil
from pathlib import Path

import pytest

from dinoscope.slides.find import find_slides, slide_files
from dinoscope.slides.members import UNSUPPORTED, unsupported_format
from dinoscope.slides.reader import Slide
from dinoscope.slides.table import read_slide_table
from limited import run_limited
from synthetic_slides import texture, write_lossless

SCRIPTS = Path(__file__).resolve().parents[2] / "workflow_scripts"
DICM = bytes(128) + b"DICM"

# Every slide with its further files.
SETS = {
    "a b [1].mrxs": ["a b [1]/Slidedat.ini", "a b [1]/Index.dat", "a b [1]/Data0000.dat"],
    "v ß.vms": ["v ß(0,0).jpg", "v ß_map.jpg"],
    "o.vsi": ["_o_/stack1/frame_t_0.ets", "_o_/stack10001/frame_t.ets"],
    "series (1)": ["series (1)/1.dcm", "series (1)/2.dcm"],
    "p.isyntax": [],
    "s.svs": [],
}


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    for key, members in SETS.items():
        for name in [*members, *([] if key == "series (1)" else [key])]:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(DICM if name.endswith(".dcm") else b"x")
    (tmp_path / "v ß.vms").write_text("[V]\nImageFile=v ß(0,0).jpg\nMapFile=v ß_map.jpg\nX=gone.jpg\n", "latin-1")
    for name in ("notes.txt", ".hidden.svs", "overview.jpg"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def test_a_folder_lists_each_slide_once(collection: Path) -> None:
    assert {path.relative_to(collection).as_posix() for path in find_slides(str(collection))} == set(SETS)
    assert len(list(find_slides(str(collection)))) == len(SETS)


def test_so_does_a_glob_that_matches_all_files(collection: Path) -> None:
    pattern = f"{collection}/**"
    assert {Path(path).relative_to(collection).as_posix() for path in find_slides(pattern)} == set(SETS)
    ids = [record.slide_id for record in read_slide_table(pattern)]
    assert sorted(ids) == sorted(["a b [1]", "v ß", "o", "series (1)", "p", "s"])


@pytest.mark.parametrize("key", SETS)
def test_all_files_of_a_slide_are_found(collection: Path, key: str) -> None:
    found = {path.relative_to(collection).as_posix() for path in slide_files(collection / key)}
    assert found == set(SETS[key])


@pytest.mark.parametrize("suffix", sorted(UNSUPPORTED))
def test_every_format_that_openslide_lacks_has_a_way_out(suffix: str) -> None:
    sentence = unsupported_format(Path(f"a{suffix.upper()}"))
    assert "convert it" in sentence and "slides.reader" in sentence
    assert unsupported_format(Path("a.svs")) is None


def test_staged_files_make_the_slide_again(shared: Path, tmp_path: Path) -> None:
    """What slide_files names, with the slide itself, is all that reading it takes."""
    source = shared / "data" / "wsi" / "dicom_camelyon"
    (tmp_path / "staged").mkdir()
    for file in slide_files(source):
        shutil.copy(file, tmp_path / "staged")
    with Slide(tmp_path / "staged", "S") as staged, Slide(source, "S") as original:
        assert (staged.thumbnail(300) == original.thumbnail(300)).all()
        assert [path.name for path in staged.files()] == [path.name for path in original.files()]


@pytest.mark.parametrize(
    "name", ["plain", "two words", "[1] (2) {3}", "Präparat_Ω_玻片", "a'b\"c$(d);e&f", "-x", "%41 #7"]
)
def test_names_of_all_kinds_on_storage_that_is_only_read(tmp_path: Path, name: str) -> None:
    folder = tmp_path / f"in {name}"
    slide = write_lossless(folder / f"{name}.tiff", texture(300, 400), 1.0)
    os.chmod(slide, 0o444)
    os.chmod(folder, 0o555)
    before = [(path.name, path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()]
    try:
        out = tmp_path / "out"
        sets = ["--set", "t", 64, 2.0, out / "t.parquet", "--overview", out / "o.jpg"]
        slide_id = name.replace('"', "").lstrip("-")
        tiled = run_limited(SCRIPTS / "tile_slide.py", ["--slide", slide, "--slide-id", slide_id, *sets])
        assert tiled.status == 0, tiled.said
        outputs = ["--output", out / "s.json", "--thumbnail", out / "s.jpg"]
        seen = run_limited(SCRIPTS / "inspect_slide.py", ["--slide", slide, "--slide-id", "S", *outputs])
        assert seen.status == 0, seen.said
        assert [(path.name, path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()] == before
    finally:
        os.chmod(folder, 0o755)
