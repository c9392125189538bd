"""Does the memory of a training grow? Trains on real slides and samples the private memory of trainer and loaders.

    python benchmarks/memory.py --slides ../shared/data/wsi --iterations 2000 --output memory.png

Private memory is RssAnon of /proc/PID/status: what is mapped from files is shared and not counted. Prints MB an
iteration for each process, a straight line fitted after the first tenth of the run.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "workflow_scripts"))

from dinoscope.train.metrics import read_metrics

SCRIPTS = Path(__file__).resolve().parents[1] / "workflow_scripts"

RECIPE = """
student: {arch: vit_nano, drop_path_rate: 0.1}
crops: {global_crops_size: 64, local_crops_size: 32, local_crops_number: 2}
augmentation: {recipe: pathology}
dino: {head_n_prototypes: 64, head_hidden_dim: 32, head_bottleneck_dim: 16}
ibot: {head_n_prototypes: 64, head_hidden_dim: 32, head_bottleneck_dim: 16}
optim: {epochs: 100, warmup_epochs: 10}
teacher: {warmup_teacher_temp_epochs: 10}
"""


def prepare(folder: Path, slides: Path) -> None:
    """Tiles and manifest of all slides of a folder."""
    found = sorted(path for path in slides.iterdir() if path.suffix.lower() in (".svs", ".ndpi", ".tiff"))
    rows = "".join(f"{path.stem}\t{path.resolve()}\n" for path in found)
    (folder / "slides.tsv").write_text(f"slide_id\tpath\n{rows}")
    tiles = []
    for path in found:
        tiles.append(folder / f"{len(tiles)}.parquet")
        arguments = ["--slide", path, "--slide-id", path.stem, "--set", "train", "128", "1.0", tiles[-1]]
        script("tile_slide.py", *arguments, "--overview", folder / f"{len(tiles)}.jpg", "--tissue-method", "auto")
    script("merge_manifest.py", "--output", folder / "train.parquet", *tiles)
    (folder / "recipe.yaml").write_text(RECIPE)


def script(name: str, *arguments: object) -> None:
    """Runs a script of the workflow."""
    subprocess.run([sys.executable, SCRIPTS / name, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def start_training(folder: Path, iterations: int, workers: int) -> subprocess.Popen:
    """One process that trains, with its loaders."""
    settings = [f"train.OFFICIAL_EPOCH_LENGTH={iterations // 100}", "train.batch_size_per_gpu=8"]
    settings += [f"train.num_workers={workers}", "checkpointing.period=500", "train.log_every=10"]
    command = [sys.executable, SCRIPTS / "pretrain.py", "--config", folder / "recipe.yaml"]
    command += ["--manifest", folder / "train.parquet", "--slides", folder / "slides.tsv"]
    return subprocess.Popen([*map(str, command), "--run-dir", str(folder / "run"), *settings])


def private_mb(pid: int) -> float:
    """RssAnon in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    return 0.0


def children(pid: int) -> list[int]:
    """The loader processes."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def sample(training: subprocess.Popen, run: Path) -> dict[str, list[tuple[int, float]]]:
    """Memory of every process at the iterations that were logged meanwhile."""
    found: dict[str, list[tuple[int, float]]] = {}
    while training.poll() is None:
        time.sleep(0.5)
        try:
            iteration = int(read_metrics(run).index[-1])
            processes = {"trainer": training.pid}
            processes |= {f"loader {i}": pid for i, pid in enumerate(children(training.pid))}
            for name, pid in processes.items():
                if megabytes := private_mb(pid):  # none is left of a process that ends
                    found.setdefault(name, []).append((iteration, megabytes))
        except (OSError, KeyError, IndexError, ValueError):
            continue
    return found


def draw(found: dict[str, list[tuple[int, float]]], output: Path) -> None:
    """Memory against iterations."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in found.items():
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
    axes.set(xlabel="iteration", ylabel="private memory, MB", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(output, dpi=120)


def main() -> None:
    """Prepares, trains, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=Path, required=True, help="folder of slides")
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("memory.png"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, arguments.slides)
        training = start_training(folder, arguments.iterations, arguments.workers)
        found = sample(training, folder / "run")
    draw(found, arguments.output)
    print("| process | private memory at the end, MB | growth, MB an iteration |\n|---|---:|---:|")
    for process, points in found.items():
        steps, megabytes = np.array(points).T
        warm = steps > arguments.iterations / 10
        slope = np.polyfit(steps[warm], megabytes[warm], 1)[0]
        print(f"| {process} | {megabytes[-1]:.0f} | {slope:.4f} |")


if __name__ == "__main__":
    main()
