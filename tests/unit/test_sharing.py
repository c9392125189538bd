"""Many slides in one process: what is finished is taken over, and only when nothing that it was made of has changed."""

import contextlib
import errno
import importlib
import json
import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import h5py
import numpy as np
import pytest

from dinoscope.errors import SlideError
from dinoscope.features.gpus import take_free_gpu
from dinoscope.features.sharing import (
    MadeWith,
    SharedSlide,
    cards_beside,
    claim,
    files_digest,
    read_wanted,
    write_wanted,
)
from dinoscope.slides.manifest import tile_table, write_tiles
from dinoscope.slides.tiff_writer import encode_tiles, write_pyramid

SCRIPT = Path(__file__).parents[2] / "workflow_scripts" / "extract_features.py"
WIDTH, HEIGHT, TILE = 256, 128, 64
NUM_TILES = (WIDTH // TILE) * (HEIGHT // TILE)
ENCODER = """
    from pathlib import Path
    from torch import nn

    class Mean(nn.Module):
        image_px = 64

        def forward(self, images):
            with open("called.txt", "a") as file:
                file.write(f"{len(images)}\\n")
            return images.mean((2, 3))
"""


def write_manifest(path, slide_id, tile_px=TILE):
    y, x = np.mgrid[0:HEIGHT:tile_px, 0:WIDTH:tile_px]
    columns = {"x": x.ravel(), "y": y.ravel(), "level": 0, "read_px": tile_px, "tile_px": tile_px, "mpp": 0.5}
    document = {"slide_id": slide_id, "tile_set": "features", "tile_px": tile_px, "requested_mpp": 0.5}
    document |= {"stride_px": tile_px, "width": WIDTH, "height": HEIGHT, "mpp_x": 0.5, "mpp_y": 0.5}
    table = tile_table(slide_id, columns | {"footprint_px": tile_px, "tissue_fraction": 1.0})
    write_tiles(path, table, document)


@pytest.fixture
def slides(tmp_path):
    """Four slides with tiles, an encoder that counts its calls, and the list of wanted slides."""
    (tmp_path / "counting.py").write_text(textwrap.dedent(ENCODER))
    found = []
    for number, name in enumerate("ABCD"):
        image = np.random.default_rng(number).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        write_pyramid(tmp_path / f"{name}.tiff", [(WIDTH, HEIGHT, encode_tiles(image))], 0.5)
        write_manifest(tmp_path / "tiles" / f"{name}.parquet", name)
        found.append(SharedSlide(Path(f"{name}.tiff"), Path(f"tiles/{name}.parquet"), Path(f"features/m/{name}.h5")))
    want(tmp_path, found)
    return found


def want(folder, slides, to_come=()):
    rows = [("m", slide.slide, str(slide.tiles), str(slide.output)) for slide in slides]
    write_wanted(folder / "wanted", rows, to_come)


@pytest.fixture
def extract(tmp_path, monkeypatch, caplog):
    """Runs one job of a workflow in this process; gives what it logged, and how many tiles the encoder was given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(SCRIPT.parent)
    script = importlib.import_module(SCRIPT.stem)

    def run(slide, *options, at_most=4):
        calls = tmp_path / "called.txt"
        calls.write_text("")
        words = ["--weights", "counting.py:Mean", "--model-name", "m", "--dtype", "float32", "--slide", slide.slide]
        words += ["--tiles", slide.tiles, "--output", slide.output, "--slides-per-job", at_most]
        words += ["--wanted", "wanted/m/.wanted.json", *options]
        monkeypatch.setattr(sys, "argv", ["extract_features.py", *map(str, words)])
        caplog.clear()
        with caplog.at_level(logging.INFO):
            script.main()
        counts = [int(line) for line in calls.read_text().split()]
        return caplog.text, sum(counts) - counts.count(1)  # without the grey image that the encoder is measured with

    return run


def features(folder, slide):
    with h5py.File(folder / slide.output) as file:
        return file["features"][:]


def test_one_process_makes_the_features_of_many_slides_and_their_jobs_take_them_over(tmp_path, slides, extract):
    _, tiles = extract(slides[1], at_most=3)
    assert tiles == 3 * NUM_TILES
    assert [path.name for path in (tmp_path / "features/m").glob("*.h5")] == ["B.h5"]
    for slide in slides[2:]:
        said, tiles = extract(slide)
        assert tiles == 0
        assert f"{slide.output.stem}: finished before, taken over" in said
    _, tiles = extract(slides[0])
    assert tiles == NUM_TILES
    whole = [features(tmp_path, slide) for slide in slides]
    extract(SharedSlide(slides[2].slide, slides[2].tiles, Path("alone/C.h5")), at_most=1)
    np.testing.assert_array_equal(whole[2], h5py.File(tmp_path / "alone/C.h5")["features"][:])
    assert not np.array_equal(whole[1], whole[2])


def test_a_slide_alone_is_made_alone(tmp_path, slides, extract):
    want(tmp_path, slides[:1])
    left = tmp_path / slides[0].finished.with_name(".A.123.partial.h5")
    left.parent.mkdir(parents=True)
    left.write_text("of a process that was killed")
    assert extract(slides[0])[1] == NUM_TILES
    assert not (tmp_path / slides[1].finished).exists() and not left.exists()


def test_what_snakemake_deletes_is_not_made_again(tmp_path, slides, extract):
    extract(slides[0], at_most=1)
    before = features(tmp_path, slides[0])
    (tmp_path / slides[0].output).unlink()
    tiles_time = (tmp_path / slides[0].tiles).stat().st_mtime
    said, tiles = extract(slides[0], at_most=1)
    assert tiles == 0 and "taken over" in said
    np.testing.assert_array_equal(features(tmp_path, slides[0]), before)
    assert (tmp_path / slides[0].output).stat().st_mtime >= tiles_time


@pytest.mark.parametrize("changed", ["pooling", "tiles", "slide", "source", "version", "precision"])
def test_nothing_is_taken_over_after_a_change(tmp_path, slides, extract, changed):
    extract(slides[0], at_most=1)
    options = []
    if changed == "tiles":
        write_manifest(tmp_path / slides[0].tiles, "A", tile_px=128)
    elif changed == "slide":
        (tmp_path / slides[0].slide).write_bytes((tmp_path / slides[1].slide).read_bytes())
    elif changed == "source":
        source = (tmp_path / "counting.py").read_text()
        (tmp_path / "counting.py").write_text(source.replace("images.mean", "2 * images.mean"))
    elif changed == "version":
        options = ["--encoder-version", "2"]
    elif changed == "precision":
        options = ["--precision", "bfloat16"]
    else:
        options = ["--dtype", "float16"]
    before = features(tmp_path, slides[0])
    _, tiles = extract(slides[0], *options, at_most=1)
    assert tiles == (2 if changed == "tiles" else NUM_TILES)
    after = features(tmp_path, slides[0])
    assert changed in ("version", "precision") or after.shape != before.shape or not np.array_equal(after, before)
    assert extract(slides[0], *options, at_most=1)[1] == 0


def test_a_touched_encoder_is_loaded_and_its_features_kept(tmp_path, slides, extract):
    extract(slides[0], at_most=1)
    os.utime(tmp_path / "counting.py", (1e9, 1e9))
    said, tiles = extract(slides[0], at_most=1)
    assert tiles == 0 and "A: finished before with the same weights, kept" in said


def test_what_lies_beside_the_weights_is_looked_at(tmp_path, monkeypatch):
    weights = tmp_path / "teacher.pth"
    weights.write_text("")
    assert cards_beside(weights) == cards_beside(tmp_path / "gone.pth") == []
    (tmp_path / "model.json").write_text("{}")
    assert cards_beside(weights) == [tmp_path / "model.json"]
    assert cards_beside(tmp_path) == []  # all that is in a folder is looked at anyhow
    monkeypatch.syspath_prepend(SCRIPT.parent)
    script = importlib.import_module(SCRIPT.stem)
    needed = ["--weights", weights, "--model-name", "m", "--slide", "A", "--tiles", "A", "--output", "A"]
    monkeypatch.setattr(sys, "argv", ["extract_features.py", *map(str, needed)])
    before = script.made_with(script.parse_arguments())
    (tmp_path / "model.json").write_text('{"mean": [0, 0, 0]}')
    after = script.made_with(script.parse_arguments())
    assert before.weights != after.weights and before.settings == after.settings


def test_a_further_file_of_the_encoder_that_changes_makes_features_anew(tmp_path, slides, extract):
    (tmp_path / "table.txt").write_text("1")
    options = ["--encoder-files", "table.txt"]
    assert extract(slides[0], *options, at_most=1)[1] == NUM_TILES
    os.utime(tmp_path / "table.txt", (1e9, 1e9))
    assert extract(slides[0], *options, at_most=1)[1] == 0
    (tmp_path / "table.txt").write_text("2")
    assert extract(slides[0], *options, at_most=1)[1] == NUM_TILES


def test_another_slide_that_fails_is_left_to_its_own_job(tmp_path, slides, extract):
    (tmp_path / slides[1].slide).write_bytes(b"no slide")
    said, tiles = extract(slides[0])
    assert tiles == 3 * NUM_TILES
    assert "B: left to its own job, which will say more" in said
    with pytest.raises(SlideError, match="slide 'B'"):
        extract(slides[1])
    skipping = ["--on-error", "skip", "--skip-records", "skipped", "--attempt", "1"]
    extract(slides[1], *skipping)
    assert features(tmp_path, slides[1]).shape == (0, 3)
    assert json.loads((tmp_path / "skipped" / "B.json").read_text())["reason"]
    (tmp_path / slides[1].slide).write_bytes((tmp_path / slides[0].slide).read_bytes())
    _, tiles = extract(slides[1], *skipping)
    assert tiles == NUM_TILES and json.loads((tmp_path / "skipped" / "B.json").read_text())["reason"] is None


@pytest.mark.parametrize("damage", ["cut short", "overwritten"])
def test_a_damaged_finished_file_is_made_again(tmp_path, slides, extract, damage):
    extract(slides[0], at_most=1)
    before, output = features(tmp_path, slides[0]), tmp_path / slides[0].output
    assert output.samefile(tmp_path / slides[0].finished)
    if damage == "cut short":
        os.truncate(output, output.stat().st_size - 1)
    else:
        with h5py.File(output, "r+") as file:
            file["features"][0] = 7
    output.unlink()
    assert extract(slides[0], at_most=1)[1] == NUM_TILES
    np.testing.assert_array_equal(features(tmp_path, slides[0]), before)
    assert extract(slides[0], at_most=1)[1] == 0


def test_an_error_that_is_no_fault_of_another_slide_ends_the_taking_of_others(tmp_path, slides, extract):
    source = (tmp_path / "counting.py").read_text()
    failing = "def forward(self, images):\n        if images.std() and Path('features/m/A.h5').exists():\n"
    failing += "            raise RuntimeError('CUDA out of memory')\n"
    (tmp_path / "counting.py").write_text(source.replace("def forward(self, images):\n", failing))
    said, tiles = extract(slides[0])
    assert tiles == NUM_TILES and features(tmp_path, slides[0]).shape == (NUM_TILES, 3)
    assert "B and those after it: left to their own jobs, which will say more: RuntimeError: CUDA out of" in said
    assert "C" not in said.split("B and those")[1].replace("CUDA", "")


def test_without_locks_a_job_makes_its_own_slide_alone(tmp_path, slides, extract, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    assert extract(slides[0])[1] == NUM_TILES
    assert [path.name for path in (tmp_path / slides[0].finished).parent.glob("*.h5")] == ["A.h5"]
    for number, raised in ((errno.EOPNOTSUPP, None), (errno.EIO, OSError)):
        monkeypatch.setattr("fcntl.flock", lambda *_, number=number: (_ for _ in ()).throw(OSError(number, "?")))
        with pytest.raises(raised) if raised else contextlib.nullcontext(), claim(slides[0], wait=True) as is_ours:
            assert is_ours


def test_tiles_that_are_about_to_be_made_are_waited_for(tmp_path, slides, extract):
    want(tmp_path, slides, to_come=[str(slides[1].tiles), str(slides[2].tiles)])
    write_manifest(tmp_path / slides[2].tiles, "C", tile_px=128)
    (tmp_path / slides[3].tiles).unlink()
    later = (tmp_path / "wanted/m/.wanted.json").stat().st_mtime + 5
    os.utime(tmp_path / slides[2].tiles, (later, later))
    _, tiles = extract(slides[0])
    assert tiles == NUM_TILES + 2
    made = [at(tmp_path, slide).finished.exists() for slide in slides]
    assert made == [True, False, True, False]


def at(folder, slide):
    return SharedSlide(folder / slide.slide, folder / slide.tiles, folder / slide.output)


def test_claims_exclude_each_other_and_end_with_their_process(tmp_path, slides):
    slide = at(tmp_path, slides[0])
    with claim(slide, wait=False) as ours:
        assert ours
        code = (
            "import sys; from pathlib import Path; from dinoscope.features.sharing import SharedSlide, claim\n"
            f"slide = SharedSlide(Path('x'), Path('y'), Path({str(slide.output)!r}))\n"
            "with claim(slide, wait=False) as ours: print(ours)"
        )
        environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent)}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == "False\n"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_the_list_begins_after_ones_own_slide(tmp_path, slides):
    names = [slide.output.stem for slide in read_wanted(tmp_path / "wanted/m/.wanted.json", slides[1])]
    assert names == ["C", "D", "A"]
    assert read_wanted(tmp_path / "gone.json", slides[1]) == [] == read_wanted(None, slides[1])


def test_a_folder_of_weights_is_known_by_all_its_files(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    first = files_digest([tmp_path / "model"])
    (tmp_path / "model" / "model.safetensors").write_text("")
    assert files_digest([tmp_path / "model"]) != first
    assert MadeWith.of([tmp_path / "model"], pooling="cls") != MadeWith.of([tmp_path / "model"], pooling="mean")


def test_a_gpu_is_taken_once(tmp_path):
    names = ["GPU-a", "GPU-b"]
    assert [take_free_gpu(names, tmp_path) for _ in range(2)] == [0, 1]
    assert take_free_gpu(names, tmp_path) in (0, 1)  # more processes than GPUs share them
    code = "from pathlib import Path; from dinoscope.features.gpus import take_free_gpu\n"
    code += f"print(take_free_gpu(['GPU-c', 'GPU-a'], Path({str(tmp_path)!r})))"
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "0\n", done.stderr
