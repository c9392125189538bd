"""Snakemake itself, run on this workflow in a folder of a test's own."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "snakemake", "--snakefile", str(REPOSITORY / "Snakefile"), "--cores", "2"]
# base alone, on slides of which some cannot be read
SKIPPING_CONFIG = {
    "slides": {"source": "slides.tsv", "on_error": "skip"},
    "tissue": {"method": "none"},
    "tiling": {"sets": {"train": {"tile_px": 128, "mpp": 1.0}, "features": {"tile_px": 112, "mpp": 1.0}}},
    "runs": {"pretrain": {"recipe": "root.yaml"}},
    "features": {"models": ["base"], "pooling": "mean", "dtype": "float32"},
    "split": {"fraction": 0},
}
NANO_RECIPE = "student: {arch: vit_nano}\ncrops: {global_crops_size: 96, local_crops_size: 48}"


def snakemake(folder, *arguments, check=True, timeout=300):
    """Runs Snakemake with `folder` as the working directory; stdout and stderr are text."""
    done = subprocess.run([*COMMAND, *arguments], cwd=folder, capture_output=True, text=True, timeout=timeout)
    if check:
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done


def plan(folder, *arguments):
    """What a dry run says: rule -> number of jobs, and the whole text."""
    done = snakemake(folder, "--dry-run", *arguments)
    text = done.stdout + done.stderr
    table = re.search(r"^job +count\n-+ +-+\n(.*?)^total", text, re.MULTILINE | re.DOTALL)
    rows = [line.split() for line in table.group(1).splitlines()] if table else []
    return Counter({name: int(count) for name, count in rows}), text
