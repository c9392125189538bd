"""Signs of collapse, cheap enough to be logged with every line of metrics.

A model collapses when it says the same of every image (its features point one way, or fill a few dimensions only), or
when its targets say nothing (as even as noise). The losses may look fine all the while.

Shapes: N samples, K prototypes, D width.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from dinoscope.train.distributed import World

__all__ = ["NUM_FEATURES", "HealthWindow", "entropy", "mean_pairwise_cosine", "rankme"]

NUM_FEATURES = 256


def entropy(probs_NK: Tensor) -> Tensor:
    """Entropy of each distribution in nats, (N,) in float32 or float64: 0 for one prototype, log K for an even one."""
    probs_NK = probs_NK if probs_NK.dtype == torch.float64 else probs_NK.float()
    return torch.special.entr(probs_NK).sum(-1)


def rankme(features_ND: Tensor, epsilon: float = 1e-7) -> float:
    """RankMe (Garrido et al. 2023, arXiv:2210.02885): in effect how many dimensions the features fill.

    The exponential of the entropy of their singular values, which are divided by their sum; between 1 and min(N, D).
    The features are not centred, so that a mean they all share counts as the collapse it is.

    The singular values are the roots of the eigenvalues of the smaller of F Fᵀ and Fᵀ F, in float64: several times
    faster than a decomposition of F, and exact down to 1e-8 of the largest singular value.

    Args:
        features_ND: Features of N samples before the head; D of any size.
        epsilon: Added to each share, as published.

    Returns:
        The rank; 1 for features that are all zero, for they tell no more than a single direction does.
    """
    features_ND = features_ND.double()
    gram = features_ND @ features_ND.T if len(features_ND) < features_ND.shape[1] else features_ND.T @ features_ND
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    total = singular.sum()
    if total == 0:
        return 1.0
    shares = singular / total + epsilon
    return float(torch.exp(-(shares * shares.log()).sum()))


def mean_pairwise_cosine(features_ND: Tensor) -> float:
    """Mean cosine over all pairs of different samples, in float64: near 1 when all features point one way.

    Args:
        features_ND: Features of at least two samples.
    """
    num_samples = len(features_ND)
    assert num_samples > 1, num_samples
    unit_ND = torch.nn.functional.normalize(features_ND.double(), dim=1)
    # the sum over all pairs is the square of the sum; the pairs of a sample with itself are taken out
    of_all, of_itself = unit_ND.sum(0).square().sum(), unit_ND.square().sum()
    return float((of_all - of_itself) / (num_samples * (num_samples - 1)))


class HealthWindow:
    """Health of a run between two logged lines, over all ranks.

    A step costs the entropy of its targets; features are kept, and looked at only when a line is due: 4 to 6 ms of one
    core for 256 of them, during which a GPU waits (11 to 32 ms for 512). They are those of the last `num_features`
    samples, whatever the batch, for the rank of fewer is lower for that reason alone. Until there are as many (at the
    start, and after a restart) no rank and no cosine is given.
    """

    def __init__(self, world: World, num_features: int = NUM_FEATURES) -> None:
        self.world, self.num_features = world, num_features
        self._kept_per_rank = -(-num_features // world.size)
        self._sums: Tensor | None = None  # of the number of targets, their entropies and the targets: K + 2 numbers
        self._features: Tensor | None = None

    @torch.no_grad()
    def add(self, targets_NK: Tensor, features_ND: Tensor) -> None:
        """Adds a batch of this rank, as large as those of the others. The CPU does not wait for the device.

        Targets that are not finite, those of a step that is skipped, are left out.

        Args:
            targets_NK: The teacher's targets of CLS tokens, all global crops.
            features_ND: The teacher's CLS features before the head, one crop of each sample: two crops of one sample
                are alike in a healthy model too.
        """
        entropy_sum, number = entropy(targets_NK).sum(), targets_NK.new_full((1,), len(targets_NK))
        sums = torch.cat([number.float(), entropy_sum[None].float(), targets_NK.float().sum(0)])
        sums = torch.where(entropy_sum.isfinite(), sums, 0)
        self._sums = sums if self._sums is None else self._sums + sums
        rows = features_ND[-self._kept_per_rank :].float()
        # a copy, always: a view would keep the tokens of all patches alive
        self._features = torch.cat([rows] if self._features is None else [self._features, rows])[-self._kept_per_rank :]

    def close(self, cross_entropy: float) -> dict[str, float]:
        """The values of one line, in nats where they are entropies; all ranks call it together.

        `teacher_entropy` is that of one target, `target_marginal_entropy` that of the mean of all targets, which
        Sinkhorn–Knopp keeps near log K. `teacher_student_kl` tells how far the student is from the targets. The
        features' `rankme` and `mean_cosine` are given on the main process only. What nothing finite is known of is left
        out.

        Args:
            cross_entropy: Mean of the DINO loss of the global crops over the same steps and all ranks. What it exceeds
                the entropy of the targets by is their divergence from the student's, so that this costs nothing.
        """
        line: dict[str, float] = {}
        if self._sums is not None:
            sums = self.world.reduce(self._sums.cpu().double(), dist.ReduceOp.SUM)
            number, entropy_sum, target_sum_K = sums[0], sums[1], sums[2:]
            if number > 0:
                line["teacher_entropy"] = float(entropy_sum / number)
                line["target_marginal_entropy"] = float(entropy(target_sum_K / number))
                line["teacher_student_kl"] = cross_entropy - line["teacher_entropy"]
        self._sums = None
        features_ND = self._gathered_features()
        if features_ND is not None and features_ND.isfinite().all():
            line |= {"rankme": rankme(features_ND), "mean_cosine": mean_pairwise_cosine(features_ND)}
        return line

    def _gathered_features(self) -> Tensor | None:
        """The last `num_features` features on the main process; None elsewhere, and while there are fewer."""
        if self.world.any(self._features is None or len(self._features) < self._kept_per_rank):
            return None
        mine = self._features.cpu()
        parts = [torch.empty_like(mine) for _ in range(self.world.size)] if self.world.is_main else None
        dist.gather(mine, parts)
        return torch.cat(parts)[: self.num_features] if self.world.is_main else None
