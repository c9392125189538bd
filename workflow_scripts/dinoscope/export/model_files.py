"""A model's own files: `teacher.pth`, `teacher.safetensors` and the card `model.json` beside them.

`teacher.pth` is {"teacher": {"backbone.…": tensor}}, readable with `torch.load(..., weights_only=True)`. The other
file holds the same tensors; a backbone alone has the names of the published files there, without `backbone.`.
"""

import errno
import logging
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dinoscope.errors import CheckpointError
from dinoscope.files import atomic_paths, read_json, write_json, writing
from dinoscope.train.disk_errors import disk_error

__all__ = ["State", "write_model"]

_log = logging.getLogger(__name__)
State = dict[str, Tensor]


def write_model(output: Path, networks: Mapping[str, Mapping[str, State]], card: dict[str, Any]) -> None:
    """Writes the files of a model and reads them back; they appear by rename, when all are whole.

    Args:
        output: The torch file; a file of the same name with .safetensors, and model.json, appear beside it.
        networks: "teacher" first, and whatever else there is -> "backbone" and heads -> their tensors.
        card: Content of model.json, with the digest of the first backbone.

    Raises:
        CheckpointError: They cannot be written, or another file's card is in the way.
    """
    whole = {network: dict(_named(parts)) for network, parts in networks.items()}
    flat = {f"{network}.{name}": tensor for network, state in whole.items() for name, tensor in state.items()}
    if list(networks) == ["teacher"]:
        flat = networks["teacher"]["backbone"] if list(networks["teacher"]) == ["backbone"] else whole["teacher"]
    _check_place(output)
    paths = (output.with_suffix(".safetensors"), output, output.with_name("model.json"))
    with writing(output, CheckpointError, SafetensorError), atomic_paths(*paths) as (plain, pickled, described):
        save_file(flat, plain, {"format": "pt", "weights_sha256": card["weights_sha256"]})
        _save_torch(whole, pickled)
        write_json(described, {"weights_file": output.name, **card})
        shutil.copymode(pickled, plain)  # safetensors lets only the owner read
        _check_written(plain, flat, pickled)
    _log.info(
        "%s: %s, %d values",
        *(output.name, card["backbone"]["arch"], sum(t.numel() for t in networks["teacher"]["backbone"].values())),
    )


def _check_place(output: Path) -> None:
    """Refuses names that would mislead, and a folder whose card is that of another file."""
    if output.suffix not in (".pth", ".pt"):
        raise CheckpointError(f"{output} is to be a torch file; give it a name that ends in .pth")
    card = output.with_name("model.json")
    if not card.is_file():
        return
    other = output.with_name(read_json(card).get("weights_file", output.name))
    if other.name != output.name and other.is_file():
        raise CheckpointError(f"{card} is the card of {other.name}; give {output.name} a folder of its own")


def _save_torch(content: Mapping[str, State], path: Path) -> None:
    try:
        torch.save(content, path)
    except RuntimeError as error:  # torch's own, while it handles the system's
        raise disk_error(error) or error from error


def _check_written(plain: Path, tensors: State, pickled: Path) -> None:
    """Reads both files again, one tensor at a time, before they get their names."""
    with safe_open(plain, framework="pt", backend="pread") as file:
        same = set(file.keys()) == tensors.keys() and all(
            torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items()
        )
    with zipfile.ZipFile(pickled) as archive:
        same = same and archive.testzip() is None
    if not same:
        raise OSError(errno.EIO, "what was read back is not what was written")


def _named(parts: Mapping[str, State]) -> Iterator[tuple[str, Tensor]]:
    for part, state in parts.items():
        for name, tensor in state.items():
            yield f"{part}.{name}", tensor
