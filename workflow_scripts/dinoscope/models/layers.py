"""Building blocks of the backbone; each allocates empty tensors and fills them in `reset_parameters`.

Shape suffixes: B images, N tokens, D width, h heads, d width of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoscope.models.registry import ViTSettings
from dinoscope.models.rope import CoordsChange, Rotation, rotate

__all__ = ["Block", "BlockDraws", "LayerScale", "Linear", "build_norm"]


@dataclass(frozen=True)
class BlockDraws:
    """The random numbers of one block for one group of crops, drawn outside the model.

    `rope` changes the patch coordinates; `attn` and `ffn` are the indices (kept,) of the samples whose residual is
    computed, None for all of them (stochastic depth by dropping samples).
    """

    rope: CoordsChange | None = None
    attn: Tensor | None = None
    ffn: Tensor | None = None


class Linear(nn.Linear):
    """A linear layer with weights from a truncated normal of std 0.02 and bias 0.

    `lora` is None, or a module whose output is added to the layer's (lora.py).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.register_module("lora", None)

    def forward(self, tokens: Tensor) -> Tensor:
        """(…, inputs) -> (…, outputs)."""
        plain = F.linear(tokens, self.weight, self.effective_bias())
        return plain if self.lora is None else plain + self.lora(tokens)

    def effective_bias(self) -> Tensor | None:
        """The bias as it is added."""
        return self.bias

    def reset_parameters(self) -> None:
        """Fills weight and bias."""
        nn.init.trunc_normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class LinearMaskedKeyBias(Linear):
    """The qkv projection whose key third of the bias is always zero; `bias_mask` (3D) is a buffer in checkpoints."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=True)
        self.register_buffer("bias_mask", torch.empty(out_features))

    def reset_parameters(self) -> None:
        """Fills weight, bias and mask."""
        super().reset_parameters()
        if "bias_mask" in self._buffers:  # nn.Linear calls this before the buffer exists
            self.bias_mask.fill_(1.0).chunk(3)[1].zero_()

    def effective_bias(self) -> Tensor:
        """The bias with its key third set to zero."""
        return self.bias * self.bias_mask.to(self.bias.dtype)


class LayerScale(nn.Module):
    """Multiplies each channel of a residual by a learned factor (CaiT, arXiv:2103.17239)."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.gamma = nn.Parameter(torch.empty(width))

    def reset_parameters(self) -> None:
        """Fills gamma with its initial value."""
        nn.init.constant_(self.gamma, self.initial)

    def forward(self, tokens: Tensor) -> Tensor:
        """(…, D) -> (…, D)."""
        return tokens * self.gamma


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions on queries and keys of the patches."""

    def __init__(self, settings: ViTSettings) -> None:
        super().__init__()
        width = settings.embed_dim
        self.num_heads = settings.num_heads
        if settings.mask_k_bias and settings.qkv_bias:
            self.qkv = LinearMaskedKeyBias(width, 3 * width)
        else:
            self.qkv = Linear(width, 3 * width, bias=settings.qkv_bias)
        self.proj = Linear(width, width, bias=settings.proj_bias)

    def forward(self, tokens_BND: Tensor, rotation: Rotation) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        batch, num_tokens, width = tokens_BND.shape
        qkv = self.qkv(tokens_BND).view(batch, num_tokens, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()  # each (B, h, N, d)
        mixed = F.scaled_dot_product_attention(rotate(query, rotation), rotate(key, rotation), value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, num_tokens, width))


class Mlp(nn.Module):
    """fc1, exact GELU, fc2."""

    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden, bias=bias)
        self.fc2 = Linear(hidden, width, bias=bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """(…, D) -> (…, D)."""
        return self.fc2(F.gelu(self.fc1(tokens)))


class SwiGlu(nn.Module):
    """w3(silu(w1 x) · w2 x) (arXiv:2002.05202)."""

    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.w1 = Linear(width, hidden, bias=bias)
        self.w2 = Linear(width, hidden, bias=bias)
        self.w3 = Linear(hidden, width, bias=bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """(…, D) -> (…, D)."""
        return self.w3(F.silu(self.w1(tokens)) * self.w2(tokens))


class Block(nn.Module):
    """Pre-norm transformer block over several groups of crops at once, so that sharded weights are gathered once."""

    def __init__(self, settings: ViTSettings) -> None:
        super().__init__()
        width = settings.embed_dim
        ffn = SwiGlu if settings.ffn_layer == "swiglu" else Mlp
        scale = (lambda: LayerScale(width, settings.layerscale)) if settings.layerscale else nn.Identity
        self.norm1 = build_norm(settings)
        self.attn = Attention(settings)
        self.ls1 = scale()
        self.norm2 = build_norm(settings)
        self.mlp = ffn(width, settings.ffn_hidden, settings.ffn_bias)
        self.ls2 = scale()

    def forward(
        self, groups: list[Tensor], rotations: list[Rotation], draws: list[BlockDraws] | None = None
    ) -> list[Tensor]:
        """Each group (B, N, D) -> (B, N, D); draws are given in training only."""
        draws = draws or [BlockDraws()] * len(groups)
        return [self._one(*group) for group in zip(groups, rotations, draws, strict=True)]

    def _one(self, x_BND: Tensor, rotation: Rotation, draw: BlockDraws) -> Tensor:
        x_BND = _add_residual(x_BND, draw.attn, lambda x: self.ls1(self.attn(self.norm1(x), rotation)))
        return _add_residual(x_BND, draw.ffn, lambda x: self.ls2(self.mlp(self.norm2(x))))


def _add_residual(x_BND: Tensor, kept: Tensor | None, branch: Callable[[Tensor], Tensor]) -> Tensor:
    """x + branch(x); with stochastic depth for the kept samples only, scaled so that the expectation stays."""
    if kept is None:
        return x_BND + branch(x_BND)
    residual = branch(x_BND[kept])
    return x_BND.index_add(0, kept, residual.to(x_BND.dtype), alpha=x_BND.shape[0] / kept.shape[0])


def build_norm(settings: ViTSettings) -> nn.Module:
    """The normalisation layer that the settings name."""
    width = settings.embed_dim
    return {
        "layernorm": lambda: nn.LayerNorm(width, eps=1e-6),
        "layernormbf16": lambda: nn.LayerNorm(width, eps=1e-5),
        "rmsnorm": lambda: nn.RMSNorm(width, eps=1e-5),
    }[settings.norm_layer]()
