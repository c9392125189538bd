"""Student, teacher, and the losses of one step of DINOv3 self-supervised training (arXiv:2508.10104).

Shape suffixes: B tiles of this rank, P patches of a global crop, M masked patches, K prototypes, D width.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dinoscope.data.collate import Batch
from dinoscope.losses.dino import dino_loss
from dinoscope.losses.gram import gram_loss, resize_patches, select_tokens
from dinoscope.losses.ibot import ibot_loss
from dinoscope.losses.kde import distributed_kde_loss, kde_loss
from dinoscope.losses.koleo import distributed_koleo_loss, koleo_loss
from dinoscope.losses.sinkhorn import sinkhorn_knopp
from dinoscope.models.heads import DINOHead
from dinoscope.models.layers import BlockDraws
from dinoscope.models.registry import ViTSettings
from dinoscope.models.vit import BackboneOutput
from dinoscope.train.distillation import TeacherShape, build_teacher
from dinoscope.train.trainable import adapted_backbone, freeze_untrained

if TYPE_CHECKING:
    from dinoscope.config import RunConfig

__all__ = ["SSLModel", "StepLosses", "Targets", "build_heads", "compute_dtype", "parameters_by_part"]

StepLosses = dict[str, Tensor]


@dataclass
class Targets:
    """What the teacher makes of one batch.

    Attributes:
        images: The global crops, normalised (2B, 3, S, S).
        cls_BD: The EMA teacher's features of each tile's first global crop, which tell of the run's health.
        cls_2BK: Centred and sharpened probabilities of CLS tokens.
        patches_MK: The same of masked patches.
        output: The teacher's tokens.
    """

    images: Tensor
    cls_2BK: Tensor
    patches_MK: Tensor
    output: BackboneOutput
    cls_BD: Tensor


class SSLModel(nn.Module):
    """The networks of a run, named as in its checkpoints: `student`, `teacher` and, in gram runs, `gram_teacher`.

    Each holds a `backbone`; student and teacher a `dino_head` and an `ibot_head` too. Only the student has gradients.
    `teacher` is its EMA. Under `distillation.enabled` the targets come from a fourth one, `distilled_teacher`, which
    stays as it is.
    """

    def __init__(self, config: "RunConfig", settings: ViTSettings, distilled: TeacherShape | None = None) -> None:
        """Builds empty networks.

        Args:
            config: The recipe.
            settings: Of the student's backbone.
            distilled: Of the teacher that is distilled, where there is one.
        """
        super().__init__()
        self.config, self.settings = config, settings
        self.student, self.teacher = (
            nn.ModuleDict({"backbone": adapted_backbone(settings, config.student), **build_heads(config, settings)})
            for _ in range(2)
        )
        self.gram_teacher: nn.ModuleDict | None = None
        if config.gram.use_loss and not config.gram.ema_teacher:
            self.gram_teacher = nn.ModuleDict({"backbone": adapted_backbone(settings, config.student)})
        assert (distilled is not None) == config.distillation.enabled
        self.distilled = distilled
        self.distilled_teacher = None if distilled is None else build_teacher(distilled)
        freeze_untrained(self.student["backbone"], config.student)
        for network in self.frozen_networks():
            network.requires_grad_(False)
        self.train()

    def frozen_networks(self) -> list[nn.ModuleDict]:
        """Teacher and, as far as there are such, gram teacher and distilled teacher."""
        networks = (self.teacher, self.gram_teacher, self.distilled_teacher)
        return [network for network in networks if network is not None]

    def train(self, mode: bool = True) -> "SSLModel":
        """Puts the student in training mode; teachers stay in eval mode."""
        super().train(mode)
        for network in self.frozen_networks():
            network.eval()
        return self

    @torch.no_grad()
    def targets(self, batches: Sequence[Batch], temperature: float) -> list[Targets]:
        """Targets of all batches of a step; Sinkhorn-Knopp runs over all of them on all ranks together.

        Args:
            batches: What this rank forwards one after the other, on the device.
            temperature: Of the teacher.
        """
        images = [self.normalised(batch.global_crops) for batch in batches]
        teacher = self.distilled_teacher or self.teacher
        outputs, cls_logits, patch_logits = [], [], []
        for batch, crops in zip(batches, images, strict=True):
            (output,) = teacher["backbone"].forward_crops([crops])
            outputs.append(output)
            cls_logits.append(teacher["dino_head"](output.cls_BD))
            patch_logits.append(teacher["ibot_head"](output.patches_BPD.flatten(0, 1)[batch.mask_indices]))
        cls_targets = _centred(cls_logits, temperature)
        patch_targets = _centred(patch_logits, temperature)
        return [
            Targets(crops, cls.unflatten(0, (2, -1)), patches, output, self._health_features(crops, output))
            for crops, cls, patches, output in zip(images, cls_targets, patch_targets, outputs, strict=True)
        ]

    def _health_features(self, images: Tensor, output: BackboneOutput) -> Tensor:
        """CLS features of the EMA teacher, one crop a tile; a copy, since a view would keep all tokens alive."""
        if self.distilled_teacher is None:
            return output.cls_BD.chunk(2)[0].clone()
        (ema,) = self.teacher["backbone"].forward_crops([images.chunk(2)[0]])
        return ema.cls_BD.clone()

    def forward(
        self,
        batch: Batch,
        targets: Targets,
        *,
        gram_weight: float | None = None,
        local_loss_weight: float | None = None,
        draws: list[list[BlockDraws]] | None = None,
        backbone_frozen: bool = False,
    ) -> tuple[Tensor, StepLosses]:
        """Total loss and its terms for one batch of this rank.

        Args:
            batch: Crops and masks, on the device.
            targets: The teacher's for this batch.
            gram_weight: Weight of the gram loss at this iteration; None outside gram runs.
            local_loss_weight: Weight of the local DINO loss under `dino.reweight_dino_local_loss`.
            draws: Random numbers of the student's forward pass.
            backbone_frozen: Only the student's heads get gradients, and no backward runs through its backbone.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not backbone_frozen):
            student_global, student_local = self.student["backbone"].forward_crops(
                [targets.images, self.normalised(batch.local_crops)], [batch.masks, None], draws, [False, True]
            )
        losses = self._cls_losses(student_global, student_local, targets.cls_2BK)
        losses["ibot_loss"] = self._patch_loss(student_global, batch, targets.patches_MK)
        total = self._total(losses, local_loss_weight)
        if gram_weight is not None:
            losses["gram_loss"] = self._gram_loss(student_global, targets.output, batch)
            total = total + gram_weight * losses["gram_loss"]
        return total, {"total_loss": total.detach()} | {name: loss.detach() for name, loss in losses.items()}

    def normalised(self, crops: Tensor) -> Tensor:
        """(N, S, S, 3) uint8 -> (N, 3, S, S) in the type of the computation."""
        mean, deviation = self._normalisation(crops.device)
        images = (crops.float() / 255 - mean) / deviation
        return images.permute(0, 3, 1, 2).to(compute_dtype(self.config, crops.device.type))

    @functools.cache  # noqa: B019 - there is one model a process
    def _normalisation(self, device: torch.device) -> tuple[Tensor, Tensor]:
        crops = self.config.crops
        mean, deviation = (torch.tensor(list(values), device=device) for values in (crops.rgb_mean, crops.rgb_std))
        return mean, deviation

    def _cls_losses(self, global_out: BackboneOutput, local_out: BackboneOutput, targets: Tensor) -> StepLosses:
        num_global, num_local = global_out.cls_BD.shape[0], local_out.cls_BD.shape[0]
        logits = self.student["dino_head"](torch.cat([global_out.cls_BD, local_out.cls_BD]))
        global_logits, local_logits = logits.split([num_global, num_local])
        batch_size = num_global // 2
        ignore_diagonal = self.config.dino.global_ignore_diagonal
        losses = {
            "dino_local_crops_loss": dino_loss(local_logits.unflatten(0, (-1, batch_size)), targets),
            "dino_global_crops_loss": dino_loss(
                global_logits.unflatten(0, (2, batch_size)), targets, ignore_diagonal=ignore_diagonal
            ),
        }
        # of each global crop by itself: two crops of one tile must not be pushed apart
        first_BD, second_BD = global_out.cls_BD.chunk(2)
        losses["koleo_loss"] = logits.new_zeros(())
        if self.config.dino.koleo_loss_weight:
            losses["koleo_loss"] = (self._koleo(first_BD) + self._koleo(second_BD)) / 2
        if self.config.dino.kde_loss_weight:
            losses["kde_loss"] = (self._kde(first_BD) + self._kde(second_BD)) / 2
        return losses

    def _koleo(self, features_BD: Tensor) -> Tensor:
        dino = self.config.dino
        if dino.koleo_loss_distributed:
            return distributed_koleo_loss(features_BD, dino.koleo_topk, dino.koleo_distributed_loss_group_size)
        return koleo_loss(features_BD)

    def _kde(self, features_BD: Tensor) -> Tensor:
        dino = self.config.dino
        loss = distributed_kde_loss if dino.kde_loss_distributed else kde_loss
        return loss(features_BD, dino.kde_concentration)

    def _patch_loss(self, global_out: BackboneOutput, batch: Batch, targets_MK: Tensor) -> Tensor:
        masked = global_out.patches_BPD.flatten(0, 1)[batch.mask_indices]
        logits_MK = self.student["ibot_head"](masked)
        return ibot_loss(logits_MK, targets_MK, batch.mask_weights, num_crops=batch.masks.shape[0])

    def _total(self, losses: StepLosses, local_loss_weight: float | None) -> Tensor:
        dino, num_local = self.config.dino, self.config.crops.local_crops_number
        global_terms = 2 if dino.global_ignore_diagonal else 4
        local_terms = 2 * num_local
        global_share = global_terms / (global_terms + local_terms)
        local_share = local_terms / (global_terms + local_terms)
        weight = local_loss_weight if local_loss_weight is not None else 1.0
        cls_loss = (
            local_share * weight * losses["dino_local_crops_loss"] + global_share * losses["dino_global_crops_loss"]
        )
        return (
            dino.loss_weight * cls_loss
            + dino.koleo_loss_weight * 2 * losses["koleo_loss"]
            + self.config.ibot.loss_weight * losses["ibot_loss"]
            + dino.kde_loss_weight * 2 * losses.get("kde_loss", 0.0)
        )

    def _gram_loss(self, student: BackboneOutput, teacher: BackboneOutput, batch: Batch) -> Tensor:
        gram = self.config.gram
        target_BPD = self._gram_targets(teacher, batch)
        student_BPD = student.patches_BPD
        if gram.tokens_used != "all":
            student_BPD, target_BPD = (
                select_tokens(patches, batch.masks, gram.tokens_used) for patches in (student_BPD, target_BPD)
            )
        return gram_loss(
            student_BPD,
            target_BPD,
            img_level=gram.img_level,
            normalized=gram.normalized,
            remove_neg=gram.remove_neg,
            remove_only_teacher_neg=gram.remove_only_teacher_neg,
        )

    @torch.no_grad()
    def _gram_targets(self, teacher: BackboneOutput, batch: Batch) -> Tensor:
        """The gram teacher's patches on the student's patch grid."""
        if self.gram_teacher is None and batch.gram_crops is None:
            return teacher.patches_BPD
        network = self.gram_teacher or self.teacher
        crops = batch.gram_crops if batch.gram_crops is not None else batch.global_crops
        (output,) = network["backbone"].forward_crops([self.normalised(crops)])
        patch = self.settings.patch_size
        from_side, to_side = crops.shape[1] // patch, batch.global_crops.shape[1] // patch
        if from_side == to_side:
            return output.patches_BPD
        return resize_patches(
            output.patches_BPD,
            (from_side, from_side),
            (to_side, to_side),
            method=self.config.gram.global_teacher_resize_method,
            antialias=self.config.gram.global_teacher_resize_antialias,
        )


