"""A model's own files: `teacher.pth`, `teacher.safetensors` and the card `model.json` beside them.

`teacher.pth` is {"teacher": {"backbone.…": tensor}}, readable with `torch.load(..., weights_only=True)`. The other
file holds the same tensors; a backbone alone has the names of the published files there, without `backbone.`.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dinoscope.files import atomic_path, write_json
from dinoscope.models.weights import read_model_file, state_digest

__all__ = ["State", "write_model"]

_log = logging.getLogger(__name__)
State = dict[str, Tensor]


def write_model(output: Path, networks: Mapping[str, Mapping[str, State]], card: dict[str, Any]) -> None:
    """Writes the files of a model and reads them back; each appears by rename.

    Args:
        output: The torch file; a file of the same name with .safetensors, and model.json, appear beside it.
        networks: "teacher" first, and whatever else there is -> "backbone" and heads -> their tensors.
        card: Content of model.json, with the digest of the first backbone.
    """
    whole = {network: dict(_named(parts)) for network, parts in networks.items()}
    flat = {f"{network}.{name}": tensor for network, state in whole.items() for name, tensor in state.items()}
    if list(networks) == ["teacher"]:
        flat = networks["teacher"]["backbone"] if list(networks["teacher"]) == ["backbone"] else whole["teacher"]
    with atomic_path(output.with_suffix(".safetensors")) as temporary:
        save_file(flat, temporary, {"format": "pt", "weights_sha256": card["weights_sha256"]})
    with atomic_path(output) as temporary:
        torch.save(whole, temporary)
    write_json(output.with_name("model.json"), card)
    written = state_digest(read_model_file(output).backbone)
    assert written == card["weights_sha256"], "what was written is not what was read"
    _log.info(
        "%s: %s, %d values",
        *(output.name, card["backbone"]["arch"], sum(t.numel() for t in networks["teacher"]["backbone"].values())),
    )


def _named(parts: Mapping[str, State]) -> Iterator[tuple[str, Tensor]]:
    for part, state in parts.items():
        for name, tensor in state.items():
            yield f"{part}.{name}", tensor
