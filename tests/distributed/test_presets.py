"""Every recipe that comes along plans and trains: a few iterations on drawn images, at reduced width."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

from dinoscope import build_backbone, load_backbone
from dinoscope.files import read_json
from dinoscope.plan import make_plan
from dinoscope.recipe import load_recipe, recipe_chain
from dinoscope.train.metrics import read_metrics

pytestmark = pytest.mark.long
REPOSITORY = Path(__file__).resolve().parents[2]
RUNS = REPOSITORY / "config" / "runs"
ALONE = sorted(path.stem for path in RUNS.glob("*.yaml") if not load_recipe(path).gram.use_loss)
GRAM = sorted(path.stem for path in RUNS.glob("*.yaml") if load_recipe(path).gram.use_loss)
SMALL = ["student.arch=vit_nano", "train.OFFICIAL_EPOCH_LENGTH=2", "train.batch_size_per_gpu=2", "train.num_workers=0"]
SMALL += ["optim.epochs=4", "teacher.warmup_teacher_temp_epochs=1"]
SMALL += ["train.dataset_path=images", "sampling.method=uniform", "train.accumulation_steps=2"]
SMALL += [f"{loss}.{key}" for loss in ("dino", "ibot") for key in ("head_n_prototypes=256", "head_hidden_dim=64")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a few images as large as the windows that gram.yaml is meant for."""
    folder = tmp_path_factory.mktemp("presets")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for index in range(4):
        image = cv2.resize(rng.integers(0, 255, (48, 48, 3), np.uint8), (768, 768), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / f"images/{index}.png"), image)
    return folder


def weights_for(recipe: str, place: Path) -> Path:
    """A file such as the published ones, for the recipe at reduced width."""
    path = place / f"{recipe}.pth"
    (place / "plain.yaml").write_text(yaml.safe_dump({"student": _student(recipe)}))
    torch.save(build_backbone(place / "plain.yaml").teacher.state_dict(), path)
    return path


def _student(recipe: str) -> dict:
    merged: dict = {}
    for path in recipe_chain(RUNS / f"{recipe}.yaml"):
        merged |= yaml.safe_load(path.read_text()).get("student", {})
    of_training = ("arch", "trainable", "unfrozen_blocks", "lora_rank", "lora_targets")
    return {"arch": "vit_nano"} | {key: merged[key] for key in merged if key not in of_training}


def train(place: Path, recipe: str, *extra: str) -> Path:
    chain = [path.stem for path in recipe_chain(RUNS / f"{recipe}.yaml")]
    shortened = [*SMALL, f"optim.warmup_epochs={0 if recipe in GRAM else 1}"]
    if any(name.endswith("_lvd") for name in chain) and recipe not in GRAM:
        shortened += ["optim.freeze_backbone_epochs=1", f"MODEL.WEIGHTS={weights_for(recipe, place).name}"]
    script = [sys.executable, REPOSITORY / "workflow_scripts/pretrain.py", "--config", RUNS / f"{recipe}.yaml"]
    command = [*script, "--run-dir", f"runs/{recipe}", *extra, *shortened]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return place / "runs" / recipe


def check_finished(run: Path) -> None:
    assert read_json(run / "final.json")["iteration"] == 7
    losses = read_metrics(run)["total_loss"]
    assert np.isfinite(losses).all()
    assert load_backbone(run)(torch.zeros(1, 3, 32, 32)).isfinite().all()


@pytest.mark.parametrize("recipe", ALONE)
def test_a_recipe_trains(place: Path, recipe: str) -> None:
    run = train(place, recipe)
    check_finished(run)
    start = (run / "training_metrics.json").read_text().splitlines()[0]
    expected = f"starts from {recipe}.pth" if recipe.endswith("_lvd") else "starts from scratch"
    assert expected in start


@pytest.mark.parametrize("recipe", GRAM)
def test_a_gram_recipe_continues_the_run_of_the_recipe_that_it_extends(place: Path, recipe: str) -> None:
    parent = recipe_chain(RUNS / f"{recipe}.yaml")[-2].stem
    if not (place / "runs" / parent / "final.json").is_file():
        train(place, parent)
    run = train(place, recipe, "--continues", f"runs/{parent}/final.json")
    check_finished(run)
    assert "gram_loss" in read_metrics(run)


@pytest.mark.parametrize("recipe", ALONE)
def test_a_recipe_plans(place: Path, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("slide.svs").touch()
    Path("slides.tsv").write_text("slide_id\tpath\nslide\tslide.svs\n")
    Path("mine.yaml").write_text(f"extends: {RUNS / recipe}.yaml\nMODEL: {{WEIGHTS: slide.svs}}\n")
    sets = {"train": {"tile_px": 512}, "features": None}
    config = {
        "slides": {"source": "slides.tsv"},
        "tiling": {"sets": sets},
        "runs": {"pretrain": {"recipe": "mine.yaml"}},
    }
    assert make_plan(config, REPOSITORY).runs["pretrain"].settings.optim.epochs > 0
