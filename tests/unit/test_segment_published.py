"""The settings that would rerun the rows of dinov2-finetune's tables: all planned, none besides, as published."""

from pathlib import Path

import pytest
import yaml

from dinoscope.plan import make_plan
from dinoscope.plan_segmentation import SegmentJobs
from dinoscope.segment.tables import components
from dinoscope.segment.transforms import check_img_dim
from dinoscope.slides.table import read_rows

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "config/segmentation"
PATCHES = {"dinov2_large": 14, "dinov3_large": 16}


@pytest.fixture(params=["voc", "ade20k"])
def jobs(request):
    """What Snakemake plans with this file beside config/config.yaml."""
    config = yaml.safe_load((REPOSITORY / "config/config.yaml").read_text())
    for section, keys in yaml.safe_load((FOLDER / f"{request.param}.yaml").read_text()).items():
        config[section] = config[section] | keys if isinstance(keys, dict) else keys
    config["slides"]["source"] = str(REPOSITORY / config["slides"]["source"])
    return request.param, SegmentJobs(make_plan(config, REPOSITORY, check_files=False))


def published(dataset):
    _, rows = read_rows(FOLDER / "published.tsv")
    return [row for _, row in rows if row["task"].startswith(dataset)]


def test_every_row_is_planned_and_none_besides(jobs):
    dataset, planned = jobs
    trainings = {
        (task, model, variant)
        for task in planned.tasks
        for model in planned.models(task)
        for variant in planned.variants(task)
    }
    assert trainings == {(row["task"], row["encoder"], row["variant"]) for row in published(dataset)}
    assert len(trainings) == 4


def test_rows_say_what_their_trainings_do(jobs):
    dataset, planned = jobs
    for row in published(dataset):
        settings = planned.settings(row["task"], row["variant"])
        assert components(settings.trainable, settings.decoder) == row["finetuned_components"]
        assert settings.dataset == dataset and settings.epochs == 100 and settings.rank == 3
        assert settings.views == "photographs"
        check_img_dim(*settings.img_dim, PATCHES[row["encoder"]])
        assert row["encoder"].startswith(row["pretraining"].lower())
        assert planned.corruption_arguments(row["task"]) == ["--kinds", "common", "--severities", "5"]


def test_numbers_are_the_published_ones(shared):
    """As the tool's own description has them: tables in HTML."""
    text = (shared / "seeds/dinov2_finetune_lora_segmentation.txt").read_text()
    found = []
    for block in text.split("<tr>")[1:]:
        cells = [
            part.split(">", 1)[1].strip() for part in block.split("</tr>")[0].replace("</td>", "").split("<td")[1:]
        ]
        if cells:
            found.append([cell.rstrip("%").strip() for cell in cells])
    assert len(found) == 8
    for row, cells in zip([*published("voc"), *published("ade20k")], found, strict=True):
        assert [row[name] for name in ("finetuned_components", "pretraining", "model")] == cells[:3]
        assert row["file"] == cells[7]
        assert float(row["miou"]) * 100 == pytest.approx(float(cells[5]))
        assert (
            row.get("miou_level_5") is None
            if cells[6] == "-"
            else float(row["miou_level_5"]) * 100 == pytest.approx(float(cells[6]))
        )
        in_comments = (FOLDER / f"{row['task'].partition('_')[0]}.yaml").read_text()
        line = next(
            line for line in in_comments.splitlines() if line.startswith(f"#   {cells[0]} ") and cells[1] in line
        )
        assert cells[5] in line and cells[6] in line
