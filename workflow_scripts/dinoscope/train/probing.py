"""Asking the EMA teacher while it learns, on a fixed small set of images of the selection cases.

Every `evaluation.probe_every` iterations, and before the first, all processes forward their share of the images through
the teacher; the main process computes k-NN on labelled images (neighbours of other groups only) or a linear probe of
patches (images with masks), and the descriptive measures. Nothing is drawn, and no weight, moment or random number of
the training changes. Whether a run got worse is judged by the paired interval against the start, over groups.

Shapes: N images, P patches, D width, C classes.
"""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dinoscope.arrays import damage_named, read_arrays, write_arrays
from dinoscope.errors import ConfigError, RunError
from dinoscope.evaluate.intervals import compare
from dinoscope.evaluate.knn import knn_predict
from dinoscope.evaluate.scores import Predictions, mean_iou, statistic_of, statistic_of_confusions
from dinoscope.train.health import mean_pairwise_cosine, rankme
from dinoscope.train.metrics import read_metrics

if TYPE_CHECKING:
    from dinoscope.train.distributed import World
    from dinoscope.train.ssl_step import SSLModel

__all__ = ["ProbeSet", "TeacherProbe", "best_probe", "read_probe_set", "write_probe_set"]

_log = logging.getLogger(__name__)
_START_NAME = "probe_start.npz"
_NEIGHBOURS = 5
_DRAWS = 1_000
_WORSE_IN_A_ROW = 3
_IGNORED_SHARE = 0.1  # of the run, at its start
_RIDGE = 1e-3  # of the mean variance of a standardised feature
_MOST_PATCHES = 60_000
_IGNORED = 255  # of masks, as in evaluate/masked.py


@dataclass(frozen=True)
class ProbeSet:
    """What the teacher is asked about.

    Attributes:
        images: (N, S, S, 3) uint8.
        groups: (N,) the case or parent of each.
        labels: (N,) class numbers, -1 unknown; empty where there are no labels.
        masks: (N, S, S) uint8 classes, 255 for pixels that do not count; empty where there are none.
    """

    images: np.ndarray
    groups: np.ndarray
    labels: np.ndarray
    masks: np.ndarray


def write_probe_set(path: Path, probe: ProbeSet) -> None:
    """Writes it, by rename."""
    write_arrays(path, **vars(probe))


def read_probe_set(path: Path) -> ProbeSet:
    """Reads it.

    Raises:
        ConfigError: It is missing or damaged.
    """
    with damage_named(path, "set of probe images", "make it again with evaluate.py probe", ConfigError):
        arrays = read_arrays(path)
        return ProbeSet(*(arrays[name] for name in ProbeSet.__annotations__))


