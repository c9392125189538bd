import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dinoscope.data.collate import Batch, mask_tensors
from dinoscope.losses.kde import distributed_kde_loss, kde_loss
from dinoscope.models.registry import settings_from_config
from dinoscope.recipe import load_recipe
from dinoscope.train.ssl_step import SSLModel

RECIPE = Path(__file__).resolve().parents[2] / "config" / "runs" / "tiny.yaml"
SMALL = [
    *("student.arch=vit_nano", "crops.global_crops_size=32", "crops.local_crops_size=16"),
    *("crops.local_crops_number=2", "dino.koleo_loss_weight=0"),
]


def naive_kde(features, concentration):
    """Every pair by hand, in float64; differentiable."""
    rows = features.double()
    rows = [row / row.pow(2).sum().sqrt() for row in rows]
    terms = []
    for i, x in enumerate(rows):
        kernels = [((x * y).sum() - 1).mul(concentration).exp() for j, y in enumerate(rows) if j != i]
        terms.append((sum(kernels) / len(kernels)).log())
    return sum(terms) / len(terms)


def mean_cosine(features):
    """Of all pairs of different features."""
    unit = F.normalize(features.detach(), dim=1)
    return ((unit @ unit.T).sum() - len(unit)).item() / (len(unit) * (len(unit) - 1))


def descend(features, loss_function, steps=300, rate=1.0):
    """Plain gradient descent on the features themselves."""
    x = features.clone().requires_grad_()
    for _ in range(steps):
        (grad,) = torch.autograd.grad(loss_function(x), x)
        x = (x - rate * grad).detach().requires_grad_()
    return x.detach()


@pytest.fixture
def features():
    return torch.randn(12, 6, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("loss_function", [kde_loss, distributed_kde_loss])
@pytest.mark.parametrize("concentration", [0.5, 5.0, 50.0])
def test_equals_naive_loop(features, loss_function, concentration):
    x, expected_x = features.clone().requires_grad_(), features.double().requires_grad_()
    loss, expected = loss_function(x, concentration), naive_kde(expected_x, concentration)
    (grad,) = torch.autograd.grad(loss, x)
    (expected_grad,) = torch.autograd.grad(expected, expected_x)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-4, atol=1e-6)


def test_the_default_concentration(features):
    assert kde_loss(features).item() == pytest.approx(naive_kde(features, 5.0).item(), rel=1e-5)


@pytest.mark.parametrize("loss_function", [kde_loss, distributed_kde_loss])
def test_minimising_keeps_random_features_apart(loss_function):
    """The sign: an implementation with the other one takes the mean cosine from 0 to 1 in these 300 steps."""
    start = F.normalize(torch.randn(48, 16, generator=torch.Generator().manual_seed(1)), dim=1)
    assert abs(mean_cosine(start)) < 0.02
    end = descend(start, loss_function)
    # as low as the mean cosine of 48 vectors can be is -1/47: features that sum to zero
    assert mean_cosine(end) < mean_cosine(start)
    assert mean_cosine(end) == pytest.approx(-1 / 47, abs=1e-3)
    assert mean_cosine(descend(start, lambda x: -loss_function(x))) > 0.9


@pytest.mark.parametrize("loss_function", [kde_loss, distributed_kde_loss])
def test_minimising_undoes_a_near_collapse(loss_function):
    noise = torch.randn(48, 16, generator=torch.Generator().manual_seed(2))
    start = F.normalize(torch.ones(16) + 0.23 * noise, dim=1)
    assert mean_cosine(start) == pytest.approx(0.95, abs=0.01)
    end = descend(start, loss_function)
    assert mean_cosine(end) < 0.05
    assert loss_function(end) < loss_function(start) - 2


def test_known_values():
    together = torch.tensor([[3.0, 4.0]]).expand(5, 2)
    assert kde_loss(together, 7.0).item() == pytest.approx(0, abs=1e-5)
    opposite = torch.tensor([[1.0, 0.0], [-2.0, 0.0]])
    assert kde_loss(opposite, 7.0).item() == pytest.approx(-14)
    corners = torch.eye(4)
    assert kde_loss(corners, 7.0).item() == pytest.approx(-7)
    # each feature has one at 0 degrees, two at 90: the density is that of the *others*, itself left out
    pairs = torch.eye(2).repeat(2, 1)
    assert kde_loss(pairs, 7.0).item() == pytest.approx(math.log((1 + 2 * math.exp(-7)) / 3), rel=1e-5)


@pytest.mark.parametrize("concentration", [5.0, 1000.0])
def test_coinciding_features_have_finite_gradients(features, concentration):
    for x in (features[:1].expand(6, 6), torch.cat([features[:3], features[:3]])):
        x = x.clone().requires_grad_()
        loss = kde_loss(x, concentration)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(x.grad).all()
        # each of the two weighted means of unit vectors that it consists of is at most that long
        assert x.grad.norm(dim=1).max() <= 2 * concentration / x.detach().norm(dim=1).min()


def test_far_features_do_not_underflow():
    """exp(-2000) is 0 in float32 and float64: the density is summed as logarithms."""
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.1]], requires_grad=True)
    loss = kde_loss(x, 1000.0)
    loss.backward()
    assert loss.item() == pytest.approx(1000 * (-1 / math.sqrt(1.01) - 1), rel=1e-5)
    assert torch.isfinite(x.grad).all()
    assert x.grad.abs().max() > 1


@pytest.mark.parametrize("loss_function", [kde_loss, distributed_kde_loss])
def test_float32_under_autocast(features, loss_function):
    x = features.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = loss_function(x)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, loss_function(x.float()))


def test_one_feature_alone_is_refused():
    with pytest.raises(AssertionError, match="needs another"):
        kde_loss(torch.ones(1, 3))


def step(*overrides):
    """Total, terms, gradient of the CLS token, and CLS features of one step with the same weights and 6 tiles."""
    config = load_recipe(RECIPE, [*SMALL, *overrides])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SSLModel(config, settings_from_config(config.student))
        for network in (model.student, model.teacher):
            for part in network.values():
                part.init_weights()
        crops = [torch.randint(0, 256, (count, size, size, 3)).byte() for count, size in ((12, 32), (12, 16))]
    masks = torch.arange(4) < torch.tensor([1, 0] * 6)[:, None]
    batch = Batch(list(range(6)), *crops, None, **mask_tensors(masks))
    total, terms = model(batch, model.targets([batch], 0.07)[0])
    total.backward()
    (output,) = model.student["backbone"].forward_crops([model.normalised(batch.global_crops)], [masks])
    return total.item(), terms, model.student["backbone"].cls_token.grad, output.cls_BD.detach()


@pytest.mark.parametrize("distributed", ["true", "false"])
def test_part_of_the_step(distributed):
    """Twice its weight in the total, of each of the two global crops by itself, by the configured concentration."""
    total, terms, grad, cls = step()
    options = ("dino.kde_loss_weight=0.3", "dino.kde_concentration=8", f"dino.kde_loss_distributed={distributed}")
    other_total, other_terms, other_grad, _ = step(*options)
    expected = (naive_kde(cls[:6], 8.0) + naive_kde(cls[6:], 8.0)) / 2
    assert "kde_loss" not in terms
    assert other_terms.keys() == terms.keys() | {"kde_loss"}
    assert other_terms["kde_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert other_total - total == pytest.approx(0.3 * 2 * expected.item(), rel=1e-5)
    assert {name: terms[name] for name in terms if name != "total_loss"} == {
        name: other_terms[name] for name in terms if name != "total_loss"
    }
    assert (other_grad - grad).abs().max() > 1e-4
