"""Trainings of a small segmenter: what they end with, that they go on bit for bit, and what they refuse."""

import dataclasses
import multiprocessing
import os
import shutil
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

from dinoscope.errors import CheckpointError, ConfigError, SealError, StoppedError
from dinoscope.features.encoders import load_encoder
from dinoscope.files import read_json
from dinoscope.segment import train
from dinoscope.segment.evaluate import measure
from dinoscope.segment.files import load_segmenter
from dinoscope.segment.metrics import ConfusionMatrix
from dinoscope.segment.published import published_encoder
from dinoscope.segment.setup import build_segmenter, told_of_encoder
from dinoscope.segment.train import inference_of, train_segmenter
from dinoscope.train.distributed import World
from segmentation_samples import ALONE, fresh_segmenter, job_on, write_discs
from tiny_segmenter import write_dinov2

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def discs(tmp_path_factory):
    return write_discs(tmp_path_factory.mktemp("data") / "discs")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tmp_path_factory.mktemp("encoder")


def run(discs, weights, run_dir, save_seconds=300.0, workers=0, debug=False, **settings):
    job = job_on(discs, run_dir, workers=workers, **settings)
    job = dataclasses.replace(job, save_seconds=save_seconds, debug=debug)
    return train_segmenter(fresh_segmenter(weights, job.settings), job, ALONE)


def crash_before(monkeypatch, step):
    """Ends a training by an error of ours, as a kill would, before a step."""
    real = train.train_step

    def crashing(model, optimizer, batch, number, *others, **more):
        if number == step:
            raise ZeroDivisionError
        return real(model, optimizer, batch, number, *others, **more)

    monkeypatch.setattr(train, "train_step", crashing)


def tensors_of(run_dir):
    return load_file(run_dir / "segmenter" / "segmenter.safetensors")


def same(one, two):
    assert one.keys() == two.keys()
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("decoder", ["linear", "fpn"])
def test_it_learns_and_keeps_its_best(discs, weights, tmp_path, decoder):
    final = run(discs, weights, tmp_path / "run", decoder=decoder, epochs=30, debug=decoder == "fpn", eval_epochs=10)
    assert final == read_json(tmp_path / "run" / "final.json")
    assert final["validation"]["miou"] > 0.6
    logged = [line for line in (tmp_path / "run" / "training_metrics.json").read_text().splitlines() if "epoch" in line]
    assert len(logged) == 3
    assert len(list((tmp_path / "run").glob("debug/*.png"))) == (3 if decoder == "fpn" else 0)
    model = load_segmenter(tmp_path / "run" / "segmenter", load_encoder(weights / "encoder.pth"))
    job = job_on(discs, tmp_path / "run", decoder=decoder)
    measured = measure(model, job.validation, inference_of(job.settings), CPU)
    assert measured.matrix.miou() == final["validation"]["miou"] == model.card.measures["validation_miou"]
    assert model.card.classes == ("background", "disc")
    assert final["trainable_parameters"] == sum(p.numel() for p in model.trainable_parameters())


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_an_interrupted_training_goes_on_bit_for_bit(discs, weights, tmp_path, monkeypatch, step):
    whole = run(discs, weights, tmp_path / "whole", dice_weight=0.5)
    with monkeypatch.context() as patched:
        crash_before(patched, step)
        with pytest.raises(ZeroDivisionError):
            run(discs, weights, tmp_path / "cut", save_seconds=0.0, dice_weight=0.5)
    assert not (tmp_path / "cut" / "final.json").exists()
    assert torch.load(tmp_path / "cut" / "state.pt")["at"]["next_step"] == step
    cut = run(discs, weights, tmp_path / "cut", workers=1, dice_weight=0.5)
    states = [torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "cut")]
    assert same(states[0]["model"], states[1]["model"])
    moments = [[value for each in state["optimizer"]["state"].values() for value in each.values()] for state in states]
    assert all(torch.equal(a, b) for a, b in zip(*moments, strict=True))
    assert same(tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "cut"))
    for key in ("validation", "best_epoch", "steps"):
        assert whole[key] == cut[key]
    starts = read_json(tmp_path / "cut" / "provenance.json")["starts"]
    assert [start["first_iteration"] for start in starts] == [0, step]
    assert starts[0]["code"]["dinoscope"] and len(starts[0]["machines"]) == 1


