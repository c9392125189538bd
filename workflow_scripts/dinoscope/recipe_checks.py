"""Settings that exclude each other, found before any process group exists; each message says what to set."""

from collections.abc import Iterable, Iterator
from typing import Any

from omegaconf import OmegaConf

from dinoscope.config import LinearCosineConfig, RunConfig
from dinoscope.errors import ConfigError
from dinoscope.models.registry import ARCHS
from dinoscope.resolutions import aligned, as_list

__all__ = ["check_processes", "check_recipe"]

_SMALLEST = {
    "optim.epochs": 1,
    "optim.clip_grad": 0,
    "train.OFFICIAL_EPOCH_LENGTH": 1,
    "train.batch_size_per_gpu": 1,
    "train.accumulation_steps": 1,
    "train.stop_after_skipped": 1,
    "train.log_every": 1,
    "train.num_workers": 0,
    "train.seed": 0,
    "crops.local_crops_number": 1,
    "checkpointing.period": 1,
    "checkpointing.keep_every": 1,
    "dino.koleo_topk": 1,
    "dino.kde_loss_weight": 0,
    "optim.freeze_backbone_epochs": 0,
    "sampling.exponent": 0,
    "sampling.max_tiles_per_slide": 1,
    "sampling.tiles_per_visit": 1,
    "student.lora_rank": 1,
    "student.unfrozen_blocks": 0,
    "evaluation.eval_period_iterations": 0,
    "evaluation.probe_every": 0,
}

_ABOVE_ZERO = ("train.hang_minutes",)
_CHOICES = {
    "augmentation.recipe": ("dinov3", "pathology"),
    "compute_precision.param_dtype": ("bf16", "fp32"),
    "compute_precision.reduce_dtype": ("bf16", "fp32"),
    "evaluation.select": ("last", "best:probe_knn", "best:probe_dense"),
    "compute_precision.sharding_strategy": ("SHARD_GRAD_OP", "FULL_SHARD", "HYBRID_SHARD"),
    "gram.tokens_used": ("all", "masked", "unmasked"),
    "gram.global_teacher_resize_method": ("bicubic", "bilinear"),
    "optim.optimizer": ("adamw",),
    "optim.scaling_rule": ("sqrt_wrt_1024", "linear_wrt_256", "none"),
    "sampling.method": ("uniform", "tempered"),
    "student.ffn_layer": ("mlp", "swiglu", "swiglu32", "swiglu64", "swiglu128"),
    "student.norm_layer": ("layernorm", "layernormbf16", "rmsnorm"),
    "student.pos_embed_rope_dtype": ("bf16", "fp32"),
    "student.pos_embed_rope_normalize_coords": ("separate", "max", "min"),
    "student.trainable": ("full", "last_n", "lora", "norms"),
}
_SIZES = ("global_crops_size", "local_crops_size", "gram_teacher_crops_size")
_LORA_TARGETS = ("q", "k", "v", "qkv", "proj", "ffn")


def check_recipe(config: RunConfig, values: dict[str, Any], name: str) -> None:
    """Raises one ConfigError with all problems of a recipe.

    Args:
        config: The merged settings.
        values: The same, dotted key -> value.
        name: Of the recipe, for the message.
    """
    problems = [
        *_choice_problems(values),
        *_range_problems(values),
        *_schedule_problems(config),
        *_trainable_problems(config),
        *_spreading_problems(config),
        *_crop_problems(config),
        *_gram_problems(config),
        *_distillation_problems(config),
        *_length_problems(config),
        *_probe_problems(config),
    ]
    if problems:
        raise ConfigError(f"recipe {name}: " + "; ".join(problems))


def _probe_problems(config: RunConfig) -> Iterable[str]:
    evaluation = config.evaluation
    if evaluation.probe_every:
        return
    if evaluation.stop_when_worse:
        yield "evaluation.stop_when_worse needs probes; set evaluation.probe_every, e.g. to 500"
    if evaluation.select != "last":
        yield f"evaluation.select {evaluation.select} needs probes; set evaluation.probe_every, e.g. to 500"


