"""What lies where in the folder of a run. Nothing here imports torch: planning looks into run folders too."""

import re
from pathlib import Path

__all__ = ["complete_checkpoints", "teacher_export_path"]


def complete_checkpoints(run_dir: Path) -> dict[int, Path]:
    """Iteration -> folder of the complete checkpoints of a run, the oldest first."""
    found = {}
    for folder in (run_dir / "ckpt").glob("*"):
        match = re.fullmatch(r"(\d+)(_keep)?", folder.name)
        if match and (folder / ".metadata").is_file():
            found[int(match[1])] = folder
    return dict(sorted(found.items()))


def teacher_export_path(run_dir: Path, iteration: int) -> Path:
    """Where the teacher of an iteration is exported to."""
    return run_dir / "eval" / f"training_{iteration}" / "teacher_checkpoint.pth"
