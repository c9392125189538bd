"""A short training on GPUs, bf16 and compiled, as recipes ask for; skipped where there is none."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dinoscope.files import read_json
from dinoscope.train.metrics import read_metrics
from tiny_slides import write_manifest, write_slide

pytestmark = pytest.mark.skipif(not torch.accelerator.is_available(), reason="torch sees no GPU here")

SCRIPTS = Path(__file__).resolve().parents[2] / "workflow_scripts"
RECIPE = """
student: {arch: vit_small, n_storage_tokens: 4, mask_k_bias: true, norm_layer: layernormbf16, drop_path_rate: 0.1,
          pos_embed_rope_dtype: fp32, pos_embed_rope_rescale_coords: 2}
crops: {global_crops_size: 96, local_crops_size: 48}
dino: {head_n_prototypes: 1024}
ibot: {head_n_prototypes: 1024}
optim: {epochs: 2, warmup_epochs: 1}
teacher: {warmup_teacher_temp_epochs: 1}
train: {OFFICIAL_EPOCH_LENGTH: 10, batch_size_per_gpu: 8, num_workers: 2, log_every: 5, compile: true}
"""


def test_bf16_and_compiled_training_runs_and_goes_on(tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "one.tiff", 0)
    (tmp_path / "slides.tsv").write_text(f"slide_id\tpath\none\t{slide}\n")
    write_manifest(tmp_path / "train.parquet", ["one"], slide_px=1024, tile_px=128)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    command = [sys.executable, SCRIPTS / "launch.py", "--", SCRIPTS / "pretrain.py", "--config", "recipe.yaml"]
    command += ["--manifest", "train.parquet", "--slides", "slides.tsv", "--run-dir", "runs/gpu"]
    for epochs in (1, 2):
        subprocess.run([*command, f"optim.epochs={epochs}"], cwd=tmp_path, check=True)
    assert read_json(tmp_path / "runs/gpu/final.json")["iteration"] == 19
    assert read_metrics(tmp_path / "runs/gpu").notna().all().all()
