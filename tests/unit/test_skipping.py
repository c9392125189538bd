"""Slides that are skipped: what fails in a process of its own, what is written, what later stages make of it."""

import faulthandler
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dinoscope.data.tiles import SlideAccess, open_tiles
from dinoscope.errors import ConfigError, DinoscopeError, ManifestError, SlideError
from dinoscope.features.extract import Extractor, ExtractSettings, extract_slides
from dinoscope.features.read_ahead import load_tiles
from dinoscope.features.writers import read_features
from dinoscope.models.registry import ViTSettings
from dinoscope.models.vit import DinoVisionTransformer
from dinoscope.slides.grid import TileSet
from dinoscope.slides.manifest import merge_manifests, read_metadata, read_tiles
from dinoscope.slides.reader import Slide
from dinoscope.slides.skipped_tiles import write_skipped
from dinoscope.slides.skipping import Attempt, failure_of, files_signature, read_records, try_slide
from dinoscope.slides.summary import write_slide_summary
from dinoscope.slides.table import read_slide_table
from dinoscope.slides.tiff_writer import encode_tiles, write_pyramid
from dinoscope.slides.tiling import tile_slide
from dinoscope.visualize.pca import fit_basis
from dinoscope.visualize.pca_map import draw_map
from synthetic_slides import texture, write_lossless

SCRIPTS = Path(__file__).resolve().parents[2] / "workflow_scripts"


def raising(error: BaseException) -> None:
    raise error


# a process of its own


