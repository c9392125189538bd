"""What a configured run will take, against what tiling, h5py, DCP and the file system really make of it."""

import os
import re
import resource
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dinoscope.budget import hours, space, tiles
from dinoscope.budget.budget import make_budget
from dinoscope.budget.jobs import count_jobs, profile_groups, submitted
from dinoscope.budget.report import as_table, as_tsv, shortages
from dinoscope.budget.space import Space, disk_use, free_space
from dinoscope.budget.tiles import slide_sizes
from dinoscope.features.writers import FeatureInfo, write_features
from dinoscope.files import write_json
from dinoscope.plan import make_plan
from dinoscope.slides.inspection import describe_slide
from dinoscope.slides.reader import Slide
from dinoscope.visualize.overview import save_jpeg
from snakemake_runs import NANO_RECIPE
from synthetic_slides import blobs, write_lossless

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = REPOSITORY / "workflow_scripts"
CONFIG = {
    "slides": {"source": "slides.tsv"},
    "tiling": {"sets": {"train": {"tile_px": 128, "mpp": 1.0}, "features": {"tile_px": 64, "mpp": 1.0}}},
    "runs": {"pretrain": {"recipe": "root.yaml"}},
    "launch": {"processes": 2},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Four small slides, each with two round pieces of tissue."""
    monkeypatch.chdir(tmp_path)
    Path("root.yaml").write_text(NANO_RECIPE)
    rows = []
    for index in range(4):
        places = [(600, 500 + 100 * index, 400), (1300, 1200, 250 + 50 * index)]
        image = blobs(1536, 2048, places, colour=(190, 90, 150), ground=(240, 238, 242))
        rows.append(f"s{index}\t{write_lossless(Path(f's{index}.tiff'), image, downsamples=(1, 4))}\n")
    Path("slides.tsv").write_text("slide_id\tpath\n" + "".join(rows))
    return tmp_path


def plan_of(**changes):
    config = yaml.safe_load(yaml.safe_dump(CONFIG))
    for dotted, value in changes.items():
        *sections, key = dotted.split("__")
        section = config
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = value
    return make_plan(config, REPOSITORY, check_files=False)


def budget_of(plan, **options):
    return make_budget(plan, **({"groups": {}, "profiles": []} | options))


def inspect(slide):
    with Slide(Path(f"{slide}.tiff"), slide) as opened:
        description, thumbnail = describe_slide(opened)
    save_jpeg(thumbnail, Path(f"results/slides/{slide}.jpg"))
    write_json(f"results/slides/{slide}.json", description)


def run(script, *arguments):
    done = subprocess.run([sys.executable, SCRIPTS / script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_tiles_are_foretold_from_thumbnails_and_counted_once_there_are_any(folder):
    plan = plan_of()
    assert {size.source for size in slide_sizes(plan)} == {"size"}
    for slide in plan.slides:
        inspect(slide)
    ahead = slide_sizes(plan)
    assert {size.source for size in ahead} == {"thumbnail"}
    for slide in list(plan.slides)[:2]:
        sets = [f"results/tiles/{name}/{slide}.parquet" for name in plan.config["tiling"]["sets"]]
        overview = ("--overview", f"results/tiles/{slide}.jpg", "--outline", f"results/tiles/{slide}.geojson")
        arguments = plan.tiling_arguments(slide, sets)
        run("tile_slide.py", "--slide", f"{slide}.tiff", "--slide-id", slide, *arguments, *overview)
    counted = slide_sizes(plan)
    assert [size.source for size in counted] == ["tiled"] * 2 + ["thumbnail"] * 2
    for before, after in zip(ahead[:2], counted[:2], strict=True):
        table = pq.read_table(f"results/tiles/features/{after.slide_id}.parquet")
        assert after.num_tiles["features"] == table.num_rows > 10
        for name, number in after.num_tiles.items():
            assert abs(before.num_tiles[name] - number) <= max(1, 0.05 * number)


def test_slides_that_were_not_looked_at_are_taken_to_be_like_the_others(folder, monkeypatch):
    plan = plan_of()
    for slide in plan.slides:
        inspect(slide)
    monkeypatch.setattr(tiles, "MOST_THUMBNAILS", 2)
    sizes = slide_sizes(plan)
    assert [size.source for size in sizes] == ["thumbnail", "size", "size", "thumbnail"]
    seen = np.mean([sizes[0].num_tiles["features"], sizes[3].num_tiles["features"]])
    assert sizes[1].num_tiles["features"] == sizes[2].num_tiles["features"] == pytest.approx(seen, abs=0.51)
    Path("results/slides/s1.json").unlink()
    Path("s1.tiff").unlink()
    assert [size.source for size in slide_sizes(plan)] == ["thumbnail", "unknown", "size", "thumbnail"]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(("dtype", "pooling", "times"), [("float16", "cls", 1), ("float32", "cls+mean", 2)])
def test_features_are_as_large_as_h5py_makes_them(folder, dense, dtype, pooling, times):
    plan = plan_of(features__dense=dense, features__dtype=dtype, features__pooling=pooling, features__models=["base"])
    budget = budget_of(plan)
    info = FeatureInfo("s0", "base", "", "", pooling, 1.0, 64, 0, 128, 0.5, 1024, 1024)
    shape, width, real = (4, 4, 64) if dense else None, 64 * times, 0
    for slide in budget.slides:
        number, path = slide.num_tiles["features"], Path(f"{slide.slide_id}.h5")
        with write_features(path, info, number, width, dtype=dtype, patch_shape=shape) as writer:
            rows = np.zeros((number, width), dtype), np.zeros((number, 2))
            writer.append(*rows, *([np.zeros((number, *shape), np.float16)] if dense else []))
        real += path.stat().st_size
    said = sum(product.bytes for product in budget.products if product.folder == "features/base")
    assert abs(said - real) < 0.15 * real


def test_what_is_there_is_not_needed_again(folder):
    before = budget_of(plan_of())
    assert before.there == 0
    checkpoint = Path("results/runs/pretrain/ckpt/1/file")
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(bytes(10**6))
    os.link(checkpoint, checkpoint.with_name("link"))
    assert disk_use(Path("results")) == (10**6, 1)
    after = budget_of(plan_of())
    assert after.there == 10**6
    assert before.missing - after.missing == pytest.approx(1.05e6)
    Path("results/models/base").mkdir(parents=True)
    Path("results/models/base/of_somebody").write_bytes(bytes(10**8))
    models = sum(product.bytes for product in after.products if product.folder == "models")
    assert budget_of(plan_of()).there == pytest.approx(10**6 + models, abs=2)


def with_space(monkeypatch, **values):
    room = {"bytes": 10**15, "files": 10**9, "limited_by": "on its disk", "largest": None} | values
    monkeypatch.setattr("dinoscope.budget.budget.free_space", lambda folder: Space(**room))


def test_a_disk_that_is_too_small_is_refused_with_what_to_change(folder, monkeypatch):
    wanted = budget_of(plan_of(features__dense=True))
    assert shortages(wanted) == []
    dense = sum(product.bytes for product in wanted.products if "every patch" in product.name)
    with_space(monkeypatch, bytes=round(wanted.missing - 0.5 * dense / 2))
    (sentence,) = shortages(budget_of(plan_of(features__dense=True)))
    assert "more and" in sentence and "are free on its disk: set features.dense to false (saves" in sentence
    with_space(monkeypatch, bytes=10_000)
    (sentence,) = shortages(budget_of(plan_of(features__dense=True, features__dtype="float32")))
    assert sentence.count("(saves") == 3 and "and make room for" in sentence


def test_every_setting_that_is_advised_saves_what_it_promises(folder):
    """Each key is really changed, and the bytes are really fewer."""
    settings = {
        "features__dense": (True, False),
        "features__dtype": ("float32", "float16"),
        "packing__enabled": (True, False),
        "pca__clusters": (8, None),
        "viewer__enabled": (True, False),
        "viewer__mpp": (1.0, 2.0),
    }
    large = {key: values[0] for key, values in settings.items()}
    before = budget_of(plan_of(**large))
    savings = [saving for product in before.products for saving in product.savings]
    for key, (_, small) in settings.items():
        after = budget_of(plan_of(**large | {key: small}))
        shown = {None: "null", False: "false"}.get(small, f"{small:g}" if isinstance(small, float) else small)
        dotted = key.replace("__", ".")
        promised = sum(saving.bytes for saving in savings if saving.advice.startswith(f"set {dotted} to {shown}"))
        assert promised > 0
        if key == "viewer__enabled":  # its data and its sample go as well
            promised += sum(p.bytes for p in before.products if p.folder in ("viewer/models", "neighbours"))
        assert before.bytes - after.bytes == pytest.approx(promised, rel=0.2), key


def test_retention_of_checkpoints_is_counted_and_advised(folder, monkeypatch):
    length = "optim: {epochs: 2, warmup_epochs: 1}\nteacher: {warmup_teacher_temp_epochs: 1}"
    recipe = f"{NANO_RECIPE}\n{length}\ntrain: {{OFFICIAL_EPOCH_LENGTH: 50}}\ncheckpointing: "
    sizes = {}
    for kept in (2, 5):
        Path("root.yaml").write_text(recipe + f"{{period: 10, max_to_keep: {kept}}}\n")
        budget = budget_of(plan_of())
        (sizes[kept],) = (product.bytes for product in budget.products if product.folder == "runs/pretrain")
    with_space(monkeypatch, bytes=round(budget.missing - 0.5 * (sizes[5] - sizes[2])))
    (sentence,) = shortages(budget_of(plan_of()))
    assert "set checkpointing.max_to_keep to 2 in root.yaml (saves" in sentence
    (product,) = (product for product in budget.products if product.folder == "runs/pretrain")
    (saving,) = (saving for saving in product.savings if "checkpointing" in saving.advice)
    assert saving.bytes == pytest.approx(sizes[5] - sizes[2])


def test_inodes_file_limits_and_gpu_memory_are_looked_at(folder, monkeypatch):
    with_space(monkeypatch, files=5)
    (sentence,) = shortages(budget_of(plan_of()))
    assert "files and the disk has room for 5 (inodes)" in sentence
    with_space(monkeypatch, largest=1000)
    (sentence,) = shortages(budget_of(plan_of()))
    assert "this shell allows 0.001 MB a file: raise it (ulimit -f unlimited)" in sentence
    with_space(monkeypatch)
    Path("root.yaml").write_text("student: {arch: vit_large}\ntrain: {batch_size_per_gpu: 512}\n")
    plan = plan_of(tiling__sets__train__tile_px=512)
    (sentence,) = shortages(budget_of(plan, gpu="T4", gpus=2))
    assert "run pretrain needs" in sentence
    assert "of memory a GPU and there are 15 GiB: lower train.batch_size_per_gpu" in sentence


def test_limits_of_the_shell_are_seen(tmp_path):
    """The real limit of a real process."""
    code = "import pathlib, dinoscope.budget.space as s; print(s.free_space(pathlib.Path('x/y')).largest)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(SCRIPTS)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (123_456, 123_456)),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "123456"


def test_quotas_count_where_there_are_any(tmp_path, monkeypatch):
    there = free_space(tmp_path / "not" / "there")
    assert there.bytes == pytest.approx(os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize, rel=0.1)
    assert there.limited_by == "on its disk"
    source = space._source(tmp_path)
    program = tmp_path / "quota"
    program.write_text(
        "#!/bin/sh\necho 'Disk quotas for user u (uid 1):'\n"
        "echo '     Filesystem  blocks   quota   limit   grace   files'\n"
        f"echo '      {source}   600*  1000    2000            5    0   0'\n"
        "echo '      elsewhere:/x   1   2    3            5    0   0'\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    limited = free_space(tmp_path)
    assert (limited.bytes, limited.limited_by) == (400 * 1024, "within the user's quota")


def test_the_script_writes_both_files_and_ends_with_a_sentence(folder):
    Path("config.yaml").write_text(yaml.safe_dump(CONFIG))
    command = [sys.executable, SCRIPTS / "budget.py", "--config", "config.yaml"]
    good = subprocess.run(command, capture_output=True, text=True, check=False)
    assert good.returncode == 0, good.stderr
    told = yaml.safe_load(Path("results/budget.json").read_text())
    assert told["bytes"] == pytest.approx(sum(product["bytes"] for product in told["products"]), abs=100)
    rows = [line.split("\t") for line in Path("results/budget.tsv").read_text().splitlines()]
    assert ["disk", "all", str(told["bytes"]), "bytes"] in rows
    assert str(folder) not in Path("results/budget.json").read_text() + Path("results/budget.tsv").read_text()
    bad = subprocess.run([*command, "--gpu", "h10"], capture_output=True, text=True, check=False)
    assert bad.returncode == 1
    assert re.match(r"error: --gpu h10 is unknown.*h100.*; known are t4, ", bad.stderr)


def test_a_full_disk_of_ones_own_is_refused_before_the_first_job(folder):
    """A real file system of two megabytes, where this machine lets one be mounted."""
    Path("small").mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", "small"], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        Path("config.yaml").write_text(yaml.safe_dump(CONFIG | {"results": "small/results"}))
        command = [sys.executable, SCRIPTS / "budget.py", "--config", "config.yaml"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        subprocess.run(["umount", "small"], check=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: the results need ") and "MB are free on its disk: set " in done.stderr


def test_measuring_gives_the_operations_and_shares_of_what_was_timed(folder, monkeypatch):
    """By a clock of the test's own: the operations that torch counts in 2 s, and a forward and backward in 8 s."""
    counted = []

    def timed(work, device):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            work()
        counted.append(counter.get_total_flops())
        return 2.0 if len(counted) == 1 else 8.0

    monkeypatch.setattr(hours, "_seconds", timed)
    measured = budget_of(plan_of(), measured=True).device
    assert "measured on this machine" in measured.source
    assert measured.flops == pytest.approx(counted[0] / 2, rel=0.03)
    assert measured.training_share == 3 * 2 / 8
    assert 2 * counted[0] < counted[1] <= 3 * counted[0]  # a backward pass has at most twice the products


def test_a_speed_is_measured_in_seconds(monkeypatch):
    """The shortest of the passes after the one that warms up."""
    ticks = iter([0.0, 9.0, 10.0, 12.0, 20.0, 21.5, 30.0, 33.0])
    monkeypatch.setattr(hours, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    passes = []
    assert hours._seconds(lambda: passes.append(1), "cpu") == 1.5 and len(passes) == 4


def test_the_table_can_be_read(folder):
    budget = budget_of(plan_of())
    text = as_table(budget)
    assert all(len(line) < 240 for line in text.splitlines())
    for part in ("features: ", "run pretrain: ", " free on its disk", "jobs    "):
        assert part in text
    assert as_tsv(budget).startswith("section\tname\tvalue\tunit\n")


def test_jobs_submitted_by_a_profile(tmp_path):
    profile = tmp_path / "profile.v9+.yaml"
    profile.write_text("cores: all\n")
    assert profile_groups(profile) is None
    profile.write_text("executor: slurm\ngroup-components: {tiles: 50}\ngroups: [inspect_slide=tiles, all=tiles]\n")
    groups, components = profile_groups(profile)
    jobs = {"tile_slide": 101, "inspect_slide": 20, "train": 2, "report": 1}
    assert submitted(jobs, {"tile_slide": "tiles", "report": "local"} | groups, components) == 3 + 1 + 2
    assert submitted(jobs, {}, {}) == 124


def test_five_thousand_slides_are_counted_in_a_moment(folder):
    rows = "".join(f"s{index}\ts{index}.svs\n" for index in range(5000))
    Path("slides.tsv").write_text(f"slide_id\tpath\n{rows}")
    jobs = count_jobs(plan_of())
    assert jobs["tile_slide"] == 5000
    assert jobs["extract_features"] == 10_000
    assert 40_000 < sum(jobs.values()) < 60_000
