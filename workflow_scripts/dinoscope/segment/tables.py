"""Tables of segmenters side by side, in the shape of dinov2-finetune's: what was tuned, on what, and how good it is.

Nothing here imports torch: the report reads these tables, too.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dinoscope.files import read_json, write_text

__all__ = ["COMPARISON_COLUMNS", "RUN_COLUMNS", "components", "read_table", "write_comparison", "write_table"]

CORRUPTIONS_NAME = "corruptions.json"
# Columns of the public tool's tables, then what they leave out.
COMPARISON_COLUMNS = (
    *(
        "task",
        "finetuned_components",
        "pretraining",
        "model",
        "parameters",
        "registers",
        "miou",
        "miou_level_5",
        "file",
    ),
    *("seeds", "miou_lowest", "miou_highest", "miou_level_5_lowest", "miou_level_5_highest", "relative_drop"),
    *("pathology_miou_level_5", "pathology_relative_drop", "trained_parameters", "dice", "pixel_accuracy"),
    *("images", "split"),
)
RUN_COLUMNS = (
    *("task", "finetuned_components", "pretraining", "model", "seed", "miou", "miou_low", "miou_high", "miou_level_5"),
    *("relative_drop", "pathology_miou_level_5", "pathology_relative_drop"),
    *("dice", "pixel_accuracy", "validation_miou", "best_epoch", "trained_parameters", "file"),
)
_TUNED = {"lora": "LoRA + ", "decoder": "", "last_n": "last blocks + ", "full": "whole encoder + "}
_PUBLIC = "FPN decoder (dinov2-finetune)"
_DECODERS = {"linear": "1x1 Conv decoder", "fpn": "FPN decoder", "public_fpn": _PUBLIC, "public_fpn3": _PUBLIC}
# Numbers that are averaged over seeds.
_CORRUPTED = ("miou_level_5", "relative_drop", "pathology_miou_level_5", "pathology_relative_drop")
_AVERAGED = ("miou", *_CORRUPTED, "dice", "pixel_accuracy")


def components(trainable: str, decoder: str) -> str:
    """What is trained, as the public tool's tables say it: LoRA + 1x1 Conv decoder."""
    return _TUNED[trainable] + _DECODERS[decoder]


def write_comparison(evaluations: Sequence[Path], output: Path, runs_output: Path) -> None:
    """Writes both tables.

    Args:
        evaluations: evaluation.json files; corruptions.json beside one is taken in.
        output: A row a task, encoder and method: the mean over its seeds, with the lowest and the highest.
        runs_output: A row a training.
    """
    runs = [_run(path) for path in evaluations]
    write_table(runs_output, RUN_COLUMNS, runs)
    write_table(output, COMPARISON_COLUMNS, over_seeds(runs))


def over_seeds(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the same task, encoder and method as one, in the order of their first."""
    together: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for run in runs:
        key = tuple(run[name] for name in ("task", "finetuned_components", "pretraining", "model"))
        together.setdefault(key, []).append(run)
    rows = []
    for same in together.values():
        row = dict(same[0]) | {"seeds": len(same)}
        for name in _AVERAGED:
            values = [run[name] for run in same if run[name] is not None]
            row[name] = sum(values) / len(values) if values else None
            row |= {f"{name}_lowest": min(values, default=None), f"{name}_highest": max(values, default=None)}
        rows.append(row)
    return rows


def write_table(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows as a tab-separated table; numbers with 4 digits after the point, nothing where there is none."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter="\t", lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_shown(row.get(column)) for column in columns] for row in rows)
    write_text(path, buffer.getvalue())


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of a table that `write_table` wrote."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def _run(path: Path) -> dict[str, Any]:
    told = read_json(path)
    corrupted = path.with_name(CORRUPTIONS_NAME)
    corruptions = read_json(corrupted) if corrupted.is_file() else {}
    low, high = told["miou_interval"] or (None, None)
    settings = told["settings"]
    return {
        "task": told["task"],
        "finetuned_components": components(settings["trainable"], settings["decoder"]),
        "pretraining": told["model_name"],
        "model": told["architecture"],
        "parameters": told["encoder_parameters"],
        "registers": told["registers"],
        "seed": settings.get("seed"),
        "miou_low": low,
        "miou_high": high,
        **{name: corruptions.get(name) for name in _CORRUPTED},
        "validation_miou": told["validation_miou"],
        "trained_parameters": told["trained_parameters"],
        **{name: told[name] for name in ("miou", "dice", "pixel_accuracy", "best_epoch", "images", "split", "file")},
    }


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)
