"""Real runs that train a part of the backbone, or at first the heads alone: checkpoints, resuming, exports."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.tensor import DTensor

from dinoscope.data.collate import Batch, Collate
from dinoscope.data.crops import Crops
from dinoscope.files import read_json
from dinoscope.models.registry import settings_from_config
from dinoscope.models.weights import load_backbone
from dinoscope.recipe import load_recipe
from dinoscope.train import parallelize as parallelize_module
from dinoscope.train import ssl_step
from dinoscope.train.distributed import World, joined_world
from dinoscope.train.metrics import read_metrics
from dinoscope.train.optimizer import build_optimizer
from dinoscope.train.ssl_step import SSLModel
from dinoscope.train.starting import Start, start_model
from sharded import whole
from tiny_slides import write_manifest, write_slide

pytestmark = pytest.mark.long
SCRIPTS = Path(__file__).resolve().parents[2] / "workflow_scripts"
RECIPE = """
student: {arch: vit_nano, n_storage_tokens: 2, mask_k_bias: true, norm_layer: layernormbf16, drop_path_rate: 0.3,
          pos_embed_rope_dtype: fp32, pos_embed_rope_rescale_coords: 2, layerscale: 0.1}
crops: {global_crops_size: 64, local_crops_size: 32, local_crops_number: 2}
dino: {head_n_prototypes: 64, head_hidden_dim: 32, head_bottleneck_dim: 16}
ibot: {head_n_prototypes: 64, head_hidden_dim: 32, head_bottleneck_dim: 16}
optim: {epochs: 2, warmup_epochs: 0.34, freeze_last_layer_epochs: 0, freeze_backbone_epochs: 1, lr: 0.05}
teacher: {warmup_teacher_temp_epochs: 1, momentum_teacher: 0.9}
train: {OFFICIAL_EPOCH_LENGTH: 3, batch_size_per_gpu: 2, num_workers: 0, log_every: 1}
checkpointing: {period: 2, max_to_keep: null}
"""
LORA = "student: {trainable: lora, unfrozen_blocks: 1, lora_rank: 4, lora_alpha: 6, lora_targets: [q, v, proj, ffn]}\n"
RECIPES = {
    "full.yaml": RECIPE,
    "lora.yaml": f"extends: full.yaml\n{LORA}",
    "last_n.yaml": "extends: full.yaml\nstudent: {trainable: last_n, unfrozen_blocks: 1}\n",
    "norms.yaml": "extends: full.yaml\nstudent: {trainable: norms}\noptim: {freeze_backbone_epochs: 0}\n",
    "gram_lora.yaml": f"extends: full.yaml\n{LORA}"
    "gram: {use_loss: true, img_level: true, update_frequency: 2}\n"
    "optim: {epochs: 1, warmup_epochs: 0, freeze_backbone_epochs: 0}\n"
    "teacher: {warmup_teacher_temp_epochs: 0}\n",
}
FROZEN = 3  # iterations


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a slide, its manifest, recipes and starting weights."""
    folder = tmp_path_factory.mktemp("trainable")
    slide = write_slide(folder / "one.tiff", 1)
    (folder / "slides.tsv").write_text(f"slide_id\tpath\none\t{slide}\n")
    write_manifest(folder / "manifests/train.parquet", ["one"], slide_px=1024, tile_px=128)
    for name, text in RECIPES.items():
        (folder / name).write_text(text)
    done = script(folder, "initial_weights.py", "--config", "full.yaml", "--output", "models/base/teacher.pth")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def lora(place: Path) -> Path:
    """An undisturbed run with adapters, of two processes."""
    return finished(place, "lora", "lora.yaml")


