"""Learning rate, weight decay, EMA momentum, teacher temperature and loss weights at every iteration.

Two systems, both of the published trainer: v1 (keys in `optim` and `teacher`) and v2 (a section `schedules`), which
wins when present. They differ at the seams, and the differences are kept: in v1 the warm-up ends on the peak and the
cosine stops one step short of its end; in v2 the warm-up stops one step short of the peak and the cosine includes both
ends.

Under `optim.freeze_backbone_epochs` (N iterations) the backbone's learning rate is 0 for N iterations and its warm-up
begins after them; the heads' warm-up begins at once, they stay at the peak until the backbone's ends, and both share
the rest. The run is as long as without, the cosine N iterations shorter (an explicit `cosine_epochs` stays as it is).
"""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from dinoscope.errors import ConfigError

__all__ = [
    "SCALING_RULES",
    "ScheduleValues",
    "Schedules",
    "build_schedules",
    "cosine_schedule",
    "linear_warmup_cosine",
    "scaled_lr",
]

SCALING_RULES = ("sqrt_wrt_1024", "linear_wrt_256", "none")


def cosine_schedule(
    base_value: float,
    final_value: float,
    total_iters: int,
    *,
    warmup_iters: int = 0,
    start_warmup_value: float = 0.0,
    freeze_iters: int = 0,
    trunc_extra: float = 0.0,
) -> np.ndarray:
    """A v1 schedule: zeros, then linear to `base_value`, then cosine towards `final_value`.

    Args:
        base_value: Value on the last step of the warm-up and on the first of the cosine.
        final_value: Value just after the last step; on the last step when `trunc_extra` is positive.
        total_iters: Length of the result.
        warmup_iters: Steps from `start_warmup_value` to `base_value`, both included.
        start_warmup_value: First value of the warm-up.
        freeze_iters: Zeros before the warm-up.
        trunc_extra: The cosine is laid out over this share of steps more, cut off, and stretched back to `final_value`:
            it ends while still falling.

    Returns:
        float64 (total_iters,).

    Raises:
        ConfigError: Freeze and warm-up are longer than the whole schedule.
    """
    cosine_iters = total_iters - warmup_iters - freeze_iters
    if cosine_iters < 0:
        raise ConfigError(
            f"a schedule of {total_iters} iterations cannot hold {freeze_iters} frozen and {warmup_iters} warm-up "
            "iterations: lower optim.warmup_epochs or optim.freeze_backbone_epochs, or raise optim.epochs"
        )
    if trunc_extra == 0:
        fall = (1 + np.cos(np.pi * np.arange(cosine_iters) / max(cosine_iters, 1))) / 2
    else:
        angles = np.linspace(0, np.pi, int((1 + trunc_extra) * cosine_iters))[:cosine_iters]
        fall = (1 + np.cos(angles)) / 2
        fall = (fall - fall[-1:]) / (1 - fall[-1:])
    return np.concatenate(
        [
            np.zeros(freeze_iters),
            np.linspace(start_warmup_value, base_value, warmup_iters),
            final_value + (base_value - final_value) * fall,
        ]
    )


def linear_warmup_cosine(
    start: float,
    peak: float,
    end: float,
    warmup_iterations: int,
    total_iterations: int,
    cosine_iterations: int | None = None,
) -> np.ndarray:
    """A v2 schedule: linear from `start` to `peak`, cosine to `end`, then constant.

    Args:
        start: First value of the warm-up.
        peak: First value of the cosine; the warm-up stops one step short of it.
        end: Last value of the cosine and of everything after it.
        warmup_iterations: Steps of the warm-up.
        total_iterations: Length of the result.
        cosine_iterations: Steps of the cosine; all that remain when None.

    Returns:
        float64 (total_iterations,).

    Raises:
        ConfigError: Warm-up and cosine are longer than the whole schedule.
    """
    remaining = total_iterations - warmup_iterations
    cosine_iterations = remaining if cosine_iterations is None else cosine_iterations
    if not 0 <= cosine_iterations <= remaining:
        raise ConfigError(
            f"a schedule of {total_iterations} iterations cannot hold {warmup_iterations} warm-up and "
            f"{cosine_iterations} cosine iterations: lower warmup_epochs or cosine_epochs, or raise optim.epochs"
        )
    fall = (1 + np.cos(np.linspace(0, np.pi, cosine_iterations))) / 2
    return np.concatenate(
        [
            np.linspace(start, peak, warmup_iterations, endpoint=False),
            end + (peak - end) * fall,
            np.full(remaining - cosine_iterations, float(end)),
        ]
    )


