"""Many logistic regressions of the same rows at once, e.g. one for each strength of the penalty and each inner fold.

Each takes two products with the features an iteration, and products of several regressions are one product of a wider
matrix: as fast as a single one as long as reading the features is what takes the time. How the features vary together
is worked out once, for all of them: with that as the first guess of the curvature, a few dozen iterations are enough
however correlated the features are.

Shapes: N rows, D width, P regressions, C classes. Inside, rows come last: what is done class by class is quick then.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["fit_logistic", "log_probabilities"]

_HISTORY = 10
_SEARCHES = 8
_LEAST_SLOPE = 0.5  # of that where a line search begins, at which it ends
_ROWS_OF_SPREAD = 16_384  # a first guess of the curvature needs no more
_WIDTH_OF_SPREAD = 4_096  # above it, eigenvectors would take longer than they save
_DRIFT = 25  # iterations after which logits are worked out anew: sums of many steps drift in float32


def fit_logistic(
    features_ND: Tensor,
    labels_N: Tensor,
    num_classes: int,
    penalties_P: Tensor,
    weights_NP: Tensor,
    *,
    max_iterations: int = 300,
    tolerance: float = 1e-4,
) -> Tensor:
    """Multinomial logistic regressions with L2 penalty, in the type of the features.

    Each minimises the weighted mean of -log p(label) plus penalty / 2 times the sum of its squared coefficients
    (intercepts are free), by L-BFGS (Liu & Nocedal 1989), which begins from the curvature that the features would have
    if all rows were equally undecided (after Böhning 1992, scaled to how undecided they are). Along a direction the
    logits are linear, so that the line search, by Newton's method between brackets, needs no further product.

    Args:
        features_ND: Scaled features, whose means are about 0.
        labels_N: Class numbers.
        num_classes: C.
        penalties_P: Above 0.
        weights_NP: Weights of the rows in each regression, 0 for rows that it must not see.
        max_iterations: Bound for those that do not reach the tolerance.
        tolerance: Largest absolute value of the gradient to stop at.

    Returns:
        (D + 1, P, C) coefficients, the intercepts last.
    """
    problem = _Problem(features_ND, labels_N, num_classes, penalties_P, weights_NP)
    theta = features_ND.new_zeros(num_classes, len(penalties_P), features_ND.shape[1] + 1)
    logits = problem.product(theta)
    probs = torch.softmax(logits, 0)
    gradient = problem.gradient(theta, probs)
    steps: list[_Step] = []
    finished, numbers = theta.clone(), torch.arange(len(penalties_P), device=theta.device)
    for iteration in range(max_iterations):
        going = gradient.abs().amax((0, 2)) > tolerance
        if not going.any():
            break
        if going.sum() <= 0.7 * len(going):  # those that are done take no more time
            finished[:, numbers], kept = theta, going.nonzero().flatten()
            problem, numbers, going = problem.some(kept), numbers[kept], going[kept]
            theta, logits, probs, gradient = (of[:, kept] for of in (theta, logits, probs, gradient))
            steps = [tuple(part[:, kept] for part in step) for step in steps]
        direction = _direction(gradient, steps, problem, problem.undecided(probs)) * going[:, None]
        slope = _dot(direction, gradient)
        direction = torch.where((slope < 0)[:, None], direction, -gradient * going[:, None])
        along = problem.product(direction)
        length, probs = problem.line_search(theta, direction, logits, along, _dot(direction, gradient))
        moved = length[:, None] * direction
        theta = theta + moved
        logits = torch.addcmul(logits, along, length[:, None])
        if (iteration + 1) % _DRIFT == 0:
            logits = problem.product(theta)
            probs = torch.softmax(logits, 0)
        new = problem.gradient(theta, probs)
        steps = [*steps[1 - _HISTORY :], (moved, new - gradient)]
        gradient = new
    finished[:, numbers] = theta
    return finished.permute(2, 1, 0).contiguous()


def log_probabilities(features_ND: Tensor, theta: Tensor) -> Tensor:
    """(N, P, C) of the regressions of `fit_logistic`."""
    logits = (features_ND @ theta[:-1].flatten(1)).unflatten(1, theta.shape[1:]) + theta[-1]
    return torch.log_softmax(logits, dim=-1)


_Step = tuple[Tensor, Tensor]  # what was moved, and by how much the gradient changed: (C, P, D + 1) each


class _Problem:
    """The objectives of P regressions."""

    def __init__(self, features: Tensor, labels: Tensor, num_classes: int, penalties: Tensor, weights: Tensor) -> None:
        self.features, self.penalties = features, penalties.to(features)
        self.shares = (weights / weights.sum(0)).to(features).T.contiguous()  # (P, N)
        self.labels = torch.nn.functional.one_hot(labels, num_classes).to(features).T[:, None].contiguous()  # (C, 1, N)
        self.spread, self.vectors = _spread(features)

    def some(self, kept: Tensor) -> "_Problem":
        """Those of some regressions."""
        fewer = copy.copy(self)
        fewer.penalties, fewer.shares = self.penalties[kept], self.shares[kept]
        return fewer

    def product(self, theta: Tensor) -> Tensor:
        """Logits (C, P, N)."""
        return (theta[..., :-1].flatten(0, 1) @ self.features.T).unflatten(0, theta.shape[:2]) + theta[..., -1:]

    def gradient(self, theta: Tensor, probs: Tensor) -> Tensor:
        residual = (probs - self.labels).mul_(self.shares)
        slope = (residual.flatten(0, 1) @ self.features).unflatten(0, theta.shape[:2])
        slope += self.penalties[:, None] * theta[..., :-1]
        return torch.cat([slope, residual.sum(2, keepdim=True)], 2)

    def undecided(self, probs: Tensor) -> Tensor:
        """(P,) how much the rows' logits still curve the loss, on average: 1 / C where all classes are as probable."""
        certain = (probs.square().sum(0) * self.shares).sum(1)
        return ((1 - certain) / (len(probs) - 1)).clamp(min=1e-4)

    def uncurved(self, values: Tensor, undecided: Tensor) -> Tensor:
        """The inverse of the guessed curvature, times values (C, P, D + 1)."""
        turned = values[..., :-1] if self.vectors is None else values[..., :-1] @ self.vectors
        turned = turned / (undecided[:, None] * self.spread + self.penalties[:, None])
        back = turned if self.vectors is None else turned @ self.vectors.T
        return torch.cat([back, values[..., -1:] / undecided[:, None]], 2)

    def line_search(
        self, theta: Tensor, direction: Tensor, logits: Tensor, along: Tensor, start: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(P,) where the objective along its direction slopes little enough, and the probabilities (C, P, N) there.

        Args:
            theta: Coefficients.
            direction: Of the search.
            logits: Of the coefficients.
            along: Of the direction.
            start: Slopes where the search begins.
        """
        bend = self.penalties * _dot(direction[..., :-1], direction[..., :-1])
        base = self.penalties * _dot(theta[..., :-1], direction[..., :-1])
        base = base - ((self.labels * along).sum(0) * self.shares).sum(1)
        length, low, high = torch.ones_like(base), torch.zeros_like(base), torch.full_like(base, torch.inf)
        for _ in range(_SEARCHES):
            probs = torch.softmax(torch.addcmul(logits, along, length[:, None]), 0)
            weighted = probs * along
            mean = weighted.sum(0)
            slope = (self.shares * mean).sum(1) + base + length * bend
            done = slope.abs() <= _LEAST_SLOPE * start.abs()
            if done.all():
                break
            curve = (self.shares * ((weighted * along).sum(0) - mean.square())).sum(1) + bend
            low, high = torch.where(slope < 0, length, low), torch.where(slope > 0, length, high)
            newton = length - slope / curve.clamp(min=torch.finfo(curve.dtype).tiny)
            inside = (newton > low) & (newton < high) & (newton <= 10 * length.clamp(min=1e-3) + 10)
            halved = torch.where(high.isfinite(), (low + high) / 2, 2 * length + 1)
            length = torch.where(done, length, torch.where(inside, newton, halved))
        else:
            probs = torch.softmax(torch.addcmul(logits, along, length[:, None]), 0)
        return length, probs


def _spread(features: Tensor) -> tuple[Tensor, Tensor | None]:
    """Mean squares (D,) along the directions (D, D) in which rows vary independently; None: along the dimensions."""
    rows = features[:: -(-len(features) // _ROWS_OF_SPREAD)]
    if rows.shape[1] > _WIDTH_OF_SPREAD:
        return rows.square().mean(0), None
    spread, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    return spread.clamp(min=0), vectors


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((0, 2))


def _direction(gradient: Tensor, steps: Sequence[_Step], problem: _Problem, undecided: Tensor) -> Tensor:
    """Minus the inverse Hessian, as the last steps tell it, times the gradient: the two loops of L-BFGS.

    A regression that did not move, or moved along too little curvature for the arithmetic, gets nothing from a step.
    """
    found, kept = -gradient, []
    tiny = torch.finfo(gradient.dtype).tiny
    for moved, change in reversed(steps):
        curvature = _dot(moved, change)
        useful = curvature > 1e-10 * _dot(change, change).clamp(min=tiny)
        inverse = torch.where(useful, 1 / torch.where(useful, curvature, 1), 0)
        share = _dot(moved, found) * inverse
        found = found - share[:, None] * change
        kept.append((moved, change, inverse, share))
    found = problem.uncurved(found, undecided)
    for moved, change, inverse, share in reversed(kept):
        back = _dot(change, found) * inverse
        found = found + (share - back)[:, None] * moved
    return found
