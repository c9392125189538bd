"""What a model answered: pooled out-of-fold predictions of each measure, kept in one file a task and model.

Comparing models needs nothing else, so a model that comes later is measured alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dinoscope.arrays import damage_named, document_in, document_of, read_arrays, write_arrays
from dinoscope.evaluate.robust_measures import change_measures

__all__ = ["Answers", "read_answers", "write_answers"]


@dataclass(frozen=True)
class Answers:
    """The answers of one model to one task.

    Attributes:
        about: model, weights' digest, width, mpp, pooling, `seen` counts, seconds.
        seen: (N,) int8 an index of cohort.SEEN a unit: whether its training has seen the unit's group.
        said: Measure -> (R, N, C) float32 probabilities of classes or (R, N) values or risks, R repeats; NaN where a
            repeat asked nothing (`scores.Predictions`).
        confusions: Measure -> (R, N, C, C) counts of an image's pixels, truth by rows.
        sums: Measure -> (N, …) what each unit adds to it (`robust_measures.statistic_of_sums`).
        numbers: Descriptive measures.
        notes: Sentences.
    """

    about: dict[str, Any]
    seen: np.ndarray
    said: Mapping[str, np.ndarray] = field(default_factory=dict)
    confusions: Mapping[str, np.ndarray] = field(default_factory=dict)
    sums: Mapping[str, np.ndarray] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def measures(self) -> list[str]:
        """Names of all that can be compared, differences between two of them included."""
        return [*self.said, *change_measures(self.said), *self.confusions, *self.sums]


_PARTS = ("said", "confusions", "sums")


def write_answers(path: Path, answers: Answers) -> None:
    """Writes the file, by rename."""
    arrays: dict[str, np.ndarray] = {"seen": answers.seen.astype(np.int8)}
    for part in _PARTS:
        arrays |= {f"{part}/{name}": values for name, values in getattr(answers, part).items()}
    document = {"about": answers.about, "numbers": dict(answers.numbers), "notes": answers.notes}
    write_arrays(path, packed=True, document=document_in(document), **arrays)


def read_answers(path: Path) -> Answers:
    """Reads the file.

    Raises:
        FeaturesError: It is missing or damaged.
    """
    with damage_named(path, "answers of a model", "delete it and measure again"):
        arrays = read_arrays(path)
        document = document_of(arrays.pop("document"))
        parts = {
            part: {name.partition("/")[2]: values for name, values in arrays.items() if name.startswith(f"{part}/")}
            for part in _PARTS
        }
        return Answers(seen=arrays["seen"], **document, **parts)
