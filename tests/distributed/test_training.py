"""Real training runs of two processes: files, resuming after every kind of end, refusals, gram phase, conversion."""

import hashlib
import json
import platform
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from dinoscope.files import read_json
from dinoscope.models.weights import load_backbone
from dinoscope.train.metrics import read_events, read_metrics
from dinoscope.train.run_folder import complete_checkpoints
from tiny_slides import write_manifest, write_slide

SCRIPTS = Path(__file__).resolve().parents[2] / "workflow_scripts"
RECIPE = """
student: {arch: vit_nano, n_storage_tokens: 2, mask_k_bias: true, norm_layer: layernormbf16, drop_path_rate: 0.3,
          pos_embed_rope_dtype: fp32, pos_embed_rope_rescale_coords: 2, layerscale: 0.1}
crops: {global_crops_size: 64, local_crops_size: 32, local_crops_number: 2}
augmentation: {recipe: pathology}
dino: {head_n_prototypes: 64, head_hidden_dim: 32, head_bottleneck_dim: 16}
ibot: {head_n_prototypes: 64, head_hidden_dim: 32, head_bottleneck_dim: 16}
optim: {epochs: 4, warmup_epochs: 1, freeze_last_layer_epochs: 1}
teacher: {warmup_teacher_temp_epochs: 2, momentum_teacher: 0.9}
train: {OFFICIAL_EPOCH_LENGTH: 6, batch_size_per_gpu: 2, num_workers: 1, log_every: 4}
checkpointing: {period: 5}
evaluation: {eval_period_iterations: 10}
"""
GRAM_RECIPE = """
extends: recipe.yaml
crops: {gram_teacher_crops_size: 96}
gram: {use_loss: true, img_level: true, update_frequency: 4, max_updates: 1}
optim: {epochs: 1, warmup_epochs: 0, freeze_last_layer_epochs: 0}
teacher: {warmup_teacher_temp_epochs: 0}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two slides, their manifest, recipes and starting weights."""
    folder = tmp_path_factory.mktemp("training")
    slides = [write_slide(folder / f"slide_{seed}.tiff", seed) for seed in (1, 2)]
    rows = "".join(f"{slide.stem}\t{slide}\n" for slide in slides)
    (folder / "slides.tsv").write_text(f"slide_id\tpath\n{rows}")
    write_manifest(folder / "manifests/train.parquet", [slide.stem for slide in slides], slide_px=1024, tile_px=128)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "gram.yaml").write_text(GRAM_RECIPE)
    script(folder, "initial_weights.py", "--config", "recipe.yaml", "--output", "models/base/teacher.pth")
    return folder


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    """A run that nothing disturbed."""
    assert train(place, "unbroken").returncode == 0
    return place / "runs/unbroken/main"


def test_a_run_tells_who_made_it(place: Path, finished: Path) -> None:
    """provenance.json: code, versions, command, machines; no host, folder or user of this machine."""
    (start,) = read_json(finished / "provenance.json")["starts"]
    code = subprocess.run(["git", "rev-parse", "HEAD"], cwd=SCRIPTS, capture_output=True, text=True, check=False)
    assert start["code"]["git_commit"] == (code.stdout.strip() or None)
    assert start["code"]["git_dirty"] in (True, False, None)
    assert start["versions"]["torch"] == version("torch")
    assert start["versions"]["python"] == platform.python_version()
    assert start["command"][0] == "pretrain.py"
    assert "recipe.yaml" in start["command"]
    assert start["config_sha256"] == hashlib.sha256((finished / "config.yaml").read_bytes()).hexdigest()
    (machine,) = start["machines"]
    assert list(machine["devices"].values()) == [2]
    text = (finished / "provenance.json").read_text()
    assert socket.gethostname() not in text
    assert str(place) not in text and str(SCRIPTS) not in text


