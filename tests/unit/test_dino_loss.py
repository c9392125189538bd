import itertools

import pytest
import torch

from dinoscope.losses.dino import dino_loss
from dinoscope.losses.sinkhorn import sinkhorn_knopp
from reference_numbers import load_reference


def naive_dino(student, teacher, temperature, ignore_diagonal):
    """One Python loop a pair and image, in float64; differentiable."""
    terms = []
    for s, t in itertools.product(range(len(student)), range(len(teacher))):
        if ignore_diagonal and s == t:
            continue
        for image in range(student.shape[1]):
            scores = student[s, image].double() / temperature
            log_total = (scores - scores.max()).exp().sum().log() + scores.max()
            terms.append(
                -sum(p * (score - log_total) for p, score in zip(teacher[t, image].double(), scores, strict=True))
            )
    return sum(terms) / len(terms)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(4, 3, 11, generator=generator)
    teacher = torch.rand(2, 3, 11, generator=generator).softmax(-1)
    return student, teacher


@pytest.mark.parametrize("ignore_diagonal", [False, True])
@pytest.mark.parametrize("num_student", [1, 2, 4])
def test_equals_naive_loop(batch, num_student, ignore_diagonal):
    student, teacher = batch[0][:num_student].requires_grad_(), batch[1]
    ours = dino_loss(student, teacher, 0.1, ignore_diagonal)
    expected = naive_dino(student, teacher, 0.1, ignore_diagonal)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    (grad,), (expected_grad,) = (torch.autograd.grad(loss, student) for loss in (ours, expected))
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-7)


def test_smallest_at_the_teachers_own_distribution(batch):
    teacher = batch[1][:1]
    entropy = -(teacher * teacher.log()).sum(-1).mean()
    torch.testing.assert_close(dino_loss(teacher.log() * 0.1, teacher, 0.1), entropy)


def test_float32_under_autocast_and_no_gradient_to_the_teacher(batch):
    student, teacher = batch[0].clone().requires_grad_(), batch[1].clone().requires_grad_()
    plain = dino_loss(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = dino_loss(student, teacher)
    assert torch.equal(plain, mixed)
    mixed.backward()
    assert teacher.grad is None


def test_large_logits_stay_finite():
    student = torch.tensor([[[1e4, -1e4, 0.0]]], requires_grad=True)
    loss = dino_loss(student, torch.tensor([[[0.0, 1.0, 0.0]]]))
    loss.backward()
    assert loss.item() == pytest.approx(2e5)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("ignore_diagonal", [False, True])
def test_logits_of_100_at_teacher_temperature_004(ignore_diagonal):
    """Targets and loss as a step makes them, from logits that exp(logits / temperature) cannot hold in float32."""
    generator = torch.Generator().manual_seed(1)
    teacher_logits, student_logits = 200 * torch.rand(2, 10, 12, generator=generator) - 100
    teacher = sinkhorn_knopp(teacher_logits, 0.04).unflatten(0, (2, 5))
    student = student_logits.unflatten(0, (2, 5)).requires_grad_()
    ours, expected = (
        dino_loss(student, teacher, 0.1, ignore_diagonal),
        naive_dino(student, teacher, 0.1, ignore_diagonal),
    )
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    (grad,), (expected_grad,) = (torch.autograd.grad(loss, student) for loss in (ours, expected))
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-6)
    assert grad.abs().max() > 0.1


@pytest.mark.parametrize("kind", ["global", "local"])
@pytest.mark.parametrize("ignore_diagonal", [False, True])
def test_published_numbers(kind, ignore_diagonal):
    tensors, values = load_reference("losses")
    student = tensors[f"dino.student_{kind}"].clone().requires_grad_()
    loss = dino_loss(student, tensors["dino.teacher_probs"], 0.1, ignore_diagonal)
    loss.backward()
    name = f"dino.{kind}.ignore_diagonal={ignore_diagonal}"
    assert loss.item() == pytest.approx(values[name], rel=1e-5)
    torch.testing.assert_close(student.grad, tensors[f"{name}.grad"], rtol=0, atol=1e-6)
