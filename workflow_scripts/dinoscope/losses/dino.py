"""DINO loss: the student's CLS predicts the teacher's prototype assignment of the same image (arXiv:2104.14294).

Shapes: S student crops, T teacher crops, B images of this rank, K prototypes.
"""

import torch
import torch.nn.functional as F

__all__ = ["dino_loss"]


def dino_loss(
    student_logits_SBK: torch.Tensor,
    teacher_probs_TBK: torch.Tensor,
    temperature: float = 0.1,
    ignore_diagonal: bool = False,
) -> torch.Tensor:
    """Mean cross entropy over all (student crop, teacher crop, image), in float32.

    Args:
        student_logits_SBK: Student logits, crop-major; gradients flow here only.
        teacher_probs_TBK: Teacher targets, for instance from `sinkhorn_knopp`.
        temperature: Student temperature.
        ignore_diagonal: Leaves out the min(S, T) pairs of equal crop number, which are the same pixels when both sides
            are the global crops.

    Returns:
        A scalar; the local batch alone, so that the mean over ranks of equal batches is the loss of the joined batch.
    """
    num_student, num_images = student_logits_SBK.shape[:2]
    num_teacher = len(teacher_probs_TBK)
    log_probs_SBK = F.log_softmax(student_logits_SBK.float() / temperature, dim=-1)
    teacher_TBK = teacher_probs_TBK.detach().float()
    # products instead of a matrix product: those may be done in TF32 or, under autocast, in bfloat16
    cross_entropy_ST = -torch.stack([(log_probs_SBK * probs_BK).sum((1, 2)) for probs_BK in teacher_TBK], dim=1)
    pairs_ST = torch.ones_like(cross_entropy_ST)
    if ignore_diagonal:
        pairs_ST.fill_diagonal_(0)
    num_pairs = num_student * num_teacher - (min(num_student, num_teacher) if ignore_diagonal else 0)
    assert num_pairs > 0 and num_images > 0, (num_student, num_teacher, num_images)
    return (cross_entropy_ST * pairs_ST).sum() / (num_pairs * num_images)
