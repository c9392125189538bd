"""What a job of a kind computes: seconds of a processor, and operations of models, from which follow hours."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from dinoscope.budget.models import Device

__all__ = ["Work", "seconds_of"]


@dataclass(frozen=True)
class Work:
    """What all jobs of a rule, or some of them, compute besides what each takes to start.

    Attributes:
        rule: Of Snakemake.
        seconds: Of one core of the machine in measured.py.
        forward: Floating-point operations of forward passes.
        trained: Floating-point operations of forward and backward passes.
    """

    rule: str
    seconds: float = 0.0
    forward: float = 0.0
    trained: float = 0.0


def seconds_of(works: Iterable[Work], device: Device) -> Counter[str]:
    """Rule -> seconds of all its jobs, one after the other, each on one GPU or on all cores."""
    one = device.flops / (device.count if device.kind != "cpu" else 1)
    seconds: Counter[str] = Counter()
    for work in works:
        passes = work.forward / device.extraction_share + work.trained / device.training_share
        seconds[work.rule] += work.seconds + passes / one
    return seconds
