"""Exact nearest neighbours by cosine, and classification by them.

The bank is read chunk by chunk, from memory or from a memory-mapped file in float16 or float32, and multiplied in
float32: a million tiles of 1,024 values take 1,000 queries at a time, no approximation, and memory for one chunk.
Products are most of the time: after the first chunk only blocks of rows whose largest product is above the least one
that a query has kept are looked into. Where cosines are so close that float32 does not tell them apart, float64 puts
them in order, so that neither the number of threads nor the device decides between rows that are alike.

Shapes: Q queries, N rows of the bank, D width, K neighbours, C classes.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["knn_predict", "neighbours", "vote"]

_CHUNK_ROWS = 16_384  # whole blocks
_BLOCK_ROWS = 64
_QUERIES_AT_ONCE = 1_024
_SPARE = 16  # neighbours more than asked for, whose order float32 may have wrong
_CLOSE = 1e-5  # ten times what float32 products of a few thousand values are off
_VALUES_AT_ONCE = 4_000_000  # in float64
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
    found_rows, found_cosines = np.empty((len(queries), k), np.int64), np.empty((len(queries), k), np.float32)
    for start in range(0, len(queries), _QUERIES_AT_ONCE):
        part = slice(start, start + _QUERIES_AT_ONCE)
        groups = None if exclude_groups is None else (exclude_groups[0][part], exclude_groups[1])
        most = min(k + _SPARE, len(bank))
        rows, cosines = _candidates(queries[part], bank, most, groups, center, torch.device(device))
        _tell_apart(queries[part], bank, rows, cosines, center)
        order = np.lexsort((rows, -cosines), axis=1)[:, :k]
        found_rows[part] = np.take_along_axis(rows, order, 1)
        found_cosines[part] = np.take_along_axis(cosines, order, 1)
    return found_rows, found_cosines


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


def _candidates(
    queries: np.ndarray,
    bank: np.ndarray,
    k: int,
    groups: tuple[np.ndarray, np.ndarray] | None,
    center: np.ndarray | None,
    device: torch.device,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows (Q, k) of the bank with the largest cosines, by float32, and these in float64; -1 and -inf of fewer."""
    asked = _centred(torch.from_numpy(np.array(queries, np.float32)).to(device), center)
    asked /= _lengths(asked)
    best = torch.full((len(asked), k), -torch.inf, device=device)
    rows = torch.full((len(asked), k), -1, dtype=torch.int64, device=device)
    mine, theirs = (None, None) if groups is None else (torch.as_tensor(g, device=device) for g in groups)
    products = torch.empty(_whole_blocks(min(len(bank), _CHUNK_ROWS)), len(asked), device=device)
    for start, chunk in _chunks(bank, device):
        chunk = _centred(chunk, center)
        cosines = torch.mm(chunk, asked.T, out=products[: len(chunk)]).div_(_lengths(chunk))
        same = None if mine is None else (mine, theirs[start : start + len(chunk)])
        hits = _hits(products, len(chunk), best[:, -1]) if start else None
        if hits is None:
            values, columns = _largest(cosines.T, min(k, len(chunk)), same)
            queries_of = torch.arange(len(asked), device=device).repeat_interleave(values.shape[1])
            hits = queries_of, columns.flatten(), values.flatten()
        elif same is not None:
            allowed = same[0][hits[0]] != same[1][hits[1]]
            hits = tuple(of[allowed] for of in hits)
        best, rows = _merged(best, rows, hits[0], hits[1] + start, hits[2])
    return torch.where(best > -torch.inf, rows, -1).cpu().numpy(), best.double().cpu().numpy()


