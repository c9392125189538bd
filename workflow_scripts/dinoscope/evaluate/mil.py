"""Attention-based multiple-instance learning: one label a case, a bag of tiles that nobody labelled.

Gated attention of Ilse et al. 2018 (arXiv:1802.04712), small, and the same with the same budget for every encoder. What
stands beside it is the linear probe of a case's mean feature: attention has to earn its place.

Shapes: N bags (all tiles of all slides of a case), T tiles of several bags, D width, H hidden, O outputs, R repeats.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from dinoscope.evaluate.folds import Fold, strata_of_cases, strata_of_survival
from dinoscope.evaluate.scores import Predictions
from dinoscope.evaluate.survival import cox_loss
from dinoscope.evaluate.tuning import inner_folds, pooled

__all__ = ["GatedAttention", "MilProbed", "MilSettings", "attention_probe", "mean_pool"]

Kind = Literal["classes", "values", "survival"]
_PARTS = 5  # of the training cases, one of which chooses the epoch
_TILES_AT_ONCE = 32_768
_TILES_ASKED_AT_ONCE = 4_096  # memory of this size is used again and again, that of larger parts is new each time


@dataclass(frozen=True)
class MilSettings:
    """The budget, the same for all encoders.

    Attributes:
        hidden: H, width that features are brought to.
        attention: Width of the gate.
        dropout: Share of hidden values that are dropped while training.
        learning_rate: Of AdamW.
        weight_decay: Of AdamW.
        epochs: At most; those of the least loss on the inner validation cases are kept.
        patience: Epochs without a lesser loss after which training ends.
        bags_at_once: Batch. Survival compares cases within a batch: it takes four times as many at once, and four times
            the epochs, for as many steps.
        tiles: Drawn from a bag, anew each epoch; all of them count when it is asked about.
    """

    hidden: int = 128
    attention: int = 64
    dropout: float = 0.25
    learning_rate: float = 1e-3
    weight_decay: float = 1e-3
    epochs: int = 40
    patience: int = 10
    bags_at_once: int = 16
    tiles: int = 128


class GatedAttention(nn.Module):
    """Tiles to one output a bag: a weighted mean, by weights that a gated network gives each tile (sum 1 a bag)."""

    def __init__(self, width: int, outputs: int, settings: MilSettings) -> None:
        super().__init__()
        hidden = settings.hidden
        self.embed = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(settings.dropout))
        self.value, self.gate = nn.Linear(hidden, settings.attention), nn.Linear(hidden, settings.attention)
        self.weigh = nn.Linear(settings.attention, 1)
        self.head = nn.Linear(hidden, outputs)

    def forward(self, tiles_TD: Tensor, bag_T: Tensor, num_bags: int) -> tuple[Tensor, Tensor]:
        """Outputs (bags, O) and the weight of each tile (T,).

        Args:
            tiles_TD: Tiles of all bags.
            bag_T: Number of each tile's bag.
            num_bags: Number of bags; each has a tile.
        """
        hidden = self.embed(tiles_TD)
        scores = self.weigh(torch.tanh(self.value(hidden)) * torch.sigmoid(self.gate(hidden)))[:, 0]
        largest = scores.new_full((num_bags,), -torch.inf).scatter_reduce(0, bag_T, scores.detach(), "amax")
        powers = torch.exp(scores - largest[bag_T])
        weights = powers / powers.new_zeros(num_bags).index_add(0, bag_T, powers)[bag_T]
        mean = hidden.new_zeros(num_bags, hidden.shape[1]).index_add(0, bag_T, weights[:, None] * hidden)
        return self.head(mean), weights


@dataclass(frozen=True)
class MilProbed:
    """Answers of attention.

    Attributes:
        predictions: Pooled over folds.
        epochs: Kept of each fold.
        models: Of each fold, when asked for.
    """

    predictions: Predictions
    epochs: tuple[int, ...]
    models: tuple["TrainedAttention", ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class TrainedAttention:
    """A network with the scale of its features."""

    network: GatedAttention
    mean: Tensor
    factor: Tensor

    def scaled(self, tiles: Tensor) -> Tensor:
        """Tiles (T, D) as the network takes them, in float32; the given ones are left as they are."""
        copied = tiles.to(self.mean.device, torch.float32, copy=True)  # and what is new may be changed in place
        return copied.sub_(self.mean).mul_(self.factor)

    @torch.no_grad()
    def ask(self, bag: np.ndarray) -> tuple[Tensor, Tensor]:
        """Outputs (O,) and weights (T,) of one bag (T, D), all tiles of it."""
        self.network.eval()
        rows = self.scaled(torch.as_tensor(bag))
        output, weights = self.network(rows, torch.zeros(len(rows), dtype=torch.int64, device=rows.device), 1)
        return output[0], weights


def mean_pool(bags: Sequence[np.ndarray]) -> np.ndarray:
    """Mean feature of each bag, (N, D) float32: what `linear_probe`, `ridge_probe` and `cox_probe` take."""
    return np.stack([bag.mean(0, dtype=np.float64) for bag in bags]).astype(np.float32)


def attention_probe(
    bags: Sequence[np.ndarray],
    labels: np.ndarray,
    cases: np.ndarray,
    folds: Sequence[Fold],
    *,
    kind: Kind = "classes",
    settings: MilSettings | None = None,
    seed: int = 0,
    keep_models: bool = False,
    device: str | torch.device = "cpu",
) -> MilProbed:
    """Trains gated attention on each fold's training cases and asks it about the others.

    A fifth of the training cases (a third or half of few), stratified, is kept out of the steps and chooses the epoch.
    Risks of survival are brought to the mean 0 and deviation 1 of each fold's training cases.

    Args:
        bags: N arrays (tiles, D).
        labels: (N,) class numbers from 0, (N,) values, or (N, 2) time and event.
        cases: (N,).
        folds: As all probes of a comparison have them.
        kind: Of the labels.
        settings: The budget.
        seed: Of the weights, the order and the tiles drawn, with the fold's number.
        keep_models: Return the networks as well, to look at their attention.
        device: Where it is trained.
    """
    settings, device = settings or MilSettings(), torch.device(device)
    task, moments = _task(kind, labels, cases), _moments(bags)
    answers, epochs, models = [], [], []
    for number, fold in enumerate(folds):
        model, its_task, epoch = _trained(bags, moments, task, cases, fold, settings, [seed, number], device)
        answers.append(its_task.answers(torch.stack([model.ask(bags[index])[0] for index in fold.test])))
        epochs.append(epoch)
        models += [model] if keep_models else []
    predictions = Predictions(labels, pooled(folds, answers, len(bags)), cases)
    return MilProbed(predictions, tuple(epochs), tuple(models))


@dataclass(frozen=True)
class _Task:
    """Targets of all bags, and how outputs are judged and read."""

    kind: Kind
    targets: Tensor
    num_outputs: int
    strata: np.ndarray
    more: int = 1  # bags at once, and epochs
    center: float = 0.0
    spread: float = 1.0

    def loss(self, outputs: Tensor, rows: Sequence[int]) -> Tensor:
        """The mean; every class has the same weight."""
        targets = self.targets[rows].to(outputs.device)
        if self.kind == "classes":
            counts = torch.bincount(targets, minlength=self.num_outputs).clamp(min=1)
            shares = 1 / counts[targets]
            each = nn.functional.cross_entropy(outputs, targets, reduction="none")
            return (each * shares).sum() / shares.sum()
        if self.kind == "values":
            return (outputs[:, 0] - (targets - self.center) / self.spread).square().mean()
        return cox_loss(outputs[:, 0].double(), targets[:, 0], targets[:, 1] > 0)

    def answers(self, outputs: Tensor) -> np.ndarray:
        outputs = outputs.double().cpu()
        if self.kind == "classes":
            return torch.softmax(outputs, 1).numpy()
        return (outputs[:, 0] * self.spread + self.center).numpy()


def _task(kind: Kind, labels: np.ndarray, cases: np.ndarray) -> _Task:
    if kind == "classes":
        return _Task(kind, torch.as_tensor(labels.astype(np.int64)), int(labels.max()) + 1, labels)
    targets = torch.as_tensor(labels, dtype=torch.float64)
    if kind == "values":
        return _Task(kind, targets, 1, strata_of_cases(labels, cases, _PARTS))
    return _Task(kind, targets, 1, strata_of_survival(labels, cases, _PARTS), more=4)


def _trained(
    bags: Sequence[np.ndarray],
    moments: tuple[np.ndarray, np.ndarray],
    task: _Task,
    cases: np.ndarray,
    fold: Fold,
    settings: MilSettings,
    seed: Sequence[int],
    device: torch.device,
) -> tuple[TrainedAttention, _Task, int]:
    held_out = inner_folds(task.strata[fold.train], cases[fold.train], seed[0], most=_PARTS)
    chosen = held_out[0] if held_out else np.arange(len(fold.train))  # too few to keep any: judged as trained
    validation = fold.train[chosen]
    steps_on = np.setdiff1d(fold.train, validation) if held_out else fold.train
    if task.kind == "values":
        mine = task.targets[steps_on]
        task = replace(task, center=float(mine.mean()), spread=float(mine.std().clamp(min=1e-12)))
    mean, factor = _scale(moments[0][steps_on], moments[1][steps_on], device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(np.random.default_rng(seed).integers(2**31)))
        network = GatedAttention(len(mean), task.num_outputs, settings).to(device)
        trained = TrainedAttention(network, mean, factor)
        epoch = _train(trained, bags, task, steps_on, validation, settings, seed)
    if task.kind == "survival":  # its loss leaves risks free to shift, each fold's by another amount
        with torch.no_grad():
            asked = _drawn(bags, fold.train, 4 * settings.tiles, [*seed, 0], _TILES_ASKED_AT_ONCE)
            risks = _outputs(trained, asked)[:, 0].double()
        spread = 1 / float(risks.std().clamp(min=1e-12))
        task = replace(task, center=-float(risks.mean()) * spread, spread=spread)
    return trained, task, epoch


def _train(
    trained: TrainedAttention,
    bags: Sequence[np.ndarray],
    task: _Task,
    steps_on: np.ndarray,
    validation: np.ndarray,
    settings: MilSettings,
    seed: Sequence[int],
) -> int:
    network = trained.network
    optimizer = torch.optim.AdamW(network.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    # the same each epoch
    asked = list(_drawn(bags, validation, 4 * settings.tiles, [*seed, 0], _TILES_ASKED_AT_ONCE))
    least, kept, state = np.inf, 0, None
    for epoch in range(task.more * settings.epochs):
        network.train()
        for batch in _batches(steps_on, task, settings, np.random.default_rng([*seed, epoch])):
            drawn = _drawn(bags, batch, settings.tiles, [*seed, epoch], _TILES_AT_ONCE)
            loss = task.loss(_outputs(trained, drawn), batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        network.eval()
        with torch.no_grad():
            found = float(task.loss(_outputs(trained, asked), validation))
        if found < least:
            least, kept = found, epoch + 1
            state = {name: value.clone() for name, value in network.state_dict().items()}
        elif epoch + 1 - kept >= task.more * settings.patience:
            break
    if state is not None:
        network.load_state_dict(state)
    return kept


def _batches(rows: np.ndarray, task: _Task, settings: MilSettings, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Rows in random order, in parts of about the same size; of survival such as hold an event."""
    size = task.more * settings.bags_at_once
    for batch in np.array_split(rng.permutation(rows), max(1, len(rows) // size)):
        if task.kind != "survival" or task.targets[batch, 1].any():
            yield batch


def _drawn(
    bags: Sequence[np.ndarray], rows: np.ndarray, most: int, seed: Sequence[int], at_once: int
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """At most so many tiles of each bag, drawn by the seed and the bag's number: tiles, number of their bag, bags.

    In parts of bags of about `at_once` tiles together, in the type of the features, so that they may be kept.
    """
    chosen = []
    for index in rows:
        count, choice = len(bags[index]), slice(None)
        if count > most:
            rng = np.random.default_rng([*seed, int(index), 1])
            choice = np.sort(rng.choice(count, most, replace=False))
        chosen.append((bags[index], choice))
    for start, stop in _parts([min(len(bag), most) for bag, _ in chosen], at_once):
        some = [bag[choice] for bag, choice in chosen[start:stop]]
        yield np.concatenate(some), np.repeat(np.arange(len(some)), [len(bag) for bag in some]), len(some)


def _outputs(trained: TrainedAttention, drawn: Iterable[tuple[np.ndarray, np.ndarray, int]]) -> Tensor:
    """Outputs (bags, O) of what `_drawn` yields."""
    outputs = []
    for tiles, numbers, count in drawn:
        scaled = trained.scaled(torch.from_numpy(tiles))
        outputs.append(trained.network(scaled, torch.as_tensor(numbers, device=scaled.device), count)[0])
    return torch.cat(outputs)


def _parts(sizes: Sequence[int], at_once: int) -> Iterator[tuple[int, int]]:
    """Runs of bags of at most so many tiles together, or of a single bag."""
    start, total = 0, 0
    for index, size in enumerate(sizes):
        if total and total + size > at_once:
            yield start, index
            start, total = index, 0
        total += size
    yield start, len(sizes)


def _moments(bags: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of each bag's tiles, (N, D) float64, once for all folds."""
    means, variances = (np.empty((len(bags), bags[0].shape[1])) for _ in range(2))
    for index, bag in enumerate(bags):
        means[index] = bag.mean(0, dtype=np.float64)
        rows = torch.as_tensor(bag).to(torch.float32, copy=True).sub_(torch.from_numpy(means[index]).float())
        variances[index] = rows.square_().mean(0).numpy()
    return means, variances


def _scale(means: np.ndarray, variances: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and one over the standard deviation (D,) of the tiles of training bags, each bag of the same weight."""
    mean = means.mean(0)
    variance = (variances + np.square(means - mean)).mean(0)
    factor = np.where(variance > 1e-10 * variance.max(), 1 / np.sqrt(np.maximum(variance, 1e-12)), 0)
    return tuple(torch.as_tensor(values, dtype=torch.float32, device=device) for values in (mean, factor))
