"""What a model answers about cases whose tiles were changed: the probes of a label task, on a sample of their tiles.

A case is the mean over the sampled tiles of its slides. Probes learn from that mean of unchanged tiles, and are asked
about it and about the mean of the changed copies; which neighbours remain is asked of the tiles themselves. The same
tiles for all models of a tile set, and the same folds.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from dinoscope.evaluate.answers import Answers
from dinoscope.evaluate.embedding import ImageFeatures
from dinoscope.evaluate.measuring import Settings, answer_values, probe_classes
from dinoscope.evaluate.robust_measures import UNCHANGED, change_of
from dinoscope.evaluate.shifted_answers import neighbours_kept
from dinoscope.evaluate.units import Units

__all__ = ["add_sampled"]


def add_sampled(answers: Answers, units: Units, sample: ImageFeatures, settings: Settings) -> Answers:
    """The answers, and those about changed copies.

    Args:
        answers: About the units, from all of their tiles.
        units: The task's; those of the test set that have sampled tiles are asked.
        sample: Features of the sampled tiles and of their changed copies; `about["slides"]` names the slide of each.
        settings: How.
    """
    unit_of_slide = {slide: number for number, unit in enumerate(units.units) for slide in unit.slides}
    unit_of = np.array([unit_of_slide.get(slide, -1) for slide in sample.about["slides"]], dtype=np.int64)
    is_test = np.array([unit.set == "test" for unit in units.units])
    taken = np.flatnonzero((unit_of >= 0) & is_test[unit_of])
    unit_of = unit_of[taken]
    rows, copies = sample.features[taken], {kind: of[taken] for kind, of in sample.shifted.items()}
    counts = np.bincount(unit_of, minlength=len(units))
    notes = _notes(units, is_test & (counts == 0), counts[counts > 0], sample.about)
    asked = units.without(is_test & (counts == 0))
    ask = probe_classes if units.kind == "classes" else answer_values
    means = {kind: _means(of, unit_of, counts) for kind, of in copies.items()}
    how = replace(settings, attention=False)
    found = ask(asked, _means(rows, unit_of, counts), how, shifted=means)
    labels = units.targets[unit_of] if units.kind == "classes" else None
    numbers, sums = neighbours_kept(rows, copies, units.groups[unit_of], labels, unit_of, len(units), notes)
    return replace(
        answers,
        said={**answers.said, **_renamed(found.said)},
        sums={**answers.sums, **sums},
        numbers={**answers.numbers, **numbers},
        notes=[*answers.notes, *notes, *(note for note in found.notes if note not in answers.notes)],
    )


def _means(rows: np.ndarray, unit_of: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(U, D) mean of each unit's tiles; 0 of a unit without."""
    sums = np.zeros((len(counts), rows.shape[1]))
    np.add.at(sums, unit_of, rows)
    return (sums / np.maximum(counts, 1)[:, None]).astype(np.float32)


def _renamed(said: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Only what was asked about changed copies, and the same on the unchanged tiles beside it."""
    stems = {measure.partition("~")[0] for measure in said if change_of(measure)}
    found = {}
    for measure, answer in said.items():
        stem, at, split = measure.partition("@")
        if change_of(measure):
            found[measure] = answer
        elif stem in stems:
            found[f"{stem}~{UNCHANGED}{at}{split}"] = answer
    return found


def _notes(units: Units, without: np.ndarray, counts: np.ndarray, about: Mapping[str, object]) -> list[str]:
    notes = [
        f"changed copies (~stain, ~blur, …) are of {counts.sum():,} sampled tiles of {len(counts)} units, at most "
        f"{about['most']} a slide; ~{UNCHANGED} is the same on these tiles as they are"
    ]
    if without.any():
        names = [unit.name for unit, is_without in zip(units.units, without, strict=True) if is_without]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        notes.append(f"not asked about changed copies, since no tile could be sampled: {', '.join(names[:5])}{more}")
    return notes
