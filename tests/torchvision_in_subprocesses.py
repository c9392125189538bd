"""torchvision_on_cpu_torch for the Python processes that a test starts, where this one needs it."""

import os
import sys
from pathlib import Path

from other_libraries import require

# Snakemake itself and every job import it first: torch is loaded by those alone that ask for torchvision.
_HOOK = """
import importlib.abc
import sys


class BeforeTorchvision(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torchvision_on_cpu_torch
        return None


sys.meta_path.insert(0, BeforeTorchvision())
"""


def environment(folder: Path) -> dict[str, str]:
    """The environment of a subprocess in which timm and transformers can be imported; the hook is written to `folder`.

    Skips the test where they are not installed.
    """
    for library in ("timm", "transformers"):
        require(library)
    if "torchvision_on_cpu_torch" not in sys.modules:  # torchvision fits torch
        return dict(os.environ)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(_HOOK, encoding="utf-8")
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(Path(__file__).parent)])}
