"""What GPUs use, tried on the CPU: bf16 compute under FSDP2, compiled and checkpointed blocks."""

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
from dinoscope.train import parallelize as parallelize_module
from dinoscope.train import ssl_step
from dinoscope.train.distributed import World, joined_world
from dinoscope.train.draws import step_draws
from dinoscope.train.optimizer import build_optimizer
from dinoscope.train.ssl_step import SSLModel
from dinoscope.train.starting import Start, start_model
from sharded import whole

RECIPE = Path(__file__).resolve().parents[2] / "config" / "runs" / "tiny.yaml"
SMALL = ["student.arch=vit_nano", "crops.global_crops_size=64", "crops.local_crops_size=32"]
SMALL += ["student.drop_path_rate=0.3", "train.batch_size_per_gpu=4"]


@pytest.fixture(autouse=True)
def sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP, though there is one process."""
    monkeypatch.setattr(parallelize_module, "is_sharded", lambda *_: True)


@pytest.fixture
def world() -> Iterator[World]:
    before = dict(os.environ)
    try:
        with joined_world() as joined:
            yield joined
    finally:
        os.environ.clear()
        os.environ.update(before)


def batch() -> Batch:
    rng = np.random.default_rng(0)

    def crops() -> Crops:
        return Crops(
            rng.integers(0, 255, (2, 64, 64, 3), np.uint8), rng.integers(0, 255, (4, 32, 32, 3), np.uint8), None
        )

    return Collate(4, 16, 0.5, (0.1, 0.45), False, 0)([(i, crops()) for i in range(4)])


def step(world: World, *overrides: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step from the same start."""
    config = load_recipe(RECIPE, [*SMALL, *overrides])
    settings = settings_from_config(config.student)
    with torch.device("meta"):
        model = SSLModel(config, settings)
    parallelize_module.parallelize(model, world)
    start_model(model, build_optimizer(model.student, config, settings.depth), Start(None, None, None), world)
    draws = step_draws(settings, [8, 16], seed=0, step=0, rank=0, device=world.device)
    loss, _ = model(batch(), model.targets([batch()], 0.04)[0], draws=draws)
    loss.backward()
    names = [(name.replace("_checkpoint_wrapped_module.", ""), p) for name, p in model.student.named_parameters()]
    return loss.item(), {name: whole(p.grad) for name, p in names}


def test_sharding_over_one_process_changes_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, gradients = step(world)
    monkeypatch.undo()
    other_loss, other = step(world)
    assert loss == other_loss
    assert all(torch.equal(gradients[name], other[name]) for name in gradients)


@pytest.mark.parametrize("option", ["train.checkpointing=true", "train.checkpointing_full=true"])
def test_checkpointed_blocks_change_nothing(world: World, option: str) -> None:
    loss, gradients = step(world)
    other_loss, other = step(world, option)
    assert loss == other_loss
    assert all(torch.equal(gradients[name], other[name]) for name in gradients)


def saved_bytes(world: World, *overrides: str) -> int:
    """What autograd keeps from the forward for the backward."""
    config = load_recipe(RECIPE, [*SMALL, *overrides])
    settings = settings_from_config(config.student)
    with torch.device("meta"):
        model = SSLModel(config, settings)
    parallelize_module.parallelize(model, world)
    start_model(model, build_optimizer(model.student, config, settings.depth), Start(None, None, None), world)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        kept[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
        return tensor

    images = torch.randn(8, 3, 64, 64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.student["backbone"].forward_crops([images])
    return sum(kept.values())


def test_checkpointing_keeps_less_the_more_it_recomputes(world: World) -> None:
    nothing = saved_bytes(world)
    whole_blocks = saved_bytes(world, "train.checkpointing_full=true")
    assert whole_blocks < 0.5 * nothing


@pytest.mark.long
@pytest.mark.filterwarnings("default")  # torch's compiler warns of its own doings
def test_compiled_blocks_change_nothing_beyond_rounding(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, gradients = step(world)
    monkeypatch.setattr(parallelize_module, "_compiles", lambda config, device_type: True)
    other_loss, other = step(world)
    assert other_loss == pytest.approx(loss, rel=1e-5)
    for name in gradients:
        torch.testing.assert_close(other[name], gradients[name], rtol=1e-3, atol=1e-6, msg=name)


def test_bf16_step_is_close_to_float32_and_keeps_float32_weights(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, gradients = step(world)
    for module in (ssl_step, parallelize_module):
        monkeypatch.setattr(module, "compute_dtype", lambda config, device_type: torch.bfloat16)
    other_loss, other = step(world)
    assert other_loss == pytest.approx(loss, rel=0.02)
    assert other_loss != loss
    assert {gradient.dtype for gradient in other.values()} == {torch.float32}
    flat, other_flat = (torch.cat([g.flatten() for g in part.values()]) for part in (gradients, other))
    assert torch.nn.functional.cosine_similarity(flat, other_flat, 0) > 0.98
