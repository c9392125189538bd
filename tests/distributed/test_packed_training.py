"""A real run on packed tiles: it resumes on them, and on nothing else."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest

from dinoscope.data.packing import pack_slide, write_index
from dinoscope.files import read_json
from dinoscope.slides.reader import Slide
from tiny_slides import write_manifest, write_slide

SCRIPTS = Path(__file__).resolve().parents[2] / "workflow_scripts"
RECIPE = """
student: {arch: vit_nano, n_storage_tokens: 2, drop_path_rate: 0.0}
crops: {global_crops_size: 64, local_crops_size: 32, local_crops_number: 2}
augmentation: {recipe: pathology}
dino: {head_n_prototypes: 64, head_hidden_dim: 32, head_bottleneck_dim: 16}
ibot: {head_n_prototypes: 64, head_hidden_dim: 32, head_bottleneck_dim: 16}
optim: {epochs: 2, warmup_epochs: 1, freeze_last_layer_epochs: 1}
teacher: {warmup_teacher_temp_epochs: 1, momentum_teacher: 0.9}
train: {OFFICIAL_EPOCH_LENGTH: 2, batch_size_per_gpu: 2, num_workers: 1, log_every: 1}
checkpointing: {period: 2}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    slide = write_slide(folder / "one.tiff", 1)
    (folder / "slides.tsv").write_text(f"slide_id\tpath\none\t{slide}\n")
    write_manifest(folder / "train.parquet", ["one"], slide_px=1024, tile_px=128)
    options = {"quality": 90, "subsampling": "4:2:0"}
    opened = functools.partial(Slide, slide, "one")
    pack_slide("one", opened, folder / "one.parquet", folder / "packed" / "one.arrow", **options)
    write_index(folder / "train.parquet", folder / "packed", folder / "packed" / "index.json")
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def train(place: Path, *extra: str) -> subprocess.CompletedProcess:
    inputs = [
        "--config",
        "recipe.yaml",
        "--manifest",
        "train.parquet",
        "--slides",
        "slides.tsv",
        "--run-dir",
        "runs/main",
    ]
    command = [sys.executable, str(SCRIPTS / "pretrain.py"), *inputs, *extra]
    return subprocess.run(command, cwd=place, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.long
def test_a_run_on_packed_tiles(place: Path) -> None:
    packed = ["--packed", "packed/index.json"]
    begun = train(place, *packed, "optim.epochs=1")
    assert begun.returncode == 0, begun.stderr[-3000:]
    pixels = read_json(place / "runs/main/run_config.json")["inputs"]["pixels"]
    assert pixels.startswith("JPEG 90 4:2:0 ")
    refused = train(place, "optim.epochs=2")
    assert refused.returncode == 1
    assert "run main was started on other pixels: packed tiles (JPEG 90 4:2:0" in refused.stderr
    (place / "one.tiff").rename(place / "away.tiff")  # nothing reads the slide any more
    extended = train(place, *packed, "optim.epochs=2")
    assert extended.returncode == 0, extended.stderr[-3000:]
    assert read_json(place / "runs/main/final.json")["iteration"] == 3
