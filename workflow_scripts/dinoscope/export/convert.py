"""DCP checkpoints and starting weights -> `teacher.pth` with a model card `model.json` beside it.

`teacher.pth` is {"teacher": {"backbone.…": tensor}}, float32, readable with `torch.load(..., weights_only=True)`.
"""

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dinoscope.errors import CheckpointError
from dinoscope.export.describe import describe_fit
from dinoscope.files import atomic_path, read_json, sha256_file, write_json
from dinoscope.models.card import PUBLISHED_ORIGIN, backbone_card
from dinoscope.models.lora import merge_lora
from dinoscope.models.registry import ViTSettings, settings_from_config
from dinoscope.models.vit import DinoVisionTransformer
from dinoscope.models.weights import load_strictly, read_model_file, state_digest
from dinoscope.recipe import load_recipe
from dinoscope.train.checkpoint import FROZEN_NAME
from dinoscope.train.checkpoint_files import require_whole
from dinoscope.train.run_folder import newest_checkpoint
from dinoscope.train.seal import SEAL_NAME, read_seal
from dinoscope.train.starting import fresh_backbone
from dinoscope.train.trainable import describe_trained

if TYPE_CHECKING:
    from dinoscope.config import RunConfig

__all__ = ["convert_checkpoint", "write_initial_weights"]

_log = logging.getLogger(__name__)
_BRANCH_NAMES = {"teacher": ("teacher", "model_ema"), "student": ("student",)}


def convert_checkpoint(checkpoint: Path, output: Path, branch: str = "teacher") -> None:
    """Writes one network's backbone of a training checkpoint as a torch file with a model card.

    Args:
        checkpoint: final.json of a run, the run's folder (its newest complete checkpoint), or a folder `ckpt/<it>`.
        output: The file to write; model.json appears beside it.
        branch: "teacher" (the EMA) or "student".

    Raises:
        CheckpointError: Missing, incomplete or damaged; tensors missing, left over, not finite or all zero.
    """
    folder, run_dir = _locate(checkpoint)
    config = load_recipe(run_dir / "config.yaml")
    settings = settings_from_config(config.student)
    backbone = _read_backbone(folder, branch)
    if config.student.trainable != "full":
        frozen = folder.with_name(FROZEN_NAME)
        require_whole(frozen, "checksums")
        backbone = merge_lora(_read_prefixed(frozen, "model.frozen.backbone.") | backbone)
    _check_tensors(folder, backbone, settings)
    origin = (read_seal(run_dir) or {}).get("origin")
    card = backbone_card(settings, config, backbone, origin) | _run_card(run_dir, folder, config, branch)
    _write(output, backbone, card)


def write_initial_weights(config: "RunConfig", output: Path) -> None:
    """Writes the starting weights of a workflow: the recipe's MODEL.WEIGHTS, else a seeded initialisation.

    Raises:
        WeightsError: The file is no backbone, or not the one that the recipe describes.
    """
    settings = settings_from_config(config.student)
    heads: dict[str, dict[str, Tensor]] = {}
    if config.MODEL.WEIGHTS:
        file = read_model_file(config.MODEL.WEIGHTS)
        for note in describe_fit(file, config):
            _log.warning("%s: %s", file.path.name, note)
        backbone, heads = {name: tensor.float() for name, tensor in file.backbone.items()}, file.heads
        origin = file.card.get("origin") or PUBLISHED_ORIGIN
        _log.info("starting weights: %d tensors of %s (%s)", len(backbone), file.path.name, settings.arch)
    else:
        backbone = fresh_backbone(settings, config.train.seed).state_dict()
        origin = f"random initialisation, seed {config.train.seed}"
        _log.info("starting weights: %s at %s; no MODEL.WEIGHTS is configured", settings.arch, origin)
    _write(output, backbone, backbone_card(settings, config, backbone, origin), heads)


