"""The settings of a training run: every key and its default.

Key names and defaults are those of the published DINOv3 trainer wherever it has the setting; keys of our own are
`augmentation.*`, `sampling.*`, `dino.kde_*`, `optim.freeze_backbone_epochs`, `student.trainable` with what belongs to
it, and those of `train`, `checkpointing` and `evaluation` that it lacks. An "epoch" is `train.OFFICIAL_EPOCH_LENGTH`
iterations, not a pass over the data.

The comment of a key is its documentation: config/README.md shows it, and a test keeps both the same.
How a YAML file becomes a RunConfig is in recipe.py.
"""

from dataclasses import dataclass, field
from typing import Any

__all__ = ["LinearCosineConfig", "RunConfig"]


@dataclass
class ModelConfig:
    """Where the run starts."""

    # what student and EMA teacher start from (docs/weights.md lists the kinds); empty: a random initialisation
    WEIGHTS: str = ""


@dataclass
class CheckpointingConfig:
    """How often the whole training state is saved, and how much of it is kept."""

    period: int = 3750  # iterations between checkpoints; the last iteration is always saved
    max_to_keep: int | None = 3  # newest checkpoints kept, at least 2; null keeps all
    every_minutes: float | None = None  # minutes after which a checkpoint is saved besides; null: none
    async_save: bool = True  # training goes on while files are written
    keep_every: int = 99999999999999999  # checkpoints of every so many iterations stay for good, as <it>_keep


@dataclass
class ComputePrecisionConfig:
    """Number formats of training; master weights are always float32."""

    param_dtype: str = "bf16"  # fp32 | bf16 of forward and backward; on CPUs fp32 is always used
    reduce_dtype: str = "fp32"  # fp32 | bf16 of the gradient reduction
    # SHARD_GRAD_OP keeps gathered weights for the backward | FULL_SHARD does not | HYBRID_SHARD: FULL_SHARD in a node
    sharding_strategy: str = "SHARD_GRAD_OP"


@dataclass
class CropsConfig:
    """Sizes and geometry of the crops of one tile."""

    global_crops_scale: list[float] = field(default_factory=lambda: [0.32, 1.0])  # share of the tile's area
    global_crops_size: Any = 224  # px; or a list of several resolutions, of which every step draws one
    local_crops_number: int = 8  # local crops a tile; there are always 2 global ones
    local_crops_scale: list[float] = field(default_factory=lambda: [0.05, 0.32])  # share of the tile's area
    local_crops_size: Any = 96  # px; or a list, as long as the others
    gram_teacher_crops_size: Any = None  # px, or a list as long as the others; null: it sees the global crops
    global_local_crop_pairs_ratios: Any = 1.0  # with lists of sizes: how often each is taken; one number: equally often
    gram_teacher_no_distortions: bool = False  # the gram teacher's crops without colour changes and blur
    horizontal_flips: bool = True  # mirror left-right with probability 0.5
    rgb_mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])  # mean of RGB in 0..1
    rgb_std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])  # its deviation


@dataclass
class SamplingConfig:
    """Which tiles a step takes."""

    # uniform (passes over all tiles, each once) | tempered (over site × scanner × stain, then evenly over slides)
    method: str = "uniform"
    exponent: float = 0.5  # a stratum's share goes with its number of tiles to this power: 1 proportional, 0 equal
    max_tiles_per_slide: int = 2  # of one slide in a step over all processes, where there are slides enough (tempered)
    tiles_per_visit: int = 1  # tiles read of a slide in a row, which spares slow storage (tempered)
    # shares of the samples that tiles of each mpp get, the finest first, e.g. [1, 2, 1]; null: as the tiles have them
    # (uniform)
    mpp_shares: list[float] | None = None


@dataclass
class AugmentationConfig:
    """Distortions of the crops: a preset, and any of its numbers changed (null: the preset's)."""

    recipe: str = "dinov3"  # dinov3 (as published) | pathology (both flips, rotations, no solarize, milder colour)
    # IHC and IF keep their colours: no stain jitter, hue shift or grayscale; Pap and MGG: no stain jitter, hue at most
    # 0.02, grayscale at most 0.05, blur at most p 0.2 and sigma 1 (pathology: true, dinov3: false)
    by_stain: bool | None = None
    vertical_flips: bool | None = None  # mirror top-bottom with probability 0.5
    rotations_90: bool | None = None  # turn by 0, 90, 180 or 270 degrees, each equally likely
    color_jitter_p: float | None = None  # probability of the next four, in random order
    brightness: float | None = None  # factor uniform in 1 ± this
    contrast: float | None = None  # factor uniform in 1 ± this
    saturation: float | None = None  # factor uniform in 1 ± this
    hue: float | None = None  # shift uniform in ± this, shares of the colour circle
    grayscale_p: float | None = None  # probability of grayscale
    blur_p: list[float] | None = None  # probability of blur: first global, second global, local crops
    blur_sigma: list[float] | None = None  # px of the crop, uniform between the two
    solarize_p: float | None = None  # probability of solarizing the second global crop
    hed_p: float | None = None  # probability of stain jitter (haematoxylin, eosin, DAB)
    hed_sigma: float | None = None  # gain of each stain uniform in 1 ± this, shift in ± this (optical density)


