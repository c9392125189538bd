"""Training checkpoints (DCP folders) and exports of the teacher.

A checkpoint `ckpt/<it>` holds, under "model", the tensors of `student.…`, `teacher.…` and, in gram runs,
`gram_teacher.…`; under "optimizer" AdamW's moments by parameter name. `<it>` is the 0-based index of the last finished
iteration. It is written under a dot-prefixed name and renamed when complete; `.metadata`, which DCP writes last, marks
it as complete.

Where only a part of the backbone is trained (`student.trainable`), checkpoints hold that part of student and teacher;
the rest, which is the same in both and never changes, is written once, before the first checkpoint: `ckpt/frozen`, a
DCP folder with `frozen.backbone.…` under "model".
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor

from dinoscope.errors import CheckpointError
from dinoscope.files import atomic_path, sync_folder, write_json
from dinoscope.models.card import backbone_card
from dinoscope.models.lora import merge_lora
from dinoscope.train.run_folder import complete_checkpoints, teacher_export_path
from dinoscope.train.ssl_step import SSLModel

if TYPE_CHECKING:
    from dinoscope.config import CheckpointingConfig
    from dinoscope.train.distributed import World

__all__ = [
    "FROZEN_NAME",
    "export_teacher",
    "fill_from_full_state",
    "load_checkpoint",
    "save_checkpoint",
]

FROZEN_NAME = "frozen"
_WRAPPER = "_checkpoint_wrapped_module."  # the name that activation checkpointing inserts


def save_checkpoint(
    run_dir: Path,
    iteration: int,
    model: SSLModel,
    optimizer: torch.optim.Optimizer,
    settings: "CheckpointingConfig",
    world: "World",
) -> Path:
    """Writes the whole training state, then deletes what is no longer to be kept. All ranks call it together."""
    keep = (iteration + 1) % settings.keep_every == 0
    target = run_dir / "ckpt" / (f"{iteration}_keep" if keep else str(iteration))
    frozen = _frozen_state(model)
    # what an attempt without any checkpoint left may be of other weights
    if frozen and world.any(world.is_main and not complete_checkpoints(run_dir)):
        _write_folder(target.with_name(FROZEN_NAME), frozen, run_dir, "the backbone's frozen part", world)
    _write_folder(target, _training_state(model, optimizer), run_dir, f"checkpoint {iteration}", world)
    if world.is_main:
        _prune(run_dir, settings.max_to_keep)
    dist.barrier()
    return target


def _write_folder(target: Path, state: dict[str, Any], run_dir: Path, what: str, world: "World") -> None:
    """Writes one DCP folder, which appears when it is complete."""
    partial = target.with_name(f".{target.name}.partial")
    if world.is_main:
        for leftover in target.parent.glob(".*.partial"):
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
    dist.barrier()
    try:
        dcp.save(state, storage_writer=_Writer(partial))
    except (dcp.api.CheckpointException, RuntimeError, OSError) as error:
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)  # it may be what fills the disk
        raise _not_written(run_dir, what, error) from error
    if world.is_main:
        if target.is_dir():
            shutil.rmtree(target)
        partial.rename(target)
        sync_folder(target.parent)
    dist.barrier()


def load_checkpoint(
    folder: Path, model: SSLModel, optimizer: torch.optim.Optimizer, *, with_gram_teacher: bool = True
) -> None:
    """Fills model and optimizer in place, on any number of ranks.

    Raises:
        CheckpointError: The folder is incomplete, or holds another model.
    """
    if not (folder / ".metadata").is_file():
        raise CheckpointError(f"checkpoint {folder} is incomplete (it has no .metadata); use another one")
    state = _training_state(model, optimizer)
    if not with_gram_teacher:
        state["model"] = {k: v for k, v in state["model"].items() if not k.startswith("gram_teacher.")}
    frozen, rest = _frozen_state(model), folder.with_name(FROZEN_NAME)
    if frozen and not (rest / ".metadata").is_file():
        raise CheckpointError(
            f"checkpoint {folder} holds only what is trained, and {rest} with the rest of the backbone is not there; "
            "put it back, or start over under a new run name"
        )
    try:
        dcp.load(state, checkpoint_id=folder)
        if frozen:
            dcp.load(frozen, checkpoint_id=rest)
            _copy_frozen_to_teacher(model)
    except (dcp.api.CheckpointException, RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"checkpoint {folder} cannot be loaded into this model: {reason}") from error


class _Writer(dcp.FileSystemWriter):
    """Leaves the folder out of a checkpoint's metadata: results hold no absolute paths."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=None, save_id=self.save_id)


