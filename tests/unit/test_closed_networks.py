"""Nodes without a network, slides on mounts that are read only, results that only the group may read."""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch

from other_libraries import randomize, require, save_transformers, transformers_model
from snakemake_runs import REPOSITORY
from synthetic_slides import blobs, write_lossless
from tiny_backbone import tiny_backbone

SCRIPTS = REPOSITORY / "workflow_scripts"
# Before anything is imported: every way out of the process is an error that no library can mistake for a slow network.
BLOCKED = """
import runpy, socket, sys

class Blocked(BaseException):
    pass

def blocked(*_, **__):
    raise Blocked("something asked for the network")

for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, blocked)
for name in ("create_connection", "getaddrinfo", "gethostbyname"):
    setattr(socket, name, blocked)
sys.path.insert(0, {scripts!r})
sys.argv = sys.argv[1:]
"""


def without_network(folder, code, *arguments):
    """Runs Python with no way out, an empty cache of Hugging Face and nothing that tells it to stay offline."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_HOME": str(folder / "empty"), "TORCH_HOME": str(folder / "empty"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BLOCKED.format(scripts=str(SCRIPTS)) + code, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def save_backbone(path):
    model = tiny_backbone()
    torch.save({"teacher": {f"backbone.{name}": value for name, value in model.state_dict().items()}}, path)


def test_the_block_is_felt(tmp_path):
    done = without_network(tmp_path, "import urllib.request as u; u.urlopen('http://localhost:1')")
    assert done.returncode != 0
    assert "something asked for the network" in done.stderr


@pytest.mark.slow
def test_models_of_all_kinds_load_and_are_exported_without_a_network(tmp_path):
    timm = require("timm")
    save_backbone(tmp_path / "teacher.pth")
    save_transformers(transformers_model("vit_nano"), tmp_path / "hf")
    theirs = randomize(timm.create_model("vit_tiny_patch16_224", pretrained=False))
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    code = """
from other_libraries import require
require("timm")
from pathlib import Path
from dinoscope import load_backbone
from dinoscope.export.formats import export_model
from dinoscope.features.encoders import load_encoder
print(load_backbone("teacher.pth").embed_dim, load_backbone("hf").embed_dim)
for source, architecture in (("teacher.pth", None), ("hf", None), ("timm.pth", "vit_tiny_patch16_224")):
    load_encoder(source, architecture=architecture)
export_model("hf", "timm", Path("exported"))
export_model("hf", "hf", Path("again"))
print("done")
"""
    done = without_network(tmp_path, f"sys.path.insert(0, {str(REPOSITORY / 'tests')!r})\n" + code)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[0:2] == ["48", "64"]
    assert done.stdout.endswith("done\n")
    assert (tmp_path / "exported" / "verification.json").is_file()
    assert not (tmp_path / "empty").exists() or not [p for p in (tmp_path / "empty").rglob("*") if p.suffix == ".json"]


@pytest.fixture
def read_only_slide(tmp_path):
    """A slide on a real mount that nobody can write to, root included."""
    image = blobs(768, 768, [(380, 380, 300)], colour=(190, 90, 150), ground=(240, 238, 242))
    slide = write_lossless(tmp_path / "archive" / "a.tiff", image, downsamples=(1, 4))
    slide.with_name("a.svs").write_bytes(slide.read_bytes())
    folder = slide.parent
    if subprocess.run(["mount", "--bind", folder, folder], capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        with pytest.raises(OSError, match="Read-only"):
            (folder / "written").touch()
        yield slide
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_slides_may_lie_where_nobody_can_write_and_results_are_for_the_group_alone(read_only_slide, tmp_path):
    """Inspect, tile, pyramid and features, under umask 027 and without a network."""
    save_backbone(tmp_path / "teacher.pth")
    out, slide = tmp_path / "results", ("--slide", read_only_slide, "--slide-id", "a")
    sets = ("--set", "features", "64", "1.0", out / "tiles/features/a.parquet")
    jobs = {
        "inspect_slide.py": (*slide, "--output", out / "slides/a.json", "--thumbnail", out / "slides/a.jpg"),
        "tile_slide.py": (*slide, *sets, "--overview", out / "tiles/a.jpg", "--outline", out / "tiles/a.geojson"),
        "build_viewer.py": ("pyramid", *slide, "--mpp", "1.0", "--output", out / "viewer/slides/a/pyramid.js"),
        "extract_features.py": (
            *("--weights", tmp_path / "teacher.pth", "--model-name", "m", "--slide", read_only_slide),
            *("--tiles", out / "tiles/features/a.parquet", "--output", out / "features/m/a.h5", "--workers", "1"),
        ),
    }
    before = hashlib.sha256(read_only_slide.read_bytes()).hexdigest()
    for script, arguments in jobs.items():
        code = "import os\nos.umask(0o027)\nrunpy.run_path(sys.argv[0], run_name='__main__')"
        done = without_network(tmp_path, code, SCRIPTS / script, *arguments)
        assert done.returncode == 0, f"{script}: {done.stderr[-3000:]}"
    assert hashlib.sha256(read_only_slide.read_bytes()).hexdigest() == before
    check_modes(out)


def check_modes(folder):
    """All is for owner and group, nothing for others; the group can read all and go into all folders."""
    paths = [folder, *folder.rglob("*")]
    assert len(paths) > 10
    for path in paths:
        mode = path.lstat().st_mode & 0o777
        assert mode & 0o007 == 0, f"{path} {mode:o}"
        assert mode & 0o040, f"{path} {mode:o}"
        assert not path.is_dir() or mode & 0o010, f"{path} {mode:o}"


def write_wheel(folder, name, version):
    """A wheel of one module, as pip takes it."""
    folder.mkdir(exist_ok=True)
    about = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", f"version = {version!r}\n")
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")


@pytest.mark.slow
def test_the_makefile_sets_up_from_a_folder_of_wheels_without_a_network(tmp_path):
    """With the real pip, in a network namespace that has not even a loopback."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-n", "true"], check=False).returncode:
        pytest.skip("a process cannot be cut off from the network here")
    (tmp_path / "Makefile").write_bytes((REPOSITORY / "Makefile").read_bytes())
    (tmp_path / "requirements.txt").write_text("tinything==1.5\n")
    write_wheel(tmp_path / "my wheels", "tinything", "1.5")
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}  # none of pip's settings of this machine
    command = ["unshare", "-n", "make", "setup", f"PYTHON={sys.executable}"]
    outcome = {}
    for name, more in (("without", []), ("with", ["WHEELHOUSE=my wheels"])):
        outcome[name] = subprocess.run(
            [*command, *more],
            cwd=tmp_path,
            env=environment | {"PIP_RETRIES": "0", "PIP_TIMEOUT": "2", "PIP_CONFIG_FILE": os.devnull},
            capture_output=True,
            text=True,
            check=False,
        )
    assert outcome["without"].returncode != 0
    assert outcome["with"].returncode == 0, outcome["with"].stderr
    python = tmp_path / ".venv" / "bin" / "python"
    shown = subprocess.run(
        [python, "-c", "import tinything; print(tinything.version)"], capture_output=True, text=True, check=True
    )
    assert shown.stdout == "1.5\n"
