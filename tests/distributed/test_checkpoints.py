"""Checkpoints of several real processes: other numbers of ranks, full disks, kills at random moments.

A longer hunt: DINOSCOPE_KILLS=50 python -m pytest tests/distributed/test_checkpoints.py -k killed
"""

import contextlib
import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.tensor import DTensor

from dinoscope.config import CheckpointingConfig
from dinoscope.errors import LockError
from dinoscope.files import read_json
from dinoscope.models.registry import settings_from_config
from dinoscope.models.weights import load_backbone
from dinoscope.recipe import load_recipe
from dinoscope.train import saving
from dinoscope.train.checkpoint import load_checkpoint, training_state
from dinoscope.train.distributed import World
from dinoscope.train.metrics import read_metrics
from dinoscope.train.optimizer import build_optimizer
from dinoscope.train.parallelize import parallelize
from dinoscope.train.run_folder import complete_checkpoints
from dinoscope.train.saving import CheckpointSaver
from dinoscope.train.ssl_step import SSLModel
from sharded import whole
from tiny_slides import write_manifest, write_slide

pytestmark = pytest.mark.long
REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = REPOSITORY / "workflow_scripts"
SMALL = [
    *("student.arch=vit_nano", "crops.global_crops_size=64", "crops.local_crops_size=32"),
    *("dino.head_n_prototypes=64", "ibot.head_n_prototypes=66", "gram.use_loss=true"),
]
# vit_nano with heads of some megabytes, so that a save takes a moment
RECIPE = """
student: {arch: vit_nano, n_storage_tokens: 2, mask_k_bias: true, norm_layer: layernormbf16, drop_path_rate: 0.3,
          pos_embed_rope_dtype: fp32, pos_embed_rope_rescale_coords: 2, layerscale: 0.1}
crops: {global_crops_size: 64, local_crops_size: 32, local_crops_number: 2}
dino: {head_n_prototypes: 8192, head_hidden_dim: 64, head_bottleneck_dim: 64}
ibot: {head_n_prototypes: 8192, head_hidden_dim: 64, head_bottleneck_dim: 64}
optim: {epochs: 2, warmup_epochs: 1, freeze_last_layer_epochs: 1}
teacher: {warmup_teacher_temp_epochs: 2, momentum_teacher: 0.9}
train: {OFFICIAL_EPOCH_LENGTH: 8, batch_size_per_gpu: 2, num_workers: 1, log_every: 4}
checkpointing: {period: 1}
evaluation: {eval_period_iterations: 5, max_to_keep: 1}
"""


def build(*overrides: str) -> tuple[SSLModel, torch.optim.Optimizer]:
    """Sharded networks full of NaN, and an optimizer without a state."""
    config = load_recipe(REPOSITORY / "config/runs/tiny.yaml", [*SMALL, *overrides])
    settings = settings_from_config(config.student)
    with torch.device("meta"):
        model = SSLModel(config, settings)
    parallelize(model, World(dist.get_rank(), 0, dist.get_world_size(), torch.device("cpu")))
    return model, build_optimizer(model.student, config, settings.depth)


def flat(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    tensors = dict(state["model"])
    for name, moments in state["optimizer"].items():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in moments.items()}
    return tensors


