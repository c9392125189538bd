"""Kernel density regulariser: spreads features over the sphere, an alternative to KoLeo.

The uniformity loss of Wang & Isola (arXiv:2005.10242) with the log inside the mean over features, which makes it a
kernel density estimate of their entropy; used by Virchow2 (arXiv:2408.00738). Unlike KoLeo, whose log distance to the
one nearest neighbour falls without bound as two features meet, its pull is bounded and comes from all features.

Shapes: B features of this rank, G features of all ranks, D width.
"""

import math

import torch
import torch.nn.functional as F

from dinoscope.losses.gather import gather_rows

__all__ = ["distributed_kde_loss", "kde_loss"]

_EPS = 1e-8


def kde_loss(features_BD: torch.Tensor, concentration: float = 5.0) -> torch.Tensor:
    """Mean log kernel density of this rank's L2-normalised features, each under all others; to be *minimised*.

    mean_i log mean_{j≠i} exp(concentration · (x_i · x_j − 1)): 0 where all features coincide, at least −2 ·
    concentration. The gradient flows into both ends of each pair, also of pairs that coincide. Always float32, also
    under autocast.

    Args:
        features_BD: Pre-head CLS of one crop of every image; two crops of one image must not meet here. B ≥ 2.
        concentration: Of the von Mises–Fisher kernel: the larger, the more only near features repel each other.
    """
    with torch.autocast(features_BD.device.type, enabled=False):
        unit_BD = F.normalize(features_BD.float(), eps=_EPS)
        return _mean_log_density(unit_BD, unit_BD, 0, concentration)


def distributed_kde_loss(features_BD: torch.Tensor, concentration: float = 5.0) -> torch.Tensor:
    """KDE loss of this rank's features under the features of all ranks of the default process group.

    The mean of the ranks' losses is the loss of the joined batch. As in `distributed_koleo_loss`, the gradient is that
    of the *sum* over ranks, which averaging over ranks (as data-parallel training does with parameter gradients) turns
    into that of the joined batch's loss.

    Args:
        features_BD: As for `kde_loss`, but B ≥ 1; B is the same on every rank.
        concentration: As for `kde_loss`.
    """
    with torch.autocast(features_BD.device.type, enabled=False):
        unit_BD = F.normalize(features_BD.float(), eps=_EPS)
        return _mean_log_density(unit_BD, *gather_rows(unit_BD), concentration)


def _mean_log_density(
    unit_BD: torch.Tensor, unit_GD: torch.Tensor, first_row: int, concentration: float
) -> torch.Tensor:
    num_others = len(unit_GD) - 1
    assert num_others > 0, "the density at one feature needs another"
    own_B = torch.arange(first_row, first_row + len(unit_BD), device=unit_BD.device)
    all_G = torch.arange(len(unit_GD), device=unit_BD.device)
    exponent_BG = concentration * (unit_BD @ unit_GD.T - 1)
    exponent_BG = exponent_BG.masked_fill(own_B[:, None] == all_G, -torch.inf)
    return exponent_BG.logsumexp(1).mean() - math.log(num_others)