def _choice_problems(values: dict[str, Any]) -> Iterable[str]:
    for key, choices in _CHOICES.items():
        if values[key] not in choices:
            yield f"{key} is {values[key]!r}; choose one of {', '.join(choices)}"


def _range_problems(values: dict[str, Any]) -> Iterable[str]:
    for key, smallest in _SMALLEST.items():
        if values[key] is not None and values[key] < smallest:
            yield f"{key} is {values[key]}; at least {smallest} is wanted"
    for key in _ABOVE_ZERO:
        if values[key] <= 0:
            yield f"{key} is {values[key]:g}; more than 0 is wanted"
    if values["student.in_chans"] != 3:
        yield f"student.in_chans is {values['student.in_chans']}; slides are read as RGB, so 3 is wanted"
    for key, length in {"crops.rgb_mean": 3, "crops.rgb_std": 3, "augmentation.blur_p": 3}.items():
        if values[key] is not None and len(values[key]) != length:
            yield f"{key} has {len(values[key])} values; {length} are wanted"
    if min(values["crops.rgb_std"], default=0) <= 0:
        yield f"crops.rgb_std is {values['crops.rgb_std']}; all must be above 0"


def _schedule_problems(config: RunConfig) -> Iterable[str]:
    if config.schedules is None:
        return
    temperature, momentum = config.schedules.teacher_temp, config.schedules.momentum
    if min(temperature.start, temperature.peak, temperature.end) <= 0 or max(momentum.peak, momentum.end) <= 0:
        yield (
            "a section `schedules` replaces all schedules, so it must give all of lr, weight_decay, momentum and "
            "teacher_temp"
        )


def _trainable_problems(config: RunConfig) -> Iterable[str]:
    student = config.student
    if student.arch not in ARCHS:
        yield f"student.arch is {student.arch!r}; choose one of {', '.join(ARCHS)}"
        return
    depth = ARCHS[student.arch].depth
    if student.trainable == "last_n" and student.unfrozen_blocks < 1:
        yield "student.trainable: last_n needs student.unfrozen_blocks, at least 1"
    if student.unfrozen_blocks and student.trainable in ("full", "norms"):
        yield (
            f"student.unfrozen_blocks is {student.unfrozen_blocks}, which student.trainable: {student.trainable} does "
            "not use; set it to 0, or trainable to last_n or lora"
        )
    if student.unfrozen_blocks > depth:
        yield f"student.unfrozen_blocks is {student.unfrozen_blocks}, but {student.arch} has {depth} blocks"
    unknown = [target for target in student.lora_targets if target not in _LORA_TARGETS]
    if unknown or not student.lora_targets:
        yield f"student.lora_targets is {list(student.lora_targets)}; choose from {', '.join(_LORA_TARGETS)}"
    if student.trainable == "lora" and student.unfrozen_blocks == depth:
        yield f"student.unfrozen_blocks leaves none of the {depth} blocks to adapters; use student.trainable: full"


