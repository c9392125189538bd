"""The settings of a training run: every key and its default.

Key names and defaults are those of the published DINOv3 trainer wherever it has the setting; keys of our own are
`augmentation.*` and `train.log_every`. An "epoch" is `train.OFFICIAL_EPOCH_LENGTH` iterations, not a pass over the
data.
How a YAML file becomes a RunConfig is in recipe.py.
"""

from dataclasses import dataclass, field

__all__ = ["RunConfig"]


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