def test_a_save_that_is_older_is_enough(discs, weights, tmp_path, monkeypatch):
    """Between two saves a kill loses steps, never the result: the weights kept as best may be newer than the state."""
    run(discs, weights, tmp_path / "whole", epochs=6)
    with monkeypatch.context() as patched:
        crash_before(patched, 9)
        with pytest.raises(ZeroDivisionError):
            run(discs, weights, tmp_path / "cut", epochs=6)
    assert torch.load(tmp_path / "cut" / "state.pt")["at"]["next_step"] < 9
    run(discs, weights, tmp_path / "cut", epochs=6)
    assert same(tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "cut"))


def test_a_best_that_a_kill_took_is_replaced(discs, weights, tmp_path, monkeypatch):
    """Between the two renames of a save there is none; what comes next is kept, although it is not better."""
    with monkeypatch.context() as patched:
        crash_before(patched, 5)
        with pytest.raises(ZeroDivisionError):
            run(discs, weights, tmp_path / "run", save_seconds=0.0)
    shutil.rmtree(tmp_path / "run" / "segmenter")
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    state["at"]["best_miou"] = 2.0
    torch.save(state, tmp_path / "run" / "state.pt")
    final = run(discs, weights, tmp_path / "run")
    assert final["best_epoch"] > 2
    kept = load_segmenter(tmp_path / "run", load_encoder(weights / "encoder.pth"))
    assert kept.card.measures["validation_miou"] == final["validation"]["miou"]


@pytest.mark.parametrize("state", [True, False])
def test_a_finished_training_is_left_alone(discs, weights, tmp_path, state):
    first = run(discs, weights, tmp_path / "run", epochs=1)
    if not state:
        (tmp_path / "run" / "state.pt").unlink()
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert run(discs, weights, tmp_path / "run", epochs=1) == first
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_other_settings_encoders_and_images_are_refused(discs, weights, tmp_path):
    run(discs, weights, tmp_path / "run", epochs=1)
    with pytest.raises(SealError, match=r"lr was 0.003 and is now 0.1; change them back, give the task a new name"):
        run(discs, weights, tmp_path / "run", epochs=1, lr=0.1)
    with pytest.raises(SealError, match=r"rank was 3 and is now None.* trainable was 'lora' and is now 'decoder'"):
        run(discs, weights, tmp_path / "run", epochs=1, trainable="decoder")
    job = dataclasses.replace(job_on(discs, tmp_path / "run", epochs=1), data_sha256="f" * 64)
    with pytest.raises(SealError, match="was begun with other images or masks"):
        train_segmenter(fresh_segmenter(weights, job.settings), job, ALONE)
    job, other = job_on(discs, tmp_path / "run", epochs=1), fresh_segmenter(weights, job.settings)
    other.encoder_sha256 = "e" * 64
    with pytest.raises(SealError, match="was begun with another encoder"):
        train_segmenter(other, job, ALONE)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_request_to_stop_saves_where_it_is(discs, weights, tmp_path, monkeypatch, workers):
    """Also one that reaches the whole family of processes, as a queue or a terminal sends it."""
    real = train.train_step

    def stopping(model, optimizer, batch, number, *others, **more):
        if number == 2:
            family = [child.pid for child in multiprocessing.active_children()]
            assert len(family) == workers
            # by a third process: PyTorch's workers heed who sends it
            subprocess.run(["kill", "-TERM", *map(str, [*family, os.getpid()])], check=True)
            time.sleep(0.5)
        return real(model, optimizer, batch, number, *others, **more)

    with monkeypatch.context() as patched:
        patched.setattr(train, "train_step", stopping)
        with pytest.raises(StoppedError, match="saved its state after step 3 of 8; give the same command again"):
            run(discs, weights, tmp_path / "run", workers=workers)
    assert run(discs, weights, tmp_path / "run")["steps"] == 8
    run(discs, weights, tmp_path / "whole")
    assert same(tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "run"))


