import numpy as np
import pytest
import torch

from dinoscope.losses.sinkhorn import sinkhorn_knopp
from reference_numbers import load_reference


def naive_sinkhorn(logits, temperature, num_iterations):
    """The textbook loop in extended precision, prototypes by samples, with every factor kept."""
    scores = logits.astype(np.longdouble) / temperature
    q = np.exp(scores - scores.max()).T
    num_prototypes, num_samples = q.shape
    q /= q.sum()
    for _ in range(num_iterations):
        for k in range(num_prototypes):
            q[k] /= q[k].sum() * num_prototypes
        for n in range(num_samples):
            q[:, n] /= q[:, n].sum() * num_samples
    return (q * num_samples).T.astype(np.float64)


@pytest.mark.parametrize("num_iterations", [1, 2, 3, 10])
@pytest.mark.parametrize(("num_samples", "num_prototypes", "spread"), [(12, 40, 0.6), (50, 7, 3.0), (1, 5, 1.0)])
def test_equals_textbook_loop(num_iterations, num_samples, num_prototypes, spread):
    logits = np.random.default_rng(0).normal(size=(num_samples, num_prototypes)).astype(np.float32) * spread
    ours = sinkhorn_knopp(torch.from_numpy(logits), 0.07, num_iterations)
    np.testing.assert_allclose(ours.numpy(), naive_sinkhorn(logits, 0.07, num_iterations), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", ["random", "one_hot", "constant_rows", "low_sample", "dead_prototype", "opposite"])
def test_stays_finite_with_extreme_logits(case):
    generator = torch.Generator().manual_seed(0)
    logits = torch.rand(64, 32, generator=generator) * 200 - 100
    if case == "one_hot":
        logits = torch.full((64, 32), -100.0).scatter_(1, torch.arange(64)[:, None] % 5, 100.0)
    elif case == "constant_rows":
        logits = torch.linspace(-100, 100, 64)[:, None].expand(64, 32)
    elif case == "low_sample":
        logits[3] = -100
        logits[4] = 100
    elif case == "dead_prototype":
        logits[:, 7] = -100
    elif case == "opposite":
        logits = torch.where(torch.arange(64)[:, None] < 32, -100.0, 100.0).expand(64, 32)
    probs = sinkhorn_knopp(logits, 0.04)
    assert torch.isfinite(probs).all()
    torch.testing.assert_close(probs.sum(1), torch.ones(64))
    # extended precision still reaches exp(-5000), so the textbook loop is a reference here too
    np.testing.assert_allclose(probs.numpy(), naive_sinkhorn(logits.numpy(), 0.04, 3), atol=2e-3)


def test_many_iterations_use_all_prototypes_evenly():
    logits = torch.randn(96, 8, generator=torch.Generator().manual_seed(1)) + torch.arange(8.0)
    totals = sinkhorn_knopp(logits, 0.5, num_iterations=200).sum(0)
    torch.testing.assert_close(totals, torch.full((8,), 96 / 8), rtol=1e-3, atol=0)


def test_leaves_the_input_alone_and_carries_no_gradient():
    logits = torch.randn(6, 5, requires_grad=True)
    before = logits.detach().clone()
    probs = sinkhorn_knopp(logits, 1.0)
    assert not probs.requires_grad
    assert torch.equal(logits.detach(), before)


def test_half_precision_logits_give_float32():
    logits = torch.randn(6, 5).bfloat16()
    probs = sinkhorn_knopp(logits, 0.07)
    assert probs.dtype == torch.float32
    torch.testing.assert_close(probs, sinkhorn_knopp(logits.float(), 0.07))


def test_no_samples():
    assert sinkhorn_knopp(torch.empty(0, 9), 0.07).shape == (0, 9)


@pytest.mark.parametrize("kind", ["cls", "patch"])
@pytest.mark.parametrize("temperature", ["0.04", "0.07"])
def test_published_numbers(kind, temperature):
    tensors, _ = load_reference("losses")
    ours = sinkhorn_knopp(tensors[f"sk.{kind}_logits"], float(temperature))
    for world_size in (1, 2):
        torch.testing.assert_close(ours, tensors[f"sk.{kind}.{temperature}.w{world_size}"], rtol=0, atol=1e-6)


def test_published_numbers_of_one_iteration_and_large_logits():
    tensors, _ = load_reference("losses")
    one = sinkhorn_knopp(tensors["sk.cls_logits"], 0.07, num_iterations=1)
    torch.testing.assert_close(one, tensors["sk.cls.0.07.n1.w1"], rtol=0, atol=1e-6)
    # logits / temperature reach 79 here, where exp without a shift is close to overflow
    large = sinkhorn_knopp(tensors["sk.cls_logits_large"], 0.07)
    torch.testing.assert_close(large, tensors["sk.cls_large.0.07.w1"], rtol=0, atol=1e-6)
