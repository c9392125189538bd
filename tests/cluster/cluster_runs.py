"""Working directories and Snakemake commands of the tests on a real SLURM."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
import yaml
from safetensors.numpy import load_file

from dinoscope.files import read_json
from dinoscope.train.metrics import read_metrics
from snakemake_runs import REPOSITORY
from tiny_slides import write_slide

NAMES = ("a", "b", "c", "d")
ITERATIONS, PERIOD = 24, 4
RECIPE = f"""
student: {{arch: vit_nano, n_storage_tokens: 2, layerscale: 0.1, drop_path_rate: 0.1, pos_embed_rope_dtype: fp32}}
crops: {{global_crops_size: 64, local_crops_size: 32, local_crops_number: 2}}
augmentation: {{recipe: pathology}}
dino: {{head_n_prototypes: 64, head_hidden_dim: 32, head_bottleneck_dim: 16}}
ibot: {{head_n_prototypes: 64, head_hidden_dim: 32, head_bottleneck_dim: 16}}
optim: {{epochs: 2, warmup_epochs: 1, freeze_last_layer_epochs: 1}}
teacher: {{warmup_teacher_temp_epochs: 1, momentum_teacher: 0.9}}
train: {{OFFICIAL_EPOCH_LENGTH: {ITERATIONS // 2}, batch_size_per_gpu: 4, num_workers: 1, log_every: 1, compile: false}}
checkpointing: {{period: {PERIOD}}}
"""
CONFIG = {
    "slides": {"source": "slides.tsv", "reader": "paced:Paced"},
    "tissue": {"method": "none"},
    "tiling": {"sets": {"train": {"tile_px": 128, "mpp": 1.0}, "features": {"tile_px": 112, "mpp": 1.0}}},
    "runs": {"pretrain": {"recipe": "root.yaml"}},
    "features": {"models": ["pretrain"], "pooling": "mean", "dtype": "float32"},
    "split": {"fraction": 0},
    "launch": {"processes": 2},
    "pca": {"clusters": None, "auto_regions": 0},
    "viewer": {"enabled": False},
}
# OpenSlide's pixels, as slowly as the file `pace` says (seconds a region): time to do something to a training, whose
# results do not depend on it.
READER = """
import time
from pathlib import Path

import numpy as np
import openslide


class Paced:
    def __init__(self, path):
        self.slide = openslide.OpenSlide(path)
        self.level_dimensions, self.mpp = self.slide.level_dimensions, 0.5

    def read_region(self, x, y, level, width, height):
        if (pace := Path("pace")).exists():
            time.sleep(float(pace.read_text()))
        return np.asarray(self.slide.read_region((x, y), level, (width, height)))
"""
FINAL = "results/runs/pretrain/final.json"
# The same numbers of threads everywhere, on which the last bits depend.
THREADS = ["--set-threads", "extract_features=2"]
# No accounting, a scheduler that starts jobs at once, one file system.
QUICK = ["--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "3", "--latency-wait", "5"]


def make_folder(folder, processes=2):
    """A working directory with slides and a config."""
    (folder / "config").mkdir(parents=True)
    config = CONFIG | {"launch": {"processes": processes}}
    (folder / "config" / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "root.yaml").write_text(RECIPE)
    (folder / "paced.py").write_text(READER)
    for seed, name in enumerate(NAMES):
        write_slide(folder / f"{name}.tiff", seed=seed)
    (folder / "slides.tsv").write_text("slide_id\tpath\n" + "".join(f"{name}\t{name}.tiff\n" for name in NAMES))
    return folder


def copy_untrained(source, folder, processes=2):
    """The same with everything done that comes before training."""
    shutil.copytree(source, folder, ignore=lambda path, names: {"runs", "pretrain"} & set(names))
    config = CONFIG | {"launch": {"processes": processes}}
    (folder / "config" / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def command(*arguments, profile="slurm"):
    """The command that a user of a cluster gives."""
    is_multinode, profile = profile == "slurm-multinode", REPOSITORY / "profiles" / profile
    start = [sys.executable, "-m", "snakemake", "--snakefile", str(REPOSITORY / "Snakefile")]
    start += ["--workflow-profile", str(profile)]
    return [*start, *arguments, *QUICK, *THREADS, f"train={1 if is_multinode else 2}"]


def run_locally(folder, *arguments):
    """The same workflow on this machine; its output."""
    start = [sys.executable, "-m", "snakemake", "--snakefile", str(REPOSITORY / "Snakefile"), "--cores", "2"]
    return _checked([*start, *arguments, *THREADS, "train=2"], folder)


def run_on_slurm(folder, *arguments, profile="slurm", check=True, timeout=900):
    """Gives the command and waits for its end; what it said, and its exit status where it may fail."""
    words = command(*arguments, profile=profile)
    if check:
        return _checked(words, folder, timeout)
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=timeout)
    return done.returncode, done.stdout + done.stderr


def start_on_slurm(folder, *arguments, log="said.log"):
    """Gives the command and goes on at once; the process, in a session of its own."""
    with open(folder / log, "w") as file:
        return subprocess.Popen(
            command(*arguments), cwd=folder, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def _checked(words, folder, timeout=900):
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout + done.stderr


def checkpoints(folder):
    """Iterations of the run's complete checkpoints."""
    return sorted(int(path.parent.name) for path in (folder / "results/runs/pretrain").glob("ckpt/[0-9]*/.metadata"))


def processes_in(folder, node=None):
    """Processes with this working directory, of a node or of all, but for the test's own."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            inside = (process / "cwd").resolve() == folder.resolve() and int(process.name) != os.getpid()
            environment = (process / "environ").read_bytes().split(b"\0")
        except OSError:  # gone meanwhile, or not ours
            continue
        if inside and (node is None or f"SLURMD_NODENAME={node}".encode() in environment):
            found.append(int(process.name))
    return found


def power_off(folder, node):
    """Kills whatever a node runs for this folder."""
    while left := processes_in(folder, node):
        for process in left:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue


def trained(folder):
    """What a finished run has come to: the exported teacher, byte by byte, and its metrics but for times.

    After a hard kill lines stand twice in the file; the reader leaves out those from before the checkpoint that counts.
    """
    run_dir = folder / "results/runs/pretrain"
    final = read_json(run_dir / "final.json")
    teacher = next(run_dir.glob(f"eval/training_{ITERATIONS - 1}/teacher_checkpoint.pth")).read_bytes()
    rows = read_metrics(run_dir)
    measured = [name for name in rows if name.startswith(("iter_time", "data_time", "samples", "eta", "memory"))]
    kept = rows.drop(columns=measured).sort_index(axis=1)
    return {"iteration": final["iteration"], "teacher": teacher, "metrics": kept.to_csv(), "rows": len(kept)}


def results(folder):
    """Everything that the workflow has made of the slides, in a form that can be compared."""
    found = {"trained": trained(folder)}
    # not the file: safetensors writes the two lines of its header in any order
    tensors = load_file(folder / "results/models/pretrain/teacher.safetensors")
    found["weights"] = {name: tensor.tobytes() for name, tensor in tensors.items()}
    for name in NAMES:
        for tile_set in ("train", "features"):
            tiles = pq.read_table(folder / f"results/tiles/{tile_set}/{name}.parquet")
            found[f"tiles of {name}", tile_set] = repr(tiles.to_pydict())  # NaN equals NaN
        with h5py.File(folder / f"results/features/pretrain/{name}.h5") as file:
            found[f"features of {name}"] = [np.asarray(file[key]).tobytes() for key in ("features", "coords")]
        found[f"map of {name}"] = (folder / f"results/pca/pretrain/{name}.png").read_bytes()
    return found
