"""Checkpoints of other trainers, of any number of ranks, turned into files that every tool loads."""

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path, PosixPath

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from checkpoint_writer import SETTINGS, in_format, network, whole_state
from dinoscope import load_backbone
from dinoscope.errors import CheckpointError, WeightsError
from dinoscope.export.convert import convert_checkpoint
from dinoscope.files import read_json
from dinoscope.models.registry import settings_from_config
from dinoscope.models.weights import read_model_file, state_digest
from dinoscope.recipe import load_recipe
from dinoscope.train.dcp_files import stored_tensors

ROOT = Path(__file__).resolve().parents[2]
WRITER = ROOT / "tests" / "checkpoint_writer.py"


def save(state: dict, folder: Path) -> Path:
    with warnings.catch_warnings(action="ignore"):
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def written_by(ranks: int, folder: Path, dtype: str, teacher: str) -> Path:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, WRITER, folder, dtype, teacher], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list(folder.glob("*.distcp"))) == ranks
    return folder


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A run's folder with one checkpoint, as the published trainer writes it."""
    save(whole_state(torch.float32, "teacher", 0), tmp_path / "theirs/ckpt/41")
    return tmp_path / "theirs"


def backbone_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("backbone."): t for name, t in state.items() if name.startswith("backbone.")}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name].float(), second[name].float())] == []


@pytest.mark.parametrize(
    ("ranks", "dtype", "teacher"),
    [(1, "bfloat16", "teacher"), (2, "float32", "model_ema"), (3, "bfloat16", "teacher")],
)
def test_any_number_of_ranks(ranks: int, dtype: str, teacher: str, tmp_path: Path) -> None:
    folder = written_by(ranks, tmp_path / "run/ckpt/41_keep", dtype, teacher)
    convert_checkpoint(folder, tmp_path / "out/teacher.pth")
    wanted = backbone_of(in_format(network(1), getattr(torch, dtype)))
    content = torch.load(tmp_path / "out/teacher.pth", weights_only=True)
    assert_same(backbone_of(content["teacher"]), wanted)
    assert {tensor.dtype for tensor in content["teacher"].values()} == {torch.float32}
    assert_same(load_file(tmp_path / "out/teacher.safetensors"), wanted)
    assert_same(load_backbone(tmp_path / "out/teacher.safetensors").state_dict(), wanted)
    card = read_json(tmp_path / "out/model.json")
    assert (card["iteration"], card["embed_dim"], card["backbone"]["ffn_layer"]) == (41, 96, "swiglu")
    assert "DINOv3 License" in card["license_note"]
    assert card["weights_sha256"] == state_digest(read_model_file(tmp_path / "out").backbone)


def test_every_branch(published: Path, tmp_path: Path) -> None:
    convert_checkpoint(published, tmp_path / "student/teacher.pth", "student", heads=True)
    student = read_model_file(tmp_path / "student")
    assert_same(student.backbone, backbone_of(network(0)))
    assert sorted(student.heads) == ["dino_head", "ibot_head"]
    assert read_json(tmp_path / "student/model.json")["branch"] == "student"
    convert_checkpoint(published, tmp_path / "all/teacher.pth", "all")
    content = torch.load(tmp_path / "all/teacher.pth", weights_only=True)
    assert_same(content["teacher"], network(1))
    assert_same(content["student"], network(0))
    assert_same(read_model_file(tmp_path / "all").backbone, backbone_of(network(1)))
    names = load_file(tmp_path / "all/teacher.safetensors").keys()
    assert "student.ibot_head.last_layer.weight" in names


def test_an_export_of_a_teacher_alone(tmp_path: Path) -> None:
    state = {f"teacher.{name}": tensor for name, tensor in backbone_of(network(1)).items()}
    bare = save(
        {"teacher": {f"backbone.{n.removeprefix('teacher.')}": t for n, t in state.items()}}, tmp_path / "a/1/s"
    )
    convert_checkpoint(bare, tmp_path / "a.pth")
    folder = tmp_path / "run/eval/training_1999/sharded_teacher_checkpoint"
    save(network(1), folder)
    convert_checkpoint(folder, tmp_path / "b/b.pth", heads=True)
    for path in (tmp_path / "a.pth", tmp_path / "b/b.pth"):
        assert_same(read_model_file(path).backbone, backbone_of(network(1)))
    assert read_json(tmp_path / "b/model.json")["iteration"] == 1999
    with pytest.raises(CheckpointError, match="holds no student backbone; it has teacher"):
        convert_checkpoint(folder, tmp_path / "c/c.pth", "student")