def script(folder: Path, name: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPTS / name, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


def train(place: Path, run: str, recipe: str, *extra: str, processes: int = 2) -> subprocess.CompletedProcess:
    inputs = ["--config", recipe, "--manifest", "manifests/train.parquet", "--slides", "slides.tsv"]
    inputs += ["--weights", "models/base/teacher.pth", "--run-dir", f"runs/{run}/main"]
    return script(
        place, "launch.py", "--processes", str(processes), "--", str(SCRIPTS / "pretrain.py"), *inputs, *extra
    )


def finished(place: Path, run: str, recipe: str, *extra: str, **options: int) -> Path:
    done = train(place, run, recipe, *extra, **options)
    assert done.returncode == 0, done.stderr
    return place / "runs" / run / "main"


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a DCP folder, read without our code."""
    target = folder.parents[1] / f"{folder.name}.pth"
    dcp_to_torch_save(folder, target)
    state = torch.load(target, weights_only=True)
    flat = dict(state["model"])
    for name, moments in state.get("optimizer", {}).items():
        flat |= {f"optimizer.{name}.{key}": value for key, value in moments.items()}
    return flat


def backbone_of(state: dict[str, torch.Tensor], network: str) -> dict[str, torch.Tensor]:
    prefix = f"{network}.backbone."
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def resumed(place: Path, run: Path, name: str, recipe: str, after: int, *extra: str, processes: int = 2) -> Path:
    """A copy of a finished run without anything after one checkpoint, gone on with."""
    copy = shutil.copytree(run, place / "runs" / name / "main")
    (copy / "final.json").unlink()
    shutil.rmtree(copy / "eval")
    for folder in (copy / "ckpt").glob("[0-9]*"):
        if int(folder.name) > after:
            shutil.rmtree(folder)
    assert (copy / f"ckpt/{after}").is_dir()
    return finished(place, name, recipe, *extra, processes=processes)


def assert_same_end(run: Path, other: Path) -> None:
    first, second = stored(run / "ckpt/5"), stored(other / "ckpt/5")
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    exports = [
        torch.load(r / read_json(r / "final.json")["teacher"], weights_only=True)["teacher"] for r in (run, other)
    ]
    assert exports[0].keys() == exports[1].keys()
    assert all(torch.equal(exports[0][name], exports[1][name]) for name in exports[0])


def naive_merge(frozen: dict[str, torch.Tensor], trained: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Adapters of vit_nano (width 64, scale 6 / 4) added into the weights, layer by layer, in float64."""
    plain = {k: v.double() for k, v in (frozen | trained).items() if ".lora." not in k}
    low = {k.replace(".lora.b", ".lora.a"): v.double() for k, v in trained.items() if ".lora.b" in k}
    assert len(low) == 5  # q, v, proj, fc1, fc2 of block 0
    for name, b in low.items():
        layer, part = name.split(".lora.a")
        start = {"": 0, "_q": 0, "_v": 128}[part]
        plain[f"{layer}.weight"][start : start + b.shape[0]] += 1.5 * b @ trained[name].double()
    return plain


def test_checkpoints_hold_what_is_trained_and_the_rest_is_stored_once(place: Path, lora: Path) -> None:
    base = load_backbone(place / "models/base/teacher.pth").state_dict()
    state, frozen = stored(lora / "ckpt/5"), backbone_of(stored(lora / "ckpt/frozen"), "frozen")
    student, teacher = backbone_of(state, "student"), backbone_of(state, "teacher")
    assert student.keys() == teacher.keys()
    assert not student.keys() & frozen.keys()
    plain_frozen = {name: tensor for name, tensor in frozen.items() if ".lora." not in name}
    assert all(torch.equal(tensor, base[name]) for name, tensor in plain_frozen.items())
    assert {name for name in student if ".lora." not in name} | plain_frozen.keys() == base.keys()
    assert "blocks.0.attn.qkv.weight" in frozen
    assert {"blocks.1.attn.qkv.weight", "blocks.0.norm1.weight", "blocks.0.attn.qkv.lora.a_q"} <= student.keys()
    in_optimizer = {k.split(".", 1)[1].rsplit(".", 1)[0] for k in state if k.startswith("optimizer.")}
    trained = {k for k in state if k.startswith("student.")}
    assert {name for name in in_optimizer if ".backbone." in name} == {k for k in trained if ".backbone." in k}
    assert all(not torch.equal(student[name], teacher[name]) for name in student if ".lora.b" in name)
    assert sorted(path.name for path in (lora / "ckpt").iterdir()) == ["1", "3", "5", "frozen"]


def test_the_frozen_phase_and_the_moments_after_it(place: Path, lora: Path) -> None:
    base = load_backbone(place / "models/base/teacher.pth").state_dict()
    early, late = stored(lora / "ckpt/1"), stored(lora / "ckpt/5")
    key = "blocks.1.mlp.fc1.weight"
    assert torch.equal(early[f"student.backbone.{key}"], base[key])
    assert torch.equal(early[f"teacher.backbone.{key}"], base[key])
    assert early[f"optimizer.student.backbone.{key}.step"] == 0
    assert early["optimizer.student.dino_head.mlp.0.weight.step"] == 2
    assert late[f"optimizer.student.backbone.{key}.step"] == 6 - FROZEN
    assert late["optimizer.student.dino_head.mlp.0.weight.step"] == 6
    assert not torch.equal(late[f"student.backbone.{key}"], base[key])
    assert not torch.equal(early["student.dino_head.mlp.0.weight"], late["student.dino_head.mlp.0.weight"])
    frame = read_metrics(lora)
    assert (frame["lr"][:FROZEN] == 0).all()
    assert frame["lr"][4] == frame["head_lr"][4] > 0
    assert frame["head_lr"][2] > 0
    assert (frame["backbone_grad_norm"][:FROZEN] == 0).all()
    assert (frame["backbone_grad_norm"][FROZEN:] > 0).all()
    note = frame.attrs["events"][0]["note"]
    assert "lora (rank 4, scale 1.5, targets q v proj ffn, 1 unfrozen blocks)" in note


@pytest.mark.parametrize("after", [1, 3])
def test_resumed_in_the_frozen_phase_or_after_it_the_end_is_the_same(place: Path, lora: Path, after: int) -> None:
    assert_same_end(resumed(place, lora, f"lora_after_{after}", "lora.yaml", after), lora)


def test_a_checkpoint_of_two_processes_goes_on_in_one(place: Path, lora: Path) -> None:
    run = resumed(place, lora, "lora_one", "lora.yaml", 1, "train.batch_size_per_gpu=4", processes=1)
    assert read_json(run / "final.json")["iteration"] == 5
    first, second = stored(run / "ckpt/5"), stored(lora / "ckpt/5")
    assert first.keys() == second.keys()
    base, exported = (
        load_backbone(path).state_dict()
        for path in (place / "models/base/teacher.pth", run / "eval/training_5/teacher_checkpoint.pth")
    )
    assert torch.equal(exported["blocks.0.attn.qkv.bias"], base["blocks.0.attn.qkv.bias"])
    assert not torch.equal(exported["blocks.0.attn.qkv.weight"], base["blocks.0.attn.qkv.weight"])


def test_activation_checkpointing_changes_nothing(place: Path, lora: Path) -> None:
    run = finished(place, "lora_checkpointed", "lora.yaml", "train.checkpointing=true")
    assert_same_end(run, lora)


def test_full_sharding_changes_nothing(place: Path, lora: Path) -> None:
    run = finished(place, "lora_sharded", "lora.yaml", "compute_precision.sharding_strategy=FULL_SHARD")
    assert_same_end(run, lora)


@pytest.mark.parametrize("branch", ["teacher", "student"])
def test_conversion_merges_the_adapters_exactly(place: Path, lora: Path, branch: str) -> None:
    output = place / f"models/{branch}/teacher.pth"
    done = script(
        *(place, "convert_checkpoint.py", "--checkpoint", str(lora / "ckpt/5"), "--output", str(output)),
        *("--branch", branch),
    )
    assert done.returncode == 0, done.stderr
    frozen, trained = backbone_of(stored(lora / "ckpt/frozen"), "frozen"), backbone_of(stored(lora / "ckpt/5"), branch)
    wanted, found = naive_merge(frozen, trained), load_backbone(output).state_dict()
    assert found.keys() == wanted.keys() == load_backbone(place / "models/base/teacher.pth").state_dict().keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name].double(), tensor, rtol=1e-7, atol=1e-9, msg=name)
    cards = [read_json(place / name / "model.json") for name in (f"models/{branch}", "models/base")]
    assert cards[0]["backbone"] == cards[1]["backbone"]
    assert cards[0]["branch"] == branch
    assert cards[0]["trained"] == "lora (rank 4, scale 1.5, targets q v proj ffn, 1 unfrozen blocks)"
    exported = torch.load(lora / "eval/training_5/teacher_checkpoint.pth", weights_only=True)["teacher"]
    same = all(torch.equal(tensor, exported[f"backbone.{name}"]) for name, tensor in found.items())
    assert same == (branch == "teacher")
    assert {name.split(".")[0] for name in exported} == {"backbone", "dino_head", "ibot_head"}
    assert not any(".lora." in name for name in exported)


