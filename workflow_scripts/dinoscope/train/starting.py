"""Where a run starts: from weights, from another run, or from scratch; and the teachers that it is held to."""

import hashlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dinoscope.errors import CheckpointError, ConfigError, WeightsError
from dinoscope.files import read_json
from dinoscope.models.lora import fresh_adapters
from dinoscope.models.registry import ViTSettings
from dinoscope.models.settings_of_tensors import periods_fit
from dinoscope.models.vit import DinoVisionTransformer
from dinoscope.models.weights import UNKNOWN_ORIGIN, ModelFile, read_model_file, state_digest
from dinoscope.train.checkpoint import fill_from_full_state, load_checkpoint
from dinoscope.train.distillation import TeacherShape, check_teacher, read_teacher, teacher_parts, teacher_shape
from dinoscope.train.optimizer import copy_state
from dinoscope.train.run_folder import teacher_export_path
from dinoscope.train.seal import SEAL_NAME, read_seal, sealed_settings
from dinoscope.train.ssl_step import SSLModel, build_heads
from dinoscope.train.trainable import adapted_backbone, count_trained, describe_trained

if TYPE_CHECKING:
    from dinoscope.config import RunConfig
    from dinoscope.train.distributed import World

__all__ = ["Start", "check_fit", "fresh_backbone", "resolve_start", "start_model"]

_READ_OFF_TENSORS = (
    *("embed_dim", "depth", "num_heads", "ffn_hidden", "ffn_layer", "patch_size", "in_chans", "num_storage_tokens"),
    *("qkv_bias", "proj_bias", "ffn_bias", "mask_k_bias", "untie_cls_and_patch_norms"),
)


@dataclass(frozen=True)
class Start:
    """What a run starts from; paths that do not apply are None."""

    weights: Path | None
    parent_checkpoint: Path | None
    gram_teacher: Path | None
    distilled: Path | None = None

    def origin(self) -> str:
        """Where the weights come from in the end: a published file, a seed, and what was distilled into them."""
        if self.distilled is None:
            return self._origin()
        return f"{self._origin()}, distilled from {read_model_file(self.distilled).origin}"

    def shape(self, config: "RunConfig") -> TeacherShape | None:
        """What the distilled teacher is built from."""
        return None if self.distilled is None else teacher_shape(read_teacher(self.distilled), config)

    def _origin(self) -> str:
        if self.parent_checkpoint is not None:
            return (read_seal(self.parent_checkpoint.parent.parent) or {}).get("origin") or UNKNOWN_ORIGIN
        if self.weights is None:
            return "random initialisation"
        return read_model_file(self.weights).origin

    def digests(self) -> dict[str, str | None]:
        """Digests for the run's seal."""
        parent = self.parent_checkpoint
        return {
            "weights": state_digest(read_model_file(self.weights).backbone) if self.weights and not parent else None,
            "continues": _checkpoint_digest(parent) if parent else None,
            "gram_teacher": state_digest(read_model_file(self.gram_teacher).backbone) if self.gram_teacher else None,
            "distillation": _teacher_digest(self.distilled) if self.distilled else None,
        }


def resolve_start(config: "RunConfig", weights: str | None, continues: Path | None, gram_teacher: str | None) -> Start:
    """Turns command-line arguments into files.

    Args:
        config: The recipe; its MODEL.WEIGHTS and gram.ckpt count where the arguments give nothing.
        weights: A model file, or None.
        continues: The final.json of the run that is continued, or None.
        gram_teacher: "last", an iteration of the run that is continued, or a model file.

    Raises:
        ConfigError: A gram run without a gram teacher, or one that trains another part of the backbone than the run
            that it continues.
        CheckpointError: The run that is continued has no such teacher or no checkpoint.
    """
    parent_dir = continues.parent if continues else None
    parent = read_json(continues) if continues else None
    teacher = None
    if config.gram.use_loss and not config.gram.ema_teacher:
        teacher = _gram_teacher(gram_teacher or config.gram.ckpt, parent_dir, parent, config)
    checkpoint = parent_dir / parent["checkpoint"] if parent else None
    if parent_dir is not None:
        _check_trained_alike(config, parent_dir)
    if checkpoint is not None and not (checkpoint / ".metadata").is_file():
        raise CheckpointError(f"run {parent_dir.name}: its checkpoint {parent['checkpoint']} is gone; train it again")
    start = weights or config.MODEL.WEIGHTS or None
    distilled = Path(config.distillation.checkpoint_path) if config.distillation.enabled else None
    if distilled is not None:
        check_teacher(read_teacher(distilled), config)
    return Start(Path(start) if start else None, checkpoint, teacher, distilled)


