"""Memory that a process keeps."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import resource, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from dinoscope.processes import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(100):
        [np.ones(800_000, np.uint8) for _ in range(4)]  # freed together, more than is kept by default
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults()
keep_freed_memory()
faults()
print(first, faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_freed_arrays_cost_no_page_faults_again():
    folder = Path(__file__).resolve().parents[2] / "workflow_scripts"
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(folder)], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before > 5_000  # of 78,000 pages
    assert after < before / 10
