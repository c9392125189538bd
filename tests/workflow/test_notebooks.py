"""Notebooks: stripped as they are kept, and run as a user runs them, on a run that trains at that moment."""

import base64
import io
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

from dinoscope.train.metrics import read_metrics
from dinoscope.train.run_folder import complete_checkpoints
from tiny_segmenter import write_own_encoder
from tiny_slides import write_manifest, write_slide

REPOSITORY = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("**/*.ipynb"))
NOTEBOOK = REPOSITORY / "notebooks" / "inspect_run.ipynb"
LORA_NOTEBOOK = REPOSITORY / "notebooks" / "explain_lora.ipynb"
# all checkpoints are kept: at this speed the newest would be an old one, and gone, while it is read
RECIPE = """
student: {arch: vit_nano, n_storage_tokens: 2, norm_layer: layernormbf16}
crops: {global_crops_size: 64, local_crops_size: 32, local_crops_number: 2, rgb_mean: [0.7, 0.6, 0.7]}
dino: {head_n_prototypes: 64, head_hidden_dim: 32, head_bottleneck_dim: 16}
ibot: {head_n_prototypes: 64, head_hidden_dim: 32, head_bottleneck_dim: 16}
optim: {epochs: 100, warmup_epochs: 1}
train: {OFFICIAL_EPOCH_LENGTH: 1000, batch_size_per_gpu: 2, num_workers: 0, log_every: 5}
checkpointing: {period: 100, max_to_keep: null}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the notebook expects it around itself: slides and their table, a manifest, a recipe."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "workflow_scripts").symlink_to(REPOSITORY / "workflow_scripts")
    (folder / "notebooks").mkdir()
    (folder / "config").mkdir()
    slide = write_slide(folder / "slide_1.tiff", seed=1)
    (folder / "config/slides.tsv").write_text(f"slide_id\tpath\n{slide.stem}\t{slide.name}\n")
    write_manifest(folder / "results/manifests/train.parquet", [slide.stem], slide_px=1024, tile_px=128)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@contextmanager
def training(project: Path) -> Iterator[subprocess.Popen]:
    """A training that goes on by itself; when the block ends it is asked to save and stop, and does."""
    command = [
        sys.executable,
        "workflow_scripts/pretrain.py",
        "--config",
        "recipe.yaml",
        "--slides",
        "config/slides.tsv",
    ]
    command += ["--manifest", "results/manifests/train.parquet", "--run-dir", "results/runs/pretrain"]
    with open(project / "train.log", "w") as log:
        process = subprocess.Popen(command, cwd=project, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 120
            while not complete_checkpoints(project / "results/runs/pretrain"):
                assert process.poll() is None and time.monotonic() < deadline, (project / "train.log").read_text()
                time.sleep(0.1)
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def execute(
    project: Path, monkeypatch: pytest.MonkeyPatch, path: Path = NOTEBOOK, **changed: str
) -> nbformat.NotebookNode:
    """Runs a notebook in a kernel of its own, with lines of its first cell changed."""
    notebook = nbformat.read(path, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    for name, value in changed.items():
        first.source, count = re.subn(rf"^{name} = .*$", f"{name} = {value}", first.source, flags=re.MULTILINE)
        assert count == 1, name
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):  # not the user's
        monkeypatch.setenv(name, str(project / ".jupyter"))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("PYTHONPATH", raising=False)  # what the notebook does itself must be enough
    client = NotebookClient(notebook, timeout=300, kernel_name="python3")
    return client.execute(cwd=str(project / "notebooks"))


def outputs_of(notebook: nbformat.NotebookNode, cell_id: str) -> list[Any]:
    return next(cell for cell in notebook.cells if cell.id == cell_id).outputs


def picture_of(notebook: nbformat.NotebookNode, cell_id: str) -> np.ndarray:
    (output,) = (output for output in outputs_of(notebook, cell_id) if "data" in output)
    with Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_small_stripped_and_of_no_machine(path: Path) -> None:
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert path.stat().st_size < 20_000
    for cell in notebook.cells:
        assert cell.metadata == {}
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, cell.id
        assert not re.search(r"""(?:["'\s(=]|^)(?:/|~|[A-Z]:\\)\w""", cell.source), f"a path in cell {cell.id}"
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"  # not one that is installed on a single machine
    raw = path.read_text(encoding="utf-8")
    assert str(Path.home()) not in raw and str(REPOSITORY) not in raw


def test_there_is_a_notebook_and_the_readme_tells_of_it() -> None:
    assert NOTEBOOK in NOTEBOOKS
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert all(f"notebooks/{path.name}" in readme for path in NOTEBOOKS)


@pytest.mark.long
def test_the_notebook_looks_into_a_run_that_trains_and_into_one_that_was_stopped(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = project / "results/runs/pretrain"
    with training(project) as process:
        first = min(complete_checkpoints(run))
        running = execute(project, monkeypatch)
        assert process.poll() is None and not (run / "final.json").exists()
    assert process.returncode == 75  # saved and stopped, as asked: nothing was in its way
    for cell in running.cells:
        assert all(output.get("name") != "stderr" for output in cell.get("outputs", [])), cell.outputs
    table = outputs_of(running, "metrics")[0].data["text/html"]
    assert "total_loss" in table and "iteration" in table
    (told,) = outputs_of(running, "teacher")
    iteration = int(re.fullmatch(r"pretrain, teacher after iteration (\d+): vit_nano, 64 wide\n", told.text)[1])
    assert first <= iteration <= read_metrics(run).index.max()
    (shapes,) = outputs_of(running, "features")
    assert shapes.text == "slide_1@0,0: cls (64,), patches (8, 8, 64)\n"
    for cell_id in ("curves", "colors", "similarity"):
        assert picture_of(running, cell_id).std() > 10
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (70, 100, 3), np.uint8)).save(project / "mine.png")
    stopped = execute(project, monkeypatch, IMAGE='"mine.png"')
    assert outputs_of(stopped, "features")[0].text == "mine.png: cls (64,), patches (4, 6, 64)\n"
    newest = max(complete_checkpoints(run))
    assert f"after iteration {newest}:" in outputs_of(stopped, "teacher")[0].text
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.fixture
def lora_project(tmp_path: Path) -> Path:
    """A folder with the code, a tiny encoder, and two pictures with their masks: dark discs on pink noise."""
    (tmp_path / "workflow_scripts").symlink_to(REPOSITORY / "workflow_scripts")
    (tmp_path / "notebooks").mkdir()
    write_own_encoder(tmp_path / "encoder.pth")
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:100, :130]
    for name in "ab":
        mask = np.zeros((100, 130), bool)
        for row, column in rng.integers(0, 100, (9, 2)):
            mask |= np.hypot(rows - row, columns - column) < 11
        image = np.where(mask[..., None], (90, 60, 140), (230, 160, 190)) + rng.integers(-20, 20, (100, 130, 3))
        Image.fromarray(image.astype(np.uint8)).save(tmp_path / f"{name}.png")
        Image.fromarray(mask.astype(np.uint8) * 255).convert("RGB").save(tmp_path / f"{name}_mask.png")
    return tmp_path


