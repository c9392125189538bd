"""What of the backbone is trained: all of it, its last blocks, low-rank adapters, or its norms (`student.trainable`).

"lora" follows ExPLoRA (arXiv:2406.10973): adapters in all blocks but the last `unfrozen_blocks`, which are trained in
full, and all norms. Heads are always trained. What is not trained is the same in student and teacher.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from dinoscope.models.lora import LORA_TARGETS, add_lora, is_adapter
from dinoscope.models.registry import ViTSettings
from dinoscope.models.vit import DinoVisionTransformer

if TYPE_CHECKING:
    from dinoscope.config import StudentConfig

__all__ = ["adapted_backbone", "count_trained", "describe_trained", "freeze_untrained", "is_trained"]


def adapted_backbone(settings: ViTSettings, student: "StudentConfig") -> DinoVisionTransformer:
    """The backbone of a recipe, empty, with adapters where `student.trainable` asks for them."""
    backbone = DinoVisionTransformer(settings)
    if student.trainable == "lora":
        adapted = range(settings.depth - student.unfrozen_blocks)
        add_lora(backbone, student.lora_rank, student.lora_alpha, student.lora_targets, adapted)
    return backbone


def freeze_untrained(backbone: DinoVisionTransformer, student: "StudentConfig") -> None:
    """Takes gradients away from all that a recipe does not train."""
    depth = len(backbone.blocks)
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(is_trained(name, student, depth))


def is_trained(name: str, student: "StudentConfig", depth: int) -> bool:
    """Whether a parameter of the backbone is trained, by its name, e.g. "blocks.3.attn.qkv.weight"."""
    block = re.match(r"blocks\.(\d+)\.", name)
    is_norm = re.search(r"norm\d?\.(weight|bias)$", name) is not None
    match student.trainable:
        case "last_n":
            return is_norm if block is None else int(block[1]) >= depth - student.unfrozen_blocks
        case "lora":
            unfrozen = block is not None and int(block[1]) >= depth - student.unfrozen_blocks
            return unfrozen or is_norm or is_adapter(name)
        case "norms":
            return is_norm or name.endswith(".gamma")
        case _:
            return True


def describe_trained(settings: Mapping[str, Any]) -> str:
    """What a run trains, in words that are the same exactly when its checkpoints fit together.

    Args:
        settings: Dotted key -> value, as in a run's seal; keys that are missing have the value of their beginnings.
    """
    trainable, blocks = settings.get("student.trainable", "full"), settings.get("student.unfrozen_blocks", 0)
    if trainable == "last_n":
        return f"last_n ({blocks} blocks)"
    if trainable == "lora":
        rank, alpha = settings["student.lora_rank"], settings["student.lora_alpha"]
        given = set(settings["student.lora_targets"])
        given = given - {"qkv"} | {"q", "k", "v"} if "qkv" in given else given
        targets = " ".join(target for target in LORA_TARGETS if target in given)
        scale = 1.0 if alpha is None else alpha / rank
        return f"lora (rank {rank}, scale {scale}, targets {targets}, {blocks} unfrozen blocks)"
    return str(trainable)


def count_trained(backbone: nn.Module) -> tuple[int, int]:
    """Number of trained parameters, and of all."""
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in backbone.parameters()]
    return sum(count for count, trained in counts if trained), sum(count for count, _ in counts)