def _centred(logits: list[Tensor], temperature: float) -> list[Tensor]:
    """Sinkhorn-Knopp over the logits of several batches together; the list is emptied, to free their memory."""
    sizes = [len(part) for part in logits]
    joined = torch.cat(logits)
    logits.clear()
    return list(sinkhorn_knopp(joined, temperature).split(sizes))


def compute_dtype(config: "RunConfig", device_type: str) -> torch.dtype:
    """Number format of forward and backward: as configured, but always float32 on CPUs, where bf16 is slower."""
    reduced = device_type != "cpu" and config.compute_precision.param_dtype == "bf16"
    return torch.bfloat16 if reduced else torch.float32


def build_heads(config: "RunConfig", settings: ViTSettings) -> dict[str, DINOHead]:
    """The two heads of a recipe, empty."""
    return {
        f"{name}_head": DINOHead(
            settings.embed_dim,
            section.head_n_prototypes,
            hidden_dim=section.head_hidden_dim,
            bottleneck_dim=section.head_bottleneck_dim,
            num_layers=section.head_nlayers,
        )
        for name, section in (("dino", config.dino), ("ibot", config.ibot))
    }


def parameters_by_part(student: nn.ModuleDict) -> dict[str, list[Any]]:
    """Trained parameters of backbone, dino_head and ibot_head, which are clipped separately."""
    return {name: [p for p in part.parameters() if p.requires_grad] for name, part in student.items()}
