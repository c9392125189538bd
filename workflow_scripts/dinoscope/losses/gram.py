"""Gram anchoring: the student's patch similarities stay those of an earlier teacher (DINOv3, arXiv:2508.10104).

Shapes: B crops, P patches a crop, D width, N tokens taken from all crops of the rank.
"""

import torch
import torch.nn.functional as F

__all__ = ["gram_loss", "resize_patches", "select_tokens"]


def gram_loss(
    student_BPD: torch.Tensor,
    teacher_BPD: torch.Tensor,
    *,
    img_level: bool = True,
    normalized: bool = True,
    remove_neg: bool = False,
    remove_only_teacher_neg: bool = False,
    keep_student_neg: bool = False,
) -> torch.Tensor:
    """Mean squared difference of the two Gram matrices (patch by patch similarities), in float32.

    Args:
        student_BPD: Student patch features; gradients flow here only. (N, D) tokens are taken when not `img_level`.
        teacher_BPD: Gram teacher's features of the same patches (see `resize_patches`).
        img_level: One P × P matrix a crop; else one matrix over all tokens of the rank.
        normalized: L2-normalise features first, so that similarities are cosines.
        remove_neg: Clip negative similarities of both sides at 0.
        remove_only_teacher_neg: Clip the teacher's negative similarities at 0, and the student's where both sides are
            negative: the student is not pulled to either sign where the teacher says "unlike". Not with `remove_neg`.
        keep_student_neg: With `remove_only_teacher_neg`, never clip the student. The published code does so, because it
            looks for negatives of the teacher after having clipped them; for comparing with runs made by it.
    """
    assert not (remove_neg and remove_only_teacher_neg), "remove_neg and remove_only_teacher_neg exclude each other"
    with torch.autocast(student_BPD.device.type, enabled=False):
        student, teacher = student_BPD.float(), teacher_BPD.detach().float()
        if normalized:
            student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
        if not img_level:
            student, teacher = student.flatten(0, -2), teacher.flatten(0, -2)
        student_gram, teacher_gram = student @ student.mT, teacher @ teacher.mT
        if remove_neg:
            student_gram, teacher_gram = student_gram.clamp(min=0), teacher_gram.clamp(min=0)
        elif remove_only_teacher_neg:
            if not keep_student_neg:
                student_gram = student_gram.masked_fill((student_gram < 0) & (teacher_gram < 0), 0)
            teacher_gram = teacher_gram.clamp(min=0)
        if not student_gram.numel():  # no token of this process was chosen
            return student.sum() * 0
        return F.mse_loss(student_gram, teacher_gram)


def resize_patches(
    patches_BPD: torch.Tensor,
    from_hw: tuple[int, int],
    to_hw: tuple[int, int],
    method: str = "bicubic",
    antialias: bool = False,
) -> torch.Tensor:
    """Resizes a feature map given as a list of patches, in float32; the same map when the sizes agree.

    Args:
        patches_BPD: Patches in row order, P = from_hw[0] · from_hw[1].
        from_hw: Rows and columns of the grid.
        to_hw: Rows and columns wanted.
        method: "bicubic" or "bilinear".
        antialias: Low-pass first when shrinking.
    """
    assert patches_BPD.shape[1] == from_hw[0] * from_hw[1], (tuple(patches_BPD.shape), from_hw)
    if tuple(from_hw) == tuple(to_hw):
        return patches_BPD
    maps_BDhw = patches_BPD.float().mT.unflatten(-1, tuple(from_hw))
    resized_BDhw = F.interpolate(maps_BDhw, size=tuple(to_hw), mode=method, align_corners=False, antialias=antialias)
    return resized_BDhw.flatten(2).mT


def select_tokens(patches_BPD: torch.Tensor, masks_BP: torch.Tensor, tokens_used: str) -> torch.Tensor:
    """The patches that the Gram loss looks at.

    Args:
        patches_BPD: Patches of the global crops.
        masks_BP: True where the student's patch was masked.
        tokens_used: "all" gives (B, P, D) unchanged; "masked" and "unmasked" give (N, D), for `img_level=False` only,
            since crops then hold different numbers of tokens.
    """
    if tokens_used == "all":
        return patches_BPD
    assert tokens_used in ("masked", "unmasked"), tokens_used
    return patches_BPD[masks_BP if tokens_used == "masked" else ~masks_BP]
