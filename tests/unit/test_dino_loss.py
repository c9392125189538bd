import itertools
import math

import pytest
import torch

from dinoscope.losses.dino import dino_loss
from reference_numbers import load_reference


def naive_dino(student, teacher, temperature, ignore_diagonal):
    """One Python loop a pair, image and prototype, in float64."""
    terms = []
    for s, t in itertools.product(range(len(student)), range(len(teacher))):
        if ignore_diagonal and s == t:
            continue
        for image in range(student.shape[1]):
            scores = [value / temperature for value in student[s, image].tolist()]
            log_total = max(scores) + math.log(sum(math.exp(score - max(scores)) for score in scores))
            probs = teacher[t, image].tolist()
            terms.append(-sum(p * (score - log_total) for p, score in zip(probs, scores, strict=True)))
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
    student, teacher = batch[0][:num_student], batch[1]
    ours = dino_loss(student, teacher, 0.1, ignore_diagonal)
    expected = naive_dino(student.double(), teacher.double(), 0.1, ignore_diagonal)
    assert ours.item() == pytest.approx(expected, rel=1e-5)


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
