"""The training step: accumulation keeps the objective, a step that is not finite leaves everything as it was."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dinoscope.data.collate import Batch, Collate
from dinoscope.data.crops import Crops
from dinoscope.models.registry import settings_from_config
from dinoscope.recipe import load_recipe
from dinoscope.train.distributed import World, joined_world
from dinoscope.train.optimizer import build_optimizer
from dinoscope.train.parallelize import parallelize
from dinoscope.train.schedule import ScheduleValues
from dinoscope.train.ssl_step import SSLModel
from dinoscope.train.starting import Start, start_model
from dinoscope.train.step import TrainingStep
from sharded import whole

RECIPE = Path(__file__).resolve().parents[2] / "config" / "runs" / "tiny_gram.yaml"
SMALL = ["student.arch=vit_nano", "crops.global_crops_size=64", "crops.local_crops_size=32"]
SMALL += ["crops.gram_teacher_crops_size=96", "gram.it_load_ema_teacher=0", "dino.koleo_loss_weight=0"]
VALUES = ScheduleValues(1e-3, 0.1, 0.9, 0.04, 1e-3, 1.0, None)
TILES = 8


@pytest.fixture
def world() -> Iterator[World]:
    before = dict(os.environ)
    try:
        with joined_world() as joined:
            yield joined
    finally:
        os.environ.clear()
        os.environ.update(before)


def batch(seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    crops = [
        Crops(*(rng.integers(0, 255, (count, side, side, 3), np.uint8) for count, side in ((2, 64), (4, 32), (2, 96))))
        for _ in range(TILES)
    ]
    return Collate(TILES, 16, 0.5, (0.1, 0.45), False, 0)(list(enumerate(crops)))


def training_step(world: World, parts: int, *overrides: str) -> TrainingStep:
    sizes = [f"train.accumulation_steps={parts}", f"train.batch_size_per_gpu={TILES // parts}"]
    config = load_recipe(RECIPE, [*SMALL, *sizes, *overrides])
    settings = settings_from_config(config.student)
    with torch.device("meta"):
        model = SSLModel(config, settings)
    parallelize(model, world)
    optimizer = build_optimizer(model.student, config, settings.depth)
    start_model(model, optimizer, Start(None, None, None), world)
    return TrainingStep(model, optimizer, world, stream_seed=0)


def gradients(step: TrainingStep) -> dict[str, torch.Tensor]:
    return {name: whole(p.grad).clone() for name, p in step.model.student.named_parameters()}


def weights(step: TrainingStep) -> dict[str, torch.Tensor]:
    return {name: whole(p).clone() for name, p in step.model.named_parameters()}


def test_a_batch_split_has_the_same_crops_and_masks() -> None:
    whole = batch()
    parts = whole.split(4)
    assert [part.samples for part in parts] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    for index, part in enumerate(parts):
        tiles = slice(2 * index, 2 * index + 2)
        for name in ("global_crops", "local_crops", "gram_crops", "masks"):
            expected = getattr(whole, name).unflatten(0, (-1, TILES))[:, tiles].flatten(0, 1)
            assert torch.equal(getattr(part, name), expected), name
    assert sum(len(part.mask_indices) for part in parts) == len(whole.mask_indices)
    assert whole.split(1) == [whole]


@pytest.mark.parametrize("overrides", [[], ["optim.clip_grad=0.05"]])
def test_accumulated_parts_are_the_undivided_batch(world: World, overrides: list[str]) -> None:
    """Terms, gradients, norms and the update; the masks of the parts hold different numbers of patches."""
    found = {}
    for parts in (1, 4):
        step = training_step(world, parts, *overrides)
        outcome = step(0, batch().split(parts), VALUES)
        found[parts] = outcome, gradients(step), weights(step)
    (whole, whole_gradients, whole_weights), (split, split_gradients, split_weights) = found[1], found[4]
    assert whole.terms.keys() == split.terms.keys() >= {"gram_loss", "ibot_loss", "backbone_grad_norm"}
    for name, value in whole.terms.items():
        assert split.terms[name].item() == pytest.approx(value.item(), rel=3e-6), name
    for name, gradient in whole_gradients.items():
        scale = gradient.abs().max() + 1e-4
        assert (split_gradients[name] - gradient).abs().max() < 5e-6 * scale, name
    for name, tensor in whole_weights.items():
        clear = torch.ones_like(tensor, dtype=torch.bool)
        if (key := name.removeprefix("student.")) in whole_gradients:
            clear = whole_gradients[key].abs() > 1e-5  # Adam turns the rounding of smaller ones into a sign
        if clear.any():
            assert (split_weights[name] - tensor)[clear].abs().max() < 2e-6, name


def test_parts_that_were_centred_alone_would_differ(world: World) -> None:
    """The control: targets of each part by itself are not those of the batch."""
    step = training_step(world, 4)
    parts = batch().split(4)
    together, alone = step.model.targets(parts, 0.04), [step.model.targets([part], 0.04)[0] for part in parts]
    assert ((together[0].cls_2BK - alone[0].cls_2BK).abs() / together[0].cls_2BK).max() > 0.1


def test_a_step_that_is_not_finite_changes_nothing(world: World) -> None:
    step = training_step(world, 1)
    step(0, [batch()], VALUES)
    before, moments = weights(step), [dict(state) for state in step.optimizer.state.values()]
    moments = [{key: value.clone() for key, value in state.items()} for state in moments]
    forward = step.model.forward

    def spoiled(*args: object, **options: object) -> tuple:
        loss, terms = forward(*args, **options)
        return loss * float("nan"), terms | {"total_loss": terms["total_loss"] * float("nan")}

    step.model.forward = spoiled
    outcome = step(1, [batch(1)], VALUES)
    assert outcome.skipped and not outcome.own_loss_finite
    after = weights(step)
    assert all(torch.equal(before[name], after[name]) for name in before)
    for old, new in zip(moments, step.optimizer.state.values(), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)
    step.model.forward = forward
    assert not step(2, [batch(2)], VALUES).skipped
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights(step).items())
