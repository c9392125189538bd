"""Real runs that distil a larger teacher, and runs whose crops have several sizes: killed, resumed, exported."""

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from dinoscope.files import read_json
from dinoscope.models.weights import load_backbone
from dinoscope.train.metrics import read_metrics
from dinoscope.train.run_folder import complete_checkpoints

pytestmark = pytest.mark.long
SCRIPTS = Path(__file__).resolve().parents[2] / "workflow_scripts"
RECIPE = """
student: {arch: vit_nano, n_storage_tokens: 2, drop_path_rate: 0.2, layerscale: 0.1}
crops: {global_crops_size: 64, local_crops_size: 32, local_crops_number: 2}
dino: {head_n_prototypes: 64, head_hidden_dim: 32, head_bottleneck_dim: 16}
ibot: {head_n_prototypes: 48, head_hidden_dim: 32, head_bottleneck_dim: 16}
optim: {epochs: 4, warmup_epochs: 1, freeze_last_layer_epochs: 1}
teacher: {warmup_teacher_temp_epochs: 2, momentum_teacher: 0.9}
train: {OFFICIAL_EPOCH_LENGTH: 5, batch_size_per_gpu: 2, num_workers: 1, log_every: 1, dataset_path: images}
checkpointing: {period: 3}
evaluation: {eval_period_iterations: 0}
"""
# a backbone that has no heads gets some, and stays as it is
HEADS = """
extends: recipe.yaml
student: {arch: vit_micro}
MODEL: {WEIGHTS: large/teacher.pth}
optim: {freeze_backbone_epochs: 4, warmup_epochs: 0}
"""
DISTIL = """
extends: recipe.yaml
distillation: {enabled: true, checkpoint_path: runs/heads/main}
"""
SIZES = """
extends: recipe.yaml
crops: {global_crops_size: [64, 96], local_crops_size: [32, 48], global_local_crop_pairs_ratios: [0.6, 0.4],
        gram_teacher_crops_size: [96, 128]}
gram: {use_loss: true, it_load_ema_teacher: 4, rep_update: false}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, recipes, and a larger backbone that got heads by a run of its own."""
    folder = tmp_path_factory.mktemp("distillation")
    (folder / "images").mkdir()
    for index in range(24):
        noise = np.random.default_rng(index).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(noise).resize((128, 128), Image.Resampling.BICUBIC).save(folder / f"images/{index:02d}.png")
    recipes = {"recipe": RECIPE, "heads": HEADS, "distil": DISTIL, "sizes": SIZES}
    recipes["large"] = "extends: recipe.yaml\nstudent: {arch: vit_micro}\n"
    for name, text in recipes.items():
        (folder / f"{name}.yaml").write_text(text)
    make = [sys.executable, SCRIPTS / "initial_weights.py", "--config", "large.yaml", "--output", "large/teacher.pth"]
    subprocess.run(make, cwd=folder, check=True, capture_output=True)
    done = train(folder, "heads", "heads.yaml")
    assert done.returncode == 0, done.stderr
    return folder


def command(run: str, recipe: str, *extra: str) -> list[str]:
    launcher = [sys.executable, str(SCRIPTS / "launch.py"), "--processes", "2", "--threads", "2"]
    script = ["--log-dir", f"runs/{run}/main/logs", "--", str(SCRIPTS / "pretrain.py"), "--config", recipe]
    return [*launcher, *script, "--run-dir", f"runs/{run}/main", *extra]  # draws derive from a run's name


def train(folder: Path, run: str, recipe: str, *extra: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(run, recipe, *extra), cwd=folder, capture_output=True, text=True, check=False)