def _spreading_problems(config: RunConfig) -> Iterable[str]:
    dino, batch = config.dino, config.train.batch_size_per_gpu
    if dino.koleo_loss_weight and dino.kde_loss_weight:
        yield "dino.koleo_loss_weight and dino.kde_loss_weight are both set; set one of them to 0"
    local = [
        name
        for name in ("koleo", "kde")
        if dino[f"{name}_loss_weight"] and not dino[f"{name}_loss_distributed"] and batch < 2
    ]
    for name in local:
        yield (
            f"dino.{name}_loss_weight compares the tiles of a process, but train.batch_size_per_gpu is {batch}: "
            f"set it to at least 2, or dino.{name}_loss_distributed to true"
        )
    group = dino.koleo_distributed_loss_group_size
    if not dino.koleo_loss_distributed and (dino.koleo_topk > 1 or group is not None):
        yield (
            "dino.koleo_topk and dino.koleo_distributed_loss_group_size act on distributed KoLeo alone: set "
            "dino.koleo_loss_distributed to true, or leave them out"
        )
    if group is not None and group <= dino.koleo_topk:
        yield f"dino.koleo_topk ({dino.koleo_topk}) must be below dino.koleo_distributed_loss_group_size ({group})"
    sampling = config.sampling
    if sampling.exponent > 1:
        yield f"sampling.exponent is {sampling.exponent:g}; at most 1 (proportional to the tiles) is wanted"
    if sampling.method == "tempered" and config.train.dataset_path is not None:
        yield (
            "sampling.method is tempered, which goes by site, scanner and stain of slides, but train.dataset_path "
            "names images without slides: set sampling.method to uniform"
        )
    if sampling.method == "tempered" and batch % sampling.tiles_per_visit:
        yield (
            f"train.batch_size_per_gpu ({batch}) is no multiple of sampling.tiles_per_visit "
            f"({sampling.tiles_per_visit}): change one of them"
        )
    if sampling.mpp_shares is not None:
        yield from _mpp_problems(config)
    if sampling.tiles_per_visit > sampling.max_tiles_per_slide:
        yield (
            f"sampling.tiles_per_visit ({sampling.tiles_per_visit}) exceeds sampling.max_tiles_per_slide "
            f"({sampling.max_tiles_per_slide}): lower the one or raise the other"
        )
    if dino.kde_concentration <= 0:
        yield f"dino.kde_concentration is {dino.kde_concentration:g}; more than 0 is wanted"


def check_processes(config: RunConfig, processes: int) -> None:
    """What depends on the number of training processes, checked before they meet.

    Raises:
        ConfigError: The features of all processes do not fill KoLeo's groups, or are too few for its neighbours.
    """
    dino, batch = config.dino, config.train.batch_size_per_gpu
    features = batch * processes
    where = f"{processes} processes × train.batch_size_per_gpu {batch} = {features} tiles"
    if not (dino.koleo_loss_weight and dino.koleo_loss_distributed):
        if dino.kde_loss_weight and features < 2:
            raise ConfigError(f"{where}: the kernel density loss compares tiles; raise train.batch_size_per_gpu")
        return
    group = dino.koleo_distributed_loss_group_size
    if group is not None and features % group:
        raise ConfigError(
            f"{where} do not fill groups of dino.koleo_distributed_loss_group_size {group}: set it to a divisor of "
            f"{features}, or to null"
        )
    if dino.koleo_topk >= features:
        raise ConfigError(f"{where} have fewer neighbours than dino.koleo_topk {dino.koleo_topk}: lower it")


def _crop_problems(config: RunConfig) -> Iterable[str]:
    problems = list(_size_problems(config))
    yield from problems
    for key in ("global_crops_scale", "local_crops_scale"):
        scale = list(config.crops[key])
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            yield f"crops.{key} is {scale}; give two shares of the tile's area, 0 < smallest <= largest <= 1"
    ratios = list(config.ibot.mask_ratio_min_max)
    if len(ratios) != 2 or not 0 < ratios[0] <= ratios[1] < 1:
        yield f"ibot.mask_ratio_min_max is {ratios}; give two shares, 0 < smallest <= largest < 1"
    if problems or config.crops.gram_teacher_crops_size is None:
        return
    columns = (as_list(config.crops[key]) for key in ("gram_teacher_crops_size", "global_crops_size"))
    for sizes in zip(*aligned(*columns), strict=True):
        if sizes[0] < sizes[1]:
            yield f"crops.gram_teacher_crops_size ({sizes[0]}) is smaller than crops.global_crops_size ({sizes[1]})"


