"""Tables and pictures of segmenters: means over seeds, intervals, what the report shows, what a page looks like."""

import cv2
import numpy as np
import pytest

from dinoscope.files import write_json
from dinoscope.segment.evaluate import interval
from dinoscope.segment.pictures import IGNORED_COLOR, MISSED, SPURIOUS, Example, draw_examples, evenly_ranked, in_colors
from dinoscope.segment.pictures import mistakes as mistakes_of
from dinoscope.segment.tables import COMPARISON_COLUMNS, RUN_COLUMNS, components, read_table, write_comparison
from dinoscope.visualize.report import build_report

PALETTE = np.array([[0, 0, 0], [200, 0, 0]], np.uint8)


def write_evaluation(folder, seed, miou, *, trainable="lora", corrupted=None):
    told = {
        "task": "cells", "model_name": "gram", "architecture": "ViT-S/16", "encoder_parameters": 21_600_000,
        "registers": 4, "miou": miou, "dice": 0.9, "pixel_accuracy": 0.95, "miou_interval": [miou - 0.1, miou + 0.1],
        "validation_miou": 0.7, "best_epoch": 3, "images": 20, "split": "test", "trained_parameters": 40_000,
        "file": "/".join(folder.parts[-3:]), "settings": {"trainable": trainable, "decoder": "linear", "seed": seed},
    }  # fmt: skip
    write_json(folder / "evaluation.json", told)
    if corrupted is not None:
        write_json(folder / "corruptions.json", {"miou_level_5": corrupted, "relative_drop": 1 - corrupted / miou})
    return folder / "evaluation.json"


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results" / "segmentation"
    files = [
        write_evaluation(folder / "cells" / "gram" / f"{way}_linear_seed{seed}", seed, miou, trainable=way, corrupted=low)  # noqa: E501
        for way, seed, miou, low in (
            ("decoder", 0, 0.70, 0.50), ("decoder", 1, 0.74, 0.52), ("lora", 0, 0.80, 0.60), ("lora", 1, 0.82, None),
        )
    ]  # fmt: skip
    write_comparison(files, folder / "comparison.tsv", folder / "runs.tsv")
    return tmp_path / "results"


def test_seeds_become_one_row_with_mean_and_range(results):
    rows = read_table(results / "segmentation" / "comparison.tsv")
    assert list(rows[0]) == list(COMPARISON_COLUMNS)
    assert [row["finetuned_components"] for row in rows] == ["1x1 Conv decoder", "LoRA + 1x1 Conv decoder"]
    assert [(row["miou"], row["miou_lowest"], row["miou_highest"], row["seeds"]) for row in rows] == [
        ("0.7200", "0.7000", "0.7400", "2"),
        ("0.8100", "0.8000", "0.8200", "2"),
    ]
    assert [(row["miou_level_5"], row["pathology_miou_level_5"]) for row in rows] == [("0.5100", ""), ("0.6000", "")]
    runs = read_table(results / "segmentation" / "runs.tsv")
    assert list(runs[0]) == list(RUN_COLUMNS)
    assert [(run["seed"], run["miou"], run["miou_level_5"]) for run in runs[2:]] == [
        ("0", "0.8000", "0.6000"),
        ("1", "0.8200", ""),
    ]


def test_components_read_as_in_the_public_tables():
    assert components("decoder", "linear") == "1x1 Conv decoder"
    assert components("lora", "linear") == "LoRA + 1x1 Conv decoder"
    assert components("lora", "fpn") == "LoRA + FPN decoder"


def test_the_interval_draws_whole_groups():
    rng = np.random.default_rng(0)
    truth, said = rng.integers(100, 900, (2, 12, 2))
    per_image = np.stack([np.minimum(truth, said) // 2, truth, said], axis=2)
    each_alone = interval(per_image, [f"i{number}" for number in range(12)], draws=2000, seed=0)
    shared, sizes = per_image[..., 0].sum(0), per_image[..., 1:].sum((0, 2))
    assert each_alone[0] < (shared / (sizes - shared)).mean() < each_alone[1]
    # two images of a group count as one observation: as wide as with half as many images
    twice = np.repeat(per_image, 2, axis=0)
    groups = [f"g{number // 2}" for number in range(24)]
    assert interval(twice, groups, draws=2000, seed=0) == each_alone
    as_if_alone = interval(twice, [str(number) for number in range(24)], draws=2000, seed=0)
    assert as_if_alone[1] - as_if_alone[0] < 0.85 * (each_alone[1] - each_alone[0])
    assert interval(per_image, ["a"] * 6 + ["b"] * 6, draws=10, seed=0) is None


def test_errors_have_their_colours():
    image = np.full((2, 2, 3), 100, np.uint8)
    truth, said = np.array([[0, 1], [0, 255]], np.uint8), np.array([[0, 0], [1, 1]], np.uint8)
    shown = mistakes_of(image, truth, said, 2)
    assert shown[0, 1].tolist() == list(MISSED)
    assert shown[1, 0].tolist() == list(SPURIOUS)
    assert shown[1, 1].tolist() == list(IGNORED_COLOR)
    assert len(set(shown[0, 0].tolist())) == 1
    assert mistakes_of(image, truth, said, 3)[1, 0].tolist() == list(MISSED)
    colors = in_colors(truth, PALETTE, image, share=0.5)
    assert colors[0, 0].tolist() == [100] * 3
    assert colors[0, 1].tolist() == [150, 50, 50]


def test_examples_range_from_the_worst_to_the_best():
    scores = np.array([0.5, np.nan, 0.1, 0.9, 0.3, 0.7])
    assert evenly_ranked(scores, 3) == [2, 0, 3]
    assert evenly_ranked(scores, 9) == [2, 4, 0, 5, 3]


def test_a_page_shows_four_pictures_a_row(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    truth = np.zeros((40, 60), np.uint8)
    truth[:20] = 1
    examples = [Example(image, truth, np.zeros_like(truth), "one", "mIoU 0.25"), Example(image, truth, truth, "two")]
    draw_examples(tmp_path / "page.png", examples, ("ground", "disc"), PALETTE, title="t", subtitle="s")
    page = cv2.imread(str(tmp_path / "page.png"))[..., ::-1]
    assert page.shape[1] > 4 * 480
    assert ((page == MISSED).all(-1)).sum() == pytest.approx(480 * 320 / 2, rel=0.05)  # the upper half of the first row


def test_the_report_has_the_table_and_the_pages(results, tmp_path):
    image = np.full((30, 40, 3), 90, np.uint8)
    draw_examples(
        results / "segmentation" / "cells" / "gram" / "lora_linear_seed0" / "examples.png",
        [Example(image, image[..., 0] // 91, image[..., 0] // 91, "x")],
        ("ground", "disc"), PALETTE, title="t",
    )  # fmt: skip
    build_report(results, [], [], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert 'href="#segmentation"' in html
    assert "<td>LoRA + 1x1 Conv decoder</td><td>gram</td><td>ViT-S/16</td>" in html
    assert "81.0 % (80.0–82.0)" in html
    assert html.count("cells: gram, LoRA + 1x1 Conv decoder") >= 1
    build_report(results, [], [], tmp_path / "report.html", tasks=[])
    assert 'href="#segmentation"' not in (tmp_path / "report.html").read_text()
