"""Which results are copied to object storage."""

import pytest

from dinoscope.plan import make_plan
from dinoscope.plan_evaluation import EvaluationJobs
from dinoscope.plan_features import FeatureJobs
from dinoscope.plan_segmentation import SegmentJobs
from dinoscope.plan_storage import StorageJobs
from snakemake_runs import REPOSITORY


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "root.yaml").write_text("student: {arch: vit_nano}\n")
    rows = [f"S{number}\ta.svs\tP{number}\t{'train' if number < 4 else 'eval,features'}" for number in range(8)]
    (tmp_path / "slides.tsv").write_text("\n".join(["slide_id\tpath\tcase_id\tuse", *rows]) + "\n")
    (tmp_path / "cells/a").mkdir(parents=True)
    return tmp_path


def objects(upload, tasks):
    config = {
        "slides": {"source": "slides.tsv"},
        "runs": {"mine": {"recipe": "root.yaml"}},
        "evaluation": {"tile_sets": {"cells": {"folder": "cells"}}},
        "segmentation": {"tasks": tasks},
        "storage": {"results": "s3://bucket/ours", "upload": upload},
    }
    plan = make_plan(config, REPOSITORY)
    return StorageJobs(plan, EvaluationJobs(plan, FeatureJobs(plan)), SegmentJobs(plan)).objects()


def test_tables_figures_and_class_maps_are_copied(folder):
    task = {"dataset": "folder", "root": "discs", "models": ["mine"], "mpp": 0.5, "slides": ["S5"]}
    found = objects(["evaluation", "segmentation"], {"plain": task, "hard": task | {"corruptions": ["fog"]}})
    assert all(address.startswith("s3://bucket/ours/") for address in found) and len(set(found)) == len(found)
    names = {address.removeprefix("s3://bucket/ours/") for address in found}
    of_evaluation = {name for name in names if name.startswith("evaluation/")}
    assert of_evaluation == {
        *("evaluation/summary.tsv", "evaluation/summary.json"),
        *("evaluation/tiles-cells/figure.png", "evaluation/descriptive/figure.png"),
    }
    assert "segmentation/comparison.tsv" in names
    assert "segmentation/plain/mine/lora_linear_seed0/slides/S5.geojson" in names
    assert "segmentation/hard/mine/lora_linear_seed0/corruptions.tsv" in names
    assert "segmentation/plain/mine/lora_linear_seed0/corruptions.tsv" not in names


def test_what_there_is_none_of_is_not_asked_for(folder):
    assert objects(["segmentation"], {}) == []
