"""Low-rank adapters on the linear layers of a backbone (LoRA, arXiv:2106.09685).

An adapted layer computes W x + b + scale · B A x. B starts at zero, so that adapters change nothing at first. Queries,
keys and values, which share one fused projection, have an A and a B each: any of them can be adapted alone.

State-dict names, beside those of the plain backbone: `blocks.3.attn.qkv.lora.a_q`, `….lora.b_q` (also `_k`, `_v`);
`….lora.a`, `….lora.b` for other layers; and a buffer `….lora.scale`, so that a state dict can be merged by itself.
"""

import copy
import math
import re
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoscope.errors import ConfigError
from dinoscope.models.layers import Linear
from dinoscope.models.vit import DinoVisionTransformer

__all__ = ["LORA_TARGETS", "Adapter", "add_lora", "fresh_adapters", "is_adapter", "merge_lora"]

LORA_TARGETS = ("q", "k", "v", "qkv", "proj", "ffn")
_THIRDS = ("q", "k", "v")
_B_NAME = re.compile(r"(.+)\.lora\.b(?:_([qkv]))?")


class Adapter(nn.Module):
    """What is added to the output of a linear layer: scale · B A x.

    Args:
        linear: The layer.
        rank: Rows of each A.
        scale: Factor.
        thirds: Of "q", "k" and "v", those of a fused projection that are adapted; empty for the whole of any layer.
    """

    def __init__(self, linear: nn.Linear, rank: int, scale: float, thirds: Sequence[str] = ()) -> None:
        super().__init__()
        self.thirds, self.initial_scale = tuple(thirds), scale
        device, dtype = linear.weight.device, linear.weight.dtype
        height = linear.out_features // len(_THIRDS) if thirds else linear.out_features
        for suffix in [f"_{third}" for third in self.thirds] or [""]:
            a = torch.empty(rank, linear.in_features, device=device, dtype=dtype)
            b = torch.empty(height, rank, device=device, dtype=dtype)
            self.register_parameter(f"a{suffix}", nn.Parameter(a))
            self.register_parameter(f"b{suffix}", nn.Parameter(b))
        self.register_buffer("scale", torch.empty((), device=device))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fills each A uniformly (Kaiming with slope √5, as a linear layer), each B with zeros, and the scale."""
        self.scale.fill_(self.initial_scale)
        for name, parameter in self.named_parameters():
            if name.startswith("a"):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
            else:
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """(…, D) -> (…, outputs of the layer)."""
        if not self.thirds:
            return self._low_rank(tokens, self.a, self.b)
        changes = {
            third: self._low_rank(tokens, getattr(self, f"a_{third}"), getattr(self, f"b_{third}"))
            for third in self.thirds
        }
        nothing = torch.zeros_like(changes[self.thirds[0]])
        return torch.cat([changes.get(third, nothing) for third in _THIRDS], -1)

    def _low_rank(self, tokens: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(F.linear(tokens, a) * self.scale, b)


def add_lora(
    backbone: DinoVisionTransformer,
    rank: int,
    alpha: float | None = None,
    targets: Iterable[str] = ("q", "v"),
    blocks: Iterable[int] | None = None,
) -> None:
    """Adds adapters to a backbone in place; what is trained of it is for the caller to say (`is_adapter`).

    Args:
        backbone: On any device, "meta" too.
        rank: Of every adapter.
        alpha: Adapters are scaled by alpha / rank; None: by 1.
        targets: Of q, k, v, qkv (all three), proj (the attention's output) and ffn (all layers of the FFN).
        blocks: Indices of the blocks; all when None.

    Raises:
        ConfigError: An unknown target, or a rank below 1.
    """
    wanted = set(targets)
    if unknown := wanted - set(LORA_TARGETS):
        raise ConfigError(f"LoRA target {min(unknown)!r} is unknown: choose from {', '.join(LORA_TARGETS)}")
    if rank < 1:
        raise ConfigError(f"the rank of LoRA adapters is {rank}; at least 1 is wanted")
    scale = 1.0 if alpha is None else alpha / rank
    thirds = _THIRDS if "qkv" in wanted else [third for third in _THIRDS if third in wanted]
    for index in range(len(backbone.blocks)) if blocks is None else blocks:
        block = backbone.blocks[index]
        if thirds:
            block.attn.qkv.lora = Adapter(block.attn.qkv, rank, scale, thirds)
        others = [block.attn.proj] if "proj" in wanted else []
        others += [layer for layer in block.mlp.children() if isinstance(layer, Linear)] if "ffn" in wanted else []
        for linear in others:
            linear.lora = Adapter(linear, rank, scale)


def is_adapter(name: str) -> bool:
    """Whether a state-dict name is one of an adapter."""
    return ".lora." in name


def fresh_adapters(backbone: DinoVisionTransformer, seed: int) -> dict[str, Tensor]:
    """Newly initialised tensors (CPU) for all adapters of a backbone, by state-dict name; the same for the same seed.

    The backbone itself stays as it is, and may be on the meta device.
    """
    tensors: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for path, module in backbone.named_modules():
            if isinstance(module, Adapter):
                adapter = copy.deepcopy(module).to_empty(device="cpu")
                adapter.reset_parameters()
                tensors |= {f"{path}.{name}": tensor for name, tensor in adapter.state_dict().items()}
    return tensors


def merge_lora(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the adapters added into the weights, under the names of the plain backbone.

    Products and sums are taken in float64 and rounded once, to the type of the weights. Names may have any prefix.
    """
    merged = {name: tensor for name, tensor in state.items() if not is_adapter(name)}
    exact: dict[str, Tensor] = {}
    for name, b in state.items():
        if not (found := _B_NAME.fullmatch(name)):
            continue
        layer, third = found.groups()
        key = f"{layer}.weight"
        weight = exact.setdefault(key, state[key].to(torch.float64, copy=True))
        rows = weight.chunk(3)[_THIRDS.index(third)] if third else weight
        a = state[f"{layer}.lora.a" + (f"_{third}" if third else "")]
        rows += state[f"{layer}.lora.scale"].double() * (b.double() @ a.double())
    return merged | {key: weight.to(state[key].dtype) for key, weight in exact.items()}
