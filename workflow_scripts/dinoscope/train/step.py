"""One optimizer step: targets, forward, backward, clipped update, EMA teacher.

With `train.accumulation_steps` above 1 a rank forwards its batch in parts. The teacher's targets of all parts come
first, centred together, so that loss and gradients are those of the undivided batch; only what compares tiles with
each other (KoLeo, kernel density, Gram matrices over all images) does so within a part, as it does within a process.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dinoscope.data.collate import Batch
from dinoscope.train.distributed import World
from dinoscope.train.draws import step_draws
from dinoscope.train.health import HealthWindow
from dinoscope.train.optimizer import apply_schedule, clip_gradients, update_ema
from dinoscope.train.schedule import ScheduleValues
from dinoscope.train.ssl_step import SSLModel, parameters_by_part

if TYPE_CHECKING:
    from dinoscope.config import RunConfig

__all__ = ["StepOutcome", "TrainingStep", "global_batch"]

Phase = Callable[[str], contextlib.AbstractContextManager[None]]


@dataclass
class StepOutcome:
    """What came of a step.

    Attributes:
        terms: Losses of this rank and gradient norms before clipping, by their names in the metrics.
        skipped: Whether all ranks left the weights as they were, because a loss or a gradient was not finite.
        own_loss_finite: Whether this rank's loss was.
    """

    terms: dict[str, Tensor]
    skipped: bool
    own_loss_finite: bool


class TrainingStep:
    """Does the steps of a run on one rank; all ranks call it together."""

    def __init__(
        self,
        model: SSLModel,
        optimizer: torch.optim.Optimizer,
        world: World,
        stream_seed: int,
        health: HealthWindow | None = None,
        phase: Phase = lambda name: contextlib.nullcontext(),
    ) -> None:
        """Keeps what every step needs.

        Args:
            model: Filled and sharded.
            optimizer: Over the student's trained parameters.
            world: The ranks.
            stream_seed: What the draws of stochastic depth and RoPE derive from, with step and rank.
            health: Takes the targets and features of every step.
            phase: Is entered around "teacher", "student", "backward" and "update", for benchmarks.
        """
        self.model, self.optimizer, self.world, self.stream_seed = model, optimizer, world, stream_seed
        self.health, self.phase = health, phase
        self.parts = parameters_by_part(model.student)
        self._unread: list[tuple[Tensor, Tensor]] = []

    def __call__(
        self, iteration: int, batches: list[Batch], values: ScheduleValues, *, backbone_frozen: bool = False
    ) -> StepOutcome:
        """Trains on what this rank forwards in one step.

        Args:
            iteration: Counted from 0.
            batches: On the device, `train.accumulation_steps` of them.
            values: Of the schedules at this iteration.
            backbone_frozen: Only the heads are trained.
        """
        apply_schedule(self.optimizer, values)
        self.optimizer.zero_grad(set_to_none=True)
        self._unread = []
        terms = self._gradients(iteration, batches, values, backbone_frozen)
        with self.phase("update"):
            clip = self.model.config.optim.clip_grad
            terms |= {f"{name}_grad_norm": clip_gradients(part, clip) for name, part in self.parts.items()}
            finite = bool(torch.stack([value.float() for value in terms.values()]).isfinite().all())
            if self.world.any(not finite):
                self.optimizer.zero_grad(set_to_none=True)
                return StepOutcome(terms, skipped=True, own_loss_finite=bool(terms["total_loss"].isfinite()))
            for targets, features in self._unread:
                self.health.add(targets, features)
            self.optimizer.step()
            for name in self.parts:
                if name != "backbone" or not backbone_frozen:
                    update_ema(self.model.teacher[name], self.model.student[name], values.momentum)
        return StepOutcome(terms, skipped=False, own_loss_finite=True)

    def _gradients(
        self, iteration: int, batches: list[Batch], values: ScheduleValues, backbone_frozen: bool
    ) -> dict[str, Tensor]:
        """Fills the gradients, averaged over the parts; returns the means of their loss terms."""
        with self.phase("teacher"):
            targets = self.model.targets(batches, values.teacher_temp)
        if self.health is not None:
            # looked at once the step is known to count
            self._unread = [(one.cls_2BK.flatten(0, 1), one.cls_BD) for one in targets]
        means: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.world.device))
        for part, (batch, of_batch) in enumerate(zip(batches, _released(targets), strict=True)):
            with self.phase("student"):
                loss, terms = self.model(
                    batch,
                    of_batch,
                    gram_weight=values.gram_weight,
                    local_loss_weight=values.local_loss_weight,
                    draws=self._draws(iteration, part, batch),
                    backbone_frozen=backbone_frozen,
                )
            with self.phase("backward"):
                (loss / len(batches)).backward()
            for name, value in terms.items():
                means[name] = means[name] + value / len(batches)
        return dict(means)

    def _draws(self, iteration: int, part: int, batch: Batch) -> list | None:
        return step_draws(
            self.model.settings,
            [batch.global_crops.shape[0], batch.local_crops.shape[0]],
            seed=self.stream_seed,
            step=iteration,
            rank=self.world.rank,
            part=part,
            device=self.world.device,
        )


def global_batch(config: "RunConfig", num_processes: int) -> int:
    """Tiles of one optimizer step over all processes."""
    return config.train.batch_size_per_gpu * config.train.accumulation_steps * num_processes


def _released(items: list) -> Iterator:
    """Hands out items, keeping none that was handed out, so that what one alone holds (images, tokens) is freed."""
    items.reverse()
    while items:
        yield items.pop()
