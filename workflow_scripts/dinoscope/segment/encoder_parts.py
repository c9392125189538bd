"""Where an encoder has its linear layers, and the patch features of its last blocks.

Known inside are our backbones and DINOv2 (with and without registers) of Hugging Face. Whatever other encoder there is
can be used frozen, with the features of its last layer.

Shapes: B images, D width, h x w patches.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from dinoscope.errors import ConfigError
from dinoscope.features.foreign_encoders import ForeignEncoder
from dinoscope.models.vit import DinoVisionTransformer
from dinoscope.segment.settings import multiples_in_words

__all__ = ["Place", "blocks_of", "fused_third", "linear_places", "patch_maps"]

_HUGGING_FACE = ("dinov2", "dinov2_with_registers")
# transformers renames its layers from version to version
_NAMES = {"q": ("q_proj", "query"), "k": ("k_proj", "key"), "v": ("v_proj", "value"), "proj": ("o_proj", "dense")}
_PROJECTION = {name: projection for projection, names in _NAMES.items() for name in names}


class Place(NamedTuple):
    """A linear layer of an encoder.

    Attributes:
        block: Index of its block.
        name: "qkv", or "q", "k" and "v" where these are layers of their own; "proj" (the attention's output); "ffn.0"
            and so on, in the order of the layers of the FFN. The same whatever the library calls it.
        path: Of the layer in the encoder.
    """

    block: int
    name: str
    path: str


def blocks_of(encoder: nn.Module) -> tuple[str, nn.ModuleList]:
    """The transformer blocks of an encoder, and their path in it.

    Raises:
        ConfigError: The encoder is of a kind whose inside is not known.
    """
    if isinstance(encoder, DinoVisionTransformer):
        return "blocks", encoder.blocks
    if _is_hugging_face(encoder):
        return "model.encoder.layer", encoder.model.encoder.layer
    raise ConfigError(
        f"the blocks of an encoder of type {type(getattr(encoder, 'model', encoder)).__name__} are not known; low-rank "
        "adapters, the fpn decoder and training of its blocks want a DINOv3 backbone or a Hugging Face folder of model "
        f"type {' or '.join(_HUGGING_FACE)}; any encoder with patch tokens can be used with the linear decoder alone"
    )


def linear_places(encoder: nn.Module) -> Iterator[Place]:
    """The linear layers of all blocks that can be adapted.

    Raises:
        ConfigError: As `blocks_of`.
    """
    path, blocks = blocks_of(encoder)
    ours = isinstance(encoder, DinoVisionTransformer)
    for index, block in enumerate(blocks):
        attention = "attn" if ours else "attention"
        for name, layer in block.get_submodule(attention).named_modules():
            if isinstance(layer, nn.Linear):
                last = name.rpartition(".")[2]
                yield Place(index, last if ours else _PROJECTION[last], f"{path}.{index}.{attention}.{name}")
        layers = [name for name, layer in block.mlp.named_children() if isinstance(layer, nn.Linear)]
        for number, name in enumerate(layers):
            yield Place(index, f"ffn.{number}", f"{path}.{index}.mlp.{name}")


def patch_maps(encoder: nn.Module, images: Tensor, num_blocks: int) -> list[Tensor]:
    """Patch features of the last blocks, each after the encoder's final norm; the last block's come last.

    Args:
        encoder: Any encoder for `num_blocks` 1, else one that `blocks_of` knows.
        images: Normalised, (B, 3, H, W).
        num_blocks: How many.

    Returns:
        `num_blocks` maps (B, D, H / patch, W / patch).

    Raises:
        ConfigError: The size is no multiple of the patch size, or the encoder has not so many blocks.
    """
    grid = _grid(encoder, images)
    if num_blocks == 1:
        return [_as_map(encoder.forward_features(images)["patches"], grid)]
    _, blocks = blocks_of(encoder)
    if num_blocks > len(blocks):
        raise ConfigError(f"features of the last {num_blocks} blocks are wanted, but the encoder has {len(blocks)}")
    if isinstance(encoder, DinoVisionTransformer):
        return encoder.get_intermediate_layers(images, num_blocks, reshape=True)
    states = encoder.model(pixel_values=images, output_hidden_states=True).hidden_states[-num_blocks:]
    first = 1 + encoder.num_storage_tokens
    return [_as_map(encoder.model.layernorm(state)[:, first:], grid) for state in states]


def fused_third(parameter: str) -> tuple[str, str | None]:
    """Splits the name of an adapter's parameter: "a_q" -> ("a", "q"), "b" -> ("b", None)."""
    found = re.fullmatch(r"([ab])(?:_([qkv]))?", parameter)
    assert found is not None, parameter
    return found[1], found[2]


def _is_hugging_face(encoder: Any) -> bool:
    config = getattr(encoder.model, "config", None) if isinstance(encoder, ForeignEncoder) else None
    return getattr(config, "model_type", None) in _HUGGING_FACE


def _grid(encoder: nn.Module, images: Tensor) -> tuple[int, int]:
    patch = encoder.patch_size
    height, width = images.shape[-2:]
    if height % patch or width % patch:
        raise ConfigError(
            f"images are {height} x {width} px, but both sides must be multiples of the encoder's patch size of "
            f"{patch} px: {' x '.join(multiples_in_words(side, patch) for side in (height, width))} would do"
        )
    return height // patch, width // patch


def _as_map(patches_BPD: Tensor, grid: tuple[int, int]) -> Tensor:
    return patches_BPD.transpose(1, 2).unflatten(2, grid).contiguous()