@dataclass
class LinearCosineConfig:
    """A v2 schedule: linear start -> peak, cosine peak -> end, then constant (epochs)."""

    start: float = 0.0  # first value
    peak: float = 0.0  # after the warm-up
    end: float = 0.0  # after the cosine
    warmup_epochs: float = 0  # epochs from start to peak, linear
    cosine_epochs: float | None = None  # epochs from peak to end; null: all that remain


@dataclass
class LearningRateScheduleConfig(LinearCosineConfig):
    """The v2 schedule of the learning rate."""

    freeze_last_layer_epochs: float = 0  # epochs in which the heads' last layers have learning rate 0


@dataclass
class SchedulesConfig:
    """Schedules of the second kind; when present they replace those of `optim` and `teacher`."""

    lr: LearningRateScheduleConfig = field(default_factory=LearningRateScheduleConfig)  # peak and end are scaled
    weight_decay: LinearCosineConfig = field(default_factory=LinearCosineConfig)
    momentum: LinearCosineConfig = field(default_factory=LinearCosineConfig)
    teacher_temp: LinearCosineConfig = field(default_factory=LinearCosineConfig)


def _half() -> LinearCosineConfig:
    return LinearCosineConfig(start=0.5, peak=0.5, end=0.5)


@dataclass
class DinoConfig:
    """The loss between CLS tokens, its head, and what keeps features apart."""

    loss_weight: float = 1.0  # weight of the loss between CLS tokens
    global_ignore_diagonal: bool = True  # no loss between a global crop and itself
    head_n_prototypes: int = 65536  # outputs of the head
    head_bottleneck_dim: int = 256  # width before the prototypes
    head_nlayers: int = 3  # linear layers of the head's MLP
    head_hidden_dim: int = 2048  # width inside the MLP
    koleo_loss_weight: float = 0.1  # weight of KoLeo, which pushes nearest neighbours apart
    koleo_loss_distributed: bool = False  # neighbours from all processes
    koleo_topk: int = 1  # neighbours each feature is pushed away from (distributed only)
    koleo_distributed_loss_group_size: int | None = None  # neighbours from blocks of so many features; null: from all
    kde_loss_weight: float = 0.0  # weight of the kernel density loss, an alternative to KoLeo: one of both must be 0
    kde_concentration: float = 5.0  # of the von Mises-Fisher kernel: the larger, the more only near features repel
    kde_loss_distributed: bool = False  # density over the features of all processes
    reweight_dino_local_loss: bool = False  # weigh the loss of local crops by the schedule below
    local_loss_weight_schedule: LinearCosineConfig = field(default_factory=_half)  # where reweight_dino_local_loss


@dataclass
class IbotConfig:
    """The loss on masked patches, its head and the masks."""

    loss_weight: float = 1.0  # weight of the loss on masked patches
    mask_sample_probability: float = 0.5  # share of the global crops that are masked
    mask_ratio_min_max: list[float] = field(default_factory=lambda: [0.1, 0.5])  # share of a crop's patches
    mask_random_circular_shift: bool = False  # shift each mask, wrapping around
    force_masking_even_with_zero_weight: bool = False  # mask although loss_weight is 0
    head_n_prototypes: int = 65536  # outputs of the head
    head_bottleneck_dim: int = 256  # width before the prototypes
    head_nlayers: int = 3  # linear layers of the head's MLP
    head_hidden_dim: int = 2048  # width inside the MLP


