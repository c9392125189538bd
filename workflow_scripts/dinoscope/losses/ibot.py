"""iBOT loss: the student predicts the teacher's prototypes of patches that were masked for it (arXiv:2111.07832).

Shapes: M masked patches of this rank, K prototypes.
"""

import torch
import torch.nn.functional as F

__all__ = ["ibot_loss"]


def ibot_loss(
    student_logits_MK: torch.Tensor,
    teacher_probs_MK: torch.Tensor,
    weights_M: torch.Tensor,
    num_crops: int,
    temperature: float = 0.1,
) -> torch.Tensor:
    """Weighted cross entropy over masked patches, divided by the number of crops, in float32.

    Args:
        student_logits_MK: Student logits of the masked patches; gradients flow here only.
        teacher_probs_MK: Teacher targets of the same patches.
        weights_M: One over the number of masked patches of the patch's crop, so that every masked crop counts alike.
        num_crops: Global crops of this rank, masked or not (2 · images).
        temperature: Student temperature.

    Returns:
        A scalar; 0 with a zero gradient when nothing is masked.
    """
    log_probs_MK = F.log_softmax(student_logits_MK.float() / temperature, dim=-1)
    cross_entropy_M = -(teacher_probs_MK.detach().float() * log_probs_MK).sum(-1)
    return (cross_entropy_M * weights_M.float()).sum() / num_crops
