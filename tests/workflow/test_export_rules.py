"""Exports as the workflow makes them: planned on request, made by the script, checked by the tools themselves."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import torchvision_in_subprocesses
from dinoscope.files import read_json
from dinoscope.models.weights import load_backbone, read_model_file, state_digest
from other_libraries import relative_error, tokens_of
from snakemake_runs import COMMAND, NANO_RECIPE, REPOSITORY, SKIPPING_CONFIG, plan

# Of the config that comes along the recipe says it: norms and RoPE that other tools have.
RECIPE = f"{NANO_RECIPE}\n".replace(
    "{arch: vit_nano}", "{arch: vit_nano, norm_layer: layernormbf16, pos_embed_rope_dtype: fp32, mask_k_bias: true}"
)
SCRIPT = REPOSITORY / "workflow_scripts" / "export_model.py"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A workflow with a run and slides that nobody opens."""
    runs = {"pretrain": {"recipe": "root.yaml"}, "gram": {"recipe": "root.yaml", "continues": "pretrain"}}
    config = SKIPPING_CONFIG | {"slides": {"source": "slides.tsv"}, "runs": runs}
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "root.yaml").write_text(RECIPE)
    (tmp_path / "slides.tsv").write_text("slide_id\tpath\nS1\tS1.svs\n")
    (tmp_path / "S1.svs").touch()
    return tmp_path


def change_formats(folder: Path, *formats: str) -> None:
    path = folder / "config" / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"export": {"formats": list(formats)}}))


def test_exports_are_planned_on_request(folder: Path) -> None:
    jobs, _ = plan(folder)
    assert not [name for name in jobs if name.startswith("export")]
    jobs, _ = plan(folder, "results/models/base/timm/model.safetensors")  # base is exported when it is asked for
    assert jobs == {"initial_weights": 1, "export_timm": 1}
    change_formats(folder, "hf", "onnx")
    exports = {"export_hf": 2, "export_onnx": 2}
    jobs, _ = plan(folder)
    assert {name: count for name, count in jobs.items() if name.startswith("export")} == exports
    jobs, text = plan(folder, "export")
    made = {"tile_slide": 1, "merge_manifest": 1, "initial_weights": 1, "train": 2, "convert": 2, "export": 1}
    assert jobs == made | exports
    for format in ("hf", "onnx"):
        said = f"--weights results/models/gram/teacher.pth --format {format} --output results/models/gram/{format} "
        assert said in text


def test_unknown_formats_are_refused(folder: Path) -> None:
    change_formats(folder, "hf", "tensorflow")
    done = subprocess.run([*COMMAND, "-n"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1
    assert "export.formats" in done.stderr and "tensorflow" in done.stderr


@pytest.mark.long
def test_snakemake_exports_for_both_libraries(folder: Path) -> None:
    environment = torchvision_in_subprocesses.environment(folder / "hook")
    targets = [f"results/models/base/{format}/verification.json" for format in ("hf", "timm")]
    done = subprocess.run([*COMMAND, *targets], cwd=folder, env=environment, capture_output=True, text=True)
    logs = "\n".join(path.read_text() for path in (folder / "logs").glob("export_*/base.log"))
    assert done.returncode == 0, done.stderr[-3000:] + logs
    ours = load_backbone(folder / "results" / "models" / "base")
    images = torch.randn(2, 3, 64, 32, generator=torch.Generator().manual_seed(0))
    for format in ("hf", "timm"):
        exported = folder / "results" / "models" / "base" / format
        report = read_json(exported / "verification.json")
        assert report["passed"]
        assert report["library"]["name"] == {"hf": "transformers", "timm": "timm"}[format]
        assert relative_error(tokens_of(load_backbone(exported), images), tokens_of(ours, images)) == 0
        weights = [read_model_file(path).backbone for path in (exported, exported.parent)]
        assert state_digest(weights[0]) == state_digest(weights[1])
        for path in exported.iterdir():  # privacy
            assert str(folder).encode() not in path.read_bytes()
    assert "differs by" in logs
    assert (
        "Nothing to be done" in subprocess.run([*COMMAND, *targets], cwd=folder, capture_output=True, text=True).stderr
    )


def test_the_script_says_in_a_sentence_what_is_wrong(folder: Path) -> None:
    environment = torchvision_in_subprocesses.environment(folder / "hook")
    arguments = [sys.executable, str(SCRIPT), "--weights", "no.pth", "--format", "hf", "--output", "out"]
    done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: no.pth does not exist; wanted: ")
    assert not (folder / "out").exists()
