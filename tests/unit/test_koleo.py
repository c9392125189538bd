import math

import pytest
import torch

from dinoscope.losses.koleo import distributed_koleo_loss, koleo_loss
from reference_numbers import load_reference


def naive_koleo(features, topk=1, group_size=None):
    """Every pair by hand, in float64; differentiable."""
    rows = [row / row.pow(2).sum().sqrt() for row in features.double()]
    group_size = group_size or len(rows)
    terms = []
    for i, x in enumerate(rows):
        others = [y for j, y in enumerate(rows) if j != i and j // group_size == i // group_size]
        others.sort(key=lambda y: -(x * y).sum().item())
        terms += [-((x - y).pow(2).sum().sqrt() + 1e-8).log() for y in others[:topk]]
    return sum(terms) / len(terms)


def assert_equals_naive_loop(features, loss_function, *arguments):
    x = features.clone().requires_grad_()
    ours, expected = loss_function(x, *arguments), naive_koleo(x, *arguments)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    (grad,), (expected_grad,) = (torch.autograd.grad(loss, x) for loss in (ours, expected))
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-6)


@pytest.fixture
def features():
    return torch.randn(12, 6, generator=torch.Generator().manual_seed(0)) * 3


def test_equals_naive_loop(features):
    assert_equals_naive_loop(features, koleo_loss)


@pytest.mark.parametrize(("topk", "group_size"), [(1, None), (3, None), (1, 6), (2, 4), (1, 2)])
def test_distributed_in_one_process_equals_naive_loop(features, topk, group_size):
    assert_equals_naive_loop(features, distributed_koleo_loss, topk, group_size)


def test_gradient_equals_finite_differences(features):
    x = features.double().requires_grad_()
    (grad,) = torch.autograd.grad(koleo_loss(x), x)
    step = torch.zeros_like(features)
    step[4, 2] = 1e-3
    slope = (naive_koleo(features + step) - naive_koleo(features - step)) / 2e-3
    assert grad[4, 2].item() == pytest.approx(slope.item(), rel=1e-3)


def test_a_step_downhill_spreads_features():
    x = (torch.randn(16, 8, generator=torch.Generator().manual_seed(1)) * 0.1 + 1).requires_grad_()
    before = koleo_loss(x)
    (grad,) = torch.autograd.grad(before, x)
    after = x.detach() - 0.1 * grad / grad.norm()
    cosine = torch.nn.functional.cosine_similarity
    assert koleo_loss(after) < before
    assert cosine(after[:, None], after, dim=-1).mean() < cosine(x.detach()[:, None], x.detach(), dim=-1).mean()


def test_equal_features_give_no_nan(features):
    x = torch.cat([features[:3], features[:3]]).requires_grad_()
    loss = koleo_loss(x)
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(1e-8), rel=1e-5)
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_float32_under_autocast(features):
    x = features.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = koleo_loss(x), distributed_koleo_loss(x, 2)
    assert torch.equal(mixed[0], koleo_loss(x.float()))
    assert torch.equal(mixed[1], distributed_koleo_loss(x.float(), 2))


def test_impossible_neighbourhoods_are_refused(features):
    with pytest.raises(AssertionError, match="fill groups"):
        distributed_koleo_loss(features, group_size=5)
    with pytest.raises(AssertionError, match="3 neighbours asked of groups of 3"):
        distributed_koleo_loss(features, topk=3, group_size=3)


@pytest.mark.parametrize(
    ("loss_function", "name"),
    [
        (koleo_loss, "koleo.local"),
        (distributed_koleo_loss, "koleo.dist.topk1.w1"),
        (lambda x: distributed_koleo_loss(x, topk=2), "koleo.dist.topk2.w1"),
    ],
)
def test_published_numbers(loss_function, name):
    tensors, values = load_reference("losses")
    x = tensors["koleo.x"].clone().requires_grad_()
    loss = loss_function(x)
    loss.backward()
    assert loss.item() == pytest.approx(values[f"{name}.loss"], rel=1e-5)
    torch.testing.assert_close(x.grad, tensors[f"{name}.grad"], rtol=0, atol=1e-6)