def test_names_that_wrappers_changed(tmp_path: Path) -> None:
    state = {
        f"_orig_mod.teacher.{name.replace('blocks.1.', 'blocks.1._checkpoint_wrapped_module.')}": tensor
        for name, tensor in network(1).items()
    }
    save({"model": state}, tmp_path / "run/ckpt/3")
    convert_checkpoint(tmp_path / "run/ckpt/3", tmp_path / "t.pth")
    assert_same(read_model_file(tmp_path / "t.pth").backbone, backbone_of(network(1)))


def test_settings_beside_count(published: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = {"student": {"arch": "vit_small", "norm_layer": "layernorm", "n_storage_tokens": 4}}
    recipe["crops"] = {"rgb_mean": [0.7, 0.5, 0.6]}
    (published / "config.yaml").write_text(json.dumps(recipe))
    with pytest.raises(WeightsError, match="lacks tensors for a vit_small backbone"):
        convert_checkpoint(published, tmp_path / "t.pth")
    assert not list(tmp_path.glob("*.pth"))
    (published / "config.yaml").write_text("student: {no_such_key: 1}")
    convert_checkpoint(published, tmp_path / "t.pth")
    assert "config.yaml of the run cannot be read" in caplog.text
    settings = settings_from_config(load_recipe(ROOT / "config/runs/tiny.yaml").student)
    state = {f"backbone.{name}": t for name, t in _backbone(settings).items()}
    save({"model": {f"teacher.{name}": t for name, t in state.items()}}, tmp_path / "tiny/ckpt/1")
    shutil.copy(ROOT / "config/runs/tiny.yaml", tmp_path / "tiny/config.yaml")
    convert_checkpoint(tmp_path / "tiny", tmp_path / "out/tiny.pth")
    assert read_json(tmp_path / "out/model.json")["backbone"]["arch"] == settings.arch


def _backbone(settings: object) -> dict[str, torch.Tensor]:
    return backbone_of(network(0, settings))


def test_refusals(published: Path, tmp_path: Path) -> None:
    folder = published / "ckpt/41"

    def refused(change: object, match: str, **options: object) -> None:
        state = whole_state(torch.float32, "teacher", 0)
        change(state["model"])
        shutil.rmtree(folder)
        save(state, folder)
        with pytest.raises((CheckpointError, WeightsError), match=match):
            convert_checkpoint(folder, tmp_path / "out/t.pth", **options)
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())

    gamma, head = "teacher.backbone.blocks.2.ls1.gamma", "teacher.dino_head.mlp.2.weight"
    refused(lambda model: model.pop("teacher.backbone.norm.weight"), "lacks tensors .*norm.weight")
    refused(lambda model: model.update({"teacher.backbone.extra": torch.ones(2)}), "unknown tensors .*extra")
    refused(lambda model: model[gamma].mul_(0), "blocks.2.ls1.gamma is all zero")
    refused(lambda model: model[gamma].fill_(float("nan")), "blocks.2.ls1.gamma holds values that are not finite")
    refused(lambda model: model.pop(head), "dino_head.*mlp.2", heads=True)
    refused(lambda model: model["teacher.ibot_head.last_layer.weight"].fill_(float("inf")), "not finite", branch="all")
    refused(
        lambda model: [model.pop(name) for name in list(model) if name.startswith("teacher")],
        "no teacher",
        branch="all",
    )


class Reduced:
    """Unpickled by a call."""

    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce__(self) -> tuple:
        return self.call


class Harmful:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("harm_done"),))


def test_code_in_a_checkpoint_is_never_run(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = published / "ckpt/41"
    metadata = folder / ".metadata"
    whole = pickle.loads(metadata.read_bytes())
    whole.planner_data = Harmful()
    metadata.write_bytes(pickle.dumps(whole))
    with pytest.raises(CheckpointError, match=r"it names pathlib\.Path\.touch|it names .*getattr"):
        convert_checkpoint(folder, tmp_path / "t.pth")
    whole.planner_data = Reduced(getattr, (PosixPath, "touch"))
    metadata.write_bytes(pickle.dumps(whole))
    with pytest.raises(CheckpointError, match="it asks for touch of"):
        convert_checkpoint(folder, tmp_path / "t.pth")
    # as Python before 3.11.4 pickles what DCP stores
    whole.planner_data = Reduced(getattr, (_MEM_FORMAT_ENCODING, "TORCH_CHANNELS_LAST"))
    metadata.write_bytes(pickle.dumps(whole))
    assert stored_tensors(folder)
    metadata.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match="an object of type dict"):
        convert_checkpoint(folder, tmp_path / "t.pth")
    torch.save({"teacher": Harmful()}, tmp_path / "teacher.pth")
    with pytest.raises(WeightsError, match="holds code"):
        load_backbone(tmp_path / "teacher.pth")
    assert not Path("harm_done").exists()