def _chunks(bank: np.ndarray, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """Where each chunk of the bank starts, and its rows in float32; the memory of one is that of the next."""
    size = min(_CHUNK_ROWS, len(bank))
    whole = torch.empty(size, bank.shape[1])
    # torch makes float32 of float16 several times as fast as numpy
    half = torch.empty(size, bank.shape[1], dtype=torch.float16) if bank.dtype == np.float16 else None
    for start in range(0, len(bank), size):
        rows = bank[start : start + size]
        chunk = whole[: len(rows)]
        if half is None:
            np.copyto(chunk.numpy(), rows, casting="same_kind")
        else:
            half[: len(rows)].numpy()[:] = rows
            chunk.copy_(half[: len(rows)])
        yield start, chunk.to(device)


def _hits(products: Tensor, num_rows: int, least: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Queries, columns and values of the products (rows × queries) above a query's least, by ascending columns.

    None where they are in so many places that a full search is faster.
    """
    whole = products[: _whole_blocks(num_rows)]
    whole[num_rows:] = -torch.inf
    blocks = whole.unflatten(0, (-1, _BLOCK_ROWS))
    block, query = torch.nonzero(blocks.amax(1) > least, as_tuple=True)
    if 4 * len(block) > len(blocks) * len(least):
        return None
    values = blocks[block, :, query]
    hit, place = torch.nonzero(values > least[query, None], as_tuple=True)
    return query[hit], block[hit] * _BLOCK_ROWS + place, values[hit, place]


def _merged(best: Tensor, rows: Tensor, query: Tensor, new_rows: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """The k largest of each query (Q, k) among those so far and new ones, of equal ones the earlier."""
    num, k = best.shape
    query = torch.cat([torch.arange(num, device=best.device).repeat_interleave(k), query])
    values, all_rows = torch.cat([best.flatten(), new]), torch.cat([rows.flatten(), new_rows])
    order = torch.sort(values, descending=True, stable=True).indices
    order = order[torch.sort(query[order], stable=True).indices]
    counts = torch.bincount(query, minlength=num)
    taken = order[(counts.cumsum(0) - counts)[:, None] + torch.arange(k, device=best.device)]
    return values[taken], all_rows[taken]


def _largest(cosines: Tensor, k: int, same: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their columns, the largest first, of equal ones the first."""
    cosines = cosines.contiguous()
    if same is not None:
        cosines = cosines.masked_fill(same[0][:, None] == same[1], -torch.inf)
    more, places = torch.topk(cosines, min(k + 1, cosines.shape[1]), dim=1)
    columns, order = torch.sort(places[:, :k], dim=1)
    values, order = torch.sort(more[:, :k].gather(1, order), dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)
    # which of several equal ones are the last of the k is not told by topk
    tied = torch.nonzero((more[:, -1] == values[:, -1]) & (more.shape[1] > k) & (more[:, -1] > -torch.inf)).flatten()
    if len(tied):
        values[tied], columns[tied] = (
            found[:, :k] for found in torch.sort(cosines[tied], dim=1, descending=True, stable=True)
        )
    return values, columns


def _tell_apart(
    queries: np.ndarray, bank: np.ndarray, rows: np.ndarray, cosines: np.ndarray, center: np.ndarray | None
) -> None:
    """Works out in float64 those of the cosines (Q, k), in descending order, that are close to the next or the last."""
    close = np.zeros(rows.shape, dtype=bool)
    with np.errstate(invalid="ignore"):  # between two that are not there
        close[:, 1:] = cosines[:, :-1] - cosines[:, 1:] < _CLOSE
    close[:, :-1] |= close[:, 1:]
    close &= rows >= 0
    query, place = np.nonzero(close)
    shift = 0.0 if center is None else np.asarray(center, np.float64)
    at_once = max(1, _VALUES_AT_ONCE // bank.shape[1])
    for start in range(0, len(query), at_once):
        its_query, its_place = query[start : start + at_once], place[start : start + at_once]
        asked = queries[its_query].astype(np.float64) - shift
        near = bank[rows[its_query, its_place]].astype(np.float64) - shift
        lengths = np.sqrt(np.square(near).sum(1) * np.square(asked).sum(1))
        # sums over the last axis are the same wherever a row lies, unlike those of a product of matrices
        cosines[its_query, its_place] = (near * asked).sum(1) / np.maximum(lengths, 1e-24)


def _centred(rows: Tensor, center: np.ndarray | None) -> Tensor:
    return rows if center is None else rows.sub_(torch.as_tensor(center, dtype=torch.float32, device=rows.device))


def _lengths(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_(min=1e-12)


def _whole_blocks(num_rows: int) -> int:
    return -(-num_rows // _BLOCK_ROWS) * _BLOCK_ROWS


def _mean(bank: np.ndarray) -> np.ndarray:
    total = np.zeros(bank.shape[1])
    for _, chunk in _chunks(bank, torch.device("cpu")):
        total += chunk.sum(0).numpy()
    return total / len(bank)
