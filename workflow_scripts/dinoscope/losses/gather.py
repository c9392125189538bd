"""Features of all ranks for a loss of each rank's own. Shapes: B rows of this rank, G rows of all ranks, D width."""

import torch
import torch.distributed as dist

__all__ = ["gather_rows"]


def gather_rows(rows_BD: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Rows of all ranks of the default process group in rank order, and where this rank's begin.

    Backward sums the gradients that all ranks' losses have for this rank's rows, so that the gradient is that of the
    sum of the ranks' losses. Without a process group these are the rows themselves, from 0.

    Args:
        rows_BD: B and D are the same on every rank.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return rows_BD, 0
    return _GatherRows.apply(rows_BD), dist.get_rank() * len(rows_BD)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows_BD: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(rows_BD) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows_BD.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_GD: torch.Tensor) -> torch.Tensor:
        grad_GD = grad_GD.contiguous().clone()
        dist.all_reduce(grad_GD)
        return grad_GD.chunk(dist.get_world_size())[dist.get_rank()]
