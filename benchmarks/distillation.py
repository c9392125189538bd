"""Does a small student take over what a larger teacher sees? With the teacher's own heads, and with made ones.

    python benchmarks/learned_features.py --only tissue --split 3 --out /tmp/learned student.arch=vit_micro  # a teacher
    python benchmarks/distillation.py --teacher /tmp/learned/split_3/runs/tissue_0 --split 3

A vit_nano is trained on the training half of seg/dsb2018_histology, as the teacher was, and held to the teacher on the
other half: linear CKA (Kornblith et al. 2019, arXiv:1905.00414) of CLS and patch tokens, and the share of the variance
of the teacher's patch tokens that a linear map of the student's explains, fitted on half of these images and asked
about the others. Beside it the same student before its training. Prints Markdown.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "workflow_scripts"))
from feature_images import read_tissue, tiles_of, write_training_images  # noqa: E402
from feature_probes import features_of  # noqa: E402

from dinoscope.cli import run_script  # noqa: E402
from dinoscope.export.convert import convert_checkpoint, write_initial_weights  # noqa: E402
from dinoscope.models.weights import read_model_file  # noqa: E402
from dinoscope.recipe import load_recipe  # noqa: E402

RECIPE = Path(__file__).with_name("learned_features.yaml")
SETTINGS = [
    *("student.arch=vit_nano", "dino.koleo_loss_weight=0.0", "optim.epochs=6", "optim.lr=1e-3"),
    *("teacher.warmup_teacher_temp=0.07", "teacher.teacher_temp=0.07", "teacher.warmup_teacher_temp_epochs=0"),
    *("teacher.momentum_teacher=0.98", "train.OFFICIAL_EPOCH_LENGTH=100", "train.batch_size_per_gpu=16"),
    *("train.log_every=100", "distillation.enabled=true"),
]
PENALTY = 10.0  # of the linear map, on standardised features


def main() -> None:
    """Distils twice, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True, help="finished run of learned_features.py")
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data", help="folder with seg/")
    parser.add_argument("--split", type=int, required=True, help="that of the teacher")
    arguments = parser.parse_args()
    tissue = read_tissue(arguments.data / "seg/dsb2018_histology", arguments.split)
    held_out = tissue.images[~tissue.training][:, :256, :320]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_training_images(tiles_of(tissue.images[tissue.training]), folder / "images")
        convert_checkpoint(arguments.teacher, folder / "bare/teacher.pth")
        heads = read_model_file(arguments.teacher).heads
        own = [
            f"{name}.head_n_prototypes={len(heads[f'{name}_head']['last_layer.weight'])}" for name in ("dino", "ibot")
        ]
        made = ["dino.head_n_prototypes=512", "ibot.head_n_prototypes=512"]
        settings = [*SETTINGS, f"train.dataset_path={folder / 'images'}"]
        teacher = features_of(folder / "bare/teacher.pth")(held_out)
        print(
            "| student | CKA, CLS | CKA, patches | teacher's patches explained | seconds |\n|---|---:|---:|---:|---:|"
        )
        given = f"distillation.checkpoint_path={arguments.teacher}"
        write_initial_weights(load_recipe(RECIPE, [*settings, *own, given]), folder / "begun/teacher.pth")
        print(_row("before its training", folder / "begun/teacher.pth", teacher, held_out, None))
        for name, path, prototypes in (
            ("teacher's own heads", arguments.teacher, own),
            ("made heads", folder / "bare/teacher.pth", made),
        ):
            begun, run = time.perf_counter(), folder / "runs" / name.replace(" ", "_").replace("'", "")
            _train(run, [*settings, *prototypes, f"distillation.checkpoint_path={path}"])
            print(_row(name, run, teacher, held_out, time.perf_counter() - begun), flush=True)


def _train(run: Path, settings: list[str]) -> None:
    command = [sys.executable, ROOT / "workflow_scripts/pretrain.py", "--config", RECIPE, "--run-dir", run, *settings]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)


def _row(name: str, path: Path, teacher: dict[str, np.ndarray], images: np.ndarray, seconds: float | None) -> str:
    student = features_of(path)(images)
    alike = [f"{cka(_rows(student[key]), _rows(teacher[key])):.3f}" for key in ("cls", "patches")]
    explained = f"{explained_share(student['patches'], teacher['patches']):.3f}"
    return f"| {' | '.join([name, *alike, explained, '–' if seconds is None else f'{seconds:.0f}'])} |"


def _rows(tokens: np.ndarray) -> np.ndarray:
    return tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)


def cka(first_ND: np.ndarray, second_ND: np.ndarray) -> float:
    """Linear CKA of two descriptions of the same N things."""
    first, second = (rows - rows.mean(axis=0) for rows in (first_ND, second_ND))
    norms = np.linalg.norm(first.T @ first) * np.linalg.norm(second.T @ second)
    return float(np.linalg.norm(first.T @ second) ** 2 / norms)


def explained_share(student_NPD: np.ndarray, teacher_NPD: np.ndarray) -> float:
    """Share of the variance of the second half's teacher tokens that a ridge regression on the first half explains."""
    half = len(student_NPD) // 2
    (known, asked), (wanted, truth) = ((_rows(t[:half]), _rows(t[half:])) for t in (student_NPD, teacher_NPD))
    mean, spread, level = known.mean(axis=0), known.std(axis=0), wanted.mean(axis=0)
    known, asked = (known - mean) / spread, (asked - mean) / spread
    weights = np.linalg.solve(known.T @ known + PENALTY * np.eye(known.shape[1]), known.T @ (wanted - level))
    left = truth - level - asked @ weights
    return float(1 - (left**2).sum() / ((truth - truth.mean(axis=0)) ** 2).sum())


if __name__ == "__main__":
    run_script(main)
