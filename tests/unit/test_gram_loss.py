import itertools

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from dinoscope.losses.gram import gram_loss, resize_patches, select_tokens
from reference_numbers import load_reference

CLIPPING = [
    {},
    {"remove_neg": True},
    {"remove_only_teacher_neg": True},
    {"remove_only_teacher_neg": True, "keep_student_neg": True},
]


def naive_gram(student, teacher, img_level, normalized, remove_neg, remove_only_teacher_neg, keep_student_neg):
    """Every pair of patches by hand, in float64; differentiable."""
    student, teacher = student.double(), teacher.double()
    groups = list(zip(student, teacher, strict=True))
    if not img_level:
        groups = [(student.flatten(0, -2), teacher.flatten(0, -2))]
    squares = []
    for of_student, of_teacher in groups:
        for first, second in itertools.product(range(len(of_student)), repeat=2):
            similarities = []
            for features in (of_student, of_teacher):
                x, y = features[first], features[second]
                scale = (x * x).sum().sqrt() * (y * y).sum().sqrt() if normalized else 1
                similarities.append((x * y).sum() / scale)
            s, t = similarities
            if remove_neg:
                s, t = s * (s > 0), t * (t > 0)
            if remove_only_teacher_neg and t < 0:
                s, t = s if keep_student_neg else s * (s > 0), 0
            squares.append((s - t) ** 2)
    return sum(squares) / len(squares)


def assert_equals_naive_loop(student, teacher, img_level, normalized, clipping):
    student = student.clone().requires_grad_()
    ours = gram_loss(student, teacher, img_level=img_level, normalized=normalized, **clipping)
    options = {"remove_neg": False, "remove_only_teacher_neg": False, "keep_student_neg": False, **clipping}
    expected = naive_gram(student, teacher, img_level, normalized, **options)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    (grad,), (expected_grad,) = (torch.autograd.grad(loss, student) for loss in (ours, expected))
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("img_level", [True, False])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("clipping", CLIPPING, ids=str)
def test_equals_naive_loop(img_level, normalized, clipping):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 5, 4, generator=generator)
    assert_equals_naive_loop(student, teacher, img_level, normalized, clipping)


@pytest.mark.parametrize("tokens_used", ["masked", "unmasked"])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("clipping", CLIPPING, ids=str)
def test_equals_naive_loop_over_chosen_tokens(tokens_used, normalized, clipping):
    """Crops with different numbers of masked patches, one with none and one with all."""
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 4, 5, 4, generator=generator)
    masks = torch.arange(5) < torch.tensor([[2], [0], [5], [1]])
    chosen = [select_tokens(patches, masks, tokens_used) for patches in (student, teacher)]
    assert [len(patches) for patches in chosen] == [8 if tokens_used == "masked" else 12] * 2
    assert_equals_naive_loop(*chosen, False, normalized, clipping)


def test_zero_for_rotated_features():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, 9, 6, generator=generator)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    assert gram_loss(student, student @ rotation * 5).item() < 1e-12


def test_float32_under_autocast_and_no_gradient_to_the_teacher():
    student, teacher = torch.randn(2, 2, 7, 8).bfloat16()
    student.requires_grad_(), teacher.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = gram_loss(student, teacher)
    mixed.backward()
    assert torch.equal(mixed, gram_loss(student.float(), teacher.float()))
    assert teacher.grad is None


def test_options_that_exclude_each_other():
    with pytest.raises(AssertionError, match="exclude"):
        gram_loss(torch.ones(1, 2, 3), torch.ones(1, 2, 3), remove_neg=True, remove_only_teacher_neg=True)


def test_resize_keeps_rows_and_columns_apart():
    ramp = torch.arange(4.0)[:, None] * 10 + torch.arange(8.0)
    patches = ramp.reshape(1, 32, 1)
    smaller = resize_patches(patches, (4, 8), (2, 4), "bilinear").reshape(2, 4)
    expected = torch.tensor([[5.0], [25.0]]) + torch.tensor([0.5, 2.5, 4.5, 6.5])
    torch.testing.assert_close(smaller, expected)
    assert resize_patches(patches, (4, 8), (4, 8)) is patches


