"""Many logistic regressions of the same rows at once, e.g. one for each strength of the penalty and each inner fold.

Each takes two products with the features an iteration, and products of several regressions are one product of a wider
matrix: as fast as a single one as long as reading the features is what takes the time.

Shapes: N rows, D width, P regressions, C classes.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["fit_logistic", "log_probabilities"]

_HISTORY = 10
_ROWS_A_DIMENSION = 8
_SEARCHES = 8


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
    (intercepts are free), by L-BFGS (Liu & Nocedal 1989) that begins with what the covariance of the features says of
    the Hessian: features of networks vary a thousandfold more along some directions than along others, which takes
    plain L-BFGS ten times the iterations. Along a direction the logits are linear, so that the line search, by
    Newton's method between brackets, needs no further product.

    Args:
        features_ND: Scaled features.
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
    theta = features_ND.new_zeros(features_ND.shape[1] + 1, len(penalties_P), num_classes)
    logits = problem.product(theta)
    gradient = problem.gradient(theta, logits)
    steps: list[tuple[Tensor, Tensor, Tensor]] = []
    finished, numbers = theta.clone(), torch.arange(len(penalties_P), device=theta.device)
    for iteration in range(max_iterations):
        going = gradient.abs().amax((0, 2)) > tolerance
        if not going.any():
            break
        if going.sum() <= 0.7 * len(going):  # those that are done take no more time
            finished[:, numbers], kept = theta, going.nonzero().flatten()
            problem, numbers, going = problem.some(kept), numbers[kept], going[kept]
            theta, logits, gradient = theta[:, kept], logits[:, kept], gradient[:, kept]
            steps = [(moved[:, kept], change[:, kept], curvature[kept]) for moved, change, curvature in steps]
        direction = _direction(gradient, steps, problem.preconditioned) * going[:, None]
        slope = _dot(direction, gradient)
        direction = torch.where((slope < 0)[:, None], direction, -gradient * going[:, None])
        slope = _dot(direction, gradient)
        along = problem.product(direction)
        length = problem.line_search(theta, direction, logits, along, slope, first=not iteration)
        moved = length[:, None] * direction
        theta = theta + moved
        # sums of many steps drift in float32
        logits = logits + length[:, None] * along if (iteration + 1) % 25 else problem.product(theta)
        new = problem.gradient(theta, logits)
        steps.append((moved, new - gradient, _dot(moved, new - gradient)))
        steps, gradient = steps[-_HISTORY:], new
    finished[:, numbers] = theta
    return finished


def log_probabilities(features_ND: Tensor, theta: Tensor) -> Tensor:
    """(N, P, C) of the regressions of `fit_logistic`."""
    return torch.log_softmax(_product(features_ND, theta), dim=-1)


class _Problem:
    """The objectives of P regressions."""

    def __init__(self, features: Tensor, labels: Tensor, num_classes: int, penalties: Tensor, weights: Tensor) -> None:
        self.features, self.penalties = features, penalties.to(features)
        self.shares = (weights / weights.sum(0)).to(features)  # (N, P)
        self.labels = torch.nn.functional.one_hot(labels, num_classes).to(features)[:, None]  # (N, 1, C)
        self.spread, self.axes = _spread(features)
        self.bends = torch.full_like(self.penalties, 0.25)  # (P,) mean of p (1 - p), the Hessian's share of the spread

    def some(self, kept: Tensor) -> "_Problem":
        """Those of some regressions."""
        fewer = copy.copy(self)
        fewer.penalties, fewer.shares, fewer.bends = self.penalties[kept], self.shares[:, kept], self.bends[kept]
        return fewer

    def product(self, theta: Tensor) -> Tensor:
        return _product(self.features, theta)

    def gradient(self, theta: Tensor, logits: Tensor) -> Tensor:
        probs = torch.softmax(logits, -1)
        self.bends = (self.shares * (1 - probs.square().sum(-1))).sum(0) / probs.shape[-1]
        residual = (probs - self.labels) * self.shares[..., None]
        slope = (self.features.T @ residual.flatten(1)).unflatten(1, residual.shape[1:])
        return torch.cat([slope + self.penalties[:, None] * theta[:-1], residual.sum(0, keepdim=True)])

    def preconditioned(self, gradient: Tensor) -> Tensor:
        """(D + 1, P, C) the gradient times the inverse of about the Hessian, by the spread of the features alone."""
        bends = self.bends.clamp(min=1e-4)
        along = torch.tensordot(self.axes.T, gradient[:-1], dims=1)
        along = along / (bends * self.spread[:, None] + self.penalties)[..., None]
        return torch.cat([torch.tensordot(self.axes, along, dims=1), gradient[-1:] / bends[:, None]])

    def line_search(
        self, theta: Tensor, direction: Tensor, logits: Tensor, along: Tensor, start: Tensor, first: bool
    ) -> Tensor:
        """(P,) about where each objective is least along its direction, given its slopes where the search begins."""
        bend = self.penalties * _dot(direction[:-1], direction[:-1])
        base = self.penalties * _dot(theta[:-1], direction[:-1])
        length = torch.zeros_like(base) if first else torch.ones_like(base)
        low, high = torch.zeros_like(base), torch.full_like(base, torch.inf)
        for _ in range(_SEARCHES):
            probs = torch.softmax(logits + length[:, None] * along, -1)
            mean = (probs * along).sum(-1)
            slope = (self.shares * (mean - (self.labels * along).sum(-1))).sum(0) + base + length * bend
            curve = (self.shares * ((probs * along.square()).sum(-1) - mean.square())).sum(0) + bend
            done = slope.abs() <= 0.1 * start.abs()
            if done.all():
                break
            low, high = torch.where(slope < 0, length, low), torch.where(slope > 0, length, high)
            newton = length - slope / curve.clamp(min=torch.finfo(curve.dtype).tiny)
            inside = (newton > low) & (newton < high) & (newton <= 10 * length.clamp(min=1e-3) + 10)
            halved = torch.where(high.isfinite(), (low + high) / 2, 2 * length + 1)
            length = torch.where(done, length, torch.where(inside, newton, halved))
        return length


def _product(features: Tensor, theta: Tensor) -> Tensor:
    logits = (features @ theta[:-1].flatten(1)).unflatten(1, theta.shape[1:])
    return logits + theta[-1]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((0, 2))


def _spread(features: Tensor) -> tuple[Tensor, Tensor]:
    """Variances (D,) along the axes (D, D) in which features, some rows of them where there are many, do not covary."""
    rows = features[:: max(1, len(features) // (_ROWS_A_DIMENSION * features.shape[1]))]
    rows = rows - rows.mean(0)
    spread, axes = torch.linalg.eigh(rows.T @ rows / len(rows))
    return spread.clamp(min=0), axes


def _direction(
    gradient: Tensor, steps: list[tuple[Tensor, Tensor, Tensor]], preconditioned: Callable[[Tensor], Tensor]
) -> Tensor:
    """Minus the inverse Hessian, as the last steps tell it, times the gradient: the two loops of L-BFGS.

    A regression that did not move, or moved along too little curvature for the arithmetic, gets nothing from a step.
    """
    found, kept = -gradient, []
    for moved, change, curvature in reversed(steps):
        useful = curvature > 1e-10 * _dot(change, change).clamp(min=torch.finfo(change.dtype).tiny)
        share = torch.where(useful, _dot(moved, found) / torch.where(useful, curvature, 1), 0)
        found = found - share[:, None] * change
        kept.append((moved, change, curvature, useful, share))
    found, scale = preconditioned(found), torch.ones_like(gradient[0, :, 0])
    if kept:
        _, change, curvature, useful, _ = kept[0]
        expected = _dot(change, preconditioned(change)).clamp(min=torch.finfo(change.dtype).tiny)
        scale = torch.where(useful, curvature / expected, scale)
    found = found * scale[:, None]
    for moved, change, curvature, useful, share in reversed(kept):
        back = torch.where(useful, _dot(change, found) / torch.where(useful, curvature, 1), 0)
        found = found + torch.where(useful, share - back, 0)[:, None] * moved
    return found
