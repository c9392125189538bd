"""Descriptions of features. None of them has an agreed better direction, and none enters a verdict.

A high rank may be noise, low uniformity may be a task with few classes, neighbours of the same slide may be tissue or
stain. They tell what changed, and where to look.

Shapes: N tiles, D width, B images, P patches, K neighbours.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from dinoscope.evaluate.knn import neighbours
from dinoscope.losses.gram import gram_loss
from dinoscope.train.health import mean_pairwise_cosine, rankme

__all__ = [
    "NO_VERDICT",
    "Origins",
    "describe",
    "effective_rank",
    "gram_distance",
    "mean_cosine",
    "neighbour_origins",
    "outlier_patches",
    "rank_me",
    "uniformity",
]

NO_VERDICT = "a description: more is not known to be better or worse"
OUTLIER_TIMES = 3.0
ORIGINS = ("same place", "same slide", "same case", "same site", "elsewhere")
_ROWS_AT_ONCE = 2_048


def rank_me(features: np.ndarray) -> float:
    """RankMe (Garrido et al. 2023, arXiv:2210.02885): exp of the entropy of the shares of the singular values.

    Args:
        features: (N, D), not centred, so that a mean that all share counts as the collapse it is. Compare only figures
            of the same N.
    """
    return rankme(torch.from_numpy(np.asarray(features, np.float32)))


def effective_rank(features: np.ndarray) -> float:
    """Effective rank (Roy & Vetterli 2007) of the centred features: of what differs between tiles alone.

    The exponential of the entropy of the singular values' shares, between 1 and min(N - 1, D); 1 where all are equal.
    """
    rows = torch.from_numpy(np.asarray(features, np.float64))
    rows = rows - rows.mean(0)
    gram = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    # rounding in the products leaves what is 0 at 1e-8 of the largest
    singular = singular[singular > 1e-7 * singular.max()]
    shares = singular / singular.sum()
    return float(torch.special.entr(shares).sum().exp()) if len(shares) else 1.0


def mean_cosine(features: np.ndarray) -> float:
    """Mean cosine over all pairs of different tiles: near 1 where all features point one way."""
    return mean_pairwise_cosine(torch.from_numpy(np.asarray(features, np.float32)))


def uniformity(features: np.ndarray, t: float = 2.0) -> float:
    """Uniformity (Wang & Isola 2020, arXiv:2005.10242): log of the mean of exp(-t·|x - y|²), unit features.

    0 where all point one way; about -2t at most where they are spread evenly over a sphere of many dimensions.

    Args:
        features: (N, D), at least two.
        t: As published.
    """
    units = torch.nn.functional.normalize(torch.from_numpy(np.asarray(features, np.float32)), dim=1)
    total = 0.0
    for start in range(0, len(units), _ROWS_AT_ONCE):
        cosines = units[start : start + _ROWS_AT_ONCE] @ units.T
        total += float(torch.exp(2 * t * (cosines - 1)).sum(dtype=torch.float64))
        own = cosines.diagonal(start)
        total -= float(torch.exp(2 * t * (own - 1)).sum(dtype=torch.float64))
    return float(np.log(total / (len(units) * (len(units) - 1))))


@dataclass(frozen=True)
class Origins:
    """Where nearest neighbours come from, the nearest kinship counting: shares that add up to 1.

    Attributes:
        shares: "same place" of the same slide, "same slide" elsewhere, "same case" on another slide, "same site" of
            another case, "elsewhere".
        chance: The same of neighbours drawn at random.
        k: Neighbours a tile.
    """

    shares: dict[str, float]
    chance: dict[str, float]
    k: int


def neighbour_origins(
    features: np.ndarray,
    slides: np.ndarray,
    cases: np.ndarray,
    sites: np.ndarray | None = None,
    centers_um: np.ndarray | None = None,
    *,
    place_um: float = 500.0,
    k: int = 5,
) -> Origins:
    """Shares of the k nearest neighbours (by cosine, centred) by their kinship with the tile.

    Args:
        features: (N, D).
        slides: (N,).
        cases: (N,).
        sites: (N,), or None.
        centers_um: (N, 2) centres of the tiles on their slides in µm, or None.
        place_um: Tiles of a slide up to so far apart, centre to centre, are of the same place.
        k: K.
    """
    num = len(features)
    rows, _ = neighbours(
        features, features, min(k, num - 1), exclude_groups=(np.arange(num),) * 2, center=features.mean(0)
    )
    numbers = [np.unique(names, return_inverse=True)[1] for names in (slides, cases)]
    numbers.append(np.zeros(num, np.int64) - 1 if sites is None else np.unique(sites, return_inverse=True)[1])
    positions = np.full((num, 2), np.inf) if centers_um is None else np.asarray(centers_um, np.float64)

    def kinship(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        same_slide, same_case, same_site = ((number[one] == number[other]) & (number[one] >= 0) for number in numbers)
        with np.errstate(invalid="ignore"):  # infinity less infinity
            near = np.linalg.norm(positions[one] - positions[other], axis=-1) <= place_um
        return np.select([same_slide & near, same_slide, same_case, same_site], range(4), 4)

    found = np.bincount(kinship(np.arange(num)[:, None], rows).ravel(), minlength=5)
    by_chance = np.zeros(5, np.int64)
    for start in range(0, num, _ROWS_AT_ONCE):
        part = np.arange(start, min(start + _ROWS_AT_ONCE, num))
        kinds = kinship(part[:, None], np.arange(num)[None])
        by_chance += np.bincount(kinds[part[:, None] != np.arange(num)], minlength=5)
    shares, chance = (dict(zip(ORIGINS, (n / n.sum()).tolist(), strict=True)) for n in (found, by_chance))
    return Origins(shares, chance, rows.shape[1])


def outlier_patches(patches: np.ndarray, times: float = OUTLIER_TIMES) -> float:
    """Share of patch tokens with a norm of more than `times` the median (Darcet et al. 2024, arXiv:2309.16588).

    Such tokens serve the network as memory, and tell of the whole image where the patch should be.

    Args:
        patches: (B, P, D) of one model, before any normalisation of the norms.
        times: Factor on the median norm of all of them.
    """
    norms = np.linalg.norm(np.asarray(patches, np.float32), axis=-1)
    return float((norms > times * np.median(norms)).mean())


def gram_distance(patches: np.ndarray, others: np.ndarray) -> float:
    """Mean squared difference of the cosines between patches of an image, of two models (arXiv:2508.10104).

    What the gram loss measures between student and gram teacher; 0 where the patches are as alike to each other in
    both. The widths of the models may differ.

    Args:
        patches: (B, P, D) of the one.
        others: (B, P, D') of the other, the same images and patches.
    """
    assert patches.shape[:2] == others.shape[:2], (patches.shape, others.shape)
    distances = [
        float(
            gram_loss(
                torch.from_numpy(np.asarray(one, np.float32))[None],
                torch.from_numpy(np.asarray(other, np.float32))[None],
            )
        )
        for one, other in zip(patches, others, strict=True)
    ]
    return float(np.mean(distances))


def describe(features: np.ndarray, patches: np.ndarray | None = None) -> Mapping[str, float]:
    """The descriptions that need nothing but features: keys `rankme`, `effective_rank`, `mean_cosine`, `uniformity`.

    Args:
        features: (N, D).
        patches: (B, P, D) for `outlier_patches` beside them, or None.
    """
    found = {
        "rankme": rank_me(features),
        "effective_rank": effective_rank(features),
        "mean_cosine": mean_cosine(features),
        "uniformity": uniformity(features),
    }
    return found if patches is None else found | {"outlier_patches": outlier_patches(patches)}
