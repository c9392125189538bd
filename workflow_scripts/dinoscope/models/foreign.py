"""Foreign names of the backbone's tensors: Hugging Face's and timm's, one table for reading and for writing.

Names only: what a foreign file lacks (RoPE periods, with timm the mask token) is completed in weights.py.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinoscope.errors import WeightsError
from dinoscope.models.tensor_files import listed

__all__ = [
    "HUGGING_FACE",
    "TIMM",
    "Dialect",
    "detect_dialect",
    "foreign_card",
    "from_foreign",
    "to_foreign",
    "without_filled",
]

_Name = str | tuple[str, str | None, str] | None


def _thirds(pattern: str) -> tuple[str, str, str]:
    return pattern.format("q"), pattern.format("k"), pattern.format("v")


# Ours, Hugging Face's, timm's. "*" is weight and bias; three names are the query, key and value third of one tensor of
# ours; None is what the other side does not store.
_TOP: tuple[tuple[str, _Name, _Name], ...] = (
    ("cls_token", "embeddings.cls_token", "cls_token"),
    ("mask_token", "embeddings.mask_token", None),
    ("storage_tokens", "embeddings.register_tokens", "reg_token"),
    ("patch_embed.proj.*", "embeddings.patch_embeddings.*", "patch_embed.proj.*"),
    ("norm.*", "norm.*", "norm.*"),
)
_BLOCK: tuple[tuple[str, _Name, _Name], ...] = (
    ("norm1.*", "norm1.*", "norm1.*"),
    ("attn.qkv.weight", _thirds("attention.{}_proj.weight"), "attn.qkv.weight"),
    ("attn.qkv.bias", _thirds("attention.{}_proj.bias"), ("attn.q_bias", None, "attn.v_bias")),
    ("attn.proj.*", "attention.o_proj.*", "attn.proj.*"),
    ("ls1.gamma", "layer_scale1.lambda1", "gamma_1"),
    ("norm2.*", "norm2.*", "norm2.*"),
    ("ls2.gamma", "layer_scale2.lambda1", "gamma_2"),
)
_MLP: tuple[tuple[str, _Name, _Name], ...] = (
    ("mlp.fc1.*", "mlp.up_proj.*", "mlp.fc1.*"),
    ("mlp.fc2.*", "mlp.down_proj.*", "mlp.fc2.*"),
)
_SWIGLU: tuple[tuple[str, _Name, _Name], ...] = (
    ("mlp.w1.*", "mlp.gate_proj.*", "mlp.fc1_g.*"),
    ("mlp.w2.*", "mlp.up_proj.*", "mlp.fc1_x.*"),
    ("mlp.w3.*", "mlp.down_proj.*", "mlp.fc2.*"),
)


@dataclass(frozen=True)
class Dialect:
    """One naming scheme: its column of the table, how its blocks are called, and the mark of its gated FFN."""

    name: str
    column: int
    block: str
    gate: str


HUGGING_FACE = Dialect("Hugging Face", 1, "layer.{}.", "mlp.gate_proj.weight")
TIMM = Dialect("timm", 2, "blocks.{}.", "mlp.fc1_g.weight")


def detect_dialect(names: Iterable[str]) -> Dialect | None:
    """The dialect that tensors with these names are in, None if they are in neither."""
    names = set(names)
    if "embeddings.cls_token" in names:
        return HUGGING_FACE
    marks = ("reg_token", "blocks.0.gamma_1", "blocks.0.attn.q_bias", f"blocks.0.{TIMM.gate}")
    return TIMM if "cls_token" in names and names.intersection(marks) else None


def from_foreign(tensors: dict[str, Tensor], dialect: Dialect, source: object) -> dict[str, Tensor]:
    """Translates a foreign state dict, all of it, to the names of DinoVisionTransformer.

    A key bias that the other side does not store is zero and masked; empty storage tokens are left out.

    Args:
        tensors: With foreign names; blocks of Hugging Face may be called `layer.` or `model.layer.`.
        dialect: What `detect_dialect` said.
        source: For messages.

    Raises:
        WeightsError: Tensors that the table does not know, or that one block has and another lacks.
    """
    tensors = {re.sub(r"^model\.(?=layer\.)", "", name): tensor for name, tensor in tensors.items()}
    prefix = re.escape(dialect.block).replace(r"\{\}", r"(\d+)")
    depth = 1 + max((int(match[1]) for name in tensors if (match := re.match(prefix, name))), default=-1)
    pairs = list(_pairs(dialect, depth, any(name.endswith(dialect.gate) for name in tensors)))
    _check_names(tensors, pairs, dialect, source)
    state: dict[str, Tensor] = {}
    for ours, parts in pairs:
        if parts[0] not in tensors:
            continue
        held = [tensors.get(name or "") for name in parts]
        if len(held) == 3 and held[1] is None:
            held[1], ones = torch.zeros_like(held[0]), torch.ones_like(held[0])
            state[f"{ours}_mask"] = torch.cat((ones, held[1], ones))
        state[ours] = held[0] if len(held) == 1 else torch.cat(held)
    return _reshaped(state)


def to_foreign(state: dict[str, Tensor], dialect: Dialect) -> dict[str, Tensor]:
    """Translates a backbone's state dict to foreign names.

    Left out is what has no effect at inference or follows from the model's configuration: RoPE periods, the norm of
    local crops and, for timm, the mask token and a masked key bias.

    Raises:
        WeightsError: The backbone has what the other side cannot store, such as an unmasked key bias in timm.
    """
    depth = 1 + max(int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name)))
    left = {name for name in state if not re.match(r"rope_embed\.periods|local_cls_norm\.|.*\.bias_mask$", name)}
    foreign: dict[str, Tensor] = {}
    for ours, parts in _pairs(dialect, depth, "blocks.0.mlp.w1.weight" in state):
        if ours not in state:
            continue
        left.remove(ours)
        value = state[ours].unsqueeze(0) if ours == "mask_token" else state[ours]
        mask = state.get(f"{ours}_mask")
        pieces = value.chunk(3) if len(parts) == 3 else [value]
        for index, (name, piece) in enumerate(zip(parts, pieces, strict=True)):
            masked = index == 1 and mask is not None and not mask.chunk(3)[1].any()
            if name is None and not masked and piece.any():
                raise WeightsError(f"{dialect.name} has no place for the key bias {ours}, which is not masked")
            if name is not None and not masked:
                foreign[name] = piece.clone()
    left -= {"mask_token"} if dialect is TIMM else set()
    if left:
        raise WeightsError(f"{dialect.name} has no names for {listed(left)}")
    return foreign | (_always_there(state, depth) if dialect is HUGGING_FACE else {})


def without_filled(state: dict[str, Tensor], told: dict[str, Any]) -> dict[str, Tensor]:
    """Leaves out what a foreign format holds in any case, where a model.json says that the backbone lacks it.

    That is LayerScale if it is only ones, biases if they are only zeros, and the mask of a key bias that is zero.

    Args:
        state: What `from_foreign` returned.
        told: The settings of the backbone in model.json.
    """
    filled = {"layerscale": (r"\.ls[12]\.gamma$", 1), "proj_bias": (r"\.attn\.proj\.bias$", 0)}
    filled["ffn_bias"] = (r"\.mlp\.(fc|w)\d\.bias$", 0)
    for key, (pattern, value) in filled.items():
        names = [name for name in state if re.search(pattern, name)]
        if key in told and not told[key] and all(bool((state[name] == value).all()) for name in names):
            state = {name: tensor for name, tensor in state.items() if name not in names}
    if told.get("mask_k_bias") is False:
        state = {name: tensor for name, tensor in state.items() if not name.endswith(".bias_mask")}
    return state


def foreign_card(config: dict[str, Any], preprocessor: dict[str, Any], source: object) -> dict[str, Any]:
    """What a Hugging Face or timm config.json tells, as the content of a model.json.

    Args:
        config: config.json beside the weights.
        preprocessor: preprocessor_config.json, empty if there is none.
        source: For messages.

    Raises:
        WeightsError: Another model, or arithmetic that the backbone does not have.
    """
    trained_with = config.get("pretrained_cfg", {})
    mean_std = {"mean": preprocessor.get("image_mean", trained_with.get("mean"))}
    mean_std["std"] = preprocessor.get("image_std", trained_with.get("std"))
    card: dict[str, Any] = {key: list(value) for key, value in mean_std.items() if value is not None}
    if "architecture" in config:  # timm's: its tensors and its name say the rest
        return card
    if config.get("model_type") != "dinov3_vit":
        raise WeightsError(f"{source} is of a model of type {config.get('model_type')!r}; wanted: 'dinov3_vit'")
    return card | {"backbone": _hugging_face_settings(config, source)}


def _hugging_face_settings(config: dict[str, Any], source: object) -> dict[str, Any]:
    gated, eps = config.get("use_gated_mlp", False), config.get("layer_norm_eps", 1e-5)
    norms = {1e-5: "layernormbf16", 1e-6: "layernorm"}
    if eps not in norms:
        raise WeightsError(f"{source}: layer_norm_eps is {eps}; the backbone has 1e-5 or 1e-6")
    activation = config.get("hidden_act", "gelu")
    if activation != ("silu" if gated else "gelu"):
        raise WeightsError(f"{source}: hidden_act is {activation!r}; DINOv3 has silu in a gated FFN, else gelu")
    same = {
        "hidden_size": "embed_dim",
        "num_hidden_layers": "depth",
        "num_attention_heads": "num_heads",
        "intermediate_size": "ffn_hidden",
        "patch_size": "patch_size",
        "num_channels": "in_chans",
        "num_register_tokens": "num_storage_tokens",
        "rope_theta": "rope_base",
        "pos_embed_shift": "rope_shift",
        "pos_embed_jitter": "rope_jitter",
        "pos_embed_rescale": "rope_rescale",
        "drop_path_rate": "drop_path_rate",
    }
    settings = {ours: config[theirs] for theirs, ours in same.items() if theirs in config}
    return settings | {"norm_layer": norms[eps], "rope_normalize_coords": "separate", "rope_dtype": "fp32"}


def _pairs(dialect: Dialect, depth: int, gated: bool) -> Iterator[tuple[str, tuple[str | None, ...]]]:
    """Every tensor of a backbone: our name, and the foreign name or the three of its thirds."""
    rows = [(row[0], row[dialect.column], "", "") for row in _TOP]
    block = (*_BLOCK, *(_SWIGLU if gated else _MLP))
    rows += [
        (row[0], row[dialect.column], f"blocks.{i}.", dialect.block.format(i)) for i in range(depth) for row in block
    ]
    for ours, theirs, our_prefix, their_prefix in rows:
        if theirs is None:
            continue
        parts = (theirs,) if isinstance(theirs, str) else theirs
        for kind in ("weight", "bias") if "*" in ours else ("",):
            names = (name and their_prefix + name.replace("*", kind) for name in parts)
            yield our_prefix + ours.replace("*", kind), tuple(names)


def _check_names(
    tensors: dict[str, Tensor], pairs: list[tuple[str, tuple[str | None, ...]]], dialect: Dialect, source: object
) -> None:
    """Refuses names outside the table, and what one block has and another has not."""
    groups = [[name for name in parts if name is not None] for _, parts in pairs]
    known = {name for names in groups for name in names}
    if unknown := tensors.keys() - known:
        raise WeightsError(f"{source} has unknown tensors for a {dialect.name} DINOv3 backbone: {listed(unknown)}")
    kinds = {re.sub(r"\.\d+\.", ".0.", name) for name in tensors}
    missing = {name for name in known - tensors.keys() if re.sub(r"\.\d+\.", ".0.", name) in kinds}
    for names in groups:  # of query, key and value only the key's bias may be absent
        needed = [name for name in names if not name.endswith("k_proj.bias")]
        missing |= {name for name in needed if name not in tensors} if tensors.keys() & names else set()
    if missing:
        raise WeightsError(f"{source} lacks tensors of a {dialect.name} DINOv3 backbone: {listed(missing)}")


def _reshaped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    if "mask_token" in state:
        state["mask_token"] = state["mask_token"].reshape(1, -1)
    if "storage_tokens" in state and not state["storage_tokens"].numel():
        del state["storage_tokens"]
    return state


def _always_there(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """What Hugging Face's model has in any case: register tokens, if only none, and LayerScale, if only of ones."""
    extra: dict[str, Tensor] = {}
    if "storage_tokens" not in state:
        extra["embeddings.register_tokens"] = state["cls_token"].new_empty(1, 0, state["cls_token"].shape[-1])
    if "blocks.0.ls1.gamma" not in state:
        ones = torch.ones_like(state["cls_token"]).flatten()
        extra |= {f"layer.{i}.layer_scale{n}.lambda1": ones.clone() for i in range(depth) for n in (1, 2)}
    return extra
