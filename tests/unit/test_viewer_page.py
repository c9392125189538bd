"""The viewer's page as a file: what it lists, what it says, and what it refuses."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dinoscope.errors import ConfigError, FeaturesError
from dinoscope.visualize.pca import fit_basis, save_basis
from dinoscope.visualize.viewer.page import PROGRAM, write_page
from dinoscope.visualize.viewer.pyramid import write_placeholder
from dinoscope.visualize.viewer.scripts import as_json, read_script, write_script
from feature_samples import write_sample

SCRIPT = Path(__file__).parents[2] / "workflow_scripts" / "build_viewer.py"
ASSETS = Path(__file__).parents[2] / "workflow_scripts" / "dinoscope" / "visualize" / "viewer"


@pytest.fixture
def viewer(tmp_path):
    """A folder with pictures of two slides, and data of one of them by one of two models."""
    folder = tmp_path / "Jane" / "viewer"
    for slide_id in ("A", "B & 'C'"):
        write_placeholder(folder / "slides" / slide_id / "pyramid.js", slide_id, "none")
    write_script(folder / "models" / "gram" / "slides" / "A.js", "tiles", "gram/A", {})
    write_script(folder / "models" / "gram" / "sample.js", "sample", "gram", {})
    rng = np.random.default_rng(0)
    for model, spread in (("gram", 1.0), ("base", 3e-3)):
        features = (3 + spread * rng.normal(size=(30, 8))).astype(np.float16)  # of base, hardly more than rounding
        path = write_sample(tmp_path / f"{model}.h5", features, model=model)
        save_basis(fit_basis([path]), tmp_path / "pca" / model)
    return folder


def contents(page):
    return json.loads(re.search(r"^const CONTENTS = (.*);$", page.read_text(encoding="utf-8"), re.MULTILINE).group(1))


def bases(viewer, *models):
    return {model: viewer.parents[1] / "pca" / model for model in models}


def test_the_page_lists_what_there_is(viewer):
    write_page(viewer / "index.html", ["B & 'C'", "A"], bases(viewer, "base", "gram"), report="../report.html")
    found = contents(viewer / "index.html")
    assert found["slides"] == [["B & 'C'", []], ["A", [1]]]
    base, gram = found["models"]
    assert (base["name"], base["has_sample"], gram["name"], gram["has_sample"]) == ("base", False, "gram", True)
    info = json.loads((viewer.parents[1] / "pca" / "gram" / "basis.json").read_text())
    assert gram["explained"] == info["explained_variance_ratio"][:3] and gram["note"] == ""
    assert "hardly differ from tile to tile" in base["note"]


def test_the_page_holds_its_program_and_names_no_place(viewer):
    write_page(viewer / "index.html", ["A"], bases(viewer, "gram"))
    text = (viewer / "index.html").read_text(encoding="utf-8")
    for name in PROGRAM:
        assert (ASSETS / name).read_text(encoding="utf-8") in text
    assert {path.name for path in ASSETS.glob("*.js")} == set(PROGRAM)
    assert not re.search(r'(src|href)="(?!data:)', text) and "Jane" not in text and "{{" not in text
    ids = set(re.findall(r'\bid="([\w-]+)"', text))
    assert set(re.findall(r'(?:getElementById|element)\("([\w-]+)"\)', text)) <= ids


def test_what_is_missing_is_named(viewer):
    with pytest.raises(ConfigError, match="no pyramid of slide 'X': run build_viewer"):
        write_page(viewer / "index.html", ["A", "X"], bases(viewer, "gram"))
    with pytest.raises(FeaturesError, match="no whole PCA basis"):
        write_page(viewer / "index.html", ["A"], bases(viewer, "nothing"))
    assert not (viewer / "index.html").exists()


def test_the_script_writes_the_page(viewer):
    listed = viewer.parent / "list.txt"
    listed.write_text("".join(f"{viewer / 'slides' / name / 'pyramid.js'}\n" for name in ("A", "B & 'C'")))
    command = [sys.executable, SCRIPT, "page", "--pyramids", f"@{listed}", "--output", viewer / "index.html"]
    command += ["--models", "gram", "--bases"]
    done = subprocess.run([*command, *bases(viewer, "gram").values()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [slide for slide, _ in contents(viewer / "index.html")["slides"]] == ["A", "B & 'C'"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "error: 1 --models and 0 --bases: give as many of each\n"


def test_data_may_hold_anything_but_nan(tmp_path):
    value = {"a": "</script><b>", "b": ["\u2028", "Ä"], "c": 0.5}
    write_script(tmp_path / "x.js", "tiles", "m/'s\"", value)
    text = (tmp_path / "x.js").read_text()
    assert "<" not in text and "\u2028" not in text
    assert read_script(tmp_path / "x.js") == ("tiles", "m/'s\"", value)
    with pytest.raises(ValueError, match="not JSON compliant"):
        as_json({"x": float("nan")})
