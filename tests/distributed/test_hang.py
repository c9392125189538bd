"""Processes that hang or die: the others end too, within a bounded time, and it can be read where they stood."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.long
SCRIPTS = Path(__file__).resolve().parents[2] / "workflow_scripts"
RECIPE = """
student: {arch: vit_nano}
crops: {global_crops_size: 32, local_crops_size: 16, local_crops_number: 1}
dino: {head_n_prototypes: 32, head_hidden_dim: 16, head_bottleneck_dim: 8}
ibot: {head_n_prototypes: 32, head_hidden_dim: 16, head_bottleneck_dim: 8}
optim: {epochs: 1, warmup_epochs: 0, freeze_last_layer_epochs: 0}
teacher: {warmup_teacher_temp_epochs: 0}
train: {OFFICIAL_EPOCH_LENGTH: 40, batch_size_per_gpu: 2, num_workers: 0, log_every: 1, dataset_path: "slow:Images"}
checkpointing: {period: 5}
evaluation: {eval_period_iterations: 0}
"""
# Waits at its 30th image on the second process, while a file is there that says so.
IMAGES = """
import os, pathlib, time
import numpy as np

class Images:
    def __init__(self):
        self.read = 0

    def __len__(self):
        return 100

    def __getitem__(self, index):
        self.read += 1
        if self.read == 30 and os.environ["RANK"] == "1" and pathlib.Path("wait").exists():
            pathlib.Path(f"waiting.{os.getpid()}").touch()
            wait_for_ever()
        return np.random.default_rng(index).integers(0, 256, (32, 32, 3), np.uint8)

def wait_for_ever():
    time.sleep(3600)
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "slow.py").write_text(IMAGES)
    (tmp_path / "wait").touch()
    return tmp_path


def start(place: Path, hang_minutes: float) -> subprocess.Popen:
    launcher = [sys.executable, str(SCRIPTS / "launch.py"), "--processes", "2", "--threads", "2", "--log-dir"]
    script = ["run/main/logs", "--", str(SCRIPTS / "pretrain.py"), "--config", "recipe.yaml", "--run-dir", "run/main"]
    environment = os.environ | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [*launcher, *script, f"train.hang_minutes={hang_minutes}"]
    return subprocess.Popen(command, cwd=place, env=environment, **pipes)


def waiting_process(place: Path) -> int:
    """The process id of the one that has begun to wait."""
    for _ in range(6000):
        if found := list(place.glob("waiting.*")):
            return int(found[0].suffix[1:])
        time.sleep(0.02)
    raise AssertionError("no process came to the image at which it waits")


def ends(launched: subprocess.Popen, seconds: float) -> str:
    try:
        return launched.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        launched.kill()
        raise


def finishes(place: Path) -> None:
    (place / "wait").unlink()
    again = start(place, 5)
    output = ends(again, 300)
    assert again.returncode == 0, output
    assert (place / "run/main/final.json").is_file()
    assert "resumes after iteration" in output


def stderr_logs(place: Path) -> str:
    return "\n".join(log.read_text() for log in (place / "run/main/logs").rglob("stderr.log"))


def test_a_process_that_hangs_takes_the_others_down_and_tells_where_it_stood(place: Path) -> None:
    launched = start(place, 0.4)
    waiting_process(place)
    output = ends(launched, 24 + 60)
    assert launched.returncode == 75
    sentence = "has come to no end of a step for 0.4 minutes (train.hang_minutes) and ended the training"
    assert sentence in [line for line in output.splitlines() if line.startswith("error: ")][-1]
    assert "in wait_for_ever" in stderr_logs(place)
    finishes(place)
    assert "in wait_for_ever" in stderr_logs(place)  # the log of the first attempt is kept


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_process_that_is_stopped_or_killed_takes_the_others_down(place: Path, number: int) -> None:
    launched = start(place, 0.4)
    process = waiting_process(place)
    os.kill(process, number)
    output = ends(launched, (24 if number == signal.SIGSTOP else 0) + 60)
    assert launched.returncode not in (0, None), output
    assert not Path(f"/proc/{process}").exists()
    finishes(place)