def _not_written(run_dir: Path, what: str, error: BaseException) -> CheckpointError:
    kept = list(complete_checkpoints(run_dir))
    reason = "no space left on the device" if "No space left" in str(error) else " ".join(str(error).split())[-160:]
    return CheckpointError(
        f"run {run_dir.name}: {what} cannot be written ({reason}); free space and start the run again, it goes on "
        + (f"after iteration {kept[-1]}" if kept else "from its start")
    )


def _training_state(model: SSLModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All that a checkpoint holds; the tensors are those of model and optimizer, not copies."""
    tensors = model.state_dict()  # first: FSDP gives back weights that are still gathered, and with them their names
    frozen = {f"{network}.backbone.{name}" for network in ("student", "teacher") for name in _frozen_names(model)}
    names = {id(p): name.replace(_WRAPPER, "") for name, p in model.named_parameters()}
    moments = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:  # before the first step: what AdamW itself would start from
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            moments[names[id(parameter)]] = {key: state[key] for key in ("step", "exp_avg", "exp_avg_sq")}
    return {"model": {k: v for k, v in tensors.items() if k not in frozen}, "optimizer": moments}


def _frozen_names(model: SSLModel) -> list[str]:
    """The backbone's tensors, buffers included, that are not trained; none where checkpoints hold everything."""
    if model.config.student.trainable == "full":
        return []
    backbone = model.student["backbone"]
    tensors = backbone.state_dict()
    trained = {name.replace(_WRAPPER, "") for name, p in backbone.named_parameters() if p.requires_grad}
    return [name for name in tensors if name not in trained]


def _frozen_state(model: SSLModel) -> dict[str, Any]:
    """What `ckpt/frozen` holds, empty where there is none; the tensors are the student's."""
    tensors = model.student["backbone"].state_dict()
    frozen = {f"frozen.backbone.{name}": tensors[name] for name in _frozen_names(model)}
    return {"model": frozen} if frozen else {}


@torch.no_grad()
def _copy_frozen_to_teacher(model: SSLModel) -> None:
    student, teacher = (network["backbone"].state_dict() for network in (model.student, model.teacher))
    for name in _frozen_names(model):
        teacher[name].copy_(student[name])


def _prune(run_dir: Path, max_to_keep: int | None) -> None:
    if max_to_keep is None:
        return
    temporary = [folder for folder in complete_checkpoints(run_dir).values() if not folder.name.endswith("_keep")]
    for folder in temporary[:-max_to_keep]:
        doomed = folder.with_name(f".{folder.name}.partial")
        folder.rename(doomed)  # a kill halfway through the deletion must not leave a half checkpoint under its name
        shutil.rmtree(doomed)


def export_teacher(run_dir: Path, iteration: int, model: SSLModel, origin: str | None, world: "World") -> Path:
    """Writes {"teacher": {"backbone.…", "dino_head.…", "ibot_head.…"}}, whole tensors. All ranks call it together."""
    path = teacher_export_path(run_dir, iteration)
    whole: dict[str, Tensor] = {}
    for name, tensor in model.teacher.state_dict().items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if world.is_main:
            whole[name] = full.detach().cpu().clone()
    if world.is_main:
        whole = merge_lora(whole)
        backbone = {k.removeprefix("backbone."): v for k, v in whole.items() if k.startswith("backbone.")}
        try:
            write_json(path.with_name("model.json"), backbone_card(model.settings, model.config, backbone, origin))
            with atomic_path(path) as temporary:
                torch.save({"teacher": whole}, temporary)
        except (OSError, RuntimeError) as error:
            raise _not_written(run_dir, f"teacher export {iteration}", error) from error
    dist.barrier()
    return path


def fill_from_full_state(module: nn.Module, state: dict[str, Tensor] | None) -> None:
    """Fills a sharded module from whole tensors that only the main process has (None elsewhere)."""
    set_model_state_dict(
        module,
        dict(state or {}),  # it changes the dictionary that it is given
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True),
    )