def test_without_its_frozen_part_a_checkpoint_is_of_no_use_and_says_so(place: Path, lora: Path) -> None:
    copy = shutil.copytree(lora, place / "runs/lost/main")
    (copy / "final.json").unlink()
    shutil.rmtree(copy / "ckpt/frozen")
    shutil.rmtree(copy / "ckpt/5")
    told = train(place, "lost", "lora.yaml").stderr
    assert "ckpt/3 holds only what is trained, and runs/lost/main/ckpt/frozen with the rest" in told
    arguments = ("--checkpoint", "runs/lost/main", "--output", "models/lost/teacher.pth")
    refused = script(place, "convert_checkpoint.py", *arguments)
    assert refused.returncode == 1
    assert "ckpt/frozen is not there" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_what_an_attempt_without_a_checkpoint_left_is_written_again(place: Path, lora: Path) -> None:
    other = place / "runs/again/main"
    shutil.copytree(lora / "ckpt/frozen", other / "ckpt/frozen")
    script(place, "initial_weights.py", "--config", "full.yaml", "--output", "models/other/teacher.pth", "train.seed=5")
    run = finished(place, "again", "lora.yaml", "--weights", "models/other/teacher.pth")
    started = load_backbone(place / "models/other/teacher.pth").state_dict()["blocks.0.attn.qkv.weight"]
    assert torch.equal(backbone_of(stored(run / "ckpt/frozen"), "frozen")["blocks.0.attn.qkv.weight"], started)


