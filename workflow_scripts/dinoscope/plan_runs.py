"""Runs that follow from those of the config: repeats with other seeds (runs.NAME.seeds), controls (runs.NAME.control).

A repeat and a control are runs like all others, with a name of their own, the recipe of the run that they come from and
a few changes in it, which go to pretrain.py as key=value. No recipe is written for them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["PlannedRun", "control_name", "planned_runs", "repeat_name"]

_NO_GRAM = "gram.use_loss=false"


@dataclass(frozen=True)
class PlannedRun:
    """A run to be made.

    Attributes:
        name: Of the run.
        settings: Of the config's run that it comes from; `continues` and `gram_teacher` are its own.
        changes: What differs from that run's recipe, key=value.
        of: The run of the config that it comes from; None, it is one.
        repeats: The run that it repeats with another seed; None, it is no repeat.
        key: Of the config, what asks for it.
    """

    name: str
    settings: Mapping[str, Any]
    changes: tuple[str, ...] = ()
    of: str | None = None
    repeats: str | None = None
    key: str = ""


def repeat_name(run: str, seed: int) -> str:
    """Name of the run that repeats another with that seed."""
    return f"{run}-seed{seed}"


def control_name(run: str) -> str:
    """Name of the run that does the same without gram loss."""
    return f"{run}-control"


def planned_runs(runs: Mapping[str, Mapping[str, Any]]) -> Iterator[PlannedRun]:
    """The config's runs, each followed by its repeats, its control, and the repeats of that.

    A repeat continues the repeat of the same seed, where the run that is continued has the same list of seeds, else
    that run itself.

    Args:
        runs: Of the config, with all defaults.
    """
    for name, settings in runs.items():
        yield PlannedRun(name, settings, key=f"runs.{name}")
        yield from _repeats(name, name, settings, runs)
        if settings["control"]:
            without = {**settings, "gram_teacher": None}
            control, key = control_name(name), f"runs.{name}.control"
            yield PlannedRun(control, without, _of_control(name), of=name, key=key)
            yield from _repeats(control, name, without, runs)


def _repeats(
    run: str, of: str, settings: Mapping[str, Any], runs: Mapping[str, Mapping[str, Any]]
) -> Iterator[PlannedRun]:
    """Of a run of the config, or of its control."""
    seeds: Sequence[int] = settings["seeds"]
    for seed in seeds[1:]:
        continued = settings["continues"]
        if continued is not None and runs.get(continued, settings)["seeds"] == seeds:
            continued = repeat_name(continued, seed)
        changes = (f"train.seed={seed}",)
        if run != of:
            changes += _of_control(repeat_name(of, seed))
        own = {**settings, "continues": continued}
        yield PlannedRun(repeat_name(run, seed), own, changes, of, run, key=f"runs.{of}.seeds")


def _of_control(run: str) -> tuple[str, ...]:
    """No gram loss, and the very tiles, crops and masks that the run itself draws."""
    return (_NO_GRAM, f"train.stream={run}")
