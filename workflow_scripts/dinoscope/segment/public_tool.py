"""Files of `dinov2-finetune` (MIT): a flat dictionary of adapters and decoder, saved with torch.save.

`w_a_000` (rank, D) and `w_b_000` (D, rank) are those of the queries of the first block, `w_a_001` and `w_b_001` those
of its values, and so on; there are none in a file of a decoder alone. Adapters are not scaled. The decoder is
`classifier.weight` (classes, D, 1, 1) and `classifier.bias`, or the pyramid of public_fpn.py.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dinoscope.errors import WeightsError
from dinoscope.features.encoders import LoadedEncoder
from dinoscope.models.tensor_files import listed
from dinoscope.segment.adapters import LoraSettings
from dinoscope.segment.encoder_parts import blocks_of
from dinoscope.segment.model import Segmenter

__all__ = ["is_public_state", "segmenter_of_public"]

_LINEAR, _PYRAMID = "classifier.weight", "conv5.0.weight"
_ADAPTER = re.compile(r"w_([ab])_(\d{3,})")


def is_public_state(state: Mapping[str, Any]) -> bool:
    """Whether a file's dictionary is one of dinov2-finetune."""
    return (_LINEAR in state) != (_PYRAMID in state) and all(isinstance(value, Tensor) for value in state.values())


def segmenter_of_public(
    state: Mapping[str, Tensor], encoder: LoadedEncoder, source: str, doublings: int = 2
) -> Segmenter:
    """The model of such a file.

    Args:
        state: A dictionary that `is_public_state`.
        encoder: What it was trained on; the file says nothing of it but its width and depth.
        source: What messages call the file.
        doublings: Of `PublicFPNDecoder`, 2 or 3.

    Raises:
        WeightsError: Tensors that are missing, do not fit, or have no place; they are listed.
    """
    places = {name: _place(name) for name in state}
    width = encoder.model.embed_dim
    pairs = sorted({int(found[2]) for name in state if (found := _ADAPTER.fullmatch(name))})
    lora = _lora(state, pairs, encoder, source) if pairs else None
    decoder = "linear" if _LINEAR in state else {2: "public_fpn", 3: "public_fpn3"}[doublings]
    last = state[_LINEAR if decoder == "linear" else _PYRAMID]
    if decoder == "linear" and last.shape[1:] != (width, 1, 1):
        raise WeightsError(
            f"{source}: classifier.weight is of shape {tuple(last.shape)}, but the encoder given ({encoder.kind}) is "
            f"{width} wide; give the encoder that it was trained on"
        )
    segmenter = Segmenter(encoder, last.shape[0], decoder, lora)
    own = segmenter.trainable_state()
    if leftover := [name for name, place in places.items() if place not in own]:
        raise WeightsError(
            f"{source}: of its tensors {len(leftover)} have no place in a {decoder} decoder on the encoder given "
            f"({encoder.kind}): {', '.join(sorted(leftover))}"
        )
    segmenter.load_trainable({places[name]: tensor for name, tensor in state.items()}, source)
    return segmenter


def _place(name: str) -> str:
    """The name that a tensor of the file has in `Segmenter.trainable_state`."""
    found = _ADAPTER.fullmatch(name)
    if found is None:
        return f"decoder.{name}"
    block, which = divmod(int(found[2]), 2)
    return f"adapters.blocks.{block}.{'qv'[which]}.{found[1]}"


def _lora(state: Mapping[str, Tensor], pairs: list[int], encoder: LoadedEncoder, source: str) -> LoraSettings:
    depth = len(blocks_of(encoder.model)[1])
    if pairs != list(range(2 * depth)):
        raise WeightsError(
            f"{source} has adapters for {len(pairs) / 2:g} blocks (w_a_{pairs[0]:03d} to w_a_{pairs[-1]:03d}), but the "
            f"encoder given ({encoder.kind}) has {depth}; give the encoder that it was trained on"
        )
    first = state.get("w_a_000")
    if first is None or first.ndim != 2 or first.shape[1] != encoder.model.embed_dim:
        shape = None if first is None else tuple(first.shape)
        raise WeightsError(
            f"{source}: w_a_000 is of shape {shape}, but wanted is (rank, {encoder.model.embed_dim}) for the encoder "
            f"given ({encoder.kind}); give the encoder that it was trained on"
        )
    odd = [name for name, tensor in state.items() if _ADAPTER.fullmatch(name) and first.shape[0] not in tensor.shape]
    if odd:
        raise WeightsError(f"{source}: adapters are not all of rank {first.shape[0]}: {listed(odd)}")
    return LoraSettings(rank=first.shape[0])
