"""What the published implementation computes (../shared/reference), for tests that skip when it is absent."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "reference"


def load_reference(name: str) -> tuple[dict, dict]:
    """Tensors (in float32, or float64 where stored so) and the JSON beside them."""
    if not (FOLDER / f"{name}.safetensors").exists():
        pytest.skip(f"no {name}.safetensors in ../shared/reference")
    tensors = load_file(FOLDER / f"{name}.safetensors")
    values = json.loads((FOLDER / f"{name}.json").read_text())
    return tensors, values
