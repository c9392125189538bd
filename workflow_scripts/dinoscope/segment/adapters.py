"""Low-rank adapters on any encoder: one face for our backbones and for DINOv2 of Hugging Face.

Both use the adapters of models/lora.py. Hugging Face's queries, keys and values are layers of their own; each that is
adapted is replaced by a layer of ours with the very same weight and bias, so that nothing else of the model changes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dinoscope.errors import ConfigError
from dinoscope.models.layers import Linear
from dinoscope.models.lora import LORA_TARGETS, Adapter, add_lora, fresh_adapters, merge_lora
from dinoscope.models.vit import DinoVisionTransformer
from dinoscope.segment.encoder_parts import blocks_of, fused_third, linear_places

__all__ = ["LoraSettings", "adapter_parameters", "add_adapters", "merge_adapters"]


@dataclass(frozen=True)
class LoraSettings:
    """Which layers are adapted, and how.

    Attributes:
        rank: Of every adapter.
        alpha: Adapters are scaled by alpha / rank; None: by 1.
        targets: Of q, k, v, qkv (all three), proj (the attention's output) and ffn (all layers of the FFN).
        blocks: Indices of the adapted blocks; all when None.
    """

    rank: int = 3
    alpha: float | None = None
    targets: tuple[str, ...] = ("q", "v")
    blocks: tuple[int, ...] | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        blocks = None if self.blocks is None else list(self.blocks)
        return {"rank": self.rank, "alpha": self.alpha, "targets": list(self.targets), "blocks": blocks}

    @classmethod
    def from_dict(cls, told: dict[str, Any]) -> "LoraSettings":
        """The inverse of `as_dict`."""
        blocks = None if told["blocks"] is None else tuple(told["blocks"])
        return cls(told["rank"], told["alpha"], tuple(told["targets"]), blocks)


def add_adapters(encoder: nn.Module, settings: LoraSettings, seed: int) -> None:
    """Adds adapters to an encoder in place; they change nothing of its output until they are trained.

    Only the adapters have gradients afterwards that the encoder did not have before.

    Args:
        encoder: A backbone of ours or DINOv2 of Hugging Face, without adapters.
        settings: Which and how.
        seed: Of their first weights.

    Raises:
        ConfigError: An unknown target, a rank below 1, a block that there is not, or another kind of encoder.
    """
    assert not any(isinstance(module, Adapter) for module in encoder.modules()), "the encoder has adapters already"
    depth = len(blocks_of(encoder)[1])
    if absent := [index for index in settings.blocks or () if not 0 <= index < depth]:
        raise ConfigError(f"block {absent[0]} is to be adapted, but the encoder has blocks 0 to {depth - 1}")
    if not settings.targets or settings.blocks == ():
        raise ConfigError(f"LoRA adapts nothing: name targets ({', '.join(LORA_TARGETS)}) and blocks, or leave it out")
    device = next(encoder.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # what they begin with is replaced
        if isinstance(encoder, DinoVisionTransformer):
            add_lora(encoder, settings.rank, settings.alpha, settings.targets, settings.blocks)
        else:
            _add_to_separate_layers(encoder, settings)
    missing = encoder.load_state_dict(fresh_adapters(encoder, seed), strict=False)
    assert not missing.unexpected_keys


def adapter_parameters(encoder: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' A and B by names that do not depend on the kind of encoder: "blocks.3.q.a", "blocks.3.q.b"."""
    found: dict[str, nn.Parameter] = {}
    for place in linear_places(encoder):
        adapter = getattr(encoder.get_submodule(place.path), "lora", None)
        for name, parameter in adapter.named_parameters() if adapter is not None else ():
            letter, third = fused_third(name)
            found[f"blocks.{place.block}.{third or place.name}.{letter}"] = parameter
    return found


def merge_adapters(encoder: nn.Module) -> None:
    """Adds the adapters into the weights, rounded once, and takes them away: the plain encoder with their output."""
    merged = merge_lora(encoder.state_dict())
    for module in encoder.modules():
        if isinstance(module, Linear):
            module.lora = None
    encoder.load_state_dict(merged, strict=True)


def _add_to_separate_layers(encoder: nn.Module, settings: LoraSettings) -> None:
    wanted = set(settings.targets)
    if unknown := wanted - set(LORA_TARGETS):
        raise ConfigError(f"LoRA target {min(unknown)!r} is unknown: choose from {', '.join(LORA_TARGETS)}")
    if settings.rank < 1:
        raise ConfigError(f"the rank of LoRA adapters is {settings.rank}; at least 1 is wanted")
    scale = 1.0 if settings.alpha is None else settings.alpha / settings.rank
    wanted |= {"q", "k", "v"} if "qkv" in wanted else set()
    for place in list(linear_places(encoder)):
        is_wanted = place.name.partition(".")[0] in wanted
        if is_wanted and (settings.blocks is None or place.block in settings.blocks):
            adapted = _as_ours(encoder.get_submodule(place.path))
            adapted.lora = Adapter(adapted, settings.rank, scale)
            encoder.set_submodule(place.path, adapted)


def _as_ours(linear: nn.Linear) -> Linear:
    """A layer of ours with the parameters of another library's, shared."""
    with torch.device("meta"):
        layer = Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    layer.weight, layer.bias = linear.weight, linear.bias
    return layer.train(linear.training)