@dataclass
class GramConfig:
    """Gram anchoring: patch similarities are held to those of an earlier teacher."""

    use_loss: bool = False  # train with gram anchoring
    ckpt: str | None = None  # exported teacher; the workflow fills it in from `gram_teacher` of the run
    ema_teacher: bool = False  # the current EMA teacher is the gram teacher
    it_load_ema_teacher: int = -1  # load the EMA teacher into the gram teacher once, before this iteration; -1: never
    rep_update: bool = True  # refresh the gram teacher from the EMA teacher
    update_frequency: int = 50000  # iterations between refreshes
    it_first_update: int = 0  # no refresh before so many iterations
    max_updates: int | None = None  # refreshes at most; null: no limit
    loss_weight: float = 1.0  # weight of the gram loss
    loss_weight_schedule: LinearCosineConfig | None = None  # a schedule instead of one weight
    tokens_used: str = "all"  # all | masked | unmasked (the last two need img_level: false)
    img_level: bool = False  # compare patches within each image instead of over all images of the process
    normalized: bool = True  # similarities are cosines
    remove_neg: bool = False  # negative similarities of both count as 0
    remove_only_teacher_neg: bool = False  # the teacher's count as 0, the student's only where both are negative
    global_teacher_resize_method: str = "bicubic"  # bicubic | bilinear, of the gram teacher's feature maps
    global_teacher_resize_antialias: bool = False  # low-pass filter before


@dataclass
class DistillationConfig:
    """A frozen teacher in place of the EMA: a smaller student learns from a larger, finished model."""

    enabled: bool = False  # the targets are those of the teacher below; the student's EMA is exported all the same
    # the teacher, as MODEL.WEIGHTS; numbers of prototypes (where it has heads), patch size and rgb_mean/rgb_std must be
    # its own; heads that it lacks are made from its features
    checkpoint_path: str = ""


@dataclass
class OptimConfig:
    """AdamW, its parameter groups, and the schedules of the first kind."""

    epochs: int = 100  # length of the run
    optimizer: str = "adamw"  # adamw
    adamw_beta1: float = 0.9  # decay of the mean of gradients
    adamw_beta2: float = 0.999  # decay of the mean of their squares
    clip_grad: float = 3.0  # largest gradient norm, separately for backbone, dino_head and ibot_head; 0: no limit
    lr: float = 0.001  # peak learning rate before scaling
    min_lr: float = 1e-6  # last learning rate; it is not scaled
    warmup_epochs: float = 10  # epochs from learning rate 0 to lr
    scaling_rule: str = "sqrt_wrt_1024"  # sqrt_wrt_1024 (× 4·√(batch/1024)) | linear_wrt_256 (× batch/256) | none
    weight_decay: float = 0.04  # first weight decay
    weight_decay_end: float = 0.4  # last weight decay
    schedule_trunc_extra: float = 0.0  # share by which cosines are computed longer than the run, and cut off
    freeze_last_layer_epochs: float = 1  # epochs in which the heads' last layers have learning rate 0
    # epochs in which the heads alone are trained: the backbone's warm-up begins after them, the heads stay at the peak
    # until it ends; for starting from published weights, whose heads were never published
    freeze_backbone_epochs: float = 0
    layerwise_decay: float = 0.9  # factor of the learning rate from block to block, downwards
    patch_embed_lr_mult: float = 0.2  # factor of the patch embedding's learning rate
    dino_head_wd_multiplier: float = 1.0  # factor of the dino head's weight decay


@dataclass
class StudentConfig:
    """The backbone of student and teacher, and what of it is trained."""

    arch: str = "vit_large"  # a row of the table of architectures in docs/weights.md
    patch_size: int = 16  # px
    in_chans: int = 3  # colour channels: 3
    n_storage_tokens: int = 0  # storage (register) tokens; published weights: 4
    ffn_layer: str = "mlp"  # mlp | swiglu | swiglu32 | swiglu64 | swiglu128; the _plus archs have swiglu
    norm_layer: str = "layernorm"  # layernorm (eps 1e-6) | layernormbf16 (eps 1e-5, published weights) | rmsnorm
    layerscale: float | None = 1e-5  # initial factor of each residual; null: none
    drop_path_rate: float = 0.3  # share of the samples whose residual is dropped (stochastic depth), same in all blocks
    qkv_bias: bool = True  # bias of queries, keys and values
    proj_bias: bool = True  # bias of the attention's output
    ffn_bias: bool = True  # biases of the FFN
    mask_k_bias: bool = False  # the keys' bias is always 0; published weights: true
    pos_embed_rope_base: float | None = 100.0  # RoPE periods are its powers
    pos_embed_rope_min_period: float | None = None  # with max_period in place of base: geometric between both
    pos_embed_rope_max_period: float | None = None  # see min_period
    pos_embed_rope_normalize_coords: str = "separate"  # separate | max | min: what patch coordinates are divided by
    pos_embed_rope_shift_coords: float | None = None  # training: shift coordinates uniformly by ± this
    pos_embed_rope_jitter_coords: float | None = None  # training: stretch each axis log-uniformly by up to this
    pos_embed_rope_rescale_coords: float | None = None  # training: stretch both axes alike; published weights: 2
    pos_embed_rope_dtype: str = "bf16"  # bf16 | fp32 (published weights)
    untie_cls_and_patch_norms: bool = False  # CLS and storage tokens have a final norm of their own
    untie_global_and_local_cls_norm: bool = False  # training: CLS and storage of local crops have one of their own
    # what of the backbone is trained (heads always are): full | last_n (unfrozen_blocks, final norms) | lora (adapters,
    # unfrozen_blocks, all norms) | norms (all norms and LayerScale)
    trainable: str = "full"
    unfrozen_blocks: int = 0  # last blocks trained in full (last_n, lora)
    lora_rank: int = 16  # rank of the adapters
    lora_alpha: float | None = None  # adapters are scaled by alpha / rank; null: by 1
    # what gets adapters, of q, k, v, qkv (all three, one each), proj and ffn
    lora_targets: list[str] = field(default_factory=lambda: ["qkv", "proj"])