@pytest.mark.parametrize("from_hw", [(8, 8), (7, 9), (12, 8)])
@pytest.mark.parametrize("method", ["bicubic", "bilinear"])
@pytest.mark.parametrize("antialias", [False, True])
def test_resize_equals_other_libraries(from_hw, method, antialias):
    """OpenCV interpolates without a low-pass filter, Pillow with one; both on one channel in float32."""
    maps = torch.randn(2, 3, *from_hw, generator=torch.Generator().manual_seed(0)).numpy()
    ours = resize_patches(torch.from_numpy(maps).flatten(2).mT, from_hw, (4, 5), method, antialias)
    for image, channel in itertools.product(range(2), range(3)):
        if antialias:
            kernel = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[method]
            expected = np.asarray(Image.fromarray(maps[image, channel]).resize((5, 4), kernel))
        else:
            kernel = {"bicubic": cv2.INTER_CUBIC, "bilinear": cv2.INTER_LINEAR}[method]
            expected = cv2.resize(maps[image, channel], (5, 4), interpolation=kernel)
        np.testing.assert_allclose(ours[image, :, channel].reshape(4, 5), expected, atol=1e-5)


def test_select_tokens():
    patches = torch.arange(12.0).reshape(2, 3, 2)
    masks = torch.tensor([[True, False, False], [False, True, True]])
    assert select_tokens(patches, masks, "all") is patches
    assert torch.equal(select_tokens(patches, masks, "masked"), patches.reshape(6, 2)[[0, 4, 5]])
    assert torch.equal(select_tokens(patches, masks, "unmasked"), patches.reshape(6, 2)[[1, 2, 3]])
    with pytest.raises(AssertionError, match="visible"):
        select_tokens(patches, masks, "visible")


@pytest.mark.parametrize("img_level", [True, False])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("clipping", [CLIPPING[0], CLIPPING[1], CLIPPING[3]], ids=str)
def test_published_numbers(img_level, normalized, clipping):
    tensors, values = load_reference("losses")
    student = tensors["gram.student"].clone().requires_grad_()
    loss = gram_loss(student, tensors["gram.teacher"], img_level=img_level, normalized=normalized, **clipping)
    loss.backward()
    name = (
        f"gram.img_level={img_level}.remove_neg={clipping.get('remove_neg', False)}"
        f".remove_only_teacher_neg={clipping.get('remove_only_teacher_neg', False)}.normalized={normalized}"
    )
    assert loss.item() == pytest.approx(values[name], rel=1e-5)
    torch.testing.assert_close(student.grad, tensors[f"{name}.grad"], rtol=1e-5, atol=1e-6)


def test_published_number_of_what_remove_only_teacher_neg_says():
    tensors, values = load_reference("losses")
    ours = gram_loss(tensors["gram.student"], tensors["gram.teacher"], remove_only_teacher_neg=True)
    name = "gram.NOT_META.intended_remove_only_teacher_neg.img_level.normalized"
    assert ours.item() == pytest.approx(values[name], rel=1e-5)


@pytest.mark.parametrize("size", [8, 7])
@pytest.mark.parametrize("method", ["bicubic", "bilinear"])
@pytest.mark.parametrize("antialias", [False, True])
def test_published_resizing(size, method, antialias):
    tensors, _ = load_reference("losses")
    ours = resize_patches(tensors[f"gram.teacher_{size}x{size}"], (size, size), (4, 4), method, antialias)
    expected = tensors[f"gram.resize.{size}x{size}to4x4.{method}.antialias={antialias}"]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tokens_used", ["masked", "unmasked"])
def test_published_token_selection(tokens_used):
    tensors, values = load_reference("losses")
    teacher = resize_patches(tensors["gram.teacher_8x8"], (8, 8), (4, 4))
    chosen = [select_tokens(x, tensors["gram.masks"], tokens_used) for x in (tensors["gram.student"], teacher)]
    name = f"gram.resize.8x8to4x4.bicubic.antialias=False.{tokens_used}"
    torch.testing.assert_close(chosen[0], tensors[f"{name}.student"], rtol=0, atol=0)
    torch.testing.assert_close(chosen[1], tensors[name], rtol=0, atol=1e-5)
    loss = gram_loss(*chosen, img_level=False, remove_neg=True)
    assert loss.item() == pytest.approx(values[f"gram.tokens_used={tokens_used}.loss"], rel=1e-5)


def test_no_chosen_token_is_no_loss():
    student = torch.empty(0, 8, requires_grad=True)
    loss = gram_loss(student, torch.empty(0, 8), img_level=False)
    loss.backward()
    assert loss.item() == 0
    assert student.grad.shape == (0, 8)