def test_damage_is_found_without_checksums_of_ours(published: Path, tmp_path: Path) -> None:
    """Checkpoints of the published trainer have no files.json."""
    shard = next((published / "ckpt/41").glob("*.distcp"))
    content = shard.read_bytes()
    weights = network(1)["backbone.blocks.1.mlp.w2.weight"].numpy().tobytes()
    place = content.index(weights) + len(weights) // 2

    def refused() -> None:
        with pytest.raises(CheckpointError, match=rf"{shard.name} is missing, cut short or no longer what was written"):
            convert_checkpoint(published, tmp_path / "out/t.pth")

    shard.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
    refused()
    shard.write_bytes(content[:place])
    refused()
    shard.unlink()
    refused()
    shard.write_bytes(content)
    convert_checkpoint(published, tmp_path / "out/t.pth")


def test_what_stands_beside_the_backbone_is_told(published: Path, tmp_path: Path) -> None:
    folder = published / "ckpt/41"

    def changed(change: object) -> None:
        state = whole_state(torch.float32, "teacher", 0)
        change(state["model"])
        shutil.rmtree(folder)
        save(state, folder)

    changed(lambda model: model.update({"teacher.third_head.weight": torch.ones(2)}))
    with pytest.raises(CheckpointError, match=r"teacher has tensors that are unknown: teacher\.third_head\.weight"):
        convert_checkpoint(folder, tmp_path / "t.pth")
    changed(lambda model: model.update({f"_orig_mod.{name}": t for name, t in model.items() if "norm.bias" in name}))
    with pytest.raises(CheckpointError, match=r"norm\.bias; they mean the same"):
        convert_checkpoint(folder, tmp_path / "t.pth")
    changed(lambda model: [model.pop(name) for name in list(model) if "teacher" in name and "_head" in name])
    convert_checkpoint(folder, tmp_path / "t.pth")
    with pytest.raises(CheckpointError, match="teacher has no heads; leave --heads out"):
        convert_checkpoint(folder, tmp_path / "u/u.pth", heads=True)


def test_places_and_modes_of_the_files(published: Path, tmp_path: Path) -> None:
    (published / "training_metrics.json").write_text('{"iteration": 41, "total_loss": Infinity, "lr": 0.5}\n')
    convert_checkpoint(published, tmp_path / "out/teacher.pth")
    assert read_json(tmp_path / "out/model.json")["metrics"] == {"lr": 0.5}
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {0o666 & ~_umask()}
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for name, match in (
        ("student.pth", "is the card of teacher.pth; give student.pth a folder of its own"),
        ("teacher.safetensors", "give it a name that ends in .pth"),
        ("teacher.pth/t.pth", "cannot be written"),
    ):
        with pytest.raises(CheckpointError, match=match):
            convert_checkpoint(published, tmp_path / "out" / name, "student")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def run_script(code: str, *arguments: object) -> subprocess.CompletedProcess:
    prelude = "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
    command = [sys.executable, "-c", prelude + code, ROOT / "workflow_scripts", *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


def test_a_full_disk_leaves_what_was_there(published: Path, tmp_path: Path) -> None:
    convert_checkpoint(published, tmp_path / "out/teacher.pth")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    code = (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from dinoscope.export.convert import convert_checkpoint\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))\n"
        "try:\n"
        "    convert_checkpoint(Path(sys.argv[2]), Path(sys.argv[3]), 'student')\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    done = run_script(code, published, tmp_path / "out/teacher.pth")
    assert done.returncode == 0, done.stderr
    assert "teacher.pth cannot be written (" in done.stdout
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.long
def test_memory_goes_with_what_is_written(tmp_path: Path) -> None:
    """Resident memory, for a backbone of 240 MB in a checkpoint of five times that."""
    settings = dataclasses.replace(SETTINGS, embed_dim=640, num_heads=10, ffn_hidden=1708, depth=12)
    state = whole_state(torch.float32, "teacher", 500, settings)
    state["model"] = {name: tensor for name, tensor in state["model"].items() if name.startswith("teacher.")}
    save(state, tmp_path / "run/ckpt/41")
    stored = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*.distcp"))
    code = (
        "from dinoscope.export.convert import convert_checkpoint\n"
        "convert_checkpoint(Path(sys.argv[2]), Path(sys.argv[3]))\n"
        "lines = Path('/proc/self/status').read_text().splitlines()\n"
        "print(*(1024 * int(line.split()[1]) for line in lines if line.startswith('VmHWM')))\n"
    )
    done = run_script(code, tmp_path / "run", tmp_path / "teacher.pth")
    assert done.returncode == 0, done.stderr
    peak, size = int(done.stdout), (tmp_path / "teacher.pth").stat().st_size
    print(f"peak {peak / 1e6:.0f} MB, file {size / 1e6:.0f} MB, checkpoint {stored / 1e6:.0f} MB")
    assert size > 230e6
    assert stored > 4 * size
    assert peak < 1.3 * size + 350e6
