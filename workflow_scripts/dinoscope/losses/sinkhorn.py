"""Sinkhorn–Knopp: teacher targets that spread all samples evenly over the prototypes (SwAV, arXiv:2006.09882).

Shapes: N samples of this rank, K prototypes.
"""

import torch
import torch.distributed as dist

__all__ = ["sinkhorn_knopp"]


@torch.no_grad()
def sinkhorn_knopp(
    logits_NK: torch.Tensor,
    temperature: float,
    num_iterations: int = 3,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Soft assignments of this rank's samples, balanced over the samples of all ranks.

    Starting from Q = exp(logits / temperature), each iteration scales every prototype to the same total over all
    samples, then every sample to a total of one. Scaling Q by its sum, by the number of samples or by K would cancel,
    so none of them is computed.

    exp(logits / temperature) itself leaves float32 as soon as logits / temperature spans more than about 90. Therefore
    each prototype is held relative to its largest logit and each sample relative to its largest entry; both factors
    cancel in the two normalisations. Then no total is ever below 1 / (K · samples), whatever finite logits come in.

    Args:
        logits_NK: Teacher logits of this rank, any floating type; N may differ between ranks and may be 0.
        temperature: Teacher temperature.
        num_iterations: Rounds of the two normalisations, at least 1.
        group: Processes to balance over; the default group when torch.distributed is initialised, else this process.
            Costs one maximum and `num_iterations` sums of K floats each.

    Returns:
        Probabilities (N, K) in float32; each row sums to 1.
    """
    assert num_iterations >= 1 and temperature > 0, (num_iterations, temperature)
    scores_NK = logits_NK.float() / temperature
    num_samples, num_prototypes = scores_NK.shape
    peaks_K = scores_NK.amax(0) if num_samples else scores_NK.new_full((num_prototypes,), -torch.inf)
    scores_NK -= _all_reduce(peaks_K, dist.ReduceOp.MAX, group)
    totals_K = _all_reduce(scores_NK.exp().sum(0), dist.ReduceOp.SUM, group)
    scores_NK -= scores_NK.amax(1, keepdim=True)
    probs_NK = scores_NK.exp_()
    for iteration in range(num_iterations):
        if iteration > 0:
            totals_K = _all_reduce(probs_NK.sum(0), dist.ReduceOp.SUM, group)
        probs_NK /= totals_K
        probs_NK /= probs_NK.sum(1, keepdim=True)
    return probs_NK


def _all_reduce(tensor: torch.Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> torch.Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor, op=op, group=group)
    return tensor
