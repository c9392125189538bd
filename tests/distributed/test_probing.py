"""Asking the teacher while it trains: columns of the metrics, the same weights, the best teacher, worse runs."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinoscope.arrays import read_arrays, write_arrays
from dinoscope.files import read_json
from dinoscope.train.metrics import append_metrics, read_metrics
from dinoscope.train.probing import ProbeSet, TeacherProbe, best_probe, read_probe_set, write_probe_set

SCRIPTS = Path(__file__).resolve().parents[2] / "workflow_scripts"
RECIPE = """
student: {arch: vit_nano, drop_path_rate: 0.3, layerscale: 0.1, pos_embed_rope_rescale_coords: 2}
crops: {global_crops_size: 64, local_crops_size: 32, local_crops_number: 2}
dino: {head_n_prototypes: 64, head_hidden_dim: 32, head_bottleneck_dim: 16}
ibot: {head_n_prototypes: 64, head_hidden_dim: 32, head_bottleneck_dim: 16}
optim: {epochs: 2, warmup_epochs: 0, freeze_last_layer_epochs: 0, lr: 0.02}
teacher: {warmup_teacher_temp_epochs: 1, momentum_teacher: 0.5}
train: {dataset_path: images, OFFICIAL_EPOCH_LENGTH: 3, batch_size_per_gpu: 2, num_workers: 0, log_every: 1}
"""


class Alone:
    """A world of one process without any process group."""

    is_main, size, rank, device = True, 1, 0, torch.device("cpu")

    @staticmethod
    def any(flag: bool) -> bool:
        return flag


def probe_set(num=12, side=70):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (num, side, side, 3), dtype=np.uint8)
    masks = np.zeros((num, side, side), np.uint8)
    masks[:, :32] = 1
    images[:, :32] //= 4
    return ProbeSet(images, np.arange(num) // 2, np.arange(num) % 2, masks)


def train(folder, run, *overrides, processes=1):
    command = [sys.executable, SCRIPTS / "launch.py", "--processes", str(processes), "--", SCRIPTS / "pretrain.py"]
    command += ["--config", "recipe.yaml", "--run-dir", f"runs/{run}/main", "--probe", "probe.npz", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "runs" / run / "main"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probing")
    (folder / "images").mkdir()
    for index, pixels in enumerate(np.random.default_rng(1).integers(0, 255, (8, 80, 80, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
    (folder / "recipe.yaml").write_text(RECIPE)
    write_probe_set(folder / "probe.npz", probe_set())
    return folder


@pytest.mark.long
def test_a_probed_run_learns_the_same_and_names_its_best_teacher(folder):
    plain = train(folder, "plain")
    probed = train(folder, "probed", "evaluation.probe_every=2", "evaluation.select=best:probe_knn")
    weights = [torch.load(run / "eval/training_5/teacher_checkpoint.pth") for run in (plain, probed)]
    first, second = (network["teacher"] for network in weights)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    metrics = read_metrics(probed)
    asked = metrics["probe_knn"].dropna()
    assert list(asked.index) == [0, 1, 3, 5] and asked.between(0, 1).all()
    assert {"probe_dense", "probe_rankme", "probe_mean_cosine", "probe_seconds", "total_loss"} <= set(metrics.columns)
    assert metrics["probe_difference_low"].dropna().index.tolist() == [1, 3, 5]
    selected = read_json(probed / "final.json")["selected"]
    best = asked.iloc[1:].idxmax()
    assert selected["out_of"] == 3 and selected["iteration"] == best and selected["value"] == asked[best]
    assert read_json(probed / "final.json")["teacher"] == f"eval/training_{best}/teacher_checkpoint.pth"
    assert read_json(plain / "final.json")["selected"] == {
        "select": "last", "iteration": 5, "why": "it is the last", "out_of": 1,
    }  # fmt: skip
    of_two = read_metrics(train(folder, "of_two", "evaluation.probe_every=6", processes=2))
    assert of_two["probe_knn"][0] == asked[0]  # the same start, asked by two processes


@pytest.mark.long
def test_a_run_that_is_worse_than_its_start_ends_and_gives_its_best_teacher(folder):
    """Nobody can tell these labels; a start that did is put in place of the run's own before it goes on."""
    rng = np.random.default_rng(2)
    images = rng.integers(0, 255, (40, 70, 70, 3))
    images[:, :32] = images[:, :32] * 0.98
    made = probe_set(40)
    write_probe_set(folder / "hard.npz", ProbeSet(images.astype(np.uint8), made.groups, made.labels, made.masks))
    asking = ["evaluation.probe_every=1", "evaluation.stop_when_worse=true", "evaluation.select=best:probe_dense"]
    run = train(folder, "worse", *asking, "--probe", "hard.npz")
    assert read_json(run / "final.json")["iteration"] == 5 and not read_json(run / "final.json")["stopped_early"]
    answers = read_arrays(run / "probe_start.npz")
    write_arrays(run / "probe_start.npz", **answers | {"knn": np.eye(2, dtype=np.float32)[made.labels]})
    train(folder, "worse", "optim.epochs=10", *asking, "--probe", "hard.npz")
    final, metrics = read_json(run / "final.json"), read_metrics(run)
    assert final["stopped_early"] and final["iteration"] == 8  # of 30, after three probes
    assert (metrics["probe_difference_high"].dropna().iloc[-3:] < 0).all()
    assert metrics.index[-1] == 8
    exported = sorted(int(path.name.rpartition("_")[2]) for path in (run / "eval").glob("training_*"))
    asked, selected = metrics["probe_dense"].dropna(), final["selected"]
    assert len(set(asked[exported])) > 1
    assert selected["iteration"] in exported and selected["value"] == asked.max() == asked[exported].max()
    assert final["teacher"] == f"eval/training_{selected['iteration']}/teacher_checkpoint.pth"
    # and it stays ended
    train(folder, "worse", "optim.epochs=10", *asking, "--probe", "hard.npz")
    assert read_metrics(run).index[-1] == 8