def test_the_notebook_on_lora_shows_what_it_says(lora_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = {"IMAGES": '["a.png", "b.png"]', "MASKS": '["a_mask.png", "b_mask.png"]'}
    run = execute(lora_project, monkeypatch, LORA_NOTEBOOK, ENCODER='"encoder.pth"', STEPS="40", RANK="2", **masks)
    for cell_id in ("data", "train", "predictions", "update", "moved"):
        assert picture_of(run, cell_id).std() > 10, cell_id
    told = {cell_id: _printed(run, cell_id) for cell_id in ("models", "train", "predictions", "update", "merge")}
    assert "largest change of a feature by new adapters: 0.0\n" in told["models"]
    assert "decoder only: 98 numbers are trained" in told["models"]
    assert "LoRA: 1,634 numbers are trained" in told["models"]  # 98, and 4 blocks x 2 projections x 2 x 2 x 48
    alone, with_lora = (float(found) for found in re.findall(r": ([\d.]+) at the end", told["train"]))
    assert with_lora < alone < 0.69
    assert len(re.findall(r"([\d.]+) %", told["predictions"])) == 2
    assert told["update"] == "singular values above a millionth of the largest: 2 of 48\n"
    left, difference = re.search(r"adapters left: (\d+); logits differ by at most (\S+)", told["merge"]).groups()
    assert left == "0" and float(difference) < 1e-5


def _printed(notebook: nbformat.NotebookNode, cell_id: str) -> str:
    return "".join(o.text for o in outputs_of(notebook, cell_id) if o.get("name") == "stdout")
