"""Floating-point operations of a training step: what its matrix products need, whatever the implementation does.

A multiplication and an addition count as two. Recomputed activations, norms, softmax, losses and the optimizer do not
count, as is usual for model FLOPs utilisation (PaLM, arXiv:2204.02311, appendix B).
"""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dinoscope.models.registry import ViTSettings
from dinoscope.resolutions import Resolution, resolutions

if TYPE_CHECKING:
    from dinoscope.config import DinoConfig, IbotConfig, RunConfig
    from dinoscope.models.heads import HeadShape
    from dinoscope.train.distillation import TeacherShape

__all__ = ["adapted_step_flops", "backbone_flops", "head_flops", "num_masked_patches", "step_flops"]


def backbone_flops(settings: ViTSettings, side_px: int) -> int:
    """Forward pass of one square crop."""
    projections, attention, embedding = _parts(settings, side_px)
    return settings.depth * (projections + attention) + embedding


def _parts(settings: ViTSettings, side_px: int) -> tuple[int, int, int]:
    """Forward pass of one square crop: linear layers and attention of one block, and the patch embedding."""
    width, patches = settings.embed_dim, (side_px // settings.patch_size) ** 2
    tokens = patches + 1 + settings.num_storage_tokens
    ffn_matrices = 3 if settings.ffn_layer == "swiglu" else 2
    projections = 2 * tokens * (4 * width * width + ffn_matrices * width * settings.ffn_hidden)
    attention = 4 * tokens * tokens * width
    embedding = 2 * patches * settings.in_chans * settings.patch_size**2 * width
    return projections, attention, embedding


def head_flops(section: "DinoConfig | IbotConfig", embed_dim: int) -> int:
    """Forward pass of one token through a head."""
    hidden, bottleneck = section.head_hidden_dim, section.head_bottleneck_dim
    return _head_flops(embed_dim, hidden, section.head_nlayers, bottleneck, section.head_n_prototypes)


def _head_flops(embed_dim: int, hidden: int, num_layers: int, bottleneck: int, prototypes: int) -> int:
    widths = [embed_dim, *[hidden] * (num_layers - 1), bottleneck, prototypes]
    return sum(2 * before * after for before, after in itertools.pairwise(widths))


def _distilled_flops(shape: "TeacherShape", num_tiles: int, num_masked: int, sizes: Resolution) -> int:
    def of_head(head: "HeadShape") -> int:
        return _head_flops(
            shape.settings.embed_dim, head.hidden_dim, head.num_layers, head.bottleneck_dim, head.num_prototypes
        )

    backbone = 2 * num_tiles * backbone_flops(shape.settings, sizes.global_px)
    return backbone + 2 * num_tiles * of_head(shape.heads["dino_head"]) + num_masked * of_head(shape.heads["ibot_head"])


def step_flops(
    config: "RunConfig",
    settings: ViTSettings,
    num_tiles: int,
    num_masked: int,
    sizes: Resolution | None = None,
    distilled: "TeacherShape | None" = None,
) -> int:
    """Forward of the teachers, forward and backward (twice the forward) of the student.

    Args:
        config: The recipe, fully trained: adapters and frozen blocks would need less.
        settings: Of the backbone.
        num_tiles: Tiles of the step.
        num_masked: Masked patches of the step.
        sizes: Of its crops; the recipe's first when None.
        distilled: Of the teacher that gives the targets in place of the EMA.
    """
    crops, sizes = config.crops, sizes or resolutions(config)[0]
    global_crops = 2 * num_tiles * backbone_flops(settings, sizes.global_px)
    local_crops = crops.local_crops_number * num_tiles * backbone_flops(settings, sizes.local_px)
    dino, ibot = (head_flops(section, settings.embed_dim) for section in (config.dino, config.ibot))
    patches = num_masked * ibot
    teacher = global_crops + 2 * num_tiles * dino + patches
    if distilled is not None:
        teacher = _distilled_flops(distilled, num_tiles, num_masked, sizes) + global_crops // 2  # and a look at the EMA
    student = global_crops + local_crops + (2 + crops.local_crops_number) * num_tiles * dino + patches
    gram = 0
    if config.gram.use_loss:
        seen_by_teacher = config.gram.ema_teacher and sizes.gram_px is None
        side = sizes.gram_px or sizes.global_px
        gram = 0 if seen_by_teacher else 2 * num_tiles * backbone_flops(settings, side)
    return teacher + 3 * student + gram


def adapted_step_flops(
    config: "RunConfig", settings: ViTSettings, num_tiles: int, num_masked: int, sizes: Resolution | None = None
) -> int:
    """The same where only a part of the backbone is trained (`student.trainable`): what is saved in the backward.

    A frozen block needs no gradients of its weights; below the first trained one nothing is propagated at all. Matrix
    products of adapters count, the teacher's too, which has its own; the norms that stay trained do not.
    """
    student, sizes = config.student, sizes or resolutions(config)[0]
    whole = step_flops(config, settings, num_tiles, num_masked, sizes)
    if student.trainable == "full":
        return whole
    open_blocks = student.unfrozen_blocks if student.trainable in ("last_n", "lora") else 0
    saved = 0
    # the teacher sees the global crops alone
    of_crops = ((sizes.global_px, 2, 4), (sizes.local_px, config.crops.local_crops_number, 3))
    for side, crops, passes in of_crops:
        projections, attention, embedding = _parts(settings, side)
        # of a frozen block: its weights' gradients; with last_n those of what goes in as well
        of_block = projections if student.trainable != "last_n" else 2 * (projections + attention)
        adapters = 0
        if student.trainable == "lora":
            tokens = (side // settings.patch_size) ** 2 + 1 + settings.num_storage_tokens
            adapters = passes * 2 * tokens * student.lora_rank * _adapted_widths(settings, student.lora_targets)
        frozen = settings.depth - open_blocks
        saved += crops * num_tiles * (frozen * (of_block - adapters) + embedding)
    return whole - saved


def _adapted_widths(settings: ViTSettings, targets: Sequence[str]) -> int:
    """Inputs and outputs of the adapters of a block, together; q, k and v have one each."""
    width = settings.embed_dim
    given = {part for target in targets for part in (("q", "k", "v") if target == "qkv" else (target,))}
    ffn_matrices = 3 if settings.ffn_layer == "swiglu" else 2
    return 2 * width * len(given - {"ffn"}) + ("ffn" in given) * ffn_matrices * (width + settings.ffn_hidden)


def num_masked_patches(config: "RunConfig", tiles: int, sizes: Resolution) -> int:
    """Masked patches of the global crops of so many tiles, which is the same number for all crops of a size."""
    ibot, patches = config.ibot, (sizes.global_px // config.student.patch_size) ** 2
    if not (ibot.loss_weight or ibot.force_masking_even_with_zero_weight):
        return 0
    num_masked_crops = int(2 * tiles * ibot.mask_sample_probability)
    low, high = ibot.mask_ratio_min_max
    shares = (low + (high - low) * (crop + 1) / num_masked_crops for crop in range(num_masked_crops))
    return sum(int(patches * share) for share in shares)
