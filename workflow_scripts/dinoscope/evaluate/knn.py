"""Exact nearest neighbours by cosine, and classification by them.

The bank is read chunk by chunk, from memory or from a memory-mapped file in float16 or float32, and multiplied in
float32: a million tiles of 1,024 values take 1,000 queries at a time, no approximation, and memory for one chunk.

Shapes: Q queries, N rows of the bank, D width, K neighbours, C classes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["knn_predict", "neighbours", "vote"]

_CHUNK_ROWS = 16_384
_QUERIES_AT_ONCE = 1_024
NEIGHBOURS = (1, 5, 20)


def neighbours(
    queries: np.ndarray,
    bank: np.ndarray,
    k: int,
    *,
    exclude_groups: tuple[np.ndarray, np.ndarray] | None = None,
    center: np.ndarray | None = None,
    device: str | torch.device = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows of a bank for each query, the nearest first, of equally near ones the lower row.

    Args:
        queries: (Q, D) float.
        bank: (N, D) float16 or float32, also memory-mapped.
        k: K; at most N.
        exclude_groups: Group numbers of the queries (Q,) and of the bank (N,): nothing of its own group is a query's
            neighbour.
        center: (D,) to take off queries and bank first; None: nothing.
        device: Where the products are computed.

    Returns:
        Rows (Q, K) int64 and cosines (Q, K) float32; -1 and -inf where there are fewer than K.
    """
    assert 0 < k <= len(bank), f"{k} neighbours of {len(bank)} rows"
    parts = [
        _nearest(queries[part], bank, k, _groups_of(exclude_groups, part), center, torch.device(device))
        for part in (slice(s, s + _QUERIES_AT_ONCE) for s in range(0, len(queries), _QUERIES_AT_ONCE))
    ]
    if not parts:
        return np.empty((0, k), np.int64), np.empty((0, k), np.float32)
    return np.concatenate([rows for rows, _ in parts]), np.concatenate([cosines for _, cosines in parts])


def vote(neighbour_labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Shares of the votes of neighbours, (Q, C) float64.

    Of classes with equal votes the one with the nearest neighbour has a little more (a thousandth of a vote at most).

    Args:
        neighbour_labels: (Q, K) class numbers, the nearest first; -1 does not vote.
        num_classes: C.
    """
    num, k = neighbour_labels.shape
    weights = 1 + 5e-4 * 0.5 ** np.arange(k)
    votes = np.zeros((num, num_classes + 1))
    np.add.at(votes, (np.arange(num)[:, None], neighbour_labels), weights)  # -1 is the last column
    votes = votes[:, :num_classes]
    total = votes.sum(1, keepdims=True)
    return np.where(total > 0, votes / np.maximum(total, 1e-12), 1 / num_classes)


def knn_predict(
    queries: np.ndarray,
    bank: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    *,
    ks: Sequence[int] = NEIGHBOURS,
    exclude_groups: tuple[np.ndarray, np.ndarray] | None = None,
    center: bool = True,
    device: str | torch.device = "cpu",
) -> dict[int, np.ndarray]:
    """Probabilities of classes (Q, C) by the shares of the k nearest neighbours' votes, for several k in one search.

    Args:
        queries: (Q, D).
        bank: (N, D).
        labels: (N,) class numbers of the bank.
        num_classes: C.
        ks: Numbers of neighbours; where the bank has fewer, all of it votes.
        exclude_groups: As in `neighbours`.
        center: Take the bank's mean off first: a part that is the same everywhere says nothing, and in networks that
            were not trained it is most of the cosine.
        device: Where the products are computed.
    """
    most = min(max(ks), len(bank))
    mean = _mean(bank) if center else None
    rows, _ = neighbours(queries, bank, most, exclude_groups=exclude_groups, center=mean, device=device)
    voters = np.where(rows >= 0, np.asarray(labels)[rows], -1)
    return {k: vote(voters[:, :k], num_classes) for k in ks}


def _nearest(
    queries: np.ndarray,
    bank: np.ndarray,
    k: int,
    groups: tuple[np.ndarray, np.ndarray] | None,
    center: np.ndarray | None,
    device: torch.device,
) -> tuple[np.ndarray, np.ndarray]:
    asked = _units(queries, center, device)
    best = torch.full((len(asked), k), -torch.inf, device=device)
    rows = torch.full((len(asked), k), -1, dtype=torch.int64, device=device)
    mine, theirs = (None, None) if groups is None else (torch.as_tensor(g, device=device) for g in groups)
    for start in range(0, len(bank), _CHUNK_ROWS):
        part = slice(start, start + _CHUNK_ROWS)
        cosines = asked @ _units(bank[part], center, device).T
        if mine is not None:
            cosines.masked_fill_(mine[:, None] == theirs[part], -torch.inf)
        values, columns = _largest(cosines, min(k, cosines.shape[1]))
        values, columns = torch.cat([best, values], 1), torch.cat([rows, columns + start], 1)
        best, order = torch.sort(values, dim=1, descending=True, stable=True)
        best, rows = best[:, :k], columns.gather(1, order)[:, :k]
    rows = torch.where(best > -torch.inf, rows, -1)
    return rows.cpu().numpy(), best.cpu().numpy()


def _largest(cosines: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their columns, the largest first, of equal ones the first."""
    values, columns = torch.topk(cosines, k, dim=1)
    order = torch.sort(columns, dim=1).indices
    values, columns = values.gather(1, order), columns.gather(1, order)
    values, order = torch.sort(values, dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)
    # which of several equal ones are the last of the k is not told by topk
    tied = torch.nonzero((cosines >= values[:, -1:]).sum(1) > k).flatten()
    tied = tied[values[tied, -1] > -torch.inf]
    if len(tied):
        values[tied], columns[tied] = (
            found[:, :k] for found in torch.sort(cosines[tied], dim=1, descending=True, stable=True)
        )
    return values, columns


def _units(rows: np.ndarray, center: np.ndarray | None, device: torch.device) -> Tensor:
    found = torch.from_numpy(np.array(rows, np.float32)).to(device)
    if center is not None:
        found -= torch.as_tensor(center, dtype=torch.float32, device=device)
    return torch.nn.functional.normalize(found, dim=1, out=found)


def _mean(bank: np.ndarray) -> np.ndarray:
    total = np.zeros(bank.shape[1])
    for start in range(0, len(bank), _CHUNK_ROWS):
        total += bank[start : start + _CHUNK_ROWS].sum(0, dtype=np.float64)
    return total / len(bank)


def _groups_of(groups: tuple[np.ndarray, np.ndarray] | None, part: slice) -> tuple[np.ndarray, np.ndarray] | None:
    return None if groups is None else (groups[0][part], groups[1])
