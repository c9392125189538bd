"""Projection heads of self-supervised training: `dino_head` for CLS tokens, `ibot_head` for patches."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoscope.models.layers import Linear

__all__ = ["DINOHead", "HeadShape"]


class DINOHead(nn.Module):
    """An MLP, L2 normalisation and a linear layer onto prototypes (DINO, arXiv:2104.14294).

    Args:
        in_dim: Width of the features.
        num_prototypes: Number of outputs K.
        hidden_dim: Width inside the MLP.
        bottleneck_dim: Width before the prototypes.
        num_layers: Number of linear layers of the MLP.
    """

    def __init__(
        self, in_dim: int, num_prototypes: int, *, hidden_dim: int, bottleneck_dim: int, num_layers: int
    ) -> None:
        super().__init__()
        widths = [in_dim, *[hidden_dim] * (num_layers - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [Linear(before, after), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.last_layer = Linear(bottleneck_dim, num_prototypes, bias=False)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fills every parameter."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.reset_parameters()

    def forward(self, features: Tensor) -> Tensor:
        """(N, D) -> logits (N, K)."""
        bottleneck = self.mlp(features)
        eps = 1e-6 if bottleneck.dtype == torch.float16 else 1e-12
        return self.last_layer(F.normalize(bottleneck, dim=-1, eps=eps))


@dataclass(frozen=True)
class HeadShape:
    """Sizes of a head, as DINOHead takes them."""

    num_prototypes: int
    hidden_dim: int
    bottleneck_dim: int
    num_layers: int

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> "HeadShape":
        """Reads the sizes off the tensors of a head.

        Raises:
            KeyError, IndexError, ValueError: They are not those of a head.
        """
        weights = [name for name in state if name.startswith("mlp.") and name.endswith("weight")]
        layers = sorted(int(name.split(".")[1]) for name in weights)
        prototypes, bottleneck = state["last_layer.weight"].shape
        return cls(prototypes, state[f"mlp.{layers[0]}.weight"].shape[0], bottleneck, len(layers))

    def build(self, in_dim: int) -> DINOHead:
        """An empty head of these sizes for features of width `in_dim`."""
        return DINOHead(
            in_dim,
            self.num_prototypes,
            hidden_dim=self.hidden_dim,
            bottleneck_dim=self.bottleneck_dim,
            num_layers=self.num_layers,
        )