class TeacherProbe:
    """Asks the teacher of a run. All processes make it and call it together.

    Args:
        probe: The images.
        run_dir: Of the run; what the start answered is kept there.
        world: The processes of the run.
        patch_size: Of the backbone; images are cut to a multiple of it.
        batch_size: Images that a process forwards at once.
    """

    def __init__(self, probe: ProbeSet, run_dir: Path, world: "World", patch_size: int, batch_size: int) -> None:
        side = probe.images.shape[1] // patch_size * patch_size
        if not len(probe.images) or not side:
            raise ConfigError(
                f"the probe set has {len(probe.images)} images of {probe.images.shape[1]} px, but patches of "
                f"{patch_size} px need larger ones; raise the tile size, or set evaluation.probe_every to 0"
            )
        self.probe = ProbeSet(probe.images[:, :side, :side], probe.groups, probe.labels, probe.masks[:, :side, :side])
        self.run_dir, self.world, self.patch_size, self.batch_size = run_dir, world, patch_size, batch_size
        self.grid = side // patch_size
        self.seconds = 0.0
        labelled = np.flatnonzero(probe.labels >= 0)
        if world.is_main and len(labelled) and not self._is_askable(labelled):
            _log.warning(
                "the images of the probe have one class or one case alone, so there is no probe_knn: hold out more "
                "cases for selection (evaluation.selection)"
            )

    def __call__(self, model: "SSLModel", *, start: bool) -> dict[str, float]:
        """Columns for training_metrics.json; empty on all but the main process.

        Args:
            model: Of the run.
            start: Whether this is what later answers are held against.
        """
        began = time.perf_counter()
        features, patches = self._features(model)
        line = self._measured(features, patches, start) if self.world.is_main else {}
        self.seconds += time.perf_counter() - began
        return line | {"probe_seconds": time.perf_counter() - began} if line else {}

    def has_got_worse(self, num_iterations: int) -> bool:
        """Whether the interval of the difference from the start lay below 0 in the last three probes.

        Those of the first tenth of the run do not count. The main process reads it off the metrics, so that a run that
        goes on knows it too.
        """
        if not self.world.is_main:
            return self.world.any(False)
        try:
            metrics = read_metrics(self.run_dir)
        except RunError:
            return self.world.any(False)
        highs = metrics.get("probe_difference_high", metrics.iloc[:, :0].sum(axis=1) + math.nan).dropna()
        highs = highs[highs.index >= _IGNORED_SHARE * num_iterations]
        return self.world.any(len(highs) >= _WORSE_IN_A_ROW and bool((highs.iloc[-_WORSE_IN_A_ROW:] < 0).all()))

    def _features(self, model: "SSLModel") -> tuple[np.ndarray, np.ndarray]:
        """CLS features (N, D) float32 and, where there are masks, patches (N, P, D) float32, on the main process."""
        size, rank = self.world.size, self.world.rank
        share = -(-len(self.probe.images) // size)  # as many a process, so that all take part in each forward pass
        rows = np.minimum(np.arange(rank * share, (rank + 1) * share), len(self.probe.images) - 1)
        cls, patches = [], []
        for first in range(0, share, self.batch_size):
            images = torch.from_numpy(self.probe.images[rows[first : first + self.batch_size]]).to(self.world.device)
            with torch.no_grad():
                (out,) = model.teacher["backbone"].forward_crops([model.normalised(images)])
            cls.append(out.cls_BD.float())
            if len(self.probe.masks):
                patches.append(out.patches_BPD.float())
        count = len(self.probe.images)
        all_cls = self._gathered(torch.cat(cls))[:count].cpu().numpy()
        if not patches:
            return all_cls, np.zeros((0, 0, all_cls.shape[1]), np.float32)
        return all_cls, self._gathered(torch.cat(patches))[:count].cpu().numpy()

    def _gathered(self, mine: Tensor) -> Tensor:
        if self.world.size == 1:
            return mine
        parts = [torch.empty_like(mine) for _ in range(self.world.size)]
        dist.all_gather(parts, mine.contiguous())
        return torch.cat(parts)

    def _measured(self, features: np.ndarray, patches: np.ndarray, start: bool) -> dict[str, float]:
        rows = torch.from_numpy(features)
        line = {"probe_rankme": rankme(rows), "probe_mean_cosine": mean_pairwise_cosine(rows)}
        answers: dict[str, np.ndarray] = {}
        labelled = np.flatnonzero(self.probe.labels >= 0) if len(self.probe.labels) else np.zeros(0, int)
        if len(labelled) and self._is_askable(labelled):
            answers["knn"] = self._knn(features[labelled], labelled)
        if len(patches) and self._num_mask_classes() > 1:
            answers["dense"] = self._dense(patches)
        for name, answer in answers.items():
            line[f"probe_{name}"] = self._score(name, answer)
        if start:
            write_arrays(self.run_dir / _START_NAME, **answers)
        elif answers:
            line |= self._difference(answers)
        return {name: float(value) for name, value in line.items() if math.isfinite(value)}

    def _is_askable(self, labelled: np.ndarray) -> bool:
        """Whether labels tell anything: neighbours are of other groups, and one class alone is told by any features."""
        return all(len(np.unique(of[labelled])) > 1 for of in (self.probe.labels, self.probe.groups))

    def _knn(self, features: np.ndarray, labelled: np.ndarray) -> np.ndarray:
        """(N, C) votes of the nearest images of other groups."""
        labels, groups = self.probe.labels[labelled], self.probe.groups[labelled]
        num_classes = int(self.probe.labels.max()) + 1
        votes = knn_predict(features, features, labels, num_classes, ks=(_NEIGHBOURS,), exclude_groups=(groups, groups))
        return votes[_NEIGHBOURS]

    def _dense(self, patches: np.ndarray) -> np.ndarray:
        """(N, C, C) confusions of patches: a ridge classifier of one half of the groups asked about the other."""
        labels, num_classes = self._patch_labels(), self._num_mask_classes()
        half = np.unique(self.probe.groups, return_inverse=True)[1] % 2
        confusions = np.zeros((len(patches), num_classes, num_classes))
        for side in (0, 1):
            train, asked = np.flatnonzero(half == side), np.flatnonzero(half != side)
            told = labels[train] >= 0
            if not told.any() or not len(asked):
                continue
            answer = _ridge_classifier(patches[train][told], labels[train][told], num_classes)
            for image in asked:
                counted = labels[image] >= 0
                np.add.at(confusions[image], (labels[image][counted], answer(patches[image])[counted]), 1)
        return confusions

    def _patch_labels(self) -> np.ndarray:
        """(N, P) the class that most pixels of a patch have, of those that count; -1 where none does."""
        size, grid = self.patch_size, self.grid
        blocks = self.probe.masks.reshape(-1, grid, size, grid, size).transpose(0, 1, 3, 2, 4)
        blocks = blocks.reshape(len(self.probe.masks), grid * grid, size * size)
        counts = np.stack([(blocks == number).sum(axis=2) for number in range(max(1, self._num_mask_classes()))], 2)
        return np.where(counts.any(axis=2), counts.argmax(axis=2), -1)

    def _num_mask_classes(self) -> int:
        known = self.probe.masks[self.probe.masks != _IGNORED]
        return int(known.max()) + 1 if known.size else 0

    def _score(self, name: str, answer: np.ndarray) -> float:
        statistic, count, _ = self._statistic(name, answer)
        return float(statistic(np.ones((1, count)))[0])

    def _statistic(self, name: str, answer: np.ndarray):
        groups = np.unique(self.probe.groups, return_inverse=True)[1]
        if name == "dense":
            summed = np.zeros((groups.max() + 1, *answer.shape[1:]))
            np.add.at(summed, groups, answer)
            return statistic_of_confusions(summed, mean_iou), len(summed), len(summed)
        labelled = self.probe.labels >= 0
        predictions = Predictions(self.probe.labels[labelled], answer[None], self.probe.groups[labelled])
        return statistic_of(predictions, "balanced_accuracy"), predictions.num_cases, predictions.smallest_class()

    def _difference(self, answers: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Of the first labelled measure from the start's, with its paired 95 % interval."""
        path = self.run_dir / _START_NAME
        if not path.is_file():
            return {}
        with damage_named(path, "answers of the start", "delete it; the run then goes on without comparing", RunError):
            before = read_arrays(path)
        name = next((name for name in answers if name in before and before[name].shape == answers[name].shape), None)
        if name is None:
            return {}
        now, count, smallest = self._statistic(name, answers[name])
        then, _, _ = self._statistic(name, before[name])
        if count < 2:
            return {}
        found = compare(now, then, count, smallest, draws=_DRAWS)
        low, high = found.interval()
        return {"probe_difference": found.difference, "probe_difference_low": low, "probe_difference_high": high}


def _ridge_classifier(rows: np.ndarray, targets: np.ndarray, num_classes: int):
    step = -(-len(rows) // _MOST_PATCHES)
    rows, targets = rows[::step], targets[::step]
    mean, deviation = rows.mean(axis=0), rows.std(axis=0) + 1e-6
    scaled = np.concatenate([(rows - mean) / deviation, np.ones((len(rows), 1), np.float32)], axis=1)
    # all classes of the same weight, as in the probes of the evaluation
    weights = 1 / np.maximum(np.bincount(targets, minlength=num_classes), 1)[targets]
    weighted = scaled * weights[:, None]
    normal = weighted.T @ scaled + _RIDGE * num_classes * np.eye(scaled.shape[1])
    theta = np.linalg.solve(normal, weighted.T @ np.eye(num_classes)[targets])

    def answer(asked: np.ndarray) -> np.ndarray:
        return (((asked - mean) / deviation) @ theta[:-1] + theta[-1]).argmax(axis=1)

    return answer


def best_probe(run_dir: Path, iterations: Sequence[int], column: str) -> tuple[int, float] | None:
    """The exported iteration with the highest value of a probe that was made just then, and the value.

    Args:
        run_dir: Of the run.
        iterations: Exported ones.
        column: Of training_metrics.json.
    """
    try:
        logged = read_metrics(run_dir)[column].dropna()
    except (RunError, KeyError):
        return None
    values = {iteration: float(logged[iteration]) for iteration in iterations if iteration in logged.index}
    if not values:
        return None
    best = max(values, key=lambda iteration: (values[iteration], -iteration))
    return best, values[best]
