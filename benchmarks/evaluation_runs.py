"""What scripts that run the workflow on real images have in common: a working directory, and the workflow in it."""

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# A config needs slides; nothing of these is drawn where trainings and tasks have folders of images.
_SLIDES = "slide_id\tpath\tcase_id\n" + "".join(
    f"demo_he_{number}\tresults/demo/demo_he_{number}.tiff\tcase_{number}\n" for number in (1, 2, 3)
)
# Goes on from another run and keeps its patch similarities; recipes extend it.
GRAM = """crops: {gram_teacher_crops_size: 128, gram_teacher_no_distortions: true}
gram: {use_loss: true, img_level: true, loss_weight: 1.0, rep_update: false}
"""

__all__ = ["GRAM", "ROOT", "run_workflow", "write_workflow"]


def write_workflow(out: Path, config: str, recipes: Mapping[str, str], extended: Sequence[str]) -> None:
    """Writes recipes, slide table and config; the config last, so that its presence says that all is there.

    Args:
        out: Working directory.
        config: Text of config.yaml.
        recipes: Text of each recipe by file name.
        extended: Files of benchmarks/ that they extend, which are copied beside them.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name in extended:
        shutil.copy(ROOT / "benchmarks" / name, out)
    for name, text in recipes.items():
        (out / name).write_text(text, encoding="utf-8")
    (out / "slides.tsv").write_text(_SLIDES, encoding="utf-8")
    (out / "config.yaml").write_text(config, encoding="utf-8")


def run_workflow(out: Path, cores: str, targets: Sequence[str] = ("evaluate",), *, config: str = "config.yaml") -> None:
    """Runs `snakemake TARGETS` in the working directory; ends the program where it fails."""
    workflow = ["--snakefile", ROOT / "Snakefile", "--configfile", config, "--replace-workflow-config"]
    command = [sys.executable, "-m", "snakemake", *workflow, "--cores", cores, *targets]
    if code := subprocess.run(command, cwd=out, check=False).returncode:
        sys.exit(code)
