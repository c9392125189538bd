import pytest
import torch

from dinoscope.losses.ibot import ibot_loss
from dinoscope.losses.sinkhorn import sinkhorn_knopp
from reference_numbers import load_reference


def weights_of(masks):
    """One over the masked patches of the patch's crop, in the order of the masked patches."""
    return (1 / masks.sum(1).clamp(min=1))[:, None].expand_as(masks)[masks]


def naive_ibot(student, teacher, masks, temperature):
    """Mean over the masked patches of a crop, sum over crops, divided by all crops; float64, differentiable."""
    total, row = 0.0, 0
    for mask in masks:
        of_crop = []
        for _ in range(int(mask.sum())):
            scores = student[row].double() / temperature
            log_total = (scores - scores.max()).exp().sum().log() + scores.max()
            of_crop.append(-sum(p * (s - log_total) for p, s in zip(teacher[row].double(), scores, strict=True)))
            row += 1
        total += sum(of_crop) / len(of_crop) if of_crop else 0.0
    return total / len(masks)


def assert_equals_naive_loop(student, teacher, masks, temperature):
    student = student.clone().requires_grad_()
    ours = ibot_loss(student, teacher, weights_of(masks), len(masks), temperature)
    expected = naive_ibot(student, teacher, masks, temperature)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    (grad,), (expected_grad,) = (torch.autograd.grad(loss, student) for loss in (ours, expected))
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-7)
    return grad


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_equals_naive_loop(temperature):
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(6, 9, generator=generator) < 0.4
    masks[2] = False
    num_masked = int(masks.sum())
    student = torch.randn(num_masked, 13, generator=generator)
    teacher = torch.randn(num_masked, 13, generator=generator).softmax(-1)
    assert_equals_naive_loop(student, teacher, masks, temperature)


def test_logits_of_100_at_teacher_temperature_004():
    """Targets and loss as a step makes them, from logits that exp(logits / temperature) cannot hold in float32."""
    generator = torch.Generator().manual_seed(1)
    masks = torch.rand(6, 9, generator=generator) < 0.4
    teacher_logits, student = 200 * torch.rand(2, int(masks.sum()), 13, generator=generator) - 100
    grad = assert_equals_naive_loop(student, sinkhorn_knopp(teacher_logits, 0.04), masks, 0.1)
    assert grad.abs().max() > 0.1


def test_nothing_masked_is_zero_and_differentiable():
    student = torch.empty(0, 5, requires_grad=True)
    loss = ibot_loss(student, torch.empty(0, 5), torch.empty(0), num_crops=4)
    loss.backward()
    assert loss.item() == 0
    assert student.grad.shape == (0, 5)


def test_float32_under_autocast_and_no_gradient_to_the_teacher():
    student = torch.randn(7, 5).bfloat16().requires_grad_()
    teacher = torch.randn(7, 5).softmax(-1).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ibot_loss(student, teacher, torch.ones(7), num_crops=2)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, ibot_loss(student.float(), teacher, torch.ones(7), num_crops=2))
    assert teacher.grad is None


@pytest.mark.parametrize("given", ["weights_given", "weights_none"])
def test_published_numbers(given):
    tensors, values = load_reference("losses")
    student = tensors["ibot.student"].clone().requires_grad_()
    masks = tensors["ibot.masks"]
    weights = tensors["ibot.masks_weight"] if given == "weights_given" else weights_of(masks)
    loss = ibot_loss(student, tensors["ibot.teacher_probs"], weights, num_crops=len(masks))
    loss.backward()
    assert loss.item() == pytest.approx(values[f"ibot.{given}"], rel=1e-5)
    torch.testing.assert_close(student.grad, tensors[f"ibot.{given}.grad"], rtol=0, atol=1e-6)
