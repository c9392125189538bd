"""Tasks of segmentation in Snakemake itself: what is planned, what comes out, what is refused and keeps its results."""

import numpy as np
import pytest
import tifffile
import yaml

from dinoscope.files import read_json
from dinoscope.segment.tables import read_table
from segmentation_samples import write_discs
from snakemake_runs import NANO_RECIPE, plan, snakemake
from tiny_slides import write_slide

TASK = {
    "dataset": "folder", "root": "discs", "data": {"instance": "disc"}, "mpp": 1.0, "models": ["base"],
    "img_dim": [48, 64], "epochs": 3, "batch_size": 4, "corruptions": ["contrast"], "severities": [5],
    "slides": ["S1"], "workers": 0,
}  # fmt: skip
FOLDER = "results/segmentation/discs/base"


def write_config(folder, **changes):
    config = {
        "slides": {"source": "slides.tsv"},
        "tissue": {"method": "none"},
        "tiling": {"sets": {"train": {"tile_px": 128, "mpp": 1.0}, "features": {"tile_px": 112, "mpp": 1.0}}},
        "runs": {"pretrain": {"recipe": "root.yaml"}},
        "launch": {"processes": 1},
        "segmentation": {"tasks": {"discs": TASK | changes}},
    }
    (folder / "config" / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segmentation")
    (folder / "config").mkdir()
    (folder / "root.yaml").write_text(NANO_RECIPE)
    write_discs(folder / "discs")
    write_slide(folder / "a.tiff", seed=0, side=512)
    (folder / "slides.tsv").write_text("slide_id\tpath\tmpp\nS1\ta.tiff\t0.5\n")
    write_config(folder)
    return folder


def test_every_way_is_trained_and_measured(folder):
    jobs, _ = plan(folder, "segmentation")
    wanted = {"segment_train": 2, "segment_evaluate": 2, "segment_corruptions": 2, "segment_predict_slide": 2}
    assert jobs == wanted | {"initial_weights": 1, "segment_compare": 1, "segmentation": 1}


def test_mistakes_end_in_a_sentence(folder):
    write_config(folder, corruptions=["contrasts"])
    done = snakemake(folder, "--dry-run", "segmentation", check=False)
    assert done.returncode != 0
    assert "error: config: segmentation.tasks.discs: corruption 'contrasts' is unknown" in done.stderr
    assert "Traceback" not in done.stderr
    write_config(folder)


@pytest.mark.long
def test_from_masks_to_tables_and_class_maps(folder):
    snakemake(folder, "segmentation", timeout=500)
    rows = read_table(folder / "results" / "segmentation" / "comparison.tsv")
    assert [row["finetuned_components"] for row in rows] == ["1x1 Conv decoder", "LoRA + 1x1 Conv decoder"]
    for row, way in zip(rows, ("decoder", "lora"), strict=True):
        run = folder / FOLDER / f"{way}_linear_seed0"
        assert row["file"] == f"discs/base/{way}_linear_seed0"
        assert float(row["miou"]) == pytest.approx(read_json(run / "evaluation.json")["miou"], abs=1e-4)
        assert float(row["miou_level_5"]) == pytest.approx(
            read_json(run / "corruptions.json")["rows"][0]["miou"], abs=1e-4
        )
        classes = tifffile.imread(run / "slides" / "S1.tiff")
        assert set(np.unique(classes)) <= {0, 1, 255}
        assert read_json(run / "slides" / "S1.geojson")["type"] == "FeatureCollection"
        assert {path.name for path in run.glob("*.png")} == {"examples.png", "corruptions.png"}
    assert plan(folder, "segmentation")[0] == {}

    final = folder / FOLDER / "lora_linear_seed0" / "final.json"
    before = final.read_bytes(), final.stat().st_mtime_ns
    write_config(folder, rank=5)
    done = snakemake(folder, "segmentation", check=False)
    assert (
        "segmenter discs/base/lora_linear_seed0 was begun with other settings: rank was 3 and is now 5" in done.stderr
    )
    assert (final.read_bytes(), final.stat().st_mtime_ns) == before
    write_config(folder, workers=1)  # changes nothing but speed
    assert plan(folder, "segmentation")[0] == {}
    (folder / "results" / "models" / "base" / "teacher.pth").touch()  # made again: what is finished stays
    assert "segment_train" not in plan(folder, "segmentation")[0]