def killed_twice(folder: Path, run: str, recipe: str, *extra: str) -> None:
    """Trains to the end; the launcher is killed after its first and after its third checkpoint, at a random moment."""
    rng = random.Random(run)
    for iteration in (2, 8):
        process = subprocess.Popen(
            command(run, recipe, *extra), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(6000):
            if any(i >= iteration for i in complete_checkpoints(folder / "runs" / run / "main")):
                break
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
    time.sleep(2)
    done = train(folder, run, recipe, *extra)
    assert done.returncode == 0, done.stderr


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, read without our code."""
    target = folder.with_name(f".{folder.name}.pth")
    dcp_to_torch_save(folder, target)
    state = torch.load(target, weights_only=True)
    target.unlink()
    flat = dict(state["model"])
    for name, moments in state.get("optimizer", {}).items():
        flat |= {f"optimizer.{name}.{key}": value for key, value in moments.items()}
    return flat


def assert_same_end(run: Path, other: Path) -> None:
    assert_same_tensors(*(stored(folder / "ckpt/19") for folder in (run, other)))


def assert_same_tensors(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_heads_alone_are_trained_for_a_backbone_without(place: Path) -> None:
    before, after = load_backbone(place / "large/teacher.pth"), load_backbone(place / "runs/heads/main")
    assert all(torch.equal(t, after.state_dict()[name]) for name, t in before.state_dict().items())
    moved = read_metrics(place / "runs/heads/main")["dino_global_crops_loss"]
    assert moved.nunique() > 5


def test_a_small_student_distils_a_larger_teacher_whatever_happens(place: Path) -> None:
    done = train(place, "small", "distil.yaml")
    assert done.returncode == 0, done.stderr
    run = place / "runs/small/main"
    assert "distils main, a vit_micro" in done.stderr + done.stdout
    student = load_backbone(run)
    assert student.settings.arch == "vit_nano"
    card = read_json(run / "eval/training_19/model.json")
    assert card["origin"] == "random initialisation, distilled from random initialisation, seed 0"
    # the teacher lies in the run's folder once, not in every checkpoint
    taught = stored(run / "ckpt/frozen")
    assert not any("distilled" in name for name in stored(run / "ckpt/19"))
    heads = place / "runs/heads/main"
    exported = torch.load(heads / read_json(heads / "final.json")["teacher"], weights_only=True)
    assert {name.removeprefix("distilled_teacher.") for name in taught} == exported["teacher"].keys()
    assert all(torch.equal(taught[f"distilled_teacher.{name}"], t) for name, t in exported["teacher"].items())
    # a run goes on with the teacher that it began with, wherever that is by then
    killed_twice(place, "broken", "distil.yaml")
    assert_same_end(run, place / "runs/broken/main")
    shutil.copytree(run, place / "runs/longer/main")
    (place / "runs/longer/main/final.json").unlink()
    moved = heads.rename(place / "runs/elsewhere")
    done = train(place, "longer", "distil.yaml", "optim.epochs=5")
    moved.rename(heads)
    assert done.returncode == 0, done.stderr
    assert read_json(place / "runs/longer/main/final.json")["iteration"] == 24


def test_a_teacher_without_heads_gets_some_and_a_run_keeps_them(place: Path) -> None:
    bare = "distillation.checkpoint_path=large/teacher.pth"
    done = train(place, "bare", "distil.yaml", bare)
    assert done.returncode == 0, done.stderr
    run = place / "runs/bare/main"
    assert "with dino_head and ibot_head made from its features" in done.stderr + done.stdout
    taught, base = stored(run / "ckpt/frozen"), load_backbone(place / "large/teacher.pth").state_dict()
    assert all(torch.equal(taught[f"distilled_teacher.backbone.{name}"], tensor) for name, tensor in base.items())
    prototypes = taught["distilled_teacher.dino_head.last_layer.weight"]
    assert prototypes.shape == (64, 16)
    assert taught["distilled_teacher.ibot_head.mlp.0.weight"].shape == (16, 128)
    killed_twice(place, "bare_broken", "distil.yaml", bare)
    assert_same_end(run, place / "runs/bare_broken/main")
    assert_same_tensors(taught, stored(place / "runs/bare_broken/main/ckpt/frozen"))


def test_a_teacher_that_does_not_fit_is_refused_in_one_sentence(place: Path) -> None:
    done = train(place, "refused", "distil.yaml", "dino.head_n_prototypes=32")
    assert done.returncode == 1
    assert (
        "error: distillation.checkpoint_path teacher_checkpoint.pth: dino.head_n_prototypes is 32, the" in done.stderr
    )
    assert not (place / "runs/refused/main/run_config.json").exists()


def test_steps_of_several_resolutions_resume_bit_by_bit(place: Path) -> None:
    done = train(place, "sizes", "sizes.yaml")
    assert done.returncode == 0, done.stderr
    assert "steps: 60 % with 2 × 64 px + 2 × 32 px, gram teacher 96 px" in done.stderr + done.stdout
    crops = {(entry["name"], entry["crop_px"]) for entry in read_json(place / "runs/sizes/main/final.json")["crops"]}
    assert crops == {
        *(("global", 64), ("global", 96), ("local", 32), ("local", 48)),
        *(("gram teacher", 96), ("gram teacher", 128)),
    }
    assert read_metrics(place / "runs/sizes/main")["gram_loss"].gt(0).any()
    killed_twice(place, "sizes_broken", "sizes.yaml")
    assert_same_end(place / "runs/sizes/main", place / "runs/sizes_broken/main")
