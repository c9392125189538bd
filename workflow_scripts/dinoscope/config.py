"""Recipes of training runs: every key, its default, and how a YAML file becomes checked settings.

Key names and defaults are those of the published DINOv3 trainer wherever it has the setting, so that its YAML files
load; keys of our own are `augmentation.*`, `train.log_every` and `extends`. A recipe holds only what differs from the
defaults:

    extends: vits16.yaml        # one parent, relative to this file; no cycles
    train: {batch_size_per_gpu: 32}

An "epoch" is `train.OFFICIAL_EPOCH_LENGTH` iterations, not a pass over the data. Nothing here imports torch.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dinoscope.errors import ConfigError

__all__ = ["IGNORED_KEYS", "RunConfig", "flatten", "load_recipe", "recipe_chain", "resolve_recipe"]


@dataclass
class ModelConfig:
    """Where the run starts."""

    # backbone file that student and EMA teacher start from; the workflow fills in models/base/teacher.pth
    WEIGHTS: str = ""


@dataclass
class CheckpointingConfig:
    """How often the whole training state is saved, and how much of it is kept."""

    period: int = 3750  # iterations between checkpoints; the last iteration is always saved
    max_to_keep: int | None = 3  # newest checkpoints kept, at least 2; null keeps all
    keep_every: int = 99999999999999999  # checkpoints of every so many iterations stay for good, as <it>_keep


@dataclass
class ComputePrecisionConfig:
    """Number formats of training; master weights are always float32."""

    param_dtype: str = "bf16"  # fp32 | bf16 of forward and backward; on CPUs fp32 is always used
    reduce_dtype: str = "fp32"  # fp32 | bf16 of the gradient reduction
    sharding_strategy: str = "SHARD_GRAD_OP"  # SHARD_GRAD_OP keeps gathered weights for the backward | FULL_SHARD


@dataclass
class CropsConfig:
    """Sizes and geometry of the crops of one tile."""

    global_crops_scale: list[float] = field(default_factory=lambda: [0.32, 1.0])  # share of the tile's area
    global_crops_size: int = 224  # px
    local_crops_number: int = 8
    local_crops_scale: list[float] = field(default_factory=lambda: [0.05, 0.32])
    local_crops_size: int = 96  # px
    gram_teacher_crops_size: int | None = None  # px; null: the gram teacher sees the global crops
    gram_teacher_no_distortions: bool = False  # the gram teacher's crops without colour changes and blur
    horizontal_flips: bool = True
    rgb_mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])  # of RGB in 0..1
    rgb_std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])


@dataclass
class AugmentationConfig:
    """Distortions of the crops: a preset, and any of its numbers changed (null: the preset's)."""

    recipe: str = "dinov3"  # dinov3 (as published) | pathology (both flips, rotations, no solarize, milder colour)
    vertical_flips: bool | None = None
    rotations_90: bool | None = None
    color_jitter_p: float | None = None
    brightness: float | None = None
    contrast: float | None = None
    saturation: float | None = None
    hue: float | None = None
    grayscale_p: float | None = None
    blur_p: list[float] | None = None  # of the first global, the second global and the local crops
    blur_sigma: list[float] | None = None
    solarize_p: float | None = None  # of the second global crop
    hed_p: float | None = None
    hed_sigma: float | None = None


@dataclass
class LinearCosineConfig:
    """A v2 schedule: linear start -> peak, cosine peak -> end, then constant (epochs)."""

    start: float = 0.0
    peak: float = 0.0
    end: float = 0.0
    warmup_epochs: float = 0
    cosine_epochs: float | None = None


@dataclass
class LearningRateScheduleConfig(LinearCosineConfig):
    """The v2 schedule of the learning rate."""

    freeze_last_layer_epochs: float = 0


@dataclass
class SchedulesConfig:
    """Schedules of the second kind; when present they replace those of `optim` and `teacher`."""

    lr: LearningRateScheduleConfig = field(default_factory=LearningRateScheduleConfig)
    weight_decay: LinearCosineConfig = field(default_factory=LinearCosineConfig)
    momentum: LinearCosineConfig = field(default_factory=LinearCosineConfig)
    teacher_temp: LinearCosineConfig = field(default_factory=LinearCosineConfig)


def _half() -> LinearCosineConfig:
    return LinearCosineConfig(start=0.5, peak=0.5, end=0.5)


@dataclass
class DinoConfig:
    """The loss between CLS tokens, its head, and KoLeo."""

    loss_weight: float = 1.0
    global_ignore_diagonal: bool = True
    head_n_prototypes: int = 65536
    head_bottleneck_dim: int = 256
    head_nlayers: int = 3
    head_hidden_dim: int = 2048
    koleo_loss_weight: float = 0.1
    koleo_loss_distributed: bool = False
    koleo_topk: int = 1
    koleo_distributed_loss_group_size: int | None = None
    reweight_dino_local_loss: bool = False
    local_loss_weight_schedule: LinearCosineConfig = field(default_factory=_half)


@dataclass
class IbotConfig:
    """The loss on masked patches, its head and the masks."""

    loss_weight: float = 1.0
    mask_sample_probability: float = 0.5  # share of the global crops that are masked
    mask_ratio_min_max: list[float] = field(default_factory=lambda: [0.1, 0.5])
    mask_random_circular_shift: bool = False
    head_n_prototypes: int = 65536
    head_bottleneck_dim: int = 256
    head_nlayers: int = 3
    head_hidden_dim: int = 2048


@dataclass
class GramConfig:
    """Gram anchoring: patch similarities are held to those of an earlier teacher."""

    use_loss: bool = False
    ckpt: str | None = None  # exported teacher; the workflow fills it in from `gram_teacher` of the run
    ema_teacher: bool = False  # the current EMA teacher is the gram teacher
    it_load_ema_teacher: int = -1  # load the EMA teacher into the gram teacher once, before this iteration
    rep_update: bool = True  # refresh the gram teacher from the EMA teacher
    update_frequency: int = 50000
    it_first_update: int = 0
    max_updates: int | None = None
    loss_weight: float = 1.0
    loss_weight_schedule: LinearCosineConfig | None = None
    tokens_used: str = "all"  # all | masked | unmasked (the last two need img_level: false)
    img_level: bool = False
    normalized: bool = True
    remove_neg: bool = False
    remove_only_teacher_neg: bool = False
    global_teacher_resize_method: str = "bicubic"
    global_teacher_resize_antialias: bool = False


@dataclass
class OptimConfig:
    """AdamW, its parameter groups, and the schedules of the first kind."""

    epochs: int = 100
    optimizer: str = "adamw"
    adamw_beta1: float = 0.9
    adamw_beta2: float = 0.999
    clip_grad: float = 3.0  # separately for backbone, dino_head and ibot_head
    lr: float = 0.001  # before scaling
    min_lr: float = 1e-6
    warmup_epochs: float = 10
    scaling_rule: str = "sqrt_wrt_1024"  # sqrt_wrt_1024 | linear_wrt_256 | none
    weight_decay: float = 0.04
    weight_decay_end: float = 0.4
    schedule_trunc_extra: float = 0.0
    freeze_last_layer_epochs: float = 1
    layerwise_decay: float = 0.9
    patch_embed_lr_mult: float = 0.2
    dino_head_wd_multiplier: float = 1.0


@dataclass
class StudentConfig:
    """The backbone of student and teacher."""

    arch: str = "vit_large"
    patch_size: int = 16
    in_chans: int = 3
    n_storage_tokens: int = 0
    ffn_layer: str = "mlp"  # mlp | swiglu | swiglu32 | swiglu64 | swiglu128; the _plus archs have swiglu
    norm_layer: str = "layernorm"  # layernorm | layernormbf16 | rmsnorm
    layerscale: float | None = 1e-5
    drop_path_rate: float = 0.3
    qkv_bias: bool = True
    proj_bias: bool = True
    ffn_bias: bool = True
    mask_k_bias: bool = False
    pos_embed_rope_base: float | None = 100.0
    pos_embed_rope_min_period: float | None = None
    pos_embed_rope_max_period: float | None = None
    pos_embed_rope_normalize_coords: str = "separate"  # separate | max | min
    pos_embed_rope_shift_coords: float | None = None
    pos_embed_rope_jitter_coords: float | None = None
    pos_embed_rope_rescale_coords: float | None = None
    pos_embed_rope_dtype: str = "bf16"  # bf16 | fp32
    untie_cls_and_patch_norms: bool = False
    untie_global_and_local_cls_norm: bool = False


@dataclass
class TeacherConfig:
    """EMA and temperature of the teacher (schedules of the first kind)."""

    momentum_teacher: float = 0.992
    final_momentum_teacher: float = 1.0
    teacher_temp: float = 0.07
    warmup_teacher_temp: float = 0.04
    warmup_teacher_temp_epochs: float = 30


@dataclass
class TrainConfig:
    """Batches, length and determinism."""

    OFFICIAL_EPOCH_LENGTH: int = 1250  # iterations
    batch_size_per_gpu: int = 64  # tiles a process
    num_workers: int = 10  # loader processes a training process; changes nothing but speed
    seed: int = 0
    compile: bool = True
    checkpointing: bool = False  # recompute attention and FFN activations in the backward
    checkpointing_full: bool = False  # recompute whole blocks
    log_every: int = 10  # iterations between lines in training_metrics.json


@dataclass
class EvaluationConfig:
    """Exports of the teacher while training."""

    eval_period_iterations: int = 12500  # the last iteration is always exported; 0: only that


@dataclass
class RunConfig:
    """All settings of one training run."""

    MODEL: ModelConfig = field(default_factory=ModelConfig)
    checkpointing: CheckpointingConfig = field(default_factory=CheckpointingConfig)
    compute_precision: ComputePrecisionConfig = field(default_factory=ComputePrecisionConfig)
    crops: CropsConfig = field(default_factory=CropsConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    dino: DinoConfig = field(default_factory=DinoConfig)
    ibot: IbotConfig = field(default_factory=IbotConfig)
    gram: GramConfig = field(default_factory=GramConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedules: SchedulesConfig | None = None
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


# Keys of the published trainer that have nothing to do here: read, named once in the log, without effect.
IGNORED_KEYS = {
    "MODEL.DEVICE": "the device is whatever the machine has",
    "MODEL.DTYPE": "see compute_precision",
    "evaluation.config_files": "evaluation belongs to the workflow",
    "evaluation.low_freq_every": "evaluation belongs to the workflow",
    "gram.compute_stats": "not measured",
    "optim.dump_fsdp_weights_path": "checkpoints hold the weights",
    "optim.multi_tensor_optim": "the optimizer always works on lists of tensors",
    "train.cache_dataset": "the manifest is memory-mapped",
    "train.dataset_path": "the workflow's manifest is the data set",
    "train.monitor_gradient_norm": "gradient norms are always logged",
    "train.output_dir": "the workflow's run folder is used",
    "train.saveckp_freq": "see checkpointing.period",
    "train.sharded_eval_checkpoint": "teacher exports are single files",
}

# Keys that are honoured at one value only.
_ONLY_VALUE = {
    "MODEL.META_ARCHITECTURE": "SSLMetaArch",
    "crops.global_local_crop_pairs_ratios": 1.0,
    "crops.localcrops_subset_of_globalcrops": False,
    "crops.share_color_jitter": False,
    "crops.teacher_to_student_resolution_scale": 1.0,
    "dino.force_weight_norm": False,
    "dino.head_norm_last_layer": False,
    "dino.koleo_distributed_replicas": 0,
    "dino.koleo_distributed_loss_group_data": True,
    "distillation.enabled": False,
    "distillation.checkpoint_path": "",
    "distillation.full_cfg_path": "",
    "hrft.enabled": False,
    "hrft.checkpoint_path": "",
    "ibot.force_masking_even_with_zero_weight": False,
    "ibot.head_norm_last_layer": False,
    "ibot.separate_head": True,
    "multidistillation.enabled": False,
    "student.ffn_ratio": 4.0,
    "student.fp8_enabled": False,
    "student.fp8_filter": "blocks",
    "student.pos_embed_type": "rope",
    "student.pretrained_weights": "",
    "student.resume_from_teacher_chkpt": "",
    "teacher.in_chans": 3,
    "train.centering": "sinkhorn_knopp",
    "train.chunk_schedule": [],
    "train.cudagraphs": False,
    "train.data_config": None,
    "train.learn_from_teacher_tokens": False,
    "train.use_teacher_head": True,
}

_CHOICES = {
    "augmentation.recipe": ("dinov3", "pathology"),
    "compute_precision.param_dtype": ("bf16", "fp32"),
    "compute_precision.reduce_dtype": ("bf16", "fp32"),
    "compute_precision.sharding_strategy": ("SHARD_GRAD_OP", "FULL_SHARD"),
    "gram.tokens_used": ("all", "masked", "unmasked"),
    "gram.global_teacher_resize_method": ("bicubic", "bilinear"),
    "optim.optimizer": ("adamw",),
    "optim.scaling_rule": ("sqrt_wrt_1024", "linear_wrt_256", "none"),
    "student.ffn_layer": ("mlp", "swiglu", "swiglu32", "swiglu64", "swiglu128"),
    "student.norm_layer": ("layernorm", "layernormbf16", "rmsnorm"),
    "student.pos_embed_rope_dtype": ("bf16", "fp32"),
    "student.pos_embed_rope_normalize_coords": ("separate", "max", "min"),
}


def recipe_chain(path: str | Path) -> list[Path]:
    """The recipe file and the files it extends, the most basic first.

    Raises:
        ConfigError: A file is missing, is not YAML, or the chain comes back to itself.
    """
    chain: list[Path] = []
    current: Path | None = Path(path)
    while current is not None:
        if current.resolve() in (seen.resolve() for seen in chain):
            raise ConfigError(f"{path}: `extends` comes back to {current.name}; a recipe cannot extend itself")
        chain.append(current)
        parent = _read_yaml(current).get("extends")
        current = current.parent / str(parent) if parent is not None else None
    return chain[::-1]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a recipe with all that it extends into checked settings.

    Args:
        path: The recipe's YAML file.
        overrides: `key=value` pairs as on a command line, e.g. `optim.lr=1e-4`; they win over the files.

    Returns:
        An OmegaConf object with the fields of RunConfig, read-only, wherever no file says otherwise at its defaults.

    Raises:
        ConfigError: An unknown key (with the nearest known one), a wrong type or value, or settings that exclude each
            other.
    """
    layers = []
    for file in recipe_chain(path):
        layer = _read_yaml(file)
        layer.pop("extends", None)
        layers.append((file.name, layer))
    layers += [("the command line", _parse_override(text)) for text in overrides]
    return resolve_recipe(layers, Path(path).name)


def resolve_recipe(layers: Iterable[tuple[str, dict[str, Any]]], name: str) -> RunConfig:
    """Merges nested dictionaries, each with the name of where it came from, over the defaults and checks the result."""
    merged = OmegaConf.structured(RunConfig)
    for source, layer in layers:
        known = _honoured(layer, source)
        try:
            merged = OmegaConf.merge(merged, known)
        except OmegaConfBaseException as error:
            raise ConfigError(_type_sentence(error, known, source)) from None
    _check(merged, name)
    OmegaConf.set_readonly(merged, True)
    return merged


def flatten(config: Any) -> dict[str, Any]:
    """Dotted key -> value of an OmegaConf object or nested dictionary; lists and None are values."""
    container = OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config
    return dict(_items(container, ""))


def _items(node: dict[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"recipe {path} does not exist")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_RecipeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content or {}, dict):
        raise ConfigError(f"recipe {path} must hold keys and values, but holds a {type(content).__name__}")
    return content or {}


class _RecipeLoader(yaml.SafeLoader):
    """Reads 1e-4 as a number (YAML 1.1 takes it for text) and refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"key {key!r} stands twice in line {node.start_mark.line + 1} or below")
        return super().construct_mapping(node, deep)


_FLOAT = r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"
_RecipeLoader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
yaml.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+.0123456789"), Loader=_RecipeLoader)


def _parse_override(text: str) -> dict[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ConfigError(f"cannot read override {text!r}: write key=value, e.g. optim.lr=1e-4")
    nested: Any = yaml.load(value, Loader=_RecipeLoader)
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return nested


def _honoured(layer: dict[str, Any], source: str) -> dict[str, Any]:
    """The keys of a layer that the schema has; published keys without effect are dropped, all others refused."""
    for key, value in flatten(layer).items():
        if key in _ONLY_VALUE and value != _ONLY_VALUE[key]:
            raise ConfigError(f"{source}: {key} is {value!r}, but only {_ONLY_VALUE[key]!r} is supported")
    return _strip(layer, RunConfig, "", source)


def _strip(layer: dict[str, Any], schema: type, prefix: str, source: str) -> dict[str, Any]:
    fields = {f.name: _section(f.type) for f in dataclasses.fields(schema)}
    kept = {}
    for key, value in layer.items():
        dotted = f"{prefix}{key}"
        if key in fields and fields[key] is not None and value is not None:
            if not isinstance(value, dict):
                raise ConfigError(f"{source}: {dotted} holds keys of its own, but is {value!r}")
            kept[key] = _strip(value, fields[key], f"{dotted}.", source)
        elif key in fields:
            kept[key] = value
        elif not _has_no_effect(dotted, value):
            raise ConfigError(f"{source}: unknown key {dotted}{_nearest(dotted)}")
    return kept


def _section(annotation: Any) -> type | None:
    """The dataclass in an annotation such as `X` or `X | None`, if there is one."""
    candidates = getattr(annotation, "__args__", (annotation,))
    return next((c for c in candidates if dataclasses.is_dataclass(c)), None)


def _has_no_effect(dotted: str, value: Any) -> bool:
    keys = flatten({dotted: value}) if isinstance(value, dict) else {dotted: value}
    return all(key in _ONLY_VALUE or any(key == k or key.startswith(k + ".") for k in IGNORED_KEYS) for key in keys)


def _nearest(dotted: str) -> str:
    known = [*_known_keys(RunConfig, ""), *_ONLY_VALUE, *IGNORED_KEYS]
    leaf = dotted.rpartition(".")[2]
    same_leaf = [key for key in known if key.rpartition(".")[2] == leaf]
    matches = (
        difflib.get_close_matches(dotted, known, 1, 0.75)
        or same_leaf[:1]
        or difflib.get_close_matches(dotted, known, 1)
    )
    return f"; did you mean {matches[0]}?" if matches else ""


def _known_keys(schema: type, prefix: str) -> Iterable[str]:
    for entry in dataclasses.fields(schema):
        yield prefix + entry.name
        if (section := _section(entry.type)) is not None:
            yield from _known_keys(section, f"{prefix}{entry.name}.")


def _type_sentence(error: OmegaConfBaseException, layer: dict[str, Any], source: str) -> str:
    key = error.full_key or "?"
    value = flatten(layer).get(key, "?")
    wanted = getattr(error.ref_type, "__name__", None) or str(error.ref_type)
    reason = str(error.msg or error).split("\n")[0]
    return f"{source}: {key} is {value!r}, which does not fit: {reason}" + (
        f" (wanted {wanted})" if wanted != "Any" else ""
    )


def _check(config: RunConfig, name: str) -> None:
    """Settings that exclude each other, before any process group exists."""
    problems = [*_choice_problems(config), *_crop_problems(config), *_gram_problems(config), *_length_problems(config)]
    if problems:
        raise ConfigError(f"recipe {name}: " + "; ".join(problems))


def _choice_problems(config: RunConfig) -> Iterable[str]:
    values = flatten(config)
    for key, choices in _CHOICES.items():
        if values[key] not in choices:
            yield f"{key} is {values[key]!r}; choose one of {', '.join(choices)}"
    for key, value in values.items():
        if value is MISSING:
            yield f"{key} has no value"


def _crop_problems(config: RunConfig) -> Iterable[str]:
    patch = config.student.patch_size
    for key in ("global_crops_size", "local_crops_size", "gram_teacher_crops_size"):
        size = config.crops[key]
        if size is not None and (size <= 0 or size % patch):
            lower = size // patch * patch
            around = f"{lower} or {lower + patch}" if lower > 0 else str(patch)
            yield f"crops.{key} is {size} px, not a multiple of the patch size {patch}: use {around}"
    for key in ("global_crops_scale", "local_crops_scale"):
        scale = list(config.crops[key])
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            yield f"crops.{key} is {scale}; give two shares of the tile's area, 0 < smallest <= largest <= 1"
    ratios = list(config.ibot.mask_ratio_min_max)
    if len(ratios) != 2 or not 0 < ratios[0] <= ratios[1] < 1:
        yield f"ibot.mask_ratio_min_max is {ratios}; give two shares, 0 < smallest <= largest < 1"
    gram_px, global_px = config.crops.gram_teacher_crops_size, config.crops.global_crops_size
    if gram_px is not None and gram_px < global_px:
        yield f"crops.gram_teacher_crops_size ({gram_px}) is smaller than crops.global_crops_size ({global_px})"


def _gram_problems(config: RunConfig) -> Iterable[str]:
    gram = config.gram
    if not gram.use_loss:
        return
    if gram.ema_teacher and (gram.ckpt or gram.it_load_ema_teacher >= 0):
        yield "gram.ema_teacher is on: drop gram.ckpt and gram.it_load_ema_teacher, or set gram.ema_teacher to false"
    if gram.tokens_used != "all" and gram.img_level:
        yield f"gram.tokens_used: {gram.tokens_used} needs gram.img_level: false"
    if gram.remove_neg and gram.remove_only_teacher_neg:
        yield "gram.remove_neg and gram.remove_only_teacher_neg exclude each other"
    if gram.rep_update and gram.update_frequency < 1:
        yield f"gram.update_frequency is {gram.update_frequency}; at least 1 iteration is wanted"


def _length_problems(config: RunConfig) -> Iterable[str]:
    for key in ("optim.epochs", "train.OFFICIAL_EPOCH_LENGTH", "train.batch_size_per_gpu", "train.log_every"):
        if OmegaConf.select(config, key) < 1:
            yield f"{key} is {OmegaConf.select(config, key)}; at least 1 is wanted"
    if config.dino.koleo_loss_weight and not config.dino.koleo_loss_distributed and config.train.batch_size_per_gpu < 2:
        yield "KoLeo compares the tiles of a process: train.batch_size_per_gpu must be at least 2"
    if config.checkpointing.period < 1:
        yield f"checkpointing.period is {config.checkpointing.period}; at least 1 iteration is wanted"
    if config.checkpointing.max_to_keep is not None and config.checkpointing.max_to_keep < 2:
        yield f"checkpointing.max_to_keep is {config.checkpointing.max_to_keep}; keep at least 2, or null for all"
    epochs = config.optim.epochs
    if config.schedules is None:
        for key in ("optim.warmup_epochs", "teacher.warmup_teacher_temp_epochs"):
            if OmegaConf.select(config, key) > epochs:
                yield f"{key} ({OmegaConf.select(config, key):g}) is longer than optim.epochs ({epochs})"
    else:
        for key, schedule in config.schedules.items():
            if schedule.warmup_epochs + (schedule.cosine_epochs or 0) > epochs:
                yield f"schedules.{key} lasts longer than optim.epochs ({epochs})"