def scaled_lr(lr: float, rule: str, global_batch: int) -> float:
    """The learning rate for a batch size, by the published rules.

    Args:
        lr: As configured.
        rule: "sqrt_wrt_1024" (times 4·sqrt(batch / 1024)), "linear_wrt_256" (times batch / 256) or "none".
        global_batch: Images of one optimizer step over all ranks.

    Raises:
        ConfigError: An unknown rule.
    """
    if rule == "sqrt_wrt_1024":
        return lr * 4 * math.sqrt(global_batch / 1024)
    if rule == "linear_wrt_256":
        return lr * global_batch / 256
    if rule == "none":
        return lr
    raise ConfigError(f"optim.scaling_rule is '{rule}', which is unknown: use one of {', '.join(SCALING_RULES)}")


class ScheduleValues(NamedTuple):
    """The values of one iteration.

    Loss weights are None when nothing schedules them. `head_lr` is None where the heads follow `lr`, as they do in runs
    without a head warm-up.
    """

    lr: float
    weight_decay: float
    momentum: float
    teacher_temp: float
    last_layer_lr: float
    gram_weight: float | None
    local_loss_weight: float | None
    head_lr: float | None = None


@dataclasses.dataclass(frozen=True)
class Schedules:
    """One float64 array a quantity, each as long as the run; in the first `frozen_iterations` the heads train alone."""

    lr: np.ndarray
    weight_decay: np.ndarray
    momentum: np.ndarray
    teacher_temp: np.ndarray
    last_layer_lr: np.ndarray
    gram_weight: np.ndarray | None
    local_loss_weight: np.ndarray | None
    head_lr: np.ndarray | None = None
    frozen_iterations: int = 0

    def __len__(self) -> int:
        """Iterations of the run."""
        return len(self.lr)

    def at(self, iteration: int) -> ScheduleValues:
        """Plain floats of one iteration, counted from 0."""
        assert 0 <= iteration < len(self), f"iteration {iteration} of {len(self)}"
        arrays = (getattr(self, field) for field in ScheduleValues._fields)
        return ScheduleValues(*(None if array is None else float(array[iteration]) for array in arrays))


def build_schedules(cfg: Any, global_batch: int) -> Schedules:
    """All schedules of a run.

    Args:
        cfg: Run config with the published key names (`optim`, `teacher`, `schedules` or None, `train`, `gram`, `dino`).
        global_batch: Images of one optimizer step over all ranks, for the scaling rule. v1 scales `optim.lr` and leaves
            `optim.min_lr`; v2 scales peak and end of `schedules.lr`.

    Raises:
        ConfigError: A schedule does not fit into the run, or the scaling rule is unknown.
    """
    return Schedules(
        **(_build_v1(cfg, global_batch) if cfg.schedules is None else _build_v2(cfg, global_batch)),
        gram_weight=_gram_weight(cfg),
        local_loss_weight=(
            _build_one(cfg, "dino.local_loss_weight_schedule", cfg.dino.local_loss_weight_schedule)
            if cfg.dino.reweight_dino_local_loss
            else None
        ),
        frozen_iterations=_frozen_iterations(cfg),
    )


