"""DCP checkpoints and starting weights -> `teacher.pth`, `teacher.safetensors` and a model card `model.json`.

Only the tensors that are wanted are read, on the CPU and without a process group: memory goes with what is written, not
with the optimizer states and heads that a checkpoint holds as well.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dinoscope.errors import CheckpointError, RunError
from dinoscope.export.checkpoint_source import NETWORKS, Source, locate
from dinoscope.export.describe import describe_fit
from dinoscope.export.model_files import State, write_model
from dinoscope.files import read_json, sha256_file
from dinoscope.models.card import UNKNOWN_ORIGIN, backbone_card
from dinoscope.models.heads import HeadShape
from dinoscope.models.lora import merge_lora
from dinoscope.models.registry import ViTSettings, settings_from_config
from dinoscope.models.settings_of_tensors import infer_settings
from dinoscope.models.tensor_files import listed
from dinoscope.models.vit import DinoVisionTransformer
from dinoscope.models.weights import load_strictly, read_model_file
from dinoscope.train.checkpoint import FROZEN_NAME
from dinoscope.train.checkpoint_files import require_whole
from dinoscope.train.dcp_files import read_stored, stored_tensors
from dinoscope.train.metrics import metrics_at
from dinoscope.train.seal import SEAL_NAME
from dinoscope.train.starting import fresh_backbone
from dinoscope.train.trainable import describe_trained

if TYPE_CHECKING:
    from dinoscope.config import RunConfig

__all__ = ["convert_checkpoint", "write_initial_weights"]

_log = logging.getLogger(__name__)
_PERIODS = "rope_embed.periods"


def convert_checkpoint(checkpoint: Path, output: Path, branch: str = "teacher", *, heads: bool = False) -> None:
    """Writes a network of a training checkpoint as torch and safetensors files with a model card.

    Args:
        checkpoint: final.json of a run, the run's folder (its newest complete checkpoint, also while it is training), a
            folder `ckpt/<it>`, or a sharded teacher export; ours, or laid out as the published trainer writes them.
        output: The file to write; the same with .safetensors and model.json appear beside it.
        branch: "teacher" (the EMA), "student" (written under the name "teacher", so that every reader finds it), or
            "all": every network that the checkpoint holds, with its heads.
        heads: Whether the network's heads are written, too.

    Raises:
        CheckpointError: Missing, incomplete or damaged; tensors missing, left over, not finite or all zero.
    """
    source = locate(checkpoint)
    held = source.networks()
    wanted = held if branch == "all" else [branch]
    assert branch in (*NETWORKS, "all"), branch
    if branch == "all" and "teacher" not in held:
        raise CheckpointError(f"checkpoint {source.folder} holds no teacher; it has {', '.join(held) or 'no network'}")
    found = {network: _read_network(source, network, heads or branch == "all") for network in wanted}
    first = found[wanted[0]]
    settings = _settings(source, first["backbone"])
    for network, parts in found.items():
        _check(f"checkpoint {source.folder}, {network}", parts, settings)
    origin = source.seal.get("origin", UNKNOWN_ORIGIN)
    card = backbone_card(settings, source.config, first["backbone"], origin) | _run_card(source, branch)
    write_model(output, found if branch == "all" else {"teacher": first}, card)


def write_initial_weights(config: "RunConfig", output: Path) -> None:
    """Writes the starting weights of a workflow: the recipe's MODEL.WEIGHTS, else a seeded initialisation.

    Raises:
        WeightsError: The file is no backbone, or not the one that the recipe describes.
    """
    settings = settings_from_config(config.student)
    heads: dict[str, State] = {}
    if config.MODEL.WEIGHTS:
        file = read_model_file(config.MODEL.WEIGHTS)
        for note in describe_fit(file, config):
            _log.warning("%s: %s", file.path.name, note)
        backbone, heads = {name: tensor.float() for name, tensor in file.backbone.items()}, file.heads
        origin = file.origin
        _log.info("starting weights: %d tensors of %s (%s)", len(backbone), file.path.name, settings.arch)
    else:
        backbone = fresh_backbone(settings, config.train.seed).state_dict()
        origin = f"random initialisation, seed {config.train.seed}"
        _log.info("starting weights: %s at %s; no MODEL.WEIGHTS is configured", settings.arch, origin)
    networks = {"teacher": {"backbone": backbone, **heads}}
    write_model(output, networks, backbone_card(settings, config, backbone, origin))


def _read_network(source: Source, network: str, heads: bool) -> dict[str, State]:
    """A network's backbone, with its heads if they are wanted: whole tensors, float32, adapters merged."""
    names = source.names(network)
    if not any(name.startswith("backbone.") for name in names):
        raise CheckpointError(
            f"checkpoint {source.folder} holds no {network} backbone; it has {', '.join(source.networks()) or 'none'}"
        )
    parts: dict[str, State] = {}
    for part in ["backbone", "dino_head", "ibot_head"] if heads else ["backbone"]:
        below = {name.removeprefix(f"{part}."): at for name, at in names.items() if name.startswith(f"{part}.")}
        if below:
            parts[part] = read_stored(source.folder, below)
    if heads and len(parts) < 3:
        missing = sorted({"dino_head", "ibot_head"} - parts.keys())
        if len(missing) == 2:
            raise CheckpointError(f"checkpoint {source.folder}: {network} has no heads; leave --heads out")
        _log.warning("checkpoint %s: %s has no %s", source.folder, network, missing[0])
    trains_part = source.seal and source.config.student.trainable != "full"
    if trains_part and network != "gram_teacher":
        parts["backbone"] = merge_lora(_frozen(source.folder.with_name(FROZEN_NAME)) | parts["backbone"])
    for state in parts.values():  # one tensor at a time, so that memory stays with what is written
        for name in state:
            state[name] = state[name] if name == _PERIODS else state[name].float()
    return parts