def test_a_gram_phase_carries_the_adapters_on(place: Path, lora: Path) -> None:
    continued = ("--continues", "runs/lora/main/final.json", "--gram-teacher", "last")
    run = finished(place, "gram_lora", "gram_lora.yaml", *continued)
    assert (read_metrics(run)["gram_loss"] >= 0).all()
    state, parent = stored(run / "ckpt/2"), stored(lora / "ckpt/5")
    assert state["optimizer.student.backbone.blocks.0.attn.qkv.lora.b_q.step"] == 6 - FROZEN + 3
    assert not torch.equal(
        *(s["student.backbone.blocks.0.attn.qkv.lora.b_q"] for s in (state, parent)),
    )
    frozen = [backbone_of(stored(r / "ckpt/frozen"), "frozen") for r in (run, lora)]
    assert all(torch.equal(frozen[0][name], frozen[1][name]) for name in frozen[1])
    # refreshed after iteration 2 of 3: the teacher as it was then, adapters included
    gram = backbone_of(state, "gram_teacher")
    assert gram.keys() == backbone_of(state, "student").keys() | frozen[0].keys()
    assert torch.equal(gram["blocks.0.attn.qkv.weight"], frozen[0]["blocks.0.attn.qkv.weight"])
    assert gram["blocks.0.attn.qkv.lora.b_q"].any()


def test_a_continuation_that_trains_something_else_is_refused(place: Path, lora: Path) -> None:
    done = train(place, "gram_full", "full.yaml", "--continues", "runs/lora/main/final.json")
    assert done.returncode == 1
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")][-1]
    assert "run main trained student.trainable: lora (rank 4" in told
    assert "asks for full: set it to the same, or start from that run's teacher instead (MODEL.WEIGHTS: " in told
    assert not (place / "runs/gram_full/main/run_config.json").exists()


def test_other_adapters_are_refused_by_the_seal(place: Path, lora: Path) -> None:
    for change, told in (
        ("student.lora_rank=8", "student.lora_rank was 4 and is now 8"),
        ("optim.freeze_backbone_epochs=0", "optim.freeze_backbone_epochs was 1.0 and is now 0.0"),
    ):
        assert told in train(place, "lora", "lora.yaml", change).stderr


def test_full_training_after_a_head_warm_up_resumes_across_its_end(place: Path) -> None:
    run = finished(place, "full", "full.yaml")
    assert_same_end(resumed(place, run, "full_after_1", "full.yaml", 1), run)
    assert not (run / "ckpt/frozen").exists()
    state = stored(run / "ckpt/5")
    assert backbone_of(state, "student").keys() == backbone_of(state, "teacher").keys()
    assert "blocks.0.attn.qkv.weight" in backbone_of(state, "student")
    assert state["optimizer.student.backbone.cls_token.step"] == 6 - FROZEN


@pytest.mark.parametrize("mode", ["last_n", "norms"])
def test_other_modes_train_and_resume(place: Path, mode: str) -> None:
    run = finished(place, mode, f"{mode}.yaml")
    if mode == "last_n":
        assert_same_end(resumed(place, run, "last_n_after_3", "last_n.yaml", 3), run)
    base, exported = (
        load_backbone(path).state_dict()
        for path in (place / "models/base/teacher.pth", run / "eval/training_5/teacher_checkpoint.pth")
    )
    moved = {name for name in base if not torch.equal(base[name], exported[name])}
    trained = backbone_of(stored(run / "ckpt/5"), "teacher").keys()
    assert moved <= trained
    assert ("blocks.1.mlp.fc1.weight" in moved) == (mode == "last_n")
    assert ("blocks.0.norm1.weight" in moved) == (mode == "norms")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """One process, sharded all the same."""
    monkeypatch.setattr(parallelize_module, "is_sharded", lambda *_: True)
    before = dict(os.environ)
    try:
        with joined_world() as joined:
            yield joined
    finally:
        os.environ.clear()
        os.environ.update(before)


