"""`pretrain.py --plan` of a run that is new, and of one that has begun; its forecast of the disk against real files."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dinoscope.models.registry import settings_from_config
from dinoscope.recipe import load_recipe
from dinoscope.train.forecast import forecast
from dinoscope.train.lock import run_lock
from tiny_slides import write_manifest, write_slide

SCRIPTS = Path(__file__).resolve().parents[2] / "workflow_scripts"
RECIPE = """
student: {arch: vit_nano, n_storage_tokens: 2, mask_k_bias: true}
crops: {global_crops_size: 64, local_crops_size: 32, local_crops_number: 2}
dino: {head_n_prototypes: 64, head_hidden_dim: 32, head_bottleneck_dim: 16}
ibot: {head_n_prototypes: 64, head_hidden_dim: 32, head_bottleneck_dim: 16}
optim: {epochs: 4, warmup_epochs: 1}
teacher: {warmup_teacher_temp_epochs: 2}
train: {OFFICIAL_EPOCH_LENGTH: 2, batch_size_per_gpu: 2, num_workers: 0}
checkpointing: {period: 4}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a slide, its manifest and a recipe."""
    folder = tmp_path_factory.mktemp("plan")
    slide = write_slide(folder / "slide.tiff", 1)
    (folder / "slides.tsv").write_text(f"slide_id\tpath\nslide\t{slide}\n")
    write_manifest(folder / "train.parquet", ["slide"], slide_px=1024, tile_px=128)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def pretrain(place: Path, run: str, *extra: str, recipe: str = "recipe.yaml") -> subprocess.CompletedProcess:
    inputs = ["--config", recipe, "--manifest", "train.parquet", "--slides", "slides.tsv", "--run-dir", f"runs/{run}"]
    command = [sys.executable, SCRIPTS / "pretrain.py", *inputs, *extra]
    return subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def begun(place: Path) -> Path:
    """The folder of a run of 8 iterations."""
    trained = pretrain(place, "begun")
    assert trained.returncode == 0, trained.stderr
    assert "memory: about" in trained.stderr and "warning: small: 64 tiles" in trained.stderr
    return place / "runs/begun"


def files(folder: Path) -> dict[str, int]:
    """All but the lock, which beats."""
    paths = (path for path in folder.rglob("*") if not path.name.startswith(".lock"))
    return {str(path): path.stat().st_mtime_ns for path in paths}


def test_a_new_run(place: Path) -> None:
    found = pretrain(place, "new", "--plan", "--processes", "3")
    assert found.returncode == 0, found.stderr
    labels = [line.split("  ")[0] for line in found.stdout.splitlines() if line[:1].strip()]
    expected = ["run", "data", "crops", "length", "learning rate", "model", "memory", "disk", "speed", "duration"]
    assert labels[: len(expected)] == expected
    assert "new, not started" in found.stdout
    assert "64 tiles; slides: 1, cases: 1" in found.stdout
    assert "8 iterations of 6 tiles (3 processes × 2): 0.8 passes over the data" in found.stdout
    assert "warning: small: 64 tiles of 1 cases" in found.stdout
    assert not (place / "runs/new").exists()


def test_a_run_that_has_begun_and_is_locked(place: Path, begun: Path) -> None:
    run_dir = begun
    with run_lock(run_dir):  # as while it is trained
        before = files(run_dir)
        found = pretrain(place, "begun", "--plan", "--processes", "1", "optim.epochs=8")
        assert files(run_dir) == before
    assert found.returncode == 0, found.stderr
    assert "begun, 8 of 16 iterations are done" in found.stdout
    config = load_recipe(place / "recipe.yaml")
    disk = forecast(config, settings_from_config(config.student), 1, 64, "cpu").disk
    for folder, size in (("ckpt/7", disk.checkpoint), ("eval/training_7", disk.export)):
        real = sum(path.stat().st_size for path in (run_dir / folder).iterdir())
        assert size == pytest.approx(real, rel=0.02), folder
    other_batch = pretrain(place, "begun", "--plan", "--processes", "2")
    assert re.search(r"warning: the run was started with 2 tiles a step and would go on with 4", other_batch.stdout)


def test_errors_are_those_of_the_run(place: Path, begun: Path) -> None:
    refused = pretrain(place, begun.name, "--plan", "optim.lr=0.5")
    assert refused.returncode == 1
    assert "optim.lr was 0.001 and is now 0.5" in refused.stderr
    too_large = pretrain(place, "new", "--plan", "crops.global_crops_size=256")
    assert too_large.returncode == 1
    assert too_large.stderr.startswith("error: global crops are 256 px but the tiles only 128 px")
    assert pretrain(place, "new", "--plan", "--processes", "none").returncode == 1
