"""Trainings of segmenters in real processes: two are as good as one, and a kill leaves nothing half-written."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dinoscope.files import read_json
from segmentation_samples import write_discs
from tiny_segmenter import write_own_encoder

SCRIPTS = Path(__file__).resolve().parents[2] / "workflow_scripts"
SETTINGS = {
    "dataset": "folder", "data-option": "instance=disc", "img-dim": "48 64", "epochs": 4, "batch-size": 4, "lr": 0.003,
    "dice-weight": 0.5, "class-weights": "balanced", "decoder": "fpn", "workers": 1, "clip-grad": 1.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segmenters")
    write_discs(folder / "discs")
    write_own_encoder(folder / "encoder.pth")
    return folder


def command(folder, name, processes=1, **settings):
    told = [part for key, value in (SETTINGS | settings).items() for part in (f"--{key}", *str(value).split())]
    told += ["--weights", str(folder / "encoder.pth"), "--data-root", str(folder / "discs")]
    launcher = [] if processes == 1 else [str(SCRIPTS / "launch.py"), "--processes", str(processes), "--"]
    script = [str(SCRIPTS / "segment_train.py"), "--exp-name", name, "--output-dir", str(folder / "runs")]
    return [sys.executable, *launcher, *script, *told]


def train(folder, name, **more):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command(folder, name, **more), capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_two_processes_train_what_one_does(folder):
    told = train(folder, "two", processes=2)
    assert "6 images, 2 validate, 2 processes" in told
    train(folder, "one")
    finals = [read_json(folder / "runs" / name / "final.json") for name in ("one", "two")]
    assert finals[0]["best_epoch"] == finals[1]["best_epoch"]
    for key, value in finals[0]["validation"].items():
        assert finals[1]["validation"][key] == pytest.approx(value, abs=2e-3)
    states = [torch.load(folder / "runs" / name / "state.pt", weights_only=True) for name in ("one", "two")]
    for name, tensor in states[0]["model"].items():
        torch.testing.assert_close(states[1]["model"][name], tensor, rtol=1e-3, atol=1e-5)
    start = load_file(folder / "runs" / "one" / "segmenter" / "segmenter.safetensors")
    assert max(tensor.abs().max() for tensor in start.values()) > 1e-2


@pytest.mark.long
def test_killed_at_random_moments_it_ends_with_the_same_weights(folder):
    train(folder, "unbroken", epochs=12)
    rng = random.Random(0)
    for _ in range(5):
        running = subprocess.Popen(
            command(folder, "killed", epochs=12),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        run_dir, deadline = folder / "runs" / "killed", time.monotonic() + 60
        while not (run_dir / "training_metrics.json").is_file() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 4))
        running.send_signal(signal.SIGKILL)
        running.wait()
        if (run_dir / "state.pt").is_file():
            torch.load(run_dir / "state.pt", weights_only=True)
    train(folder, "killed", epochs=12)
    weights = [
        load_file(folder / "runs" / name / "segmenter" / "segmenter.safetensors") for name in ("unbroken", "killed")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    left = [path.name for path in (folder / "runs" / "killed").iterdir() if not path.name.startswith(".")]
    own = ["final.json", "provenance.json", "run_config.json", "segmenter", "state.pt", "training_metrics.json"]
    assert sorted(left) == own