def _frozen(folder: Path) -> State:
    """What a run that trains a part of the backbone wrote once."""
    require_whole(folder, "checksums")
    prefix = "model.frozen.backbone."
    return read_stored(folder, {n.removeprefix(prefix): n for n in stored_tensors(folder) if n.startswith(prefix)})


def _settings(source: Source, backbone: State) -> ViTSettings:
    """Of a run with settings: these; else what the tensors tell, completed by the published defaults."""
    if source.config is not None:
        return settings_from_config(source.config.student)
    _log.warning("%s has no settings that can be read; what no tensor tells is assumed", source.folder)
    return infer_settings(backbone, {}, source.folder)


def _check(where: str, parts: dict[str, State], settings: ViTSettings) -> None:
    """Every tensor must fit, none may be missing, left over, not finite or all zero."""
    with torch.device("meta"):
        model = DinoVisionTransformer(settings)
    load_strictly(model, parts["backbone"], where)
    for part, state in parts.items():
        if part != "backbone":
            _check_head(f"{where}, {part}", state, settings.embed_dim)
        for name, tensor in state.items():
            if not torch.isfinite(tensor).all():
                raise CheckpointError(f"{where}: tensor {name} holds values that are not finite")
            if not name.endswith(("bias", "mask_token")) and not tensor.any():  # these begin as zeros
                raise CheckpointError(f"{where}: tensor {name} is all zero")


def _check_head(where: str, state: State, width: int) -> None:
    try:
        with torch.device("meta"):
            wanted = {name: tensor.shape for name, tensor in HeadShape.of(state).build(width).state_dict().items()}
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"{where} is no whole head ({error}); it has {listed(state)}") from None
    off = {name for name in wanted.keys() | state.keys() if wanted.get(name) != getattr(state.get(name), "shape", None)}
    if off:
        raise CheckpointError(f"{where} has missing, unknown or wrongly shaped tensors: {listed(off)}")


def _run_card(source: Source, branch: str) -> dict[str, Any]:
    """What a card says of the run and of where in it the weights are from."""
    seal, run_dir, iteration = source.seal, source.run_dir, source.iteration
    card = {"run": run_dir.name if run_dir else None, "branch": branch, "iteration": iteration}
    card |= {"metrics": _metrics_at(run_dir, iteration)}
    if not seal:
        return card
    final = read_json(run_dir / "final.json") if (run_dir / "final.json").is_file() else {}
    data = seal.get("data") or {key: final.get(key) for key in ("tiles", "crops")}
    return card | {
        "inputs_sha256": seal["inputs"],
        "run_config_sha256": sha256_file(run_dir / SEAL_NAME),
        **data,
        "samples_seen": None if iteration is None else (iteration + 1) * seal["global_batch"],
        "gram_anchored": source.config.gram.use_loss,
        "trained": describe_trained(seal["settings"]),
    }


def _metrics_at(run_dir: Path | None, iteration: int | None) -> dict[str, float] | None:
    """The metrics logged last at or before an iteration; None where none are."""
    if run_dir is None or iteration is None:
        return None
    try:
        return metrics_at(run_dir, iteration) or None
    except RunError:
        return None