def _check_trained_alike(config: "RunConfig", parent_dir: Path) -> None:
    """A run goes on with its parent's optimizer, so it trains the same part of the backbone."""
    before = describe_trained((read_seal(parent_dir) or {}).get("settings", {}))
    now = describe_trained(sealed_settings(config))
    if before != now:
        raise ConfigError(
            f"run {parent_dir.name} trained student.trainable: {before}, and the run that continues it asks for {now}: "
            f"set it to the same, or start from that run's teacher instead (MODEL.WEIGHTS: {parent_dir})"
        )


def _gram_teacher(wanted: str | None, parent_dir: Path | None, parent: dict | None, config: "RunConfig") -> Path | None:
    if wanted is None or wanted == "last":
        if parent is not None:
            return parent_dir / parent["teacher"]
        if config.gram.it_load_ema_teacher >= 0:
            return None
        raise ConfigError("gram.use_loss needs a gram teacher: continue a run, or set gram.ckpt to an exported teacher")
    if str(wanted).isdigit():
        if parent_dir is None:
            raise ConfigError(f"gram teacher {wanted} is an iteration, but this run continues no other; give a file")
        path = teacher_export_path(parent_dir, int(wanted))
        if not path.is_file():
            exported = sorted(int(p.name.removeprefix("training_")) for p in (parent_dir / "eval").glob("training_*"))
            raise CheckpointError(f"run {parent_dir.name} exported no teacher at iteration {wanted}; it has {exported}")
        return path
    return Path(wanted)


def start_model(model: SSLModel, optimizer: torch.optim.Optimizer, start: Start, world: "World") -> str:
    """Fills student, teacher and gram teacher; says in one sentence from what."""
    if start.parent_checkpoint is not None:
        load_checkpoint(start.parent_checkpoint, model, optimizer, with_other_teachers=False)
        run = start.parent_checkpoint.parent.parent.name
        story = f"continues {run} from its iteration {start.parent_checkpoint.name}, optimizer included"
    else:
        whole, story = _whole_state(model, start.weights) if world.is_main else ({}, "")
        for name, part in model.student.items():
            fill_from_full_state(part, whole.get(name))
            fill_from_full_state(model.teacher[name], whole.get(name))
    if model.gram_teacher is not None:
        story += _fill_gram_teacher(model, start, world)
    if model.distilled_teacher is not None:
        story += _fill_distilled_teacher(model.distilled_teacher, start.distilled, world)
    _check_filled(model)
    trained, everything = count_trained(model.student["backbone"])
    if trained < everything:
        what = describe_trained(sealed_settings(model.config))
        story += f"; trains {trained:,} of {everything:,} backbone parameters: {what}"
    return story


def _adapters(model: SSLModel) -> dict[str, Tensor]:
    """Adapters as they start, by name; empty where the recipe has none."""
    with torch.device("meta"):
        backbone = adapted_backbone(model.settings, model.config.student)
    return fresh_adapters(backbone, model.config.train.seed + 2)


def _whole_state(model: SSLModel, weights: Path | None) -> tuple[dict[str, dict[str, Tensor]], str]:
    """Whole tensors of backbone and heads, on the main process alone."""
    config = model.config
    heads = _fresh_heads(config, model.settings)
    if weights is None:
        backbone = fresh_backbone(model.settings, config.train.seed).state_dict()
        return {"backbone": backbone | _adapters(model), **heads}, "starts from scratch: random backbone, random heads"
    file = read_model_file(weights)
    check_fit(file, model.settings)
    backbone = _with_untold(file, model)
    digest = state_digest(file.backbone)[:12]
    story = f"starts from {weights.name}: {len(backbone)} backbone tensors for student and teacher (sha256 {digest})"
    taken = {name: part for name, part in file.heads.items() if _same_shapes(part, heads[name])}
    story += "; heads from the file" if len(taken) == 2 else "; heads start random, the file has none that fit"
    return {"backbone": backbone | _adapters(model), **heads, **taken}, story


def _with_untold(file: ModelFile, model: SSLModel) -> dict[str, Tensor]:
    """The file's tensors; a norm of local crops that the file lacks starts as its general norm."""
    state = dict(file.backbone)
    if model.settings.untie_global_and_local_cls_norm and "local_cls_norm.weight" not in state:
        state |= {f"local_cls_{name}": value for name, value in state.items() if name.startswith("norm.")}
    elif not model.settings.untie_global_and_local_cls_norm:
        state = {name: value for name, value in state.items() if not name.startswith("local_cls_norm.")}
    return {name: tensor.float() for name, tensor in state.items()}


