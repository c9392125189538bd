"""Extraction under Snakemake: many slides a process, other encoders, kills, and what a change redoes."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import h5py
import numpy as np
import pytest
import yaml

from dinoscope.features.writers import read_features
from snakemake_runs import COMMAND, NANO_RECIPE, SKIPPING_CONFIG, plan, snakemake
from tiny_slides import write_slide

pytestmark = pytest.mark.long
NAMES = ("a", "b", "c", "d")
ENCODER = """
    import os, time
    from torch import nn

    class Mean(nn.Module):
        image_px, scale = 32, 1.0

        def forward(self, images):
            with open("called.txt", "a") as file:
                file.write(f"{os.getpid()} {len(images)}\\n")
            time.sleep(float(os.environ.get("SLOW", 0)))
            return self.scale * images.mean((2, 3))
"""


@pytest.fixture
def folder(tmp_path):
    """Four slides and an encoder of one's own that says when it is called; nothing is trained."""
    (tmp_path / "config").mkdir()
    (tmp_path / "own.py").write_text(textwrap.dedent(ENCODER))
    (tmp_path / "root.yaml").write_text(NANO_RECIPE)
    for seed, name in enumerate(NAMES):
        write_slide(tmp_path / f"{name}.tiff", seed=seed)
    write_table(tmp_path, NAMES)
    features = {"models": ["own"], "encoders": {"own": {"source": "own.py:Mean"}}, "dtype": "float32"}
    configure(tmp_path, features=features | {"batch_size": 4})
    return tmp_path


def write_table(folder, names):
    rows = "".join(f"{name}\t{name}.tiff\t{'train,' if name in NAMES else ''}features\n" for name in names)
    (folder / "slides.tsv").write_text(f"slide_id\tpath\tuse\n{rows}")


def configure(folder, **changes):
    slides = {"slides": {"source": "slides.tsv", "on_error": "skip"}}
    (folder / "config" / "config.yaml").write_text(yaml.safe_dump(SKIPPING_CONFIG | slides | changes))


def change_features(folder, **changes):
    path = folder / "config" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["features"] |= changes
    path.write_text(yaml.safe_dump(config))


def calls(folder):
    """Process -> tiles that the encoder was given, without the grey image."""
    counts = {}
    path = folder / "called.txt"
    for line in path.read_text().splitlines() if path.exists() else []:
        process, count = map(int, line.split())
        counts[process] = counts.get(process, -1) + count
    path.unlink(missing_ok=True)
    return list(counts.values())


def num_tiles(folder, names=NAMES):
    return sum(len(read_features(folder / f"results/features/own/{name}.h5").features) for name in names)


def test_one_process_for_all_slides_and_one_slide_alone(folder):
    snakemake(folder, "results/features/own/c.h5")
    assert calls(folder) == [num_tiles(folder, ["c"])]
    assert not list((folder / "results/features/own/.finished").glob("[abd].h5"))
    snakemake(folder, "features")
    assert calls(folder) == [num_tiles(folder, ["a", "b", "d"])]
    write_slide(folder / "e.tiff", seed=9)
    write_table(folder, [*NAMES, "e"])
    jobs, _ = plan(folder, "features")
    assert jobs == {"tile_slide": 1, "extract_features": 1, "features": 1}
    change_features(folder, slides_per_job=2, batch_size=3, workers=0, compile=False)
    assert plan(folder, "features")[0] == jobs
    snakemake(folder, "features")
    assert calls(folder) == [num_tiles(folder, ["e"])]


def test_a_changed_encoder_redoes_its_features(folder):
    snakemake(folder, "results/features/own/a.h5")
    before = read_features(folder / "results/features/own/a.h5")
    source = (folder / "own.py").read_text()
    (folder / "own.py").write_text(source.replace("scale = 32, 1.0", "scale = 32, 2.0"))
    assert plan(folder, "results/features/own/a.h5")[0] == {"extract_features": 1}
    snakemake(folder, "results/features/own/a.h5")
    after = read_features(folder / "results/features/own/a.h5")
    np.testing.assert_allclose(after.features, 2 * before.features, rtol=1e-6)
    assert after.info.weights_sha256 != before.info.weights_sha256
    encoder = {"own": {"source": "own.py:Mean", "version": "2"}}
    change_features(folder, encoders=encoder)
    assert plan(folder, "results/features/own/a.h5")[0] == {"extract_features": 1}


def test_after_a_kill_only_unfinished_slides_are_made(folder):
    snakemake(folder, "tiles")
    process = subprocess.Popen(
        [*COMMAND, "features", "--jobs", "1"], cwd=folder, env=os.environ | {"SLOW": "0.3"}, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    finished = folder / "results/features/own/.finished"
    try:
        wait_for(lambda: len(list(finished.glob("[abcd].json"))) == 2)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    receipts = {path.stem for path in finished.glob("[abcd].json")}
    assert len(receipts) == 2
    assert all(not h5_is_cut(path) for path in (folder / "results/features/own").glob("*.h5"))
    calls(folder)
    subprocess.run([sys.executable, "-m", "snakemake", "-s", COMMAND[4], "--unlock", "--cores", "1"], cwd=folder,
                   check=True, capture_output=True)  # fmt: skip
    snakemake(folder, "features")
    assert sum(calls(folder)) == num_tiles(folder, [name for name in NAMES if name not in receipts])
    assert plan(folder, "features")[0] == {}


def wait_for(condition):
    limit = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


def h5_is_cut(path):
    try:
        with h5py.File(path) as file:
            return "features" not in file
    except OSError:
        return True


def test_a_bad_slide_costs_no_other_and_exports_follow(folder):
    whole = (folder / "b.tiff").read_bytes()
    snakemake(folder, "tiles")
    (folder / "b.tiff").write_bytes(whole[: len(whole) // 3])
    os.utime(folder / "b.tiff", (1e9, 1e9))  # its tiles stay as they are
    change_features(folder, export=["clam", "parquet"])
    snakemake(folder, "features", "export_features")
    assert num_tiles(folder, ["b"]) == 0 and num_tiles(folder, ["a", "c", "d"]) > 0
    assert "b" in (folder / "results/failed_slides.tsv").read_text()
    exported = sorted(path.name for path in (folder / "results/exports/clam/own").rglob("*.*"))
    assert exported == sorted(f"{name}.{ending}" for name in NAMES for ending in ("pt", "h5"))
    assert len(list((folder / "results/exports/parquet/own").glob("*.parquet"))) == 4
