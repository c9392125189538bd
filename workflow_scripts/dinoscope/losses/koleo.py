"""KoLeo regulariser: keeps features apart by the distance to their nearest neighbour (arXiv:1806.03198).

Shapes: B features of this rank, G features of all ranks, D width, Q nearest neighbours of each.
"""

import torch
import torch.nn.functional as F

from dinoscope.losses.gather import gather_rows

__all__ = ["distributed_koleo_loss", "koleo_loss"]

_EPS = 1e-8


def koleo_loss(features_BD: torch.Tensor) -> torch.Tensor:
    """-mean(log(distance to the nearest other feature)) of this rank's L2-normalised features.

    Neighbours are found by dot product; the gradient flows into both ends of each pair. Pairs that coincide, such as
    blank tiles, get no gradient. Always float32, also under autocast.

    Args:
        features_BD: Pre-head CLS of one crop of every image; two crops of one image must not meet here. B ≥ 2.
    """
    with torch.autocast(features_BD.device.type, enabled=False):
        unit_BD = F.normalize(features_BD.float(), eps=_EPS)
        return _spread(unit_BD, unit_BD, first_row=0, topk=1, group_size=None)


def distributed_koleo_loss(features_BD: torch.Tensor, topk: int = 1, group_size: int | None = None) -> torch.Tensor:
    """KoLeo of this rank's features with neighbours from all ranks of the default process group.

    The mean of the ranks' losses is the loss of the joined batch. A feature also gets the gradient of the other ranks'
    losses in which it is a neighbour: the gradient is that of the *sum* over ranks, which averaging over ranks (as
    data-parallel training does with parameter gradients) turns into that of the joined batch's loss.

    Args:
        features_BD: As for `koleo_loss`; B is the same on every rank.
        topk: Neighbours each feature is pushed away from.
        group_size: Neighbours come from blocks of this many consecutive features of the joined batch (in rank order);
            None: from all of them. The number of all features must be a multiple of it, and it must exceed `topk`.
    """
    with torch.autocast(features_BD.device.type, enabled=False):
        unit_BD = F.normalize(features_BD.float(), eps=_EPS)
        return _spread(unit_BD, *gather_rows(unit_BD), topk, group_size)


def _spread(
    unit_BD: torch.Tensor, unit_GD: torch.Tensor, first_row: int, topk: int, group_size: int | None
) -> torch.Tensor:
    num_all = len(unit_GD)
    group_size = group_size or num_all
    assert num_all % group_size == 0, f"{num_all} features do not fill groups of {group_size}"
    assert topk < group_size, f"{topk} neighbours asked of groups of {group_size} features"
    with torch.no_grad():
        similarity_BG = unit_BD @ unit_GD.T
        own_B = torch.arange(first_row, first_row + len(unit_BD), device=unit_BD.device)
        all_G = torch.arange(num_all, device=unit_BD.device)
        similarity_BG.masked_fill_(own_B[:, None] // group_size != all_G // group_size, -torch.inf)
        similarity_BG.masked_fill_(own_B[:, None] == all_G, -torch.inf)
        neighbours_BQ = similarity_BG.topk(topk, dim=1).indices
    distance_BQ = torch.linalg.vector_norm(unit_BD[:, None] - unit_GD[neighbours_BQ], dim=-1)
    return -torch.log(distance_BQ + _EPS).mean()
