"""The backbone as plain, slow float64 formulas, one patch and one head at a time; shares no code with the library."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def naive_forward(model: Any, image: torch.Tensor, *, local: bool = False) -> np.ndarray:
    """Normed tokens (N, D) of one image (3, H, W).

    Args:
        model: Gives `settings` and `state_dict()`.
        image: Height and width multiples of the patch size.
        local: As a local crop in training, which may have a norm of its own.
    """
    settings = model.settings
    p = {name: tensor.detach().double().numpy() for name, tensor in model.state_dict().items()}
    x, coords = _embed(p, settings, image.double().numpy())
    periods = _periods(settings)
    for index in range(settings.depth):
        block = {name.removeprefix(f"blocks.{index}."): value for name, value in p.items()}
        attended = _attention(block, settings, _norm(block, "norm1", x, settings), coords, periods)
        x = x + block.get("ls1.gamma", 1.0) * attended
        x = x + block.get("ls2.gamma", 1.0) * _ffn(block, settings, _norm(block, "norm2", x, settings))
    prefix = "cls_norm" if settings.untie_cls_and_patch_norms else "norm"
    if local and settings.untie_global_and_local_cls_norm:
        prefix = "local_cls_norm"
    count = 1 + settings.num_storage_tokens
    return np.concatenate([_norm(p, prefix, x[:count], settings), _norm(p, "norm", x[count:], settings)])


def _embed(p: dict, settings: Any, image: np.ndarray) -> tuple[np.ndarray, list[tuple[float, float]]]:
    side, width = settings.patch_size, settings.embed_dim
    height, columns = image.shape[1] // side, image.shape[2] // side
    divisors = {
        "separate": (height, columns),
        "max": (max(height, columns),) * 2,
        "min": (min(height, columns),) * 2,
    }[settings.rope_normalize_coords]
    kernel = p["patch_embed.proj.weight"].reshape(width, -1)
    tokens = [p["cls_token"][0, 0]] + [p["storage_tokens"][0, i] for i in range(settings.num_storage_tokens)]
    coords = []
    for row in range(height):
        for column in range(columns):
            patch = image[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
            tokens.append(kernel @ patch.ravel() + p["patch_embed.proj.bias"])
            coords.append((2 * (row + 0.5) / divisors[0] - 1, 2 * (column + 0.5) / divisors[1] - 1))
    return np.array(tokens), coords


def _periods(settings: Any) -> list[float]:
    head = settings.embed_dim // settings.num_heads
    count = head // 4
    if settings.rope_base is not None:
        return [settings.rope_base ** (2 * i / (head / 2)) for i in range(count)]
    low, high = math.log(settings.rope_min_period), math.log(settings.rope_max_period)
    return [math.exp(low + (high - low) * i / (count - 1)) for i in range(count)]


def _norm(p: dict, name: str, x: np.ndarray, settings: Any) -> np.ndarray:
    if settings.norm_layer == "rmsnorm":
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p[f"{name}.weight"]
    centred = x - x.mean(-1, keepdims=True)
    eps = {"layernorm": 1e-6, "layernormbf16": 1e-5}[settings.norm_layer]
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]


def _attention(p: dict, settings: Any, x: np.ndarray, coords: list, periods: list[float]) -> np.ndarray:
    width, head = settings.embed_dim, settings.embed_dim // settings.num_heads
    bias = p["attn.qkv.bias"].copy() if settings.qkv_bias else np.zeros(3 * width)
    if settings.mask_k_bias:
        bias[width : 2 * width] = 0
    qkv = x @ p["attn.qkv.weight"].T + bias
    mixed = []
    for h in range(settings.num_heads):
        query, key, value = (qkv[:, i * width + h * head : i * width + (h + 1) * head] for i in range(3))
        scores = _turned(query, coords, periods) @ _turned(key, coords, periods).T / math.sqrt(head)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed.append(weights / weights.sum(-1, keepdims=True) @ value)
    return np.concatenate(mixed, -1) @ p["attn.proj.weight"].T + p.get("attn.proj.bias", 0.0)


def _turned(vectors: np.ndarray, coords: list[tuple[float, float]], periods: list[float]) -> np.ndarray:
    out, half = vectors.copy(), vectors.shape[1] // 2
    first_patch = len(vectors) - len(coords)
    for index, position in enumerate(coords, first_patch):
        angles = [2 * math.pi * coordinate / period for coordinate in position for period in periods]
        for i, angle in enumerate(angles):
            a, b = vectors[index, i], vectors[index, i + half]
            out[index, i] = a * math.cos(angle) - b * math.sin(angle)
            out[index, i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def _ffn(p: dict, settings: Any, x: np.ndarray) -> np.ndarray:
    def linear(name: str) -> Callable[[np.ndarray], np.ndarray]:
        return lambda tokens: tokens @ p[f"mlp.{name}.weight"].T + p.get(f"mlp.{name}.bias", 0.0)

    if settings.ffn_layer == "swiglu":
        gate = linear("w1")(x)
        return linear("w3")(gate / (1 + np.exp(-gate)) * linear("w2")(x))
    hidden = linear("fc1")(x)
    return linear("fc2")(hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))))
