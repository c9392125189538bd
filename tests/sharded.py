"""Tensors of models that may be sharded."""

import torch
from torch.distributed.tensor import DTensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be sharded; all ranks call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