def _locate(checkpoint: Path) -> tuple[Path, Path]:
    """The DCP folder and the run folder that a path stands for; the folder's files hold what was written."""
    if checkpoint.name == "final.json" and checkpoint.is_file():
        folder, run_dir = checkpoint.parent / read_json(checkpoint)["checkpoint"], checkpoint.parent
    elif (checkpoint / ".metadata").is_file():
        folder, run_dir = checkpoint, checkpoint.parent.parent
    elif (newest := newest_checkpoint(checkpoint, "checksums")) is not None:
        return newest[1], checkpoint
    else:
        raise CheckpointError(
            f"{checkpoint} is neither a final.json, nor a complete checkpoint folder (ckpt/<it> with .metadata), "
            "nor the folder of a run that has one"
        )
    require_whole(folder, "checksums")
    return folder, run_dir


def _read_backbone(folder: Path, branch: str) -> dict[str, Tensor]:
    stored = _stored_names(folder)
    for name in _BRANCH_NAMES[branch]:
        prefix = next((p for p in (f"model.{name}.backbone.", f"{name}.backbone.") if _any_starts(stored, p)), None)
        if prefix:
            break
    else:
        raise CheckpointError(f"checkpoint {folder} holds no {branch} backbone")
    return _read_prefixed(folder, prefix)


def _stored_names(folder: Path) -> dict[str, Any]:
    try:
        return dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not there or has no .metadata: the checkpoint is incomplete") from None
    except Exception as error:  # whatever a damaged pickle raises
        raise CheckpointError(f"checkpoint {folder} is damaged: its .metadata cannot be read ({error})") from None


def _read_prefixed(folder: Path, prefix: str) -> dict[str, Tensor]:
    """Reads only the tensors wanted, each into its place."""
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in _stored_names(folder).items()
        if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it is meant to be
            dcp.load(state, checkpoint_id=folder, no_dist=True)
    except (Exception, dcp.api.CheckpointException) as error:  # cut short, missing or damaged shards
        reason = " ".join(str(error).split())[-120:]
        raise CheckpointError(f"checkpoint {folder} is damaged: its tensors cannot be read (… {reason})") from None
    return {key.removeprefix(prefix): tensor for key, tensor in state.items()}


def _any_starts(stored: dict[str, Any], prefix: str) -> bool:
    return any(key.startswith(prefix) for key in stored)


def _check_tensors(folder: Path, backbone: dict[str, Tensor], settings: ViTSettings) -> None:
    with torch.device("meta"):
        model = DinoVisionTransformer(settings)
    load_strictly(model, backbone, folder)
    for name, tensor in backbone.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"checkpoint {folder}: tensor {name} holds values that are not finite")
        if tensor.ndim > 1 and name.endswith("weight") and not tensor.any():
            raise CheckpointError(f"checkpoint {folder}: tensor {name} is all zero")


def _run_card(run_dir: Path, folder: Path, config: "RunConfig", branch: str) -> dict[str, Any]:
    seal = read_seal(run_dir) or {}
    final_path = run_dir / "final.json"
    final = read_json(final_path) if final_path.is_file() else {}
    return {
        "run": run_dir.name,
        "branch": branch,
        "iteration": int(folder.name.removesuffix("_keep")),
        "inputs_sha256": seal.get("inputs", {}),
        "run_config_sha256": sha256_file(run_dir / SEAL_NAME),
        "tiles": final.get("tiles"),
        "crops": final.get("crops"),
        "samples_seen": final.get("samples_seen"),
        "metrics": final.get("metrics"),
        "gram_anchored": config.gram.use_loss,
        "trained": describe_trained(seal.get("settings", {})),
    }


def _write(
    output: Path, backbone: dict[str, Tensor], card: dict[str, Any], heads: dict[str, dict[str, Tensor]] | None = None
) -> None:
    parts = {"backbone": backbone, **(heads or {})}
    flat = {f"{part}.{name}": tensor.contiguous() for part, state in parts.items() for name, tensor in state.items()}
    with atomic_path(output) as temporary:
        torch.save({"teacher": flat}, temporary)
    write_json(output.with_name("model.json"), card)
    written = state_digest(read_model_file(output).backbone)
    assert written == card["weights_sha256"], "what was written is not what was read"
    _log.info("%s: %s, %d values", output.name, card["backbone"]["arch"], sum(t.numel() for t in backbone.values()))
