"""Counted operations against torch's own counter of what really runs."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dinoscope.models.registry import ViTSettings
from dinoscope.models.vit import DinoVisionTransformer
from dinoscope.recipe import resolve_recipe
from dinoscope.train.flops import adapted_step_flops, backbone_flops, head_flops, step_flops
from dinoscope.train.ssl_step import build_heads
from dinoscope.train.trainable import adapted_backbone, freeze_untrained

SETTINGS = ViTSettings(64, 3, 2, 256, num_storage_tokens=4, mask_k_bias=True)


@pytest.mark.parametrize("changes", [{}, {"ffn_layer": "swiglu", "ffn_hidden": 176}, {"num_storage_tokens": 0}])
@pytest.mark.parametrize("side", [32, 96])
def test_backbone(changes: dict, side: int) -> None:
    settings = dataclasses.replace(SETTINGS, **changes)
    with torch.device("meta"):
        model = DinoVisionTransformer(settings)
        with FlopCounterMode(display=False) as counter:
            model.forward_features(torch.empty(3, 3, side, side))
    assert counter.get_total_flops() == 3 * backbone_flops(settings, side)


def test_head_and_step() -> None:
    dino = {"head_n_prototypes": 96, "head_hidden_dim": 48, "head_bottleneck_dim": 16, "head_nlayers": 3}
    crops = {"global_crops_size": 64, "local_crops_size": 32, "local_crops_number": 3}
    config = resolve_recipe([("test", {"dino": dino, "ibot": dino, "crops": crops})], "test")
    with torch.device("meta"):
        head = build_heads(config, SETTINGS)["dino_head"]
        with FlopCounterMode(display=False) as counter:
            head(torch.empty(5, 64))
    assert counter.get_total_flops() == 5 * head_flops(config.dino, 64)
    one_tile = step_flops(config, SETTINGS, 1, 0)
    large, small, tokens = backbone_flops(SETTINGS, 64), backbone_flops(SETTINGS, 32), head_flops(config.dino, 64)
    assert one_tile == 4 * 2 * large + 3 * 3 * small + (2 + 3 * 5) * tokens
    assert step_flops(config, SETTINGS, 4, 10) == 4 * one_tile + 4 * 10 * tokens


@pytest.mark.parametrize(
    "student",
    [
        {"trainable": "lora", "lora_rank": 4, "unfrozen_blocks": 1},
        {"trainable": "lora", "lora_rank": 2, "unfrozen_blocks": 0, "lora_targets": ["q", "v", "ffn"]},
        {"trainable": "last_n", "unfrozen_blocks": 1},
        {"trainable": "last_n", "unfrozen_blocks": 2},
    ],
)
def test_what_is_frozen_saves_what_torch_saves(student: dict) -> None:
    """The difference between training all and a part, forward and backward, as torch's counter has it."""
    settings = dataclasses.replace(SETTINGS, depth=3)
    crops = {"global_crops_size": 64, "local_crops_size": 32, "local_crops_number": 3}

    def counted(trained: dict) -> tuple[int, int]:
        config = resolve_recipe([("test", {"crops": crops, "student": {"arch": "vit_nano"} | trained})], "test")
        backbone = adapted_backbone(settings, config.student)
        freeze_untrained(backbone, config.student)
        total = 0
        for side, number in ((64, 2), (32, 3)):
            # the counter knows no fused attention of CPUs
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                (out,) = backbone.forward_crops([torch.randn(number, 3, side, side)])
                (out.cls_BD.sum() + out.patches_BPD.sum()).backward()
            total += counter.get_total_flops()
        return total, adapted_step_flops(config, settings, 1, 0)

    (all_of_it, whole), (part_of_it, part) = counted({}), counted(student)
    assert whole - part == all_of_it - part_of_it > 0