def script(folder: Path, name: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPTS / name, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


def command(run: str, *extra: str, recipe: str = "recipe.yaml", processes: int = 2) -> list[str]:
    launcher = [sys.executable, str(SCRIPTS / "launch.py"), "--processes", str(processes), "--threads", str(processes)]
    inputs = ["--config", recipe, "--manifest", "manifests/train.parquet", "--slides", "slides.tsv"]
    inputs += ["--weights", "models/base/teacher.pth", "--run-dir", f"runs/{run}/main"]
    return [*launcher, "--log-dir", f"runs/{run}/main/logs", "--", str(SCRIPTS / "pretrain.py"), *inputs, *extra]


def train(place: Path, run: str, *extra: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command(run, *extra, **options), cwd=place, capture_output=True, text=True, check=False)


def without_launcher(place: Path, launched: list[str]) -> subprocess.CompletedProcess:
    """The same training as a plain script."""
    plain = [sys.executable, *launched[launched.index("--") + 1 :]]
    return subprocess.run(plain, cwd=place, capture_output=True, text=True, check=False)


def last_error(output: str) -> str:
    """The sentence that a launched training ends with."""
    return [line for line in output.splitlines() if line.startswith("error: ")][-1]


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def descendants(pid: int) -> list[int]:
    """Ids of all processes below one."""
    found = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout.split()
    parents = dict(zip(map(int, found[::2]), map(int, found[1::2]), strict=True))
    below, grown = {pid}, True
    while grown:
        more = {child for child, parent in parents.items() if parent in below} - below
        below, grown = below | more, bool(more)
    return sorted(below - {pid})


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def all_tensors(run: Path) -> dict[str, torch.Tensor]:
    """Student, teacher and optimizer state of a run's last checkpoint, read without our code."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    target = run / "state.pth"
    dcp_to_torch_save(run / read_json(run / "final.json")["checkpoint"], target)
    state = torch.load(target, weights_only=True)
    flat = dict(state["model"])
    for name, moments in state["optimizer"].items():
        flat |= {f"optimizer.{name}.{key}": value for key, value in moments.items()}
    return flat


def assert_same_end(run: Path, other: Path) -> None:
    first, second = all_tensors(run), all_tensors(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    exports = [load_backbone(folder / read_json(folder / "final.json")["teacher"]) for folder in (run, other)]
    states = [model.state_dict() for model in exports]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    frames = [read_metrics(folder) for folder in (run, other)]
    assert list(frames[0].index) == list(frames[1].index)
    assert frames[0]["lr"].equals(frames[1]["lr"])


def test_an_unbroken_run_leaves_all_its_files(finished: Path) -> None:
    final = read_json(finished / "final.json")
    assert final["iteration"] == 23
    assert final["checkpoint"] == "ckpt/23"
    assert final["samples_seen"] == 96
    assert sorted(int(path.name) for path in (finished / "ckpt").iterdir()) == [14, 19, 23]  # the newest 3
    assert {path.name for path in (finished / "eval").iterdir()} == {"training_9", "training_19", "training_23"}
    frame = read_metrics(finished)
    assert list(frame.index) == [3, 7, 11, 15, 19, 23]
    wanted = "total_loss dino_local_crops_loss dino_global_crops_loss koleo_loss ibot_loss lr wd mom teacher_temp"
    wanted += " backbone_grad_norm dino_head_grad_norm ibot_head_grad_norm iter_time data_time samples_per_second"
    assert set(wanted.split()) <= set(frame.columns)
    assert frame.notna().all().all()
    assert frame["last_layer_lr"][3] == 0.0  # frozen in the first epoch
    assert frame["last_layer_lr"][11] == frame["lr"][11] > 0
    logs = list((finished / "logs").rglob("stderr.log"))
    assert {log.parent.name for log in logs} == {"0", "1"}
    assert not list(finished.rglob(".*.partial*"))


def test_student_moved_and_teacher_follows_slowly(place: Path, finished: Path) -> None:
    state = all_tensors(finished)
    start = load_backbone(place / "models/base/teacher.pth").state_dict()
    key = "blocks.0.attn.qkv.weight"
    student, teacher = (state[f"{name}.backbone.{key}"] - start[key] for name in ("student", "teacher"))
    assert 0 < teacher.norm() < student.norm()


def test_a_finished_run_has_nothing_left_to_do(place: Path, finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished / "ckpt").rglob("*")}
    (finished / "final.json").unlink()  # as Snakemake does before it runs a job again
    assert train(place, "unbroken").returncode == 0
    assert read_json(finished / "final.json")["iteration"] == 23
    assert {path: path.stat().st_mtime_ns for path in (finished / "ckpt").rglob("*")} == before


@pytest.mark.long
def test_killed_at_any_moment_it_ends_the_same(place: Path, finished: Path) -> None:
    """SIGKILL of the launcher, again and again: its processes die with it, and the end is the same bit for bit."""
    run, moments = place / "runs/killed/main", random.Random(0)
    for _ in range(3):
        before = max(complete_checkpoints(run), default=-1)
        process = subprocess.Popen(command("killed"), cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(
            lambda before=before, process=process: (
                max(complete_checkpoints(run), default=-1) > before or process.poll() is not None
            )
        )
        time.sleep(moments.uniform(0, 0.6))
        family = descendants(process.pid)
        process.kill()
        process.wait()
        assert len(family) >= 2 or (run / "final.json").exists(), "it was not running"
        wait_for(lambda family=family: not any(alive(pid) for pid in family), seconds=2)
    assert train(place, "killed").returncode == 0
    events = [event["event"] for event in read_metrics(run).attrs["events"]]
    assert events[0] == "start"
    assert "resume" in events
    assert_same_end(run, finished)


@pytest.mark.long
def test_a_half_written_checkpoint_is_not_used(place: Path, finished: Path) -> None:
    run = place / "runs/half/main"
    process = subprocess.Popen(command("half"), cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: (run / "ckpt/9/.metadata").exists())
    process.kill()
    process.wait()
    newest = max(run.glob("ckpt/[0-9]*"), key=lambda path: int(path.name))
    (newest / ".metadata").unlink()
    (run / "ckpt/.77.partial").mkdir()
    assert train(place, "half").returncode == 0
    assert_same_end(run, finished)


@pytest.mark.long
def test_asked_to_stop_it_saves_and_goes_on_later(place: Path, finished: Path) -> None:
    run = place / "runs/stopped/main"
    process = subprocess.Popen(command("stopped"), cwd=place, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (run / "ckpt/4/.metadata").exists())
    process.send_signal(signal.SIGTERM)
    _, output = process.communicate(timeout=40)
    assert process.returncode != 0
    told = re.search(r"asked to stop and saved its state after iteration (\d+)", output)
    assert told, output
    assert (run / "ckpt" / told[1] / ".metadata").is_file()
    assert not (run / "final.json").exists()
    assert train(place, "stopped").returncode == 0
    assert_same_end(run, finished)


@pytest.mark.long
def test_the_number_of_loader_workers_changes_nothing_and_a_run_can_be_extended(place: Path, finished: Path) -> None:
    assert train(place, "workers", "train.num_workers=0").returncode == 0
    assert_same_end(place / "runs/workers/main", finished)
    assert train(place, "workers", "train.num_workers=0", "optim.epochs=5").returncode == 0
    assert read_json(place / "runs/workers/main/final.json")["iteration"] == 29
    (extended,) = [e for e in read_events(place / "runs/workers/main") if e["event"] == "extended"]
    assert extended["iteration"] == 24
    assert re.fullmatch(r"has 5 epochs instead of 4: its learning rate goes from \S+ to \S+", extended["note"])
    old, new = map(float, re.findall(r"(?:from|to) (\S+)", extended["note"]))
    assert old == pytest.approx(read_metrics(finished)["lr"][23], rel=5e-3)  # where the old cosine ended
    assert new > 10 * old


@pytest.mark.long
def test_tempered_sampling_resumes_exactly_and_keeps_its_strata(place: Path) -> None:
    tempered = ["sampling.method=tempered", "sampling.tiles_per_visit=2"]
    assert train(place, "tempered", *tempered).returncode == 0
    whole = place / "runs/tempered/main"
    (stratum,) = read_json(whole / "final.json")["strata"]
    assert (stratum["stratum"], stratum["slides"], stratum["sample_share"]) == ("unknown", 2, 1.0)
    process = subprocess.Popen(command("broken", *tempered), cwd=place, stderr=subprocess.DEVNULL)
    wait_for(lambda: (place / "runs/broken/main/ckpt/9").is_dir())
    process.kill()
    process.wait()
    table = (place / "slides.tsv").read_text()
    (place / "slides.tsv").write_text(_with_sites(table))
    refused = train(place, "broken", *tempered)
    (place / "slides.tsv").write_text(table)
    assert "these columns of the slide table have changed since it was started" in last_error(refused.stderr)
    assert train(place, "broken", *tempered, "train.num_workers=2").returncode == 0
    assert_same_end(place / "runs/broken/main", whole)


def _with_sites(table: str) -> str:
    header, *rows = table.splitlines()
    return "\n".join([f"{header}\tsite", *(f"{row}\tsite {index}" for index, row in enumerate(rows))]) + "\n"


@pytest.mark.long
def test_a_run_whose_loss_is_never_finite_ends_with_a_sentence(place: Path) -> None:
    """A learning rate that blows the weights up at the first step with one above 0."""
    spoiled = ["optim.lr=1e30", "optim.scaling_rule=none", "train.stop_after_skipped=4", "optim.clip_grad=0"]
    done = train(place, "spoiled", *spoiled)
    assert done.returncode != 0
    assert "4 steps in a row, up to iteration" in last_error(done.stderr)
    skipped = [event for event in read_events(place / "runs/spoiled/main") if event["event"] == "skipped"]
    assert len(skipped) == 4
    assert re.search(r"the loss is not on slide_\d@\d+,\d+", skipped[0]["note"])
    assert not (place / "runs/spoiled/main/final.json").exists()


@pytest.mark.long
def test_accumulated_steps_are_steps_of_the_undivided_batch(place: Path) -> None:
    """One process with 2 × 2 tiles a step: as many samples as with 4 at once, and it may go on as that."""
    divided = ["train.batch_size_per_gpu=2", "train.accumulation_steps=2", "optim.epochs=2"]
    assert without_launcher(place, command("divided", *divided)).returncode == 0
    run = place / "runs/divided/main"
    assert read_json(run / "final.json")["samples_seen"] == 48
    undivided = ["train.batch_size_per_gpu=4", "optim.epochs=3"]
    assert without_launcher(place, command("divided", *undivided)).returncode == 0
    assert read_json(run / "final.json")["iteration"] == 17


def test_other_settings_are_refused_and_nothing_is_lost(place: Path, finished: Path) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*.json")}
    refused = train(place, "unbroken", "optim.lr=0.5")
    assert refused.returncode == 1
    last = last_error(refused.stderr)
    assert last.startswith("error: run main was started with other settings: optim.lr was 0.001 and is now 0.5")
    assert "new run name" in last
    assert "Traceback" not in refused.stderr
    assert {path: path.read_bytes() for path in finished.rglob("*.json")} == before


@pytest.mark.long
def test_one_process_without_a_launcher_and_as_many_tiles_in_two_processes(place: Path) -> None:
    alone = without_launcher(place, command("alone", "optim.epochs=2", "train.batch_size_per_gpu=4"))
    assert alone.returncode == 0, alone.stderr
    run = place / "runs/alone/main"
    assert read_json(run / "final.json")["samples_seen"] == 48
    refused = train(place, "alone", "optim.epochs=3", processes=1)
    assert "was started with 4 tiles a step over all processes and would go on with 2" in last_error(refused.stderr)
    assert train(place, "alone", "optim.epochs=3", processes=2).returncode == 0
    assert read_json(run / "final.json")["iteration"] == 17


@pytest.mark.long
def test_a_run_keeps_its_tiles_when_the_manifest_changes(place: Path, finished: Path) -> None:
    """Stopped in the middle, it goes on with the tiles it began with, and ends as if nothing had changed."""
    other = place / "kept"
    shutil.copytree(place / "manifests", other / "manifests")
    for name in ("slides.tsv", "recipe.yaml", "models"):
        (other / name).symlink_to(place / name)
    run = other / "runs/kept/main"
    process = subprocess.Popen(command("kept"), cwd=other, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: (run / "ckpt/4/.metadata").exists())
    process.kill()
    process.wait()
    write_manifest(other / "manifests/train.parquet", ["slide_1"], slide_px=1024, tile_px=128)
    (other / "models").unlink()
    shutil.copytree(place / "models", other / "models")
    (other / "models/base/teacher.pth").write_bytes(b"no longer what the run began with")
    assert train(other, "kept").returncode == 0
    assert_same_end(run, finished)
    shutil.rmtree(other / "manifests/.mapped")
    (run / "final.json").unlink()
    assert "was started on manifest" in last_error(train(other, "kept").stderr)


def test_a_run_that_continues_another_sees_other_samples(place: Path) -> None:
    from dinoscope.config import RunConfig, TrainConfig
    from dinoscope.train.trainer import _stream_seed

    def drawn(seed: int, run: str, stream: str | None = None) -> int:
        return _stream_seed(RunConfig(train=TrainConfig(seed=seed, stream=stream)), Path("runs") / run)

    assert len({drawn(seed, run) for seed in (0, 1) for run in ("pretrain", "gram")}) == 4
    assert drawn(1, "gram-control-seed1", "gram-seed1") == drawn(1, "gram-seed1")


def test_a_damaged_slide_is_named_in_one_sentence(place: Path) -> None:
    other = place / "damaged"
    shutil.copytree(place / "manifests", other / "manifests", ignore=shutil.ignore_patterns(".mapped"))
    for name in ("recipe.yaml", "models", "slide_1.tiff"):
        (other / name).symlink_to(place / name)
    content = bytearray((place / "slide_2.tiff").read_bytes())
    content[2000 : len(content) // 2] = bytes(len(content) // 2 - 2000)
    (other / "slide_2.tiff").write_bytes(content)
    (other / "slides.tsv").write_text("slide_id\tpath\nslide_1\tslide_1.tiff\nslide_2\tslide_2.tiff\n")
    done = train(other, "damaged")
    assert done.returncode == 1
    assert "slide 'slide_2'" in last_error(done.stderr)
    assert "DataLoader worker" not in done.stderr


def test_a_full_disk_is_named_and_leaves_nothing_half_written(place: Path) -> None:
    """No file may grow to the size of a shard: writing fails as on a full disk."""
    limited = ["bash", "-c", 'ulimit -f 200; exec "$@"', "-", *command("full")]
    done = subprocess.run(limited, cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "cannot be written" in last_error(done.stderr)
    assert not list((place / "runs/full/main/ckpt").glob("*"))
    assert not list((place / "runs/full/main/ckpt").glob(".*"))


def test_gram_phase_continues_and_is_held_to_an_exported_teacher(place: Path, finished: Path) -> None:
    done = train(
        place, "gram", "--continues", "runs/unbroken/main/final.json", "--gram-teacher", "9", recipe="gram.yaml"
    )
    assert done.returncode == 0, done.stderr
    frame = read_metrics(place / "runs/gram/main")
    assert (frame["gram_loss"] > 0).all()
    events = {event["event"]: event for event in frame.attrs["events"]}
    assert "continues main from its iteration 23, optimizer included" in events["start"]["note"]
    assert "training_9/teacher_checkpoint.pth" in events["start"]["note"]
    assert events["gram_teacher_update"]["iteration"] == 4
    state = all_tensors(place / "runs/gram/main")
    assert state["optimizer.student.backbone.cls_token.step"] == 24 + 6
    refreshed = torch.load(finished / "eval/training_9/teacher_checkpoint.pth", weights_only=True)["teacher"]
    key = "backbone.blocks.1.mlp.fc1.weight"
    assert not torch.equal(state[f"gram_teacher.{key}"], refreshed[key])


def test_gram_phase_asks_for_a_teacher_that_exists(place: Path, finished: Path) -> None:
    def refused(*arguments: str) -> str:
        result = without_launcher(place, command("gram_bad", *arguments, recipe="gram.yaml"))
        assert result.returncode == 1
        assert not (place / "runs/gram_bad/main/run_config.json").exists()
        return last_error(result.stderr)

    continued = ("--continues", "runs/unbroken/main/final.json")
    assert "exported no teacher at iteration 5; it has [9, 19, 23]" in refused(*continued, "--gram-teacher", "5")
    assert "give the exported teacher instead" in refused(*continued, "--gram-teacher", "runs/unbroken/main/ckpt/23")
    assert "needs a gram teacher" in refused()


def test_conversion_gives_the_exported_teacher(place: Path, finished: Path) -> None:
    for number, checkpoint in enumerate(
        ("runs/unbroken/main/final.json", "runs/unbroken/main", "runs/unbroken/main/ckpt/23")
    ):
        done = script(
            place, "convert_checkpoint.py", "--checkpoint", checkpoint, "--output", f"models/c{number}/teacher.pth"
        )
        assert done.returncode == 0, done.stderr
        converted = load_backbone(place / f"models/c{number}").state_dict()
        exported = torch.load(finished / "eval/training_23/teacher_checkpoint.pth", weights_only=True)["teacher"]
        assert all(torch.equal(tensor, exported[f"backbone.{name}"]) for name, tensor in converted.items())
    card = read_json(place / "models/c0/model.json")
    assert (card["backbone"]["arch"], card["iteration"], card["tiles"]) == (
        "vit_nano",
        23,
        [{"tile_px": 128, "mpp": 0.5}],
    )
    assert card["origin"] == "random initialisation, seed 0"
    exported_card = read_json(finished / "eval/training_23/model.json")
    assert {key: card[key] for key in exported_card} == exported_card
    assert str(place) not in json.dumps(card)
    assert str(place).encode() not in (finished / "ckpt/23/.metadata").read_bytes()


def test_conversion_refuses_what_is_not_whole(place: Path, finished: Path, tmp_path: Path) -> None:
    def refused(checkpoint: Path) -> str:
        done = script(
            place, "convert_checkpoint.py", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "t.pth")
        )
        assert done.returncode == 1
        assert not (tmp_path / "t.pth").exists()
        return last_error(done.stderr)

    run = shutil.copytree(finished, tmp_path / "run")
    shard = next((run / "ckpt/23").glob("*.distcp"))
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 3])
    assert f"{shard.name} has {len(content) // 3} bytes, not the {len(content)} that" in refused(run / "final.json")
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert f"{shard.name} no longer holds what was written" in refused(run / "final.json")
    shard.write_bytes(content[: len(content) // 3])
    (run / "ckpt/23/files.json").unlink()
    assert f"{shard.name} is missing, cut short or no longer what was written" in refused(run / "final.json")
    (run / "ckpt/23/.metadata").write_bytes(b"rubbish")
    assert "its .metadata cannot be read" in refused(run / "final.json")
    (run / "ckpt/23/.metadata").unlink()
    assert "is neither a final.json" in refused(run / "ckpt/23")


def test_a_slide_that_disappears_is_named(place: Path) -> None:
    (place / "less.tsv").write_text("\n".join((place / "slides.tsv").read_text().splitlines()[:2]) + "\n")
    arguments = [a if a != "slides.tsv" else "less.tsv" for a in command("less")]
    done = without_launcher(place, arguments)
    assert done.returncode == 1
    assert "the manifest has tiles of slide slide_2, which less.tsv does not list" in done.stderr
