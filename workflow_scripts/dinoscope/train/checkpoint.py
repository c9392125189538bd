"""Training checkpoints (DCP folders) and exports of the teacher.

A checkpoint `ckpt/<it>` holds, under "model", the tensors of `student.…`, `teacher.…` and, in gram runs,
`gram_teacher.…`; under "optimizer" AdamW's moments by parameter name. `<it>` is the 0-based index of the last finished
iteration. How it is written: saving.py. When it is complete: checkpoint_files.py.

Where only a part of the backbone is trained (`student.trainable`), checkpoints hold that part of student and teacher;
the rest, which is the same in both and never changes, is written once, before the first checkpoint: `ckpt/frozen`, a
DCP folder with `frozen.backbone.…` under "model". There lies the teacher that a run distils, too, as
`distilled_teacher.…`.
"""

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor

from dinoscope.errors import CheckpointError
from dinoscope.files import atomic_path, write_json
from dinoscope.models.card import backbone_card
from dinoscope.models.lora import merge_lora
from dinoscope.train.checkpoint_files import require_whole
from dinoscope.train.dcp_files import PlainReader
from dinoscope.train.disk_errors import disk_error
from dinoscope.train.run_folder import teacher_export_path
from dinoscope.train.seal import read_seal
from dinoscope.train.ssl_step import SSLModel

if TYPE_CHECKING:
    from dinoscope.train.distributed import World

__all__ = [
    "FROZEN_NAME",
    "export_teacher",
    "fill_from_full_state",
    "frozen_names",
    "frozen_state",
    "load_checkpoint",
    "training_state",
]

FROZEN_NAME = "frozen"
_DISTILLED = "distilled_teacher."
_WRAPPER = "_checkpoint_wrapped_module."  # the name that activation checkpointing inserts


def load_checkpoint(
    folder: Path, model: SSLModel, optimizer: torch.optim.Optimizer, *, with_other_teachers: bool = True
) -> None:
    """Fills model and optimizer in place, on any number of ranks.

    Args:
        folder: The checkpoint.
        model: Of the same sizes.
        optimizer: Over its student.
        with_other_teachers: Gram teacher and distilled teacher too; a run that continues another has its own.

    Raises:
        CheckpointError: The folder is incomplete, or holds another model.
    """
    require_whole(folder)
    state = training_state(model, optimizer)
    if not with_other_teachers:
        state["model"] = {k: v for k, v in state["model"].items() if not k.startswith("gram_teacher.")}
    frozen, rest = frozen_state(model, with_distilled=with_other_teachers), folder.with_name(FROZEN_NAME)
    if frozen and not (rest / ".metadata").is_file():
        raise CheckpointError(
            f"checkpoint {folder} holds only what is trained, and {rest} with the rest of the backbone is not there; "
            "put it back, or start over under a new run name"
        )
    if frozen:
        require_whole(rest)
    try:
        dcp.load(state, storage_reader=PlainReader(folder))
        if frozen:
            dcp.load(frozen, storage_reader=PlainReader(rest))
            _copy_frozen_to_teacher(model)
    except (dcp.api.CheckpointException, pickle.UnpicklingError, RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"checkpoint {folder} cannot be loaded into this model: {reason}") from error


def training_state(model: SSLModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All that a checkpoint holds; the tensors are those of model and optimizer, not copies."""
    tensors = model.state_dict()  # first: FSDP gives back weights that are still gathered, and with them their names
    frozen = {f"{network}.backbone.{name}" for network in ("student", "teacher") for name in frozen_names(model)}
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
    kept = {k: v for k, v in tensors.items() if k not in frozen and not k.startswith(_DISTILLED)}
    return {"model": kept, "optimizer": moments}


def frozen_names(model: SSLModel) -> list[str]:
    """The backbone's tensors, buffers included, that are not trained; none where checkpoints hold everything."""
    if model.config.student.trainable == "full":
        return []
    backbone = model.student["backbone"]
    tensors = backbone.state_dict()
    trained = {name.replace(_WRAPPER, "") for name, p in backbone.named_parameters() if p.requires_grad}
    return [name for name in tensors if name not in trained]


def frozen_state(model: SSLModel, *, with_distilled: bool = True) -> dict[str, Any]:
    """What `ckpt/frozen` holds, if anything; the tensors are the student's and the distilled teacher's."""
    tensors = model.student["backbone"].state_dict()
    frozen = {f"frozen.backbone.{name}": tensors[name] for name in frozen_names(model)}
    if with_distilled and model.distilled_teacher is not None:
        frozen |= {f"{_DISTILLED}{name}": tensor for name, tensor in model.distilled_teacher.state_dict().items()}
    return {"model": frozen} if frozen else {}


@torch.no_grad()
def _copy_frozen_to_teacher(model: SSLModel) -> None:
    student, teacher = (network["backbone"].state_dict() for network in (model.student, model.teacher))
    for name in frozen_names(model):
        teacher[name].copy_(student[name])


def export_teacher(run_dir: Path, iteration: int, model: SSLModel, origin: str | None, world: "World") -> Path:
    """Writes {"teacher": {"backbone.…", "dino_head.…", "ibot_head.…"}}, whole tensors. All ranks call it together.

    Raises:
        OSError: It cannot be written; on all ranks.
    """
    path = teacher_export_path(run_dir, iteration)
    whole: dict[str, Tensor] = {}
    for name, tensor in model.teacher.state_dict().items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if world.is_main:
            whole[name] = full.detach().cpu().clone()
    outcome: list[OSError | None] = [None]
    if world.is_main:
        whole = merge_lora(whole)
        backbone = {k.removeprefix("backbone."): v for k, v in whole.items() if k.startswith("backbone.")}
        try:
            card = backbone_card(model.settings, model.config, backbone, origin)
            write_json(path.with_name("model.json"), card | ((read_seal(run_dir) or {}).get("data") or {}))
            with atomic_path(path) as temporary, open(temporary, "wb") as file:
                torch.save({"teacher": whole}, file)
        except (OSError, RuntimeError) as error:
            outcome[0] = disk_error(error)
            if outcome[0] is None:
                raise
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise outcome[0]
    return path


def fill_from_full_state(module: nn.Module, state: dict[str, Tensor] | None) -> None:
    """Fills a sharded module from whole tensors that only the main process has (None elsewhere)."""
    set_model_state_dict(
        module,
        dict(state or {}),  # it changes the dictionary that it is given
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True),
    )
