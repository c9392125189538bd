"""What evaluation and segmentation will take, against windows, operations and parameters of the real thing."""

from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from dinoscope.budget.budget import make_budget
from dinoscope.budget.evaluation import evaluation_products, evaluation_work
from dinoscope.budget.models import Device, ModelSizes
from dinoscope.budget.segmentation import _num_trained, _num_windows, _Passes, segmentation_work
from dinoscope.budget.tiles import slide_sizes
from dinoscope.budget.work import Work, seconds_of
from dinoscope.features.encoders import LoadedEncoder
from dinoscope.models.registry import settings_from_config
from dinoscope.plan import make_plan
from dinoscope.segment.inference import Inference, _batches
from dinoscope.segment.settings import TrainSettings
from dinoscope.segment.setup import build_segmenter
from dinoscope.train.starting import fresh_backbone
from segmentation_samples import write_discs
from snakemake_runs import NANO_RECIPE
from tiny_slides import write_slide

REPOSITORY = Path(__file__).parents[2]
DEVICE = Device("cuda", 4, 8e12, "", None, 4, 0.4, 0.5)
TASK = {
    "dataset": "folder", "root": "discs", "data": {"instance": "disc"}, "mpp": 1.0, "models": ["base"],
    "slides": ["s0"], "img_dim": [48, 64], "epochs": 3, "corruptions": ["contrast", "fog"], "severities": [1, 3, 5],
    "seeds": [0, 1],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Four slides, of which three are held out, with a label; a folder of tiles, and images with masks."""
    monkeypatch.chdir(tmp_path)
    Path("root.yaml").write_text(NANO_RECIPE)
    for index in range(4):
        write_slide(Path(f"s{index}.tiff"), seed=index, side=512)
    uses = ("train,features", "eval,features", "eval,features", "eval,features")
    rows = "".join(f"s{index}\ts{index}.tiff\tp{index}\t{use}\n" for index, use in enumerate(uses))
    Path("slides.tsv").write_text("slide_id\tpath\tcase_id\tuse\n" + rows)
    Path("labels.tsv").write_text("slide_id\tgrade\ns0\tlow\ns1\tlow\ns2\thigh\ns3\thigh\n")
    write_discs(Path("discs"))
    write_discs(Path("cells/one"), splits=("train",) * 5)
    return tmp_path


def plan_of(evaluation=None, task=None):
    config = {
        "slides": {"source": "slides.tsv"},
        "labels": "labels.tsv",
        "tiling": {"sets": {"train": {"tile_px": 128, "mpp": 1.0}, "features": {"tile_px": 64, "mpp": 1.0}}},
        "runs": {"pretrain": {"recipe": "root.yaml"}},
        "features": {"models": ["base"]},
        "evaluation": {"selection": {"fraction": 0}, "tile_sets": {"cells": {"folder": "cells"}}, **(evaluation or {})},
        "segmentation": {"tasks": {"discs": TASK | (task or {})}},
    }
    return make_plan(yaml.safe_load(yaml.safe_dump(config)), REPOSITORY, check_files=False)


def sizes_of(plan):
    by_id = {slide.slide_id: slide for slide in slide_sizes(plan)}
    return by_id, ModelSizes(plan, DEVICE, dict.fromkeys(plan.runs, 100))


def work_of(work, plan):
    """Rule -> seconds, operations of forward passes, operations of training."""
    found = {}
    for each in work(plan, *sizes_of(plan)):
        of = found.setdefault(each.rule, Counter())
        of.update(seconds=each.seconds, forward=each.forward, trained=each.trained)
    return found


@pytest.mark.parametrize("overlap", [0.0, 1 / 3, 0.5])
@pytest.mark.parametrize("size_hw", [(48, 64), (49, 64), (300, 517), (20, 30)])
def test_windows_are_as_many_as_are_laid(size_hw, overlap):
    window_hw = (48, 64)
    laid = sum(map(len, _batches(tuple(map(max, size_hw, window_hw)), Inference(window_hw, overlap=overlap))))
    rows, columns = (_num_windows(side, window, overlap) for side, window in zip(size_hw, window_hw, strict=True))
    assert rows * columns == laid


@pytest.mark.parametrize("decoder", ["linear", "fpn"])
@pytest.mark.parametrize("trainable", ["decoder", "lora", "last_n", "full"])
def test_operations_and_parameters_are_those_of_a_real_segmenter(folder, trainable, decoder):
    Path("root.yaml").write_text(NANO_RECIPE.replace("vit_nano", "vit_micro"))  # the pyramid wants four blocks
    plan = plan_of()
    models = sizes_of(plan)[1]
    settings = TrainSettings(img_dim=(64, 64), trainable=trainable, decoder=decoder)
    backbone = fresh_backbone(settings_from_config(plan.base_run.settings.student), seed=0)
    encoder = LoadedEncoder(backbone.requires_grad_(False), "digest", "backbone vit_micro")
    segmenter = build_segmenter(encoder, 2, settings).train()
    counter = FlopCounterMode(display=False)
    with counter:
        logits = segmenter(torch.zeros(1, 3, 64, 64))
    passes = _Passes(models, "base", settings)
    assert passes.view == pytest.approx(counter.get_total_flops(), rel=0.1)
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    if decoder == "linear":
        whole = counter.get_total_flops() + backward.get_total_flops()
        assert passes.view * passes.trained == pytest.approx(whole, rel=0.25)
    trained = sum(parameter.numel() for parameter in segmenter.parameters() if parameter.requires_grad)
    assert _num_trained(models, "base", settings) == pytest.approx(trained, rel=0.1, abs=200)


def test_segmentation_follows_its_settings(folder):
    before = work_of(segmentation_work, plan_of())
    longer = work_of(segmentation_work, plan_of(task={"epochs": 6}))
    assert longer["segment_train"] == {key: 2 * value for key, value in before["segment_train"].items()}
    # two ways to train, two seeds, and a pass over the images as they are beside two kinds at three severities
    evaluated, corrupted = before["segment_evaluate"]["forward"], before["segment_corruptions"]["forward"]
    assert corrupted == pytest.approx(7 * evaluated)
    more = work_of(segmentation_work, plan_of(task={"seeds": [0, 1, 2]}))
    assert more["segment_evaluate"]["forward"] == pytest.approx(1.5 * evaluated)
    assert more["segment_predict_slide"] == before["segment_predict_slide"]  # by the first seed alone
    finer = work_of(segmentation_work, plan_of(task={"mpp": 0.5}))["segment_predict_slide"]["forward"]
    assert finer == pytest.approx(4 * before["segment_predict_slide"]["forward"])


def test_evaluation_follows_its_settings(folder):
    before = work_of(evaluation_work, plan_of())
    folds = work_of(evaluation_work, plan_of(evaluation={"repeats": 10}))["measure_model"]["seconds"]
    few = work_of(evaluation_work, plan_of(evaluation={"attention": False}))["measure_model"]["seconds"]
    assert before["measure_model"]["seconds"] * 1.5 < folds < before["measure_model"]["seconds"] * 2
    assert few < before["measure_model"]["seconds"]
    shifted = work_of(evaluation_work, plan_of(evaluation={"robustness": True}))["embed_images"]["forward"]
    assert shifted == pytest.approx(7 * before["embed_images"]["forward"])
    assert work_of(evaluation_work, plan_of(evaluation={"enabled": False})) == {}
    assert "extract_features" not in work_of(evaluation_work, plan_of(evaluation={"baselines": False}))


def test_baselines_have_room_of_their_own(folder):
    plan = plan_of()
    folders = {product.folder: product for product in evaluation_products(plan, *sizes_of(plan))}
    assert folders.keys() == {"features/color-histogram", "features/thumbnail", "evaluation"}
    tiles = sum(slide.num_tiles["features"] for slide in slide_sizes(plan) if slide.slide_id != "s0")
    assert folders["features/thumbnail"].bytes == tiles * (192 * 2 + 16) + 3 * 12_000
    plan = plan_of(evaluation={"baselines": False})
    assert {product.folder for product in evaluation_products(plan, *sizes_of(plan))} == {"evaluation"}


def test_hours_of_all_of_it_are_in_the_budget(folder):
    budget = make_budget(plan_of(), groups={}, profiles=[], gpu="a100")
    for rule in ("measure_model", "embed_images", "segment_train", "segment_corruptions", "segment_predict_slide"):
        assert budget.hours[rule] > 0, rule
    assert budget.jobs["segment_train"] == 4
    assert {"segmentation/discs", "evaluation"} <= {product.folder for product in budget.products}


def test_seconds_are_of_one_gpu():
    assert seconds_of([Work("a", 3.0, 1e12, 2e12), Work("a", 1.0)], DEVICE) == {"a": 4 + 1e12 / 1e12 + 2e12 / 0.8e12}


def test_data_that_is_not_there_is_guessed_and_stops_nothing(folder):
    known = work_of(segmentation_work, plan_of())["segment_train"]["trained"]
    Path("discs").rename("elsewhere")
    assert work_of(segmentation_work, plan_of())["segment_train"]["trained"] > known