def gathered(model: SSLModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Whole tensors of the state, copies."""
    state = flat(training_state(model, optimizer))
    return {k: whole(v).detach().clone() for k, v in state.items()}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, read without our code."""
    target = folder.with_name(f".{folder.name}.pth")
    dcp_to_torch_save(folder, target)
    state = flat(torch.load(target, weights_only=True))
    target.unlink()
    return state


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def fill(model: SSLModel, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """Other values everywhere, in the moments too."""
    shared, own = (torch.Generator().manual_seed(100 * seed + rank) for rank in (99, dist.get_rank()))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            sharded = isinstance(tensor, DTensor)
            local = tensor.to_local() if sharded else tensor
            local.copy_(torch.rand(local.shape, generator=own if sharded else shared))
    for _ in range(2):
        for parameter in model.student.parameters():
            parameter.grad = parameter.detach().sin()
        optimizer.step()


@contextlib.contextmanager
def joined(rank: int, size: int, folder: Path) -> Iterator[World]:
    torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous_{size}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=120))
    try:
        yield World(rank, rank, size, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def on_two_ranks(rank: int, run_dir: Path) -> None:
    with joined(rank, 2, run_dir) as world:
        model, optimizer = build()
        fill(model, optimizer, 1)
        with CheckpointSaver(run_dir, CheckpointingConfig(max_to_keep=2), world) as saver:
            saved_while_trained(model, optimizer, saver, run_dir)
            two_saves_do_not_overlap(model, optimizer, saver)
            a_full_disk_of_one_rank(rank, model, optimizer, saver)
        a_lost_lock(model, optimizer, world, run_dir)


def saved_while_trained(
    model: SSLModel, optimizer: torch.optim.Optimizer, saver: CheckpointSaver, run_dir: Path
) -> None:
    """What is saved is the state at the call, though all of it changes before anything is written."""
    before, may_write, write = gathered(model, optimizer), threading.Event(), saving._Writer.write_data

    def late(self: Any, plan: Any, planner: Any) -> Any:
        assert may_write.wait(60)
        return write(self, plan, planner)

    saving._Writer.write_data = late
    assert saver.save(4, model, optimizer, blocking=False) is None
    fill(model, optimizer, 7)
    assert not (run_dir / "ckpt/4").exists()
    may_write.set()
    assert saver.wait() is None
    saving._Writer.write_data = write
    dist.barrier()
    assert complete_checkpoints(run_dir, "checksums").keys() == {4}
    if dist.get_rank() == 0:
        torch.save(before, run_dir / "2.pth")
    dist.barrier()


def two_saves_do_not_overlap(model: SSLModel, optimizer: torch.optim.Optimizer, saver: CheckpointSaver) -> None:
    write, at_work, lock = saving._Writer.write_data, [], threading.Lock()

    def watched(self: Any, plan: Any, planner: Any) -> Any:
        assert lock.acquire(blocking=False), "two at once"
        at_work.append(threading.current_thread().name)
        time.sleep(0.1)
        lock.release()
        return write(self, plan, planner)

    saving._Writer.write_data = watched
    for iteration in (5, 6, 7):
        assert saver.save(iteration, model, optimizer, blocking=False) is None
    assert saver.save(8, model, optimizer, blocking=True) is None
    saving._Writer.write_data = write
    assert [name.startswith("checkpoint") for name in at_work] == [True, True, True, False]
    dist.barrier()  # the first rank alone deletes old ones
    assert sorted(complete_checkpoints(saver.run_dir)) == [7, 8]


def a_full_disk_of_one_rank(
    rank: int, model: SSLModel, optimizer: torch.optim.Optimizer, saver: CheckpointSaver
) -> None:
    """Both ranks learn of it, nothing is left of it, and the next save works."""

    class FullDisk:
        def __enter__(self) -> "FullDisk":
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def tell(self) -> int:
            return 0

        def write(self, _: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/path")

        def flush(self) -> None:
            pass

    create = torch.distributed.checkpoint.filesystem.FileSystem.create_stream
    if rank == 1:
        torch.distributed.checkpoint.filesystem.FileSystem.create_stream = lambda *_: FullDisk()
    for iteration, blocking in ((9, False), (10, True)):
        cause = saver.save(iteration, model, optimizer, blocking=blocking)
        assert (cause or saver.wait()) == "no space left on the device"
    torch.distributed.checkpoint.filesystem.FileSystem.create_stream = create
    dist.barrier()
    assert sorted(path.name for path in (saver.run_dir / "ckpt").glob("[0-9.]*")) == ["7", "8"]
    dist.barrier()
    saver.save(11, model, optimizer, blocking=False)
    assert saver.wait() is None
    dist.barrier()
    assert sorted(complete_checkpoints(saver.run_dir, "checksums")) == [8, 11]


def a_lost_lock(model: SSLModel, optimizer: torch.optim.Optimizer, world: World, run_dir: Path) -> None:
    """A checkpoint does not get its name when another trainer has the folder; all ranks end."""

    def lost() -> None:
        raise LockError("taken over")

    saver = CheckpointSaver(run_dir, CheckpointingConfig(), world, lost)
    saver.save(12, model, optimizer, blocking=False)
    with pytest.raises(LockError), saver:
        pass
    assert not (run_dir / "ckpt/12").exists()


def on_one_rank(rank: int, run_dir: Path) -> None:
    with joined(rank, 1, run_dir) as world:
        model, optimizer = build("train.checkpointing=true")
        load_checkpoint(run_dir / "ckpt/from_2", model, optimizer)
        assert_same(gathered(model, optimizer), torch.load(run_dir / "2.pth"))
        fill(model, optimizer, 3)
        with CheckpointSaver(run_dir, CheckpointingConfig(async_save=False, keep_every=5), world) as saver:
            assert saver.save(14, model, optimizer, blocking=False) is None
        torch.save(gathered(model, optimizer), run_dir / "1.pth")


def on_three_ranks(rank: int, run_dir: Path) -> None:
    with joined(rank, 3, run_dir):
        model, optimizer = build("train.checkpointing_full=true", "compute_precision.sharding_strategy=FULL_SHARD")
        for folder, state in (("from_2", "2.pth"), ("14_keep", "1.pth")):
            load_checkpoint(run_dir / "ckpt" / folder, model, optimizer)
            assert_same(gathered(model, optimizer), torch.load(run_dir / state))


def spawn(function: Any, processes: int, run_dir: Path) -> None:
    torch.multiprocessing.spawn(function, (run_dir,), nprocs=processes)


def test_what_two_ranks_save_one_and_three_load_bit_by_bit(tmp_path: Path) -> None:
    """Also: saved while the state changes, one save at a time, a full disk, a lost lock (in the ranks themselves)."""
    ckpt = tmp_path / "ckpt"
    spawn(keeps_the_first, 2, tmp_path)
    assert_same(stored(ckpt / "from_2"), torch.load(tmp_path / "2.pth"))
    spawn(on_one_rank, 1, tmp_path)
    assert_same(stored(ckpt / "14_keep"), torch.load(tmp_path / "1.pth"))
    spawn(on_three_ranks, 3, tmp_path)


def keeps_the_first(rank: int, run_dir: Path) -> None:
    """The checkpoint of the first save under another name: later saves delete it."""
    replace = saving.replace_folder

    def replace_and_copy(partial: Path, target: Path) -> None:
        replace(partial, target)
        if target.name == "4":
            shutil.copytree(target, target.with_name("from_2"))

    saving.replace_folder = replace_and_copy
    on_two_ranks(rank, run_dir)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a slide, its manifest, a recipe and starting weights."""
    folder = tmp_path_factory.mktemp("checkpoints")
    slide = write_slide(folder / "one.tiff", 1)
    (folder / "slides.tsv").write_text(f"slide_id\tpath\none\t{slide}\n")
    write_manifest(folder / "manifests/train.parquet", ["one"], slide_px=1024, tile_px=128)
    (folder / "recipe.yaml").write_text(RECIPE)
    weights = [SCRIPTS / "initial_weights.py", "--config", "recipe.yaml", "--output", "models/base/teacher.pth"]
    subprocess.run([sys.executable, *weights], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def unbroken(place: Path) -> Path:
    """A run that nothing disturbed, which saved the plain way."""
    done = train(place, "unbroken", "checkpointing.async_save=false", "checkpointing.period=100")
    assert done.returncode == 0, done.stderr
    return place / "runs/unbroken/main"


def command(run: str, *extra: str) -> list[str]:
    launcher = [sys.executable, str(SCRIPTS / "launch.py"), "--processes", "2", "--threads", "2", "--"]
    inputs = ["--config", "recipe.yaml", "--manifest", "manifests/train.parquet", "--slides", "slides.tsv"]
    inputs += ["--weights", "models/base/teacher.pth", "--run-dir", f"runs/{run}/main"]
    return [*launcher, str(SCRIPTS / "pretrain.py"), *inputs, *extra]


def train(place: Path, run: str, *extra: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(run, *extra), cwd=place, capture_output=True, text=True, check=False)


def assert_same_end(run: Path, other: Path) -> None:
    finals = [read_json(folder / "final.json") for folder in (run, other)]
    checkpoints = [stored(folder / final["checkpoint"]) for folder, final in zip((run, other), finals, strict=True)]
    assert_same(*checkpoints)
    teachers = [load_backbone(folder / final["teacher"]) for folder, final in zip((run, other), finals, strict=True)]
    assert_same(*(teacher.state_dict() for teacher in teachers))


def wait_for(condition: Any, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


def test_killed_at_random_moments_and_during_saves_it_ends_the_same(place: Path, unbroken: Path) -> None:
    """SIGKILL of the launcher while files are written, whose processes die with it."""
    run, moments, kills = place / "runs/killed/main", random.Random(5), int(os.environ.get("DINOSCOPE_KILLS", "3"))
    half_written = 0
    for kill in range(kills):
        begun, ckpt = set(complete_checkpoints(run)), run / "ckpt"
        process = subprocess.Popen(command("killed"), cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # every other kill hits a save, the others whatever there is
        if kill % 2:
            wait_for(lambda begun=begun, p=process: set(complete_checkpoints(run)) - begun or p.poll() is not None)
            time.sleep(moments.uniform(0, 0.3))
        else:
            wait_for(lambda ckpt=ckpt, p=process: any(ckpt.glob(".*.partial/*")) or p.poll() is not None)
            time.sleep(moments.uniform(0, 0.01))
        process.kill()
        process.wait()
        time.sleep(0.3)  # its processes end
        half_written += any(ckpt.glob(".[0-9]*.partial"))
        assert not (run / ".clean").exists() or (run / "final.json").exists()
    assert half_written
    done = train(place, "killed")
    assert done.returncode == 0, done.stderr
    assert not list(run.rglob("*.partial*"))
    assert (run / ".clean").is_file()
    assert [event["event"] for event in read_metrics(run).attrs["events"]].count("resume") >= 1
    assert_same_end(run, unbroken)


def test_a_damaged_checkpoint_is_passed_over(place: Path, unbroken: Path) -> None:
    """After a kill a flipped bit is seen and the checkpoint before is used; the end is the same."""
    run = place / "runs/flipped/main"
    process = subprocess.Popen(command("flipped"), cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(complete_checkpoints(run)) >= 2)
    process.kill()
    process.wait()
    time.sleep(0.3)
    before, newest = list(complete_checkpoints(run))[-2:]
    shard = run / "ckpt" / str(newest) / "__1_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    done = train(place, "flipped")
    assert done.returncode == 0, done.stderr
    assert f"checkpoint ckpt/{newest} is not used: __1_0.distcp no longer holds what was written" in done.stderr
    assert f"resumes after iteration {before}, from ckpt/{before}" in done.stderr
    assert_same_end(run, unbroken)


def test_a_stopped_run_says_that_it_is_to_be_started_again(place: Path, unbroken: Path) -> None:
    """By SIGUSR1, then by its time limit; by the clock it saves after every step; exports are pruned."""
    run = place / "runs/stopped/main"
    by_the_clock = ["checkpointing.period=1000", "checkpointing.every_minutes=0.0001"]
    process = subprocess.Popen(command("stopped", *by_the_clock), cwd=place, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: complete_checkpoints(run))
    process.send_signal(signal.SIGUSR1)
    _, output = process.communicate(timeout=60)
    assert process.returncode == 75, output
    told = re.search(r"asked to stop and saved its state after iteration (\d+)", output)
    assert told, output
    assert max(complete_checkpoints(run)) == int(told[1])
    out_of_time = train(place, "stopped", "train.time_limit_minutes=0.5", *by_the_clock)
    assert out_of_time.returncode == 75, out_of_time.stderr
    assert f"came near its time limit and saved its state after iteration {int(told[1]) + 1}" in out_of_time.stderr
    assert not (run / "final.json").exists()
    assert (run / ".clean").is_file()
    done = train(place, "stopped", "checkpointing.period=1000")
    assert done.returncode == 0, done.stderr
    assert_same_end(run, unbroken)
    assert {path.name for path in (run / "eval").iterdir()} == {"training_4", "training_15"}


def test_a_full_disk_does_not_end_the_run_but_a_last_save_that_fails_does(place: Path, unbroken: Path) -> None:
    """On a real file system with room for two checkpoints and a half, then for more."""
    run, size = place / "runs/full/main", sum(path.stat().st_size for path in (unbroken / "ckpt/15").iterdir())
    (run / "ckpt").mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size * 5 // 2}", "tmpfs", str(run / "ckpt")]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        done = train(place, "full", "checkpointing.period=5")
        assert done.returncode == 1, done.stderr
        warning = "checkpoint 14 cannot be written (no space left on the device); the training goes on and tries again"
        assert f"{warning} at the next one, the last complete one is of iteration 9" in done.stderr
        error = [line for line in done.stderr.splitlines() if line.startswith("error: ")][-1]
        assert "checkpoint 15 cannot be written (no space left on the device); free space and start" in error
        assert error.endswith("it goes on after iteration 9")
        assert list(complete_checkpoints(run, "checksums")) == [4, 9]
        assert not list((run / "ckpt").glob(".*"))
        assert not (run / "final.json").exists()
        subprocess.run(["mount", "-o", f"remount,size={size * 9}", str(run / "ckpt")], check=True)
        assert train(place, "full", "checkpointing.period=5").returncode == 0
        assert_same_end(run, unbroken)
    finally:
        subprocess.run(["umount", str(run / "ckpt")], check=True)