def test_a_probe_set_comes_back(tmp_path):
    write_probe_set(tmp_path / "probe.npz", probe_set())
    for name, value in vars(read_probe_set(tmp_path / "probe.npz")).items():
        assert np.array_equal(value, getattr(probe_set(), name))


def test_a_run_that_got_worse_ends_after_three_probes(tmp_path):
    probe = TeacherProbe(probe_set(), tmp_path, Alone(), 16, 4)
    highs = {0: None, 9: -0.1, 19: -0.1, 29: 0.1, 39: -0.1, 49: -0.2}
    for iteration, high in highs.items():
        line = {"iteration": iteration, "total_loss": 1.0}
        append_metrics(tmp_path, line | ({} if high is None else {"probe_difference_high": high}))
    assert not probe.has_got_worse(100)
    append_metrics(tmp_path, {"iteration": 59, "probe_difference_high": -0.3})
    assert probe.has_got_worse(100)
    assert not probe.has_got_worse(600)  # within its first tenth nothing counts


def test_answers_are_held_against_the_start(tmp_path):
    probe = TeacherProbe(probe_set(40), tmp_path, Alone(), 16, 4)
    rng = np.random.default_rng(0)
    labels = probe.probe.labels
    blind, patches = rng.normal(size=(40, 8)).astype(np.float32), np.zeros((0, 0, 8), np.float32)
    start = probe._measured(blind, patches, start=True)
    assert "probe_difference" not in start and start["probe_knn"] < 0.8
    knowing = blind + 20 * labels[:, None]
    line = probe._measured(knowing, patches, start=False)
    assert line["probe_knn"] == 1
    assert line["probe_difference"] == pytest.approx(1 - start["probe_knn"])
    assert 0 < line["probe_difference_low"] <= line["probe_difference"] <= line["probe_difference_high"]
    same = probe._measured(blind, patches, start=False)
    assert same["probe_difference"] == same["probe_difference_low"] == same["probe_difference_high"] == 0


def test_patches_are_told_by_a_ridge_classifier(tmp_path):
    probe = TeacherProbe(probe_set(), tmp_path, Alone(), 16, 4)
    labels = probe._patch_labels()
    assert probe.grid == 4 and labels.shape == (12, 16)
    assert (labels.reshape(12, 4, 4)[:, :2] == 1).all() and (labels.reshape(12, 4, 4)[:, 2:] == 0).all()
    rng = np.random.default_rng(0)
    patches = (rng.normal(size=(12, 16, 5)) + 10 * labels[..., None]).astype(np.float32)
    confusions = probe._dense(patches)
    assert confusions.sum() == 12 * 16 and np.trace(confusions.sum(0)) == 12 * 16


def test_pixels_of_255_and_patches_of_nothing_else_do_not_count(tmp_path):
    images = probe_set()
    images.masks[:, :, 20:] = 255
    probe = TeacherProbe(images, tmp_path, Alone(), 16, 4)
    labels = probe._patch_labels().reshape(12, 4, 4)
    assert (labels[:, :2, :2] == 1).all() and (labels[:, 2:, :2] == 0).all() and (labels[:, :, 2:] == -1).all()
    patches = np.random.default_rng(0).normal(size=(12, 16, 5)) + 10 * labels.reshape(12, 16)[..., None]
    confusions = probe._dense(patches.astype(np.float32))
    assert confusions.shape == (12, 2, 2) and confusions.sum() == np.trace(confusions.sum(0)) == 12 * 8


@pytest.mark.parametrize("alone", ["labels", "groups"])
def test_one_class_or_one_case_alone_is_not_asked_about(tmp_path, caplog, alone):
    images = probe_set()
    getattr(images, alone)[:] = 0
    probe = TeacherProbe(images, tmp_path, Alone(), 16, 4)
    assert "one class or one case alone" in caplog.text
    line = probe._measured(np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32), np.zeros((0, 0, 8)), True)
    assert "probe_knn" not in line and "probe_rankme" in line


def test_the_best_probe_is_of_an_exported_teacher(tmp_path):
    for iteration, value in {0: 0.5, 9: 0.7, 19: 0.9, 29: 0.7}.items():
        append_metrics(tmp_path, {"iteration": iteration, "probe_knn": value})
    assert best_probe(tmp_path, [9, 29], "probe_knn") == (9, 0.7)
    assert best_probe(tmp_path, [9, 19], "probe_knn") == (19, 0.9)
    assert best_probe(tmp_path, [5], "probe_knn") is None
    assert best_probe(tmp_path, [9], "probe_dense") is None
