"""Counted operations against torch's own counter of what really runs."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dinoscope.config import RunConfig
from dinoscope.data.collate import Batch, mask_tensors
from dinoscope.models.registry import ViTSettings, settings_from_config
from dinoscope.models.vit import DinoVisionTransformer
from dinoscope.recipe import load_recipe, resolve_recipe
from dinoscope.resolutions import resolutions
from dinoscope.train.flops import adapted_step_flops, backbone_flops, head_flops, num_masked_patches, step_flops
from dinoscope.train.ssl_step import SSLModel, build_heads
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
    """The difference between training all and a part, teacher included, as torch's counter has it."""
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
                if side == 64:  # the teacher is built alike
                    with torch.no_grad():
                        backbone.forward_crops([torch.randn(number, 3, side, side)])
            total += counter.get_total_flops()
        return total, adapted_step_flops(config, settings, 1, 0)

    (all_of_it, whole), (part_of_it, part) = counted({}), counted(student)
    assert whole - part == all_of_it - part_of_it > 0


def counted_step(config: RunConfig, num_tiles: int) -> int:
    """What torch's counter sees of a whole step: teacher's forward, student's forward and backward, all losses."""
    settings = settings_from_config(config.student)
    torch.manual_seed(0)
    model = SSLModel(config, settings)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    sizes = resolutions(config)[0]
    side, num_masked = sizes.global_px // config.student.patch_size, num_masked_patches(config, num_tiles, sizes)
    masks = torch.zeros(2 * num_tiles, side * side, dtype=torch.bool)
    masks.view(-1)[:num_masked] = True
    num_local = config.crops.local_crops_number * num_tiles
    batch = Batch(
        samples=list(range(num_tiles)),
        global_crops=torch.randint(0, 256, (2 * num_tiles, sizes.global_px, sizes.global_px, 3), dtype=torch.uint8),
        local_crops=torch.randint(0, 256, (num_local, sizes.local_px, sizes.local_px, 3), dtype=torch.uint8),
        gram_crops=None,
        **mask_tensors(masks),
    )
    # the counter knows no fused attention of CPUs
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss, _ = model(batch, model.targets([batch], 0.07)[0])
        loss.backward()
    return counter.get_total_flops()


def test_a_whole_step_of_each_arm_of_a_pilot() -> None:
    """All arms are off by the same little: losses do not count, gradients of images count though nobody needs them."""
    recipe = Path(__file__).resolve().parents[2] / "config" / "runs" / "tiny.yaml"
    counts = {}
    for arm, blocks in (("full", 0), ("lora", 1), ("last_n", 2)):
        trained = [f"student.trainable={arm}", f"student.unfrozen_blocks={blocks}"]
        config = load_recipe(recipe, [*trained, "student.pos_embed_rope_rescale_coords=null"])
        ours = adapted_step_flops(
            config,
            settings_from_config(config.student),
            4,
            num_masked_patches(config, 4, resolutions(config)[0]),
        )
        counts[arm] = (ours, counted_step(config, 4))
        assert counts[arm][1] == pytest.approx(ours, rel=0.03), arm
    assert len({theirs - ours for ours, theirs in counts.values()}) == 1, counts
    assert counts["last_n"][0] < 0.8 * counts["full"][0]