def _size_problems(config: RunConfig) -> Iterable[str]:
    """Sizes that are no sizes, and lists that do not go together."""
    crops, patch = config.crops, config.student.patch_size
    lengths = {}
    for key in (*_SIZES, "global_local_crop_pairs_ratios"):
        given = crops[key]
        if given is None and key == "gram_teacher_crops_size":
            continue
        values, is_ratio = as_list(given), key not in _SIZES
        kinds = (int, float) if is_ratio else (int,)
        if not values or any(not isinstance(value, kinds) or isinstance(value, bool) or value <= 0 for value in values):
            wanted = "a number above 0" if is_ratio else "a whole number of pixels above 0"
            yield f"crops.{key} is {_plain(given)!r}; wanted is {wanted}, or a list of them"
            return
        if len(values) > 1:
            lengths[f"crops.{key}"] = len(values)
        for size in () if is_ratio else values:
            if size % patch:
                lower = size // patch * patch
                around = f"{lower} or {lower + patch}" if lower > 0 else str(patch)
                yield f"crops.{key} is {size} px, not a multiple of the patch size {patch}: use {around}"
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{key} has {length} values" for key, length in lengths.items())
        yield f"{shown}; lists of crop sizes must be equally long, one value each a resolution"
    elif list(lengths) == ["crops.global_local_crop_pairs_ratios"]:
        yield "crops.global_local_crop_pairs_ratios is a list, but no crop size is: leave it out, or list sizes"


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


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


def _distillation_problems(config: RunConfig) -> Iterable[str]:
    distillation = config.distillation
    if distillation.enabled and not distillation.checkpoint_path:
        yield "distillation.enabled needs distillation.checkpoint_path: name the teacher"
    if distillation.checkpoint_path and not distillation.enabled:
        yield "distillation.checkpoint_path is set, but distillation.enabled is false: set it to true, or drop the path"
    if distillation.enabled and config.gram.use_loss and config.gram.ema_teacher:
        yield "gram.ema_teacher and distillation.enabled exclude each other: name a gram teacher (gram.ckpt)"


def _length_problems(config: RunConfig) -> Iterable[str]:
    if config.checkpointing.max_to_keep is not None and config.checkpointing.max_to_keep < 2:
        yield f"checkpointing.max_to_keep is {config.checkpointing.max_to_keep}; keep at least 2, or null for all"
    epochs, frozen = config.optim.epochs, config.optim.freeze_backbone_epochs
    warmup = config.optim.warmup_epochs if config.schedules is None else config.schedules.lr.warmup_epochs
    cosine = 0 if config.schedules is None else config.schedules.lr.cosine_epochs or 0
    if frozen and frozen + warmup + cosine > epochs:
        yield (
            f"optim.freeze_backbone_epochs ({frozen:g}) and the schedule of the learning rate (warm-up {warmup:g}"
            + (f", cosine {cosine:g}" if cosine else "")
            + f") are longer than optim.epochs ({epochs})"
        )
    if config.schedules is None:
        for key in ("optim.warmup_epochs", "teacher.warmup_teacher_temp_epochs"):
            if OmegaConf.select(config, key) > epochs:
                yield f"{key} ({OmegaConf.select(config, key):g}) is longer than optim.epochs ({epochs})"
    for key, schedule in _running_schedules(config):
        if schedule.warmup_epochs + (schedule.cosine_epochs or 0) > epochs:
            yield f"{key} lasts longer than optim.epochs ({epochs})"


def _running_schedules(config: RunConfig) -> Iterable[tuple[str, LinearCosineConfig]]:
    if config.schedules is not None:
        yield from ((f"schedules.{key}", schedule) for key, schedule in config.schedules.items())
    if config.gram.use_loss and config.gram.loss_weight_schedule is not None:
        yield "gram.loss_weight_schedule", config.gram.loss_weight_schedule
    if config.dino.reweight_dino_local_loss:
        yield "dino.local_loss_weight_schedule", config.dino.local_loss_weight_schedule


def _mpp_problems(config: RunConfig) -> Iterator[str]:
    shares = list(config.sampling.mpp_shares)
    if not shares or min(shares) <= 0:
        yield f"sampling.mpp_shares is {shares}; wanted is a number above 0 for each mpp of the tiles"
    if config.sampling.method != "uniform":
        yield (
            f"sampling.mpp_shares goes with sampling.method uniform, not with {config.sampling.method}, which deals "
            "samples out by slides: leave out one of them"
        )
    if config.train.dataset_path is not None:
        yield "sampling.mpp_shares goes by the mpp of tiles, but train.dataset_path names other images: leave one out"