@dataclass
class TeacherConfig:
    """EMA and temperature of the teacher (schedules of the first kind)."""

    momentum_teacher: float = 0.992  # first momentum of the EMA
    final_momentum_teacher: float = 1.0  # last momentum, on a cosine
    teacher_temp: float = 0.07  # temperature of the teacher's targets after the warm-up
    warmup_teacher_temp: float = 0.04  # first temperature
    warmup_teacher_temp_epochs: float = 30  # epochs between both, linear


@dataclass
class TrainConfig:
    """Data, batches, length and determinism."""

    # null: the tile manifest that pretrain.py is given; or a folder of images, or module:Class, a data set of your own
    # (see below)
    dataset_path: str | None = None
    OFFICIAL_EPOCH_LENGTH: int = 1250  # iterations
    batch_size_per_gpu: int = 64  # tiles that a process forwards at once
    accumulation_steps: int = 1  # forwards whose gradients make one step: batch = processes × this × batch_size_per_gpu
    num_workers: int = 10  # loader processes a training process; changes nothing but speed
    seed: int = 0  # of every random draw
    stream: str | None = None  # run whose tiles, crops and masks are drawn, at the same seed; null: this run, its own
    compile: bool = True  # compile blocks with torch.compile (on GPUs)
    checkpointing: bool = False  # recompute all but matrix products in the backward: less memory
    checkpointing_full: bool = False  # recompute whole blocks in the backward: least memory, one more forward
    hang_minutes: float = 30  # a process that does no step for so long ends the run, to be started again
    time_limit_minutes: float | None = None  # save and end in time, to be started again; null: no limit
    stop_after_skipped: int = 20  # end after so many steps in a row whose loss or gradients are not finite
    log_every: int = 10  # iterations between lines in training_metrics.json


@dataclass
class EvaluationConfig:
    """Exports of the teacher while training, and questions to it."""

    eval_period_iterations: int = 12500  # the last iteration is always exported; 0: only that
    # newest exports kept; the first, the last, the best and those that other runs need always stay; null keeps all
    max_to_keep: int | None = None
    # column of training_metrics.json that is highest at the best export (-column: lowest); null: none is the best
    best_by: str | None = None
    # iterations between questions to the EMA teacher about images of the selection cases (columns probe_… of
    # training_metrics.json); asked before the first iteration too; 0: never
    probe_every: int = 0
    # end the run where, in 3 probes running after its first tenth, the interval of the labelled measure lies below that
    # of the start
    stop_when_worse: bool = False
    # last | best:probe_knn | best:probe_dense: the teacher export that is converted and used onwards; the best is
    # exported at the probe itself
    select: str = "last"


@dataclass
class RunConfig:
    """All settings of one training run."""

    MODEL: ModelConfig = field(default_factory=ModelConfig)
    checkpointing: CheckpointingConfig = field(default_factory=CheckpointingConfig)
    compute_precision: ComputePrecisionConfig = field(default_factory=ComputePrecisionConfig)
    crops: CropsConfig = field(default_factory=CropsConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    dino: DinoConfig = field(default_factory=DinoConfig)
    ibot: IbotConfig = field(default_factory=IbotConfig)
    gram: GramConfig = field(default_factory=GramConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedules: SchedulesConfig | None = None
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
