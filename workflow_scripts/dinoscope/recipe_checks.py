"""Settings that exclude each other, found before any process group exists; each message says what to set."""

from collections.abc import Iterable
from typing import Any

from omegaconf import OmegaConf

from dinoscope.config import RunConfig
from dinoscope.errors import ConfigError

__all__ = ["check_recipe"]

_SMALLEST = {
    "optim.epochs": 1,
    "optim.clip_grad": 0,
    "train.OFFICIAL_EPOCH_LENGTH": 1,
    "train.batch_size_per_gpu": 1,
    "train.log_every": 1,
    "train.num_workers": 0,
    "train.seed": 0,
    "crops.local_crops_number": 1,
    "checkpointing.period": 1,
    "checkpointing.keep_every": 1,
    "dino.koleo_topk": 1,
    "evaluation.eval_period_iterations": 0,
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
        *_crop_problems(config),
        *_gram_problems(config),
        *_length_problems(config),
    ]
    if problems:
        raise ConfigError(f"recipe {name}: " + "; ".join(problems))


def _choice_problems(values: dict[str, Any]) -> Iterable[str]:
    for key, choices in _CHOICES.items():
        if values[key] not in choices:
            yield f"{key} is {values[key]!r}; choose one of {', '.join(choices)}"


def _range_problems(values: dict[str, Any]) -> Iterable[str]:
    for key, smallest in _SMALLEST.items():
        if values[key] is not None and values[key] < smallest:
            yield f"{key} is {values[key]}; at least {smallest} is wanted"
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
    if config.dino.koleo_loss_weight and not config.dino.koleo_loss_distributed and config.train.batch_size_per_gpu < 2:
        yield "KoLeo compares the tiles of a process: train.batch_size_per_gpu must be at least 2"
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
