"""The pilot in Snakemake itself: planned only when asked for, and really run on small slides of two classes."""

import csv

import cv2
import numpy as np
import pytest
import yaml

from dinoscope.files import read_json
from dinoscope.slides.tiff_writer import encode_tiles, write_pyramid
from snakemake_runs import plan, snakemake

RECIPE = """
MODEL: {WEIGHTS: published.pth}
student: {arch: vit_nano, n_storage_tokens: 2, layerscale: 0.1, drop_path_rate: 0.0, pos_embed_rope_dtype: fp32}
crops: {global_crops_size: 64, local_crops_size: 32, local_crops_number: 2}
dino: {head_n_prototypes: 64, head_hidden_dim: 32, head_bottleneck_dim: 16}
ibot: {head_n_prototypes: 64, head_hidden_dim: 32, head_bottleneck_dim: 16}
optim: {epochs: 4, warmup_epochs: 1, freeze_last_layer_epochs: 1}
teacher: {warmup_teacher_temp_epochs: 2, momentum_teacher: 0.9}
train: {OFFICIAL_EPOCH_LENGTH: 12, batch_size_per_gpu: 4, num_workers: 1, log_every: 4, compile: false}
"""
CONFIG = {
    "slides": {"source": "slides.tsv"},
    "labels": "labels.tsv",
    "tissue": {"method": "none"},
    "tiling": {"sets": {"train": {"tile_px": 64, "mpp": 0.5}, "features": {"tile_px": 64, "mpp": 0.5}}},
    "runs": {"pretrain": {"recipe": "root.yaml"}},
    "launch": {"processes": 1},
    "evaluation": {"attention": False, "repeats": 1, "bootstraps": 200, "probe": {"images": 16}},
    "pilot": {"iterations": 12, "probes": 3},
}
ARMS = ("pilot-lora", "pilot-last_n", "pilot-full")
NUM_EVAL, NUM_SELECTION = 12, 3


def write_config(folder, **changes):
    (folder / "config" / "config.yaml").write_text(yaml.safe_dump(CONFIG | changes))


def write_stripes(path, seed, *, upright):
    """A slide of stripes of one of two directions, in colours that tell nothing."""
    rng = np.random.default_rng(seed)
    across = np.repeat(rng.integers(40, 240, (16, 1, 3), dtype=np.uint8), 8, axis=0)
    image = np.ascontiguousarray(np.broadcast_to(across, (128, 128, 3)))
    image = np.ascontiguousarray(image.transpose(1, 0, 2)) if upright else image
    small = cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    write_pyramid(path, [(each.shape[1], each.shape[0], encode_tiles(each)) for each in (image, small)], 0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adaptation")
    (folder / "config").mkdir()
    (folder / "root.yaml").write_text(RECIPE)
    rows, labels = ["slide_id\tpath\tcase_id\tuse\tsite"], ["case_id\tdirection"]
    for index in range(NUM_EVAL + 4):
        use = "eval,features" if index < NUM_EVAL else "train"
        write_stripes(folder / f"s{index}.tiff", index, upright=bool(index % 2))
        rows.append(f"s{index}\ts{index}.tiff\tC{index}\t{use}\t{'AB'[index // 2 % 2]}")
        labels.append(f"C{index}\t{'upright' if index % 2 else 'level'}")
    (folder / "slides.tsv").write_text("\n".join(rows) + "\n")
    (folder / "labels.tsv").write_text("\n".join(labels) + "\n")
    write_config(folder)
    (folder / "published.pth").touch()
    return folder


def test_it_is_planned_when_asked_for_and_not_else(folder):
    everything, text = plan(folder)
    assert "pilot-" not in text.replace(str(folder), "") and everything["train"] == 1
    jobs, _ = plan(folder, "pilot")
    wanted = {"train": 3, "convert": 3, "probe_set": 1, "pilot_compare": 1, "pilot_summary": 1}
    # base, three arms, random initialisation, histogram and thumbnail
    wanted |= {"measure_model": 7, "random_weights": 1, "initial_weights": 1, "evaluation_units": 1, "pilot": 1}
    assert {name: jobs[name] for name in wanted} == wanted
    assert jobs["extract_features"] == 7 * (NUM_EVAL - NUM_SELECTION)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"labels": None}, "the pilot has nothing to judge by: name a table in `labels`"),
        ({"pilot": {"gpu_minutes": 1e-7}}, "give full adaptation 0 iterations; 10 are the least: raise them"),
        ({"runs": {"pilot-lora": {"recipe": "root.yaml"}}}, "pilot-lora is the name of a run of the pilot"),
    ],
)
def test_mistakes_end_in_a_sentence(folder, changes, sentence):
    write_config(folder, **changes)
    done = snakemake(folder, "--dry-run", "pilot", check=False)
    write_config(folder)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert sentence in done.stderr


@pytest.mark.long
def test_it_runs_and_says_that_cases_are_too_few(folder):
    (folder / "published.pth").unlink()
    (folder / "random.yaml").write_text(RECIPE.replace("published.pth", "''"))
    write_config(folder, runs={"pretrain": {"recipe": "random.yaml"}}, results="before")
    snakemake(folder, "before/models/base/teacher.pth")
    (folder / "before/models/base/teacher.pth").rename(folder / "published.pth")
    write_config(folder)
    snakemake(folder, "pilot", timeout=900)
    results = folder / "results" / "pilot"
    said = (results / "advice.txt").read_text()
    assert said.startswith("Too few cases to judge whether to adapt (on label-direction/linear: ")
    with open(results / "summary.tsv") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row["primary"] == "yes"]
    assert [row["model"] for row in rows] == ["base", *ARMS, "random", "color-histogram", "thumbnail"]
    assert [row["kind"] for row in rows] == ["start", *["arm"] * 3, *["baseline"] * 3]
    assert {row["verdict"] for row in rows if row["kind"] == "arm"} == {"too few to judge"}
    assert all(row["seen"] in ("no", "unknown") and row["low"] for row in rows)
    arms = {row["model"]: row for row in rows if row["kind"] == "arm"}
    iterations = {name: int(row["iterations"]) for name, row in arms.items()}
    assert iterations["pilot-full"] == 12 < iterations["pilot-lora"] < iterations["pilot-last_n"]
    compute = [float(row["petaflops"]) for row in arms.values()]
    assert min(compute) > 0.92 * max(compute)  # at most an iteration apart
    assert all(float(row["seconds"]) > 0 for row in arms.values())
    with open(results / "curves.tsv") as file:
        points = list(csv.DictReader(file, delimiter="\t"))
    for name in ARMS:
        curve = [point for point in points if point["model"] == name]
        assert int(curve[0]["iteration"]) == 0 and int(curve[-1]["iteration"]) == iterations[name]
        assert 4 <= len(curve) <= 5 and float(curve[0]["difference"]) == 0
    # all arms start from the same weights, so that the probe gives the same answer
    assert len({point["value"] for point in points if point["iteration"] == "0"}) == 1
    trained = {name: read_json(folder / "results/runs" / name / "run_config.json")["settings"] for name in ARMS}
    assert [trained[name]["student.trainable"] for name in ARMS] == ["lora", "last_n", "full"]
    assert (results / "figure.png").stat().st_size > 10_000
    assert plan(folder, "pilot")[0] == {}