def test_success_and_failure_come_back_from_the_process() -> None:
    assert failure_of(lambda: None) is None
    assert failure_of(lambda: raising(SlideError("slide 'ß' is bad" * 20_000))) == "slide 'ß' is bad" * 20_000


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_a_crash_is_the_slides_doing(number: signal.Signals) -> None:
    assert number.name in failure_of(lambda: (faulthandler.disable(), os.kill(os.getpid(), number)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_an_end_from_outside_is_not(number: signal.Signals) -> None:
    with pytest.raises(SystemExit):
        failure_of(lambda: (signal.signal(signal.SIGINT, signal.SIG_DFL), os.kill(os.getpid(), number)))


def test_a_defect_of_ours_keeps_its_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        failure_of(lambda: raising(RuntimeError("our mistake")))
    assert ended.value.code == 1 and "RuntimeError: our mistake" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        failure_of(lambda: raising(ConfigError("no such set")))
    error = capfd.readouterr().err
    assert "error: no such set" in error and "Traceback" not in error


# attempts and their records


def test_records_are_written_where_there_is_something_to_say(tmp_path: Path) -> None:
    slide = tmp_path / "Doe.svs"
    slide.write_text("x")
    given_up: list[str] = []

    def attempt(work: object, on_error: str, number: int) -> None:
        record = tmp_path / "skipped" / "tiles" / "S.json"
        try_slide(work, given_up.append, Attempt(slide, "S", "tiles", on_error, number, record))

    bad = lambda: raising(SlideError(f"slide 'S' (file Doe.svs) is bad ({slide})"))  # noqa: E731
    attempt(lambda: None, "skip", 0)
    assert not list(read_records(tmp_path)) and not given_up
    with pytest.raises(SlideError):
        attempt(bad, "fail", 0)
    assert not list(read_records(tmp_path))
    attempt(bad, "skip", 0)
    (record,) = read_records(tmp_path)
    reason = "slide 'S' is bad (the file)"
    assert (record.attempt, record.reason, given_up) == (0, reason, [reason])
    assert record.signature == files_signature(slide)
    for on_error, number in (("skip", 0), ("fail", 1)):  # other settings, or another attempt
        attempt(bad, "skip", 0)
        attempt(lambda: None, on_error, number)
        (record,) = read_records(tmp_path)
        assert (record.attempt, record.reason) == (number, None)


def test_a_half_written_record_counts_as_none(tmp_path: Path) -> None:
    folder = tmp_path / "skipped" / "tiles"
    folder.mkdir(parents=True)
    (folder / "a.json").write_text('{"slide_id": "a"')
    (folder / "b.json").write_text('{"unknown": 1}')
    assert list(read_records(tmp_path)) == []


def test_a_record_that_cannot_be_written_is_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "skipped").write_text("a file where the folder should be")
    attempt = Attempt(tmp_path / "s.svs", "S", "tiles", "skip", 0, tmp_path / "skipped" / "tiles" / "S.json")
    with pytest.raises(DinoscopeError, match=r"S\.json cannot be written"):
        attempt.end("a reason")


def test_the_signature_is_of_all_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("a.mrxs", "a/Slidedat.ini", "a/Data.dat"):
        (tmp_path / name).write_text(name)
    found = [files_signature(tmp_path / "a.mrxs")]
    (tmp_path / "a" / "Data.dat").write_text("longer than before")
    found.append(files_signature(tmp_path / "a.mrxs"))
    os.utime(tmp_path / "a.mrxs", (1, 1))  # restored with its old date
    found.append(files_signature(tmp_path / "a.mrxs"))
    (tmp_path / "a" / "Data.dat").unlink()
    found.append(files_signature(tmp_path / "a.mrxs"))
    found.append(files_signature(tmp_path / "none.svs"))
    assert len(set(found)) == 5


# what a skipped slide leaves


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lossless(tmp_path_factory.mktemp("slides") / "good.tiff", texture(700, 900), 1.0, (1, 4))


@pytest.fixture
def folder(tmp_path: Path, good: Path) -> Path:
    """Manifests of a good slide A and of a skipped slide B."""
    tile_set = TileSet("t", 64, 2.0)
    with Slide(good, "A") as slide:
        tile_slide(slide, [(tile_set, tmp_path / "A.parquet")], "none")
    write_skipped("B", [(tile_set, tmp_path / "B.parquet")], "it is broken")
    return tmp_path


def test_manifests_of_skipped_slides_are_valid_and_empty(folder: Path) -> None:
    tiles, metadata = read_tiles(folder / "B.parquet"), read_metadata(folder / "B.parquet")
    assert tiles.num_rows == 0 and tiles.schema.equals(read_tiles(folder / "A.parquet").schema)
    assert (metadata["error"], metadata["width"], metadata["num_tiles"]) == ("it is broken", None, 0)
    assert load_tiles(folder / "B.parquet").skipped == "it is broken"
    assert load_tiles(folder / "A.parquet").skipped is None


def test_merging_leaves_them_out(folder: Path) -> None:
    alone = merge_manifests([folder / "A.parquet"], folder / "alone.parquet")
    assert merge_manifests([folder / "B.parquet", folder / "A.parquet"], folder / "all.parquet") == alone
    with pytest.raises(ManifestError, match="none of the 1 slides has a tile"):
        merge_manifests([folder / "B.parquet"], folder / "none.parquet")


def test_the_table_of_slides_has_them(folder: Path, good: Path) -> None:
    import pyarrow.parquet as pq

    (folder / "slides.tsv").write_text(f"slide_id\tpath\tsite\nA\t{good}\tX\nB\tgone.svs\tX\n")
    records = read_slide_table(folder / "slides.tsv")
    write_slide_summary(folder / "slides.parquet", [folder / "A.parquet", folder / "B.parquet"], records)
    first, second = pq.read_table(folder / "slides.parquet").to_pylist()
    assert first["num_tiles"] > 10 and first["mpp"] == 1.0
    assert (second["slide_id"], second["num_tiles"], second["mpp"], second["width"]) == ("B", 0, None, None)


def extractor() -> Extractor:
    torch.manual_seed(0)
    model = DinoVisionTransformer(ViTSettings(embed_dim=48, depth=1, num_heads=3, ffn_hidden=96))
    model.init_weights()
    model.mean, model.std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    settings = ExtractSettings(dtype="float32", batch_size=8, workers=0)
    return Extractor(model.eval(), "m", "0" * 64, settings, torch.device("cpu"))


def test_features_and_maps_of_skipped_slides(folder: Path, good: Path) -> None:
    jobs = [(good, folder / "A.parquet", folder / "A.h5"), (folder / "gone", folder / "B.parquet", folder / "B.h5")]
    extract_slides(extractor(), jobs)
    files = [read_features(job[2]) for job in jobs]
    assert len(files[0].features) > 10 and files[1].features.shape == (0, 48) and files[1].coords.shape == (0, 2)
    basis = fit_basis([job[2] for job in jobs])
    assert basis.info["num_slides"] == 2 and basis.info["num_tiles"] == len(files[0].features)
    draw_map(folder / "B.png", files[1], basis, np.full((384, 512, 3), 225, np.uint8))
    assert (folder / "B.png").stat().st_size > 1000


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A slide whose lower level is whole, so that it is tiled, and whose upper one is damaged."""
    image = texture(1024, 1024)
    path = tmp_path / "Doe Jane.tiff"
    levels = [(1024, 1024, encode_tiles(image)), (256, 256, encode_tiles(image[::4, ::4]))]
    write_pyramid(path, levels, 1.0)
    content = bytearray(path.read_bytes())
    content[3000:90_000] = bytes(87_000)
    path.write_bytes(content)
    return path


def test_damage_found_while_extracting_is_skipped_too(tmp_path: Path, damaged: Path, good: Path) -> None:
    jobs = []
    for name, path in (("A", good), ("D", damaged)):
        with Slide(path, name) as slide:
            tile_slide(slide, [(TileSet("t", 64, 1.0), tmp_path / f"{name}.parquet")], "none")
        jobs.append((path, tmp_path / f"{name}.parquet", tmp_path / f"{name}.h5"))
    with pytest.raises(SlideError, match="damaged or cut short"):
        extract_slides(extractor(), jobs[1:])
    assert not (tmp_path / "D.h5").exists()
    records = tmp_path / "skipped" / "features_m"
    attempts = [Attempt(job[0], job[2].stem, "features_m", "skip", 0, records / f"{job[2].stem}.json") for job in jobs]
    extract_slides(extractor(), jobs, attempts=attempts)
    assert len(read_features(jobs[0][2]).features) > 10 and len(read_features(jobs[1][2]).features) == 0
    (record,) = read_records(tmp_path)
    assert (record.slide_id, record.stage) == ("D", "features_m") and "cannot be read at x" in record.reason
    assert "Doe" not in json.dumps(record.__dict__)


def test_training_takes_other_tiles_of_the_stain(tmp_path: Path, damaged: Path, good: Path) -> None:
    for name, path in (("A", good), ("D", damaged), ("E", good)):
        with Slide(path, name) as slide:
            tile_slide(slide, [(TileSet("t", 64, 1.0), tmp_path / f"{name}.parquet")], "none")
    merge_manifests([tmp_path / f"{name}.parquet" for name in "ADE"], tmp_path / "all.parquet")
    table = f"slide_id\tpath\tstain\nA\t{good}\tHE\nD\t{damaged}\tHE\nE\t{good}\tPap\n"
    (tmp_path / "slides.tsv").write_text(table)
    access = SlideAccess(on_error="skip", records=tmp_path / "skipped", run="pretrain")
    skipping = open_tiles(tmp_path / "all.parquet", str(tmp_path / "slides.tsv"), access=access)
    failing = open_tiles(tmp_path / "all.parquet", str(tmp_path / "slides.tsv"))
    bad = []
    for index in range(len(failing)):
        try:
            image, name = failing.read(index)
        except SlideError as error:
            assert "slide 'D' cannot be read" in str(error) and "Doe" not in str(error)
            bad.append(index)
        else:
            again, same = skipping.read(index)
            assert np.array_equal(image, again) and name == same
    assert bad and {failing.tiles[index].kind.slide_id for index in bad} == {"D"}
    taken = [skipping.read(index) for index in bad]
    again = open_tiles(tmp_path / "all.parquet", str(tmp_path / "slides.tsv"), access=access)
    for index, (image, name) in zip(bad, taken, strict=True):
        assert name.startswith("A@")  # of the same stain
        assert np.array_equal(again.read(index)[0], image)
    assert len({name for _, name in taken}) > 1
    (record,) = read_records(tmp_path)
    assert (record.slide_id, record.stage) == ("D", "training_pretrain") and "stand in" in record.reason


# the script


def test_the_script_skips_and_later_succeeds(tmp_path: Path, good: Path) -> None:
    slide, record = tmp_path / "Doe.tiff", tmp_path / "skipped" / "tiles" / "S.json"
    slide.write_bytes(good.read_bytes()[:5000])

    def tile(on_error: str, number: int) -> subprocess.CompletedProcess[str]:
        outputs = ["--set", "t", 64, 2.0, tmp_path / "S.parquet", "--overview", tmp_path / "S.jpg"]
        how = ["--on-error", on_error, "--attempt", number, "--skip-record", record]
        command = [SCRIPTS / "tile_slide.py", "--slide", slide, "--slide-id", "S", "--tissue-method", "none"]
        words = [str(word) for word in [*command, *outputs, *how]]
        return subprocess.run([sys.executable, "-W", "error", *words], capture_output=True, text=True, timeout=60)

    failed = tile("fail", 0)
    assert failed.returncode == 1 and not (tmp_path / "S.parquet").exists() and not record.exists()
    skipped = tile("skip", 0)
    assert skipped.returncode == 0 and "slide 'S' is skipped: slide 'S' is not a slide that" in skipped.stderr
    assert read_metadata(tmp_path / "S.parquet")["num_tiles"] == 0 and (tmp_path / "S.jpg").is_file()
    assert "Doe" not in record.read_text() and json.loads(record.read_text())["attempt"] == 0
    slide.write_bytes(good.read_bytes())
    assert tile("skip", 1).returncode == 0
    assert read_metadata(tmp_path / "S.parquet")["num_tiles"] > 10
    assert json.loads(record.read_text()) | {"signature": ""} == {
        "slide_id": "S",
        "stage": "tiles",
        "attempt": 1,
        "reason": None,
        "signature": "",
    }
