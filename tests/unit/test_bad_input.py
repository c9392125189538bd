"""Bad slides: each ends in the right sentence or is skipped, in bounded time and memory, without half-written files."""

import json
import re
from pathlib import Path

import pytest

from bad_slides import BAD_SLIDES
from dinoscope.errors import ConfigError
from dinoscope.slides.manifest import read_metadata, read_tiles
from dinoscope.slides.table import read_slide_table
from limited import Ended, run_limited
from synthetic_slides import texture, write_lossless

SCRIPTS = Path(__file__).resolve().parents[2] / "workflow_scripts"


def tile(slide: Path, output: Path, *options: str) -> Ended:
    sets = ["--set", "t", 64, 2.0, output / "t.parquet", "--set", "u", 32, 2.0, output / "u.parquet"]
    return run_limited(
        SCRIPTS / "tile_slide.py",
        ["--slide", slide, "--slide-id", "S 1", *sets, "--overview", output / "o.jpg", *options],
    )


@pytest.fixture
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """The bad slide, and a folder for what is made of it."""
    (tmp_path / "in put").mkdir()
    return BAD_SLIDES[request.param].make(tmp_path / "in put"), tmp_path / "out"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()} if folder.exists() else set()


@pytest.mark.parametrize(("made", "name"), [(name, name) for name in BAD_SLIDES], indirect=["made"])
def test_tiling(made: tuple[Path, Path], name: str) -> None:
    path, output = made
    bad = BAD_SLIDES[name]
    before = names(path.parent) if path.parent != Path("/dev") else set()
    failed = tile(path, output, *bad.options)
    assert "Traceback" not in failed.said, failed.said
    if bad.words is None:
        assert failed.status == 0, failed.said
        assert read_tiles(output / "t.parquet").num_rows > 3
        return
    assert failed.status == 1, failed
    (line,) = [line for line in failed.said.splitlines() if line.startswith("error: ")]
    assert re.search(bad.words, line), line
    assert "'S 1'" in line and str(path.parent) not in line
    assert names(output) == set()  # nothing, and nothing half

    record = output / "skipped" / "S 1.json"
    skipped = tile(path, output, *bad.options, "--on-error", "skip", "--skip-record", str(record))
    assert skipped.status == 0 and "Traceback" not in skipped.said, skipped.said
    assert names(output) == {"t.parquet", "u.parquet", "o.jpg", "S 1.json"}
    assert read_tiles(output / "t.parquet").num_rows == 0
    reason = json.loads(record.read_text())["reason"]
    assert re.search(bad.words, reason) and read_metadata(output / "u.parquet")["error"] == reason
    if path.parent != Path("/dev"):
        assert names(path.parent) == before


@pytest.mark.parametrize(("made", "name"), [(name, name) for name in BAD_SLIDES], indirect=["made"])
def test_inspecting(made: tuple[Path, Path], name: str) -> None:
    path, output = made
    bad = BAD_SLIDES[name]
    outputs = ["--output", output / "s.json", "--thumbnail", output / "s.jpg", "--keep-going"]
    done = run_limited(SCRIPTS / "inspect_slide.py", ["--slide", path, "--slide-id", "S 1", *outputs, *bad.options])
    assert done.status == 0 and "Traceback" not in done.said, done
    assert names(output) == {"s.json", "s.jpg"}
    found = json.loads((output / "s.json").read_text())
    told = found.get("error", "; ".join(found.get("warnings", [])))
    if bad.words is None or bad.only_tiling:
        assert "error" not in found
    else:
        assert re.search(bad.words, told), told


def test_there_are_enough_of_them() -> None:
    assert len(BAD_SLIDES) >= 25


def test_two_files_of_one_name(tmp_path: Path) -> None:
    for name in ("a/S.svs", "b/S.svs"):
        write_lossless(tmp_path / name, texture(64, 64))
    with pytest.raises(ConfigError, match="would both be slide 'S'; rename one"):
        read_slide_table(tmp_path)
    (tmp_path / "slides.tsv").write_text("slide_id\tpath\nS\ta/S.svs\nS\tb/S.svs\n")
    with pytest.raises(ConfigError, match="line 3: slide_id 'S' stands in line 2 already"):
        read_slide_table(tmp_path / "slides.tsv")