def check_fit(file: ModelFile, settings: ViTSettings) -> None:
    """Compares what a file's tensors tell with the recipe's `student` section.

    Raises:
        WeightsError: They contradict each other; names the key and both values.
    """
    seen = file.settings
    differing = [name for name in _READ_OFF_TENSORS if getattr(seen, name) != getattr(settings, name)]
    if (seen.layerscale is None) != (settings.layerscale is None):
        differing.append("layerscale")
    if differing:
        contradictions = ", ".join(
            f"{name} is {getattr(seen, name)} in the file and {getattr(settings, name)} in the recipe"
            for name in differing
        )
        raise WeightsError(
            f"{file.path} holds a {seen.arch} backbone, the recipe asks for {settings.arch}: {contradictions}; "
            "change the recipe's student section or give other weights"
        )
    if not periods_fit(settings, file.backbone):
        ends = file.backbone["rope_embed.periods"].float()[[0, -1]].tolist()
        raise WeightsError(
            f"{file.path} has RoPE periods from {ends[0]:g} to {ends[1]:g}, the recipe asks for {_periods(settings)}; "
            "change the recipe's student.pos_embed_rope_base"
        )


def _periods(settings: ViTSettings) -> str:
    if settings.rope_base is not None:
        return f"base {settings.rope_base:g}"
    return f"periods from {settings.rope_min_period:g} to {settings.rope_max_period:g}"


def fresh_backbone(settings: ViTSettings, seed: int) -> DinoVisionTransformer:
    """A randomly initialised backbone on the CPU, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DinoVisionTransformer(settings)
        model.init_weights()
    return model


def _fresh_heads(config: "RunConfig", settings: ViTSettings) -> dict[str, dict[str, Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed + 1)
        heads = build_heads(config, settings)
        for head in heads.values():
            head.init_weights()
    return {name: head.state_dict() for name, head in heads.items()}


def _same_shapes(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return {k: v.shape for k, v in first.items()} == {k: v.shape for k, v in second.items()}


def _fill_gram_teacher(model: SSLModel, start: Start, world: "World") -> str:
    if start.gram_teacher is None:  # gram.it_load_ema_teacher says when it takes the EMA teacher again
        copy_state(model.gram_teacher["backbone"], model.teacher["backbone"])
        return "; gram teacher is the EMA teacher of the start"
    backbone, story = None, ""
    if world.is_main:
        file = read_model_file(start.gram_teacher)
        check_fit(file, model.settings)
        backbone = _with_untold(file, model) | _adapters(model)
        story = f"; gram teacher from {start.gram_teacher.parent.name}/{start.gram_teacher.name}"
    fill_from_full_state(model.gram_teacher["backbone"], backbone)
    return story


def _fill_distilled_teacher(teacher: nn.ModuleDict, path: Path, world: "World") -> str:
    parts: dict[str, dict[str, Tensor]] = {}
    story = ""
    if world.is_main:
        file = read_teacher(path)
        parts, story = teacher_parts(file), f"; distils {path.name}, a {file.settings.arch}"
        missing = [name for name in teacher if name not in parts]
        story += f", with {' and '.join(missing)} made from its features" if missing else ""
        # until teacher_heads.make_heads has seen some images
        parts |= {name: {k: torch.zeros(v.shape) for k, v in teacher[name].state_dict().items()} for name in missing}
    for name, part in teacher.items():
        fill_from_full_state(part, parts.get(name))
    read_teacher.cache_clear()
    return story


def _check_filled(model: SSLModel) -> None:
    """Every tensor was NaN before; one that still is was forgotten."""
    for name, tensor in model.state_dict().items():
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if not torch.isfinite(local).all():
            raise WeightsError(f"{name} is not finite after loading; the weights are damaged")


def _teacher_digest(path: Path) -> str:
    file = read_teacher(path)
    return state_digest(
        {f"{part}.{name}": t for part, state in teacher_parts(file).items() for name, t in state.items()}
    )


def _checkpoint_digest(folder: Path) -> str:
    """Identity of a checkpoint: the seal of its run and its iteration (bit-reproducible runs make that enough)."""
    seal = (folder.parent.parent / SEAL_NAME).read_bytes()
    return hashlib.sha256(seal + folder.name.encode()).hexdigest()


assert set(_READ_OFF_TENSORS) <= {f.name for f in fields(ViTSettings)}