def build(world: World, recipe: Path, *overrides: str) -> SSLModel:
    config = load_recipe(recipe, overrides)
    settings = settings_from_config(config.student)
    with torch.device("meta"):
        model = SSLModel(config, settings)
    parallelize_module.parallelize(model, world)
    start_model(model, build_optimizer(model.student, config, settings.depth), Start(None, None, None), world)
    for name, parameter in model.student["backbone"].named_parameters():
        if ".lora.b" in name:  # else A would have no gradient
            with torch.no_grad():
                parameter.fill_(0.1)
    return model


def batch() -> Batch:
    rng = np.random.default_rng(0)

    def crops() -> Crops:
        return Crops(
            rng.integers(0, 255, (2, 64, 64, 3), np.uint8), rng.integers(0, 255, (2, 32, 32, 3), np.uint8), None
        )

    return Collate(2, 16, 0.5, (0.1, 0.45), False, 0)([(i, crops()) for i in range(2)])


def gradients(model: SSLModel, **options: bool) -> tuple[float, dict[str, torch.Tensor | None]]:
    loss, _ = model(batch(), model.targets([batch()], 0.04)[0], **options)
    loss.backward()
    named = [(name.replace("_checkpoint_wrapped_module.", ""), p) for name, p in model.student.named_parameters()]
    return loss.item(), {name: None if p.grad is None else whole(p.grad) for name, p in named}


@pytest.mark.parametrize("mode", ["lora", "last_n", "norms"])
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_sharded_modules_give_frozen_parameters_no_gradients(
    place: Path, world: World, mode: str, checkpointing: str
) -> None:
    model = build(world, place / f"{mode}.yaml", f"train.checkpointing={checkpointing}")
    wanted = {
        name.replace("_checkpoint_wrapped_module.", ""): p.requires_grad for name, p in model.student.named_parameters()
    }
    _, found = gradients(model)
    assert {name: gradient is not None for name, gradient in found.items()} == wanted
    assert any(not trained for trained in wanted.values())
    assert all(isinstance(parameter, DTensor) for parameter in model.student.parameters())  # sharded again


def test_frozen_blocks_do_not_stay_gathered(place: Path, world: World) -> None:
    model = build(world, place / "last_n.yaml", "compute_precision.sharding_strategy=SHARD_GRAD_OP")
    model(batch(), model.targets([batch()], 0.04)[0])
    first, last = model.student["backbone"].blocks
    assert all(isinstance(parameter, DTensor) for parameter in first.parameters())
    assert not any(isinstance(parameter, DTensor) for parameter in last.parameters())  # waits for its backward


@pytest.mark.filterwarnings("default")  # torch's compiler warns of its own doings
def test_compiled_adapters_change_nothing_beyond_rounding(
    place: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First with the backbone frozen, then without, as in a run."""

    def both() -> list[tuple[float, dict[str, torch.Tensor | None]]]:
        model, seen = build(world, place / "lora.yaml"), []
        for frozen in (True, False):
            model.zero_grad(set_to_none=True)
            seen.append(gradients(model, backbone_frozen=frozen))
        return seen

    plain = both()
    monkeypatch.setattr(parallelize_module, "_compiles", lambda config, device_type: True)
    for (loss, wanted), (other, found) in zip(plain, both(), strict=True):
        assert other == pytest.approx(loss, rel=1e-5)
        for name, gradient in wanted.items():
            assert (gradient is None) == (found[name] is None), name
            if gradient is not None:
                torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_bf16_adapters_are_close_to_float32(place: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, wanted = gradients(build(world, place / "lora.yaml"))
    for module in (ssl_step, parallelize_module):
        monkeypatch.setattr(module, "compute_dtype", lambda config, device_type: torch.bfloat16)
    other, found = gradients(build(world, place / "lora.yaml"))
    assert other == pytest.approx(loss, rel=0.02)
    assert other != loss
    names = [name for name in wanted if ".lora." in name]
    flat, other_flat = (torch.cat([g[name].flatten() for name in names]) for g in (wanted, found))
    assert {found[name].dtype for name in names} == {torch.float32}
    assert torch.nn.functional.cosine_similarity(flat, other_flat, 0) > 0.98
