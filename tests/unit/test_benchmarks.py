"""Benchmarks are run by hand and rarely; what they import must be there all the same."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = sorted(path for path in BENCHMARKS.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))


def test_there_are_some() -> None:
    assert {"learned_features.py", "stages.py", "train_step.py"} <= {path.name for path in SCRIPTS}


@pytest.mark.long
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_each_starts_and_says_what_it_is_for(script: Path) -> None:
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout and "benchmarks/" in done.stdout
