"""Measures of a segmenter on corrupted images: every kind and severity, their means, what is lost."""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dinoscope.errors import ConfigError, DinoscopeError
from dinoscope.files import read_json, write_json, writing
from dinoscope.models.weights import state_digest
from dinoscope.names import nearest
from dinoscope.segment.corruptions import (
    ALL_CORRUPTIONS,
    CORRUPTIONS,
    PATHOLOGY_CORRUPTIONS,
    SEVERITIES,
    corrupt,
    groups_of_kinds,
)
from dinoscope.segment.evaluate import Measured
from dinoscope.segment.pictures import draw_examples
from dinoscope.segment.questions import Asked, Question
from dinoscope.segment.setup import data_digest
from dinoscope.segment.tables import write_table

__all__ = ["corruptions_run", "drop_of", "kinds_of", "means_of"]

_log = logging.getLogger(__name__)


def corruptions_run(
    question: Question,
    output: Path,
    *,
    kinds: Sequence[str],
    severities: Sequence[int],
    seed: int = 0,
    table: Path | None = None,
    picture: Path | None = None,
) -> dict[str, Any]:
    """Measures a segmenter on corrupted images.

    What was measured is kept beside `output` until all of it is there: a run that was killed goes on where it was.

    Args:
        question: Segmenter and images.
        output: Means and all measures as JSON.
        kinds: Names of corruptions, or of groups of them.
        severities: Of each kind, 1 to 5.
        seed: Of the corruptions.
        table: A row a kind and severity.
        picture: One image in all kinds at the highest severity.

    Returns:
        What `output` says.

    Raises:
        DinoscopeError: An unknown kind, or as `evaluate_run`.
    """
    names, severities = kinds_of(kinds), sorted(set(severities))
    asked = Asked(question)
    begun = _Begun(output, asked, seed)
    clean = begun.miou("images as they are", lambda words: asked.measure(f"measuring {words}"))
    rows = []
    for kind in names:
        for severity in severities:
            change = functools.partial(_corrupted, kind=kind, severity=severity, seed=seed)
            miou = begun.miou(f"{kind}, severity {severity}", functools.partial(asked.measure, change=change))
            rows.append({"kind": kind, "severity": severity, "miou": miou, "relative_drop": drop_of(miou, clean)})
    told = {"miou_clean": clean, "seed": seed, **means_of(rows, clean), "rows": rows, **asked.told}
    if table is not None:
        write_table(table, ("kind", "severity", "miou", "relative_drop"), rows)
    if picture is not None:
        _draw_corruptions(picture, asked, names, severities[-1], seed)
    write_json(output, told)
    begun.end()
    return told


def means_of(rows: Sequence[Mapping[str, Any]], clean: float) -> dict[str, float | None]:
    """Means over kinds at the highest severity, and the share of the clean mIoU that is lost there.

    The fifteen common kinds and those of slides are told apart: the first are what the public tool's tables mean.

    Args:
        rows: With kind, severity and miou.
        clean: The mIoU of images as they are.
    """
    told: dict[str, float | None] = {}
    for prefix, kinds in (("", CORRUPTIONS), ("pathology_", PATHOLOGY_CORRUPTIONS)):
        hardest = [row["miou"] for row in rows if row["severity"] == max(SEVERITIES) and row["kind"] in kinds]
        mean = float(np.mean(hardest)) if hardest else None
        told[f"{prefix}miou_level_5"] = mean
        told[f"{prefix}relative_drop"] = None if mean is None else drop_of(mean, clean)
    return told


def drop_of(miou: float, clean: float) -> float | None:
    """The share of the clean mIoU that is lost; None where there was none to lose."""
    return 1 - miou / clean if clean else None


def kinds_of(wanted: Sequence[str]) -> list[str]:
    """Names of corruptions, groups of them written out, each once.

    Raises:
        ConfigError: A name is unknown, with the nearest known one.
    """
    groups = {"common": CORRUPTIONS, **groups_of_kinds(), "all": ALL_CORRUPTIONS}
    names: list[str] = []
    for name in wanted:
        if name not in groups and name not in ALL_CORRUPTIONS:
            raise ConfigError(
                f"corruption {name!r} is unknown{nearest(name, [*groups, *ALL_CORRUPTIONS])}; groups are "
                f"{', '.join(groups)}, kinds {', '.join(ALL_CORRUPTIONS)}"
            )
        names += groups.get(name, (name,))
    return list(dict.fromkeys(names))


class _Begun:
    """What a run has measured so far, in a hidden file beside its output, for one that is killed."""

    def __init__(self, output: Path, asked: Asked, seed: int) -> None:
        self._path = output.with_name(f".{output.name}.begun")
        # Float32 and bfloat16 differ, and so do windows; batches and devices do so by rounding alone.
        how = [*asked.how.window_hw, asked.how.mode, asked.how.overlap, str(asked.how.autocast), seed]
        weights = state_digest(asked.model.trainable_state())
        self._identity = [weights, asked.told["encoder_sha256"], data_digest(asked.data), how]
        self._mious = self._of_earlier()

    def _of_earlier(self) -> dict[str, float]:
        try:
            earlier = read_json(self._path)
            if earlier["identity"] != self._identity:
                return {}
            mious = dict(earlier["mious"])
        except (OSError, DinoscopeError, KeyError, TypeError, ValueError):
            return {}
        _log.info("goes on from %d measures of a run that did not end", len(mious))
        return mious

    def miou(self, what: str, measure: Callable[[str], Measured]) -> float:
        """That of an earlier run, or a new one, which is kept."""
        if what not in self._mious:
            miou = measure(what).matrix.miou()
            with writing(self._path, DinoscopeError):
                write_json(self._path, {"identity": self._identity, "mious": self._mious | {what: miou}})
            self._mious[what] = miou
        return self._mious[what]

    def end(self) -> None:
        """Nothing is left to be kept."""
        self._path.unlink(missing_ok=True)


def _corrupted(image: np.ndarray, index: int, kind: str, severity: int, seed: int) -> np.ndarray:
    return corrupt(image, kind, severity, seed, index)


def _draw_corruptions(picture: Path, asked: Asked, kinds: Sequence[str], severity: int, seed: int) -> None:
    index = 0
    examples = []
    for kind in kinds:
        change = functools.partial(_corrupted, kind=kind, severity=severity, seed=seed)
        examples.append(replace(asked.example(index, change=change), name=kind.replace("_", " ")))
    draw_examples(
        picture,
        examples,
        asked.data.classes,
        asked.data.palette,
        title=f"{asked.label}: {asked.data.names[index]}, corrupted",
        subtitle=f"severity {severity} of 5",
    )