def _build_v1(cfg: Any, global_batch: int) -> dict[str, np.ndarray]:
    optim, teacher, total = cfg.optim, cfg.teacher, _iterations(cfg, cfg.optim.epochs)
    common = {"total_iters": total, "trunc_extra": optim.schedule_trunc_extra}
    peak, lr_warmup = scaled_lr(optim.lr, optim.scaling_rule, global_batch), _iterations(cfg, optim.warmup_epochs)
    frozen = _frozen_iterations(cfg)
    lr = cosine_schedule(peak, optim.min_lr, warmup_iters=lr_warmup, freeze_iters=frozen, **common)
    head_lr = _head_lr(lr, frozen, lr_warmup, peak)
    warmup = _iterations(cfg, teacher.warmup_teacher_temp_epochs)
    rising = np.linspace(teacher.warmup_teacher_temp, teacher.teacher_temp, warmup)[:total]
    constant = np.full(total - len(rising), float(teacher.teacher_temp))
    return {
        "lr": lr,
        "weight_decay": cosine_schedule(optim.weight_decay, optim.weight_decay_end, **common),
        "momentum": cosine_schedule(teacher.momentum_teacher, teacher.final_momentum_teacher, **common),
        "teacher_temp": np.concatenate([rising, constant]),
        "head_lr": head_lr,
        "last_layer_lr": _frozen_at_first(
            lr if head_lr is None else head_lr, _iterations(cfg, optim.freeze_last_layer_epochs)
        ),
    }


def _build_v2(cfg: Any, global_batch: int) -> dict[str, np.ndarray]:
    def scaled(value: float) -> float:
        return scaled_lr(value, cfg.optim.scaling_rule, global_batch)

    schedules, frozen = cfg.schedules, _frozen_iterations(cfg)
    peak, end = scaled(schedules.lr.peak), scaled(schedules.lr.end)
    lr = _build_one(cfg, "schedules.lr", schedules.lr, peak=peak, end=end, frozen=frozen)
    head_lr = _head_lr(lr, frozen, _iterations(cfg, schedules.lr.warmup_epochs), peak)
    last_layer = _iterations(cfg, getattr(schedules.lr, "freeze_last_layer_epochs", 0))
    return {
        "lr": lr,
        "weight_decay": _build_one(cfg, "schedules.weight_decay", schedules.weight_decay),
        "momentum": _build_one(cfg, "schedules.momentum", schedules.momentum),
        "teacher_temp": _build_one(cfg, "schedules.teacher_temp", schedules.teacher_temp),
        "head_lr": head_lr,
        "last_layer_lr": _frozen_at_first(lr if head_lr is None else head_lr, last_layer),
    }


def _gram_weight(cfg: Any) -> np.ndarray | None:
    if not cfg.gram.use_loss:
        return None
    if cfg.gram.loss_weight_schedule is None:
        return np.full(_iterations(cfg, cfg.optim.epochs), float(cfg.gram.loss_weight))
    return _build_one(cfg, "gram.loss_weight_schedule", cfg.gram.loss_weight_schedule)


def _build_one(
    cfg: Any, key: str, section: Any, peak: float | None = None, end: float | None = None, frozen: int = 0
) -> np.ndarray:
    cosine_epochs = getattr(section, "cosine_epochs", None)
    warmup, total = _iterations(cfg, section.warmup_epochs), _iterations(cfg, cfg.optim.epochs)
    cosine = None if cosine_epochs is None else _iterations(cfg, cosine_epochs)
    if frozen and frozen + warmup + (cosine or 0) > total:
        raise ConfigError(
            f"{key}: a run of {total} iterations cannot hold {frozen} with a frozen backbone, {warmup} of warm-up and "
            f"{cosine or 0} of cosine: lower optim.freeze_backbone_epochs, {key}.warmup_epochs or {key}.cosine_epochs, "
            "or raise optim.epochs"
        )
    try:
        moving = linear_warmup_cosine(
            section.start,
            section.peak if peak is None else peak,
            section.end if end is None else end,
            warmup,
            total - frozen,
            cosine,
        )
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None
    return np.concatenate([np.zeros(frozen), moving])


def _iterations(cfg: Any, epochs: float) -> int:
    return round(epochs * cfg.train.OFFICIAL_EPOCH_LENGTH)


def _frozen_iterations(cfg: Any) -> int:
    return _iterations(cfg, getattr(cfg.optim, "freeze_backbone_epochs", 0))


def _head_lr(lr: np.ndarray, frozen: int, warmup: int, peak: float) -> np.ndarray | None:
    """The heads' learning rate when the backbone's has `frozen` zeros first; None when it has none."""
    if not frozen:
        return None
    return np.concatenate([lr[frozen : frozen + warmup], np.full(frozen, peak), lr[frozen + warmup :]])


def _frozen_at_first(lr: np.ndarray, iterations: int) -> np.ndarray:
    frozen = lr.copy()
    frozen[:iterations] = 0
    return frozen