def test_damage_and_loss_of_numbers_are_told(discs, weights, tmp_path):
    with pytest.raises(ConfigError, match=r"the loss of run is (nan|inf) at step \d+: lower lr"):
        run(discs, weights, tmp_path / "run", lr=1e30, clip_grad=0.0, epochs=10)
    run(discs, weights, tmp_path / "other", epochs=1)
    (tmp_path / "other" / "state.pt").write_bytes(b"nothing")
    (tmp_path / "other" / "final.json").unlink()
    with pytest.raises(CheckpointError, match=r"state\.pt cannot be read"):
        run(discs, weights, tmp_path / "other", epochs=1)


def test_sizes_of_no_whole_patches_are_refused(discs, weights, tmp_path):
    with pytest.raises(ConfigError, match=r"img_dim 50 64 .* height 50: take 48 or 64"):
        run(discs, weights, tmp_path / "run", img_dim=(50, 64))


def test_batch_norm_is_trained_in_one_process_alone(discs, weights, tmp_path):
    job = job_on(discs, tmp_path / "run", decoder="public_fpn", img_dim=(192, 192), epochs=1)
    with pytest.raises(ConfigError, match=r"decoder public_fpn has batch norm.* in 2 processes.* take decoder fpn"):
        train_segmenter(fresh_segmenter(weights, job.settings), job, World(0, 0, 2, CPU))
    assert train_segmenter(fresh_segmenter(weights, job.settings), job, ALONE)["steps"] == 2


@pytest.mark.parametrize(
    ("trainable", "frozen"), [("decoder", True), ("lora", True), ("last_n", False), ("full", False)]
)
def test_what_is_frozen_stays(discs, weights, tmp_path, trainable, frozen):
    job = job_on(discs, tmp_path / trainable, trainable=trainable, epochs=1)
    model = fresh_segmenter(weights, job.settings)
    before = {name: tensor.clone() for name, tensor in load_encoder(weights / "encoder.pth").model.state_dict().items()}
    train_segmenter(model, job, ALONE)
    after = {name: tensor for name, tensor in model.encoder.state_dict().items() if ".lora." not in name}
    assert same(before, after) == frozen


def test_measured_counts_are_those_of_each_image(discs, weights, tmp_path):
    job = job_on(discs, tmp_path)
    model = fresh_segmenter(weights, job.settings).eval()
    measured = measure(model, job.training, inference_of(job.settings), CPU)
    total = ConfusionMatrix(2)
    from dinoscope.segment.evaluate import predict_classes

    for index, sample in enumerate(job.training):
        one = ConfusionMatrix(2)
        one.update(predict_classes(model, sample.image, inference_of(job.settings), CPU), sample.mask)
        assert measured.image_miou()[index] == pytest.approx(one.miou(), nan_ok=True)
        total += one
    assert (total.counts == measured.matrix.counts).all()
    assert measured.summary(job.training.classes)["miou"] == total.miou()


def test_dinov2_with_registers_is_trained_and_told(discs, tmp_path):
    folder = write_dinov2(tmp_path / "dinov2-with-registers-small", registers=4)
    job = job_on(discs, tmp_path / "run", img_dim=(42, 56), epochs=1)
    model = build_segmenter(load_encoder(folder), 2, job.settings)
    before = {name: tensor.clone() for name, tensor in model.trainable_state().items()}
    train_segmenter(model, job, ALONE)
    after = tensors_of(tmp_path / "run")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before if name.endswith(".b"))
    told = told_of_encoder(load_encoder(folder))
    assert (told["registers"], told["encoder_kind"]) == (4, "Hugging Face dinov2_with_registers")
    assert published_encoder("dinov2", "small", tmp_path) == folder
