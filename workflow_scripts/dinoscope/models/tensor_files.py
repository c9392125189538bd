"""From a path to the tensors that lie there: torch files without code, safetensors (in shards too), and folders."""

import pickle
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from dinoscope.errors import WeightsError
from dinoscope.files import read_json

__all__ = ["KINDS", "find_weights", "listed", "read_tensors"]

KINDS = (
    "a published DINOv3 file, a teacher.pth or teacher export, a timm state dict, any of them as .safetensors, or the "
    "folder of a model, of a finished run or of Hugging Face"
)
_INDEX = "model.safetensors.index.json"


def find_weights(path: Path) -> Path:
    """The file that a path stands for: itself, or what a folder holds.

    Raises:
        WeightsError: No such path, or a folder without weights.
    """
    if not path.exists():
        raise WeightsError(f"{path} does not exist; wanted: {KINDS}")
    if not path.is_dir():
        return path
    if (path / "final.json").is_file():
        return path / read_json(path / "final.json")["teacher"]
    for name in ("teacher.pth", "teacher_checkpoint.pth", "model.safetensors", _INDEX):
        if (path / name).is_file():
            return path / name
    if (path / ".metadata").is_file():
        raise WeightsError(
            f"{path} is a training checkpoint (DCP); give the exported teacher instead (eval/training_<it>/"
            "teacher_checkpoint.pth), or convert it with convert_checkpoint.py"
        )
    if (path / "ckpt").is_dir():
        raise WeightsError(
            f"{path} is the folder of a run that is not finished; make a file of its newest checkpoint: "
            "convert_checkpoint.py --checkpoint RUN --output teacher.pth"
        )
    raise WeightsError(
        f"folder {path} holds neither teacher.pth, nor model.safetensors, nor the final.json of a finished run; "
        f"wanted: {KINDS}"
    )


def read_tensors(path: Path) -> dict[str, Any]:
    """Reads a file's dictionary onto the CPU.

    Raises:
        WeightsError: Empty, damaged, cut short, with code in it, or no dictionary.
    """
    if path.is_file() and path.stat().st_size == 0:
        raise WeightsError(f"{path} cannot be read: it is empty")
    if path.name == _INDEX:
        return _read_shards(path)
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)


def listed(names: Iterable[str]) -> str:
    """The first of some tensors' names, in order, and how many more there are."""
    ordered = sorted(names)
    return ", ".join(ordered[:4]) + (f" and {len(ordered) - 4} more" if len(ordered) > 4 else "")


def _read_shards(index: Path) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    homes = read_json(index).get("weight_map", {})
    for name in sorted(set(homes.values())):
        if not (index.parent / name).is_file():
            raise WeightsError(f"{index} names {name}, which is not beside it; copy the whole folder")
        tensors |= _read_safetensors(index.parent / name)
    if tensors.keys() != homes.keys():
        differing = listed(tensors.keys() ^ homes.keys())
        raise WeightsError(f"{index} and the files beside it do not hold the same tensors: {differing}")
    return tensors


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise WeightsError(
            f"{path} cannot be read as safetensors ({error}); the file is damaged or cut short"
        ) from None


def _read_torch(path: Path) -> dict[str, Any]:
    refused = (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        AttributeError,
        IndexError,
    )
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's own, of files that are none of its
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except refused:
        raise WeightsError(
            f"{path} cannot be read as a torch file of tensors alone: it is damaged, cut short, of another kind, or "
            f"holds code; wanted: {KINDS}"
        ) from None
    if not isinstance(content, dict):
        raise WeightsError(
            f"{path} holds an object of type {type(content).__name__}, not a dictionary of tensors; wanted: {KINDS}"
        )
    return content
