"""What is trained of a backbone, and what follows from it: gradients, optimizer, EMA."""

import re

import pytest
import torch

from dinoscope.data.collate import Batch
from dinoscope.models.registry import ViTSettings
from dinoscope.models.vit import DinoVisionTransformer
from dinoscope.recipe import flatten, resolve_recipe
from dinoscope.train.optimizer import apply_schedule, build_optimizer, clip_gradients, multipliers, update_ema
from dinoscope.train.schedule import ScheduleValues
from dinoscope.train.ssl_step import SSLModel, parameters_by_part
from dinoscope.train.trainable import count_trained, describe_trained

DEPTH = 3
SETTINGS = ViTSettings(32, DEPTH, 2, 64, mask_k_bias=True, num_storage_tokens=2, untie_cls_and_patch_norms=True)
SMALL = {"head_n_prototypes": 16, "head_hidden_dim": 16, "head_bottleneck_dim": 8}
BASE = {
    "crops": {"global_crops_size": 32, "local_crops_size": 16, "local_crops_number": 1},
    "train": {"batch_size_per_gpu": 2},
    "dino": SMALL,
    "ibot": SMALL,
    "student": {"arch": "vit_micro"},
}
MODES = {
    "full": {},
    "last_n": {"unfrozen_blocks": 1},
    "lora": {"unfrozen_blocks": 1, "lora_targets": ["q", "v"], "lora_rank": 2, "lora_alpha": 6},
    "norms": {},
}
NORMS = r"blocks\.\d\.norm[12]\.(weight|bias)"
FINAL_NORMS = r"(cls_)?norm\.(weight|bias)"
TRAINED = {
    "full": r".*",
    "last_n": rf"blocks\.2\..*|{FINAL_NORMS}",
    "lora": rf"blocks\.[01]\.attn\.qkv\.lora\.[ab]_[qv]|blocks\.2\..*|{NORMS}|{FINAL_NORMS}",
    "norms": rf"{NORMS}|{FINAL_NORMS}|blocks\.\d\.ls[12]\.gamma",
}


def config_of(mode: str, **optim):
    student = {**BASE["student"], "trainable": mode, **MODES[mode]}
    return resolve_recipe([("test", BASE | {"student": student, "optim": optim})], "test")


def build(mode: str, **optim) -> SSLModel:
    torch.manual_seed(0)
    model = SSLModel(config_of(mode, **optim), SETTINGS)
    for part in model.student.values():
        part.init_weights()
    model.teacher.load_state_dict(model.student.state_dict())
    return model


def batch() -> Batch:
    torch.manual_seed(1)
    masks = torch.tensor([[True, False, False, True]] * 2 + [[False] * 4] * 2)
    return Batch(
        samples=[],
        global_crops=torch.randint(0, 255, (4, 32, 32, 3), dtype=torch.uint8),
        local_crops=torch.randint(0, 255, (2, 16, 16, 3), dtype=torch.uint8),
        gram_crops=None,
        masks=masks,
        mask_indices=masks.flatten().nonzero().flatten(),
        mask_weights=torch.full((4,), 0.5),
    )


def one_step(model: SSLModel, **options) -> torch.optim.Optimizer:
    """Loss, gradients, clipping, update and EMA, as in the trainer."""
    optimizer = build_optimizer(model.student, model.config, DEPTH)
    apply_schedule(optimizer, ScheduleValues(0.01, 0.1, 0.5, 0.07, 0.01, None, None))
    loss, _ = model(batch(), model.targets([batch()], 0.07)[0], **options)
    loss.backward()
    for parameters in parameters_by_part(model.student).values():
        clip_gradients(parameters, 3.0)
    optimizer.step()
    for name in ("backbone", "dino_head", "ibot_head"):
        update_ema(model.teacher[name], model.student[name], 0.5)
    return optimizer


@pytest.mark.parametrize("mode", MODES)
def test_exactly_what_the_mode_names_is_trained(mode: str) -> None:
    model = build(mode)
    for name, parameter in model.student["backbone"].named_parameters():
        assert parameter.requires_grad == bool(re.fullmatch(TRAINED[mode], name)), name
    assert all(p.requires_grad for head in ("dino_head", "ibot_head") for p in model.student[head].parameters())
    assert not any(p.requires_grad for p in model.teacher.parameters())
    names = [name for name, _ in model.student["backbone"].named_parameters()]
    assert sum(bool(re.fullmatch(TRAINED[mode], name)) for name in names) > 0
    expected = sum(p.numel() for p in parameters_by_part(model.student)["backbone"])
    everything = sum(p.numel() for p in model.student["backbone"].parameters())
    assert count_trained(model.student["backbone"]) == (expected, everything)


@pytest.mark.parametrize("mode", MODES)
def test_a_step_moves_what_is_trained_and_nothing_else(mode: str) -> None:
    model = build(mode, layerwise_decay=1.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = one_step(model)
    in_optimizer = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.student.named_parameters():
        start, teacher = before[f"student.{name}"], model.teacher.get_parameter(name)
        if parameter.requires_grad:
            assert id(parameter) in in_optimizer, name
            assert parameter.grad is not None, name
            torch.testing.assert_close(teacher, (start + parameter) / 2, rtol=1e-6, atol=1e-8, msg=name)
        else:
            assert id(parameter) not in in_optimizer, name
            assert parameter.grad is None, name
            assert torch.equal(parameter, start), name
            assert torch.equal(teacher, start), name
    moved = {name for name, p in model.student.named_parameters() if not torch.equal(p, before[f"student.{name}"])}
    assert any(name.startswith("backbone.") for name in moved)
    if mode == "lora":  # B moves first: while it is zero A has no gradient
        assert "backbone.blocks.0.attn.qkv.lora.b_v" in moved


def test_the_backward_stops_at_the_first_block_that_is_trained() -> None:
    model = build("last_n")
    seen: dict[int, bool] = {}
    for index, block in enumerate(model.student["backbone"].blocks):
        block.register_forward_hook(
            lambda _module, _inputs, output, index=index: seen.__setitem__(index, output[0].requires_grad)
        )
    one_step(model)
    assert seen == {0: False, 1: False, 2: True}


def test_with_a_frozen_backbone_the_heads_alone_are_trained() -> None:
    frozen, free = build("full"), build("full")
    losses = [
        model(batch(), model.targets([batch()], 0.07)[0], backbone_frozen=model is frozen)[0]
        for model in (frozen, free)
    ]
    assert losses[0].item() == losses[1].item()
    for loss in losses:
        loss.backward()
    assert all(p.grad is None for p in frozen.student["backbone"].parameters())
    for head in ("dino_head", "ibot_head"):
        pairs = zip(frozen.student[head].parameters(), free.student[head].parameters(), strict=True)
        assert all(torch.equal(first.grad, second.grad) for first, second in pairs)
    optimizer = build_optimizer(frozen.student, frozen.config, DEPTH)
    before = {name: p.clone() for name, p in frozen.student.named_parameters()}
    apply_schedule(optimizer, ScheduleValues(0.0, 0.1, 0.5, 0.07, 0.01, None, None, 0.01))
    norm = clip_gradients(parameters_by_part(frozen.student)["backbone"], 3.0)
    assert norm.item() == 0
    optimizer.step()
    for name, parameter in frozen.student.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("backbone."), name
        assert bool(optimizer.state[parameter]) != name.startswith("backbone."), name


def test_adapters_have_no_weight_decay_and_no_layer_decay() -> None:
    config = config_of("lora", layerwise_decay=0.5)
    for name in ("a_q", "b_v"):
        found = multipliers(f"backbone.blocks.0.attn.qkv.lora.{name}", config, DEPTH)
        assert (found.lr, found.weight_decay, found.is_last_layer, found.is_head) == (1.0, 0.0, False, False)
    found = multipliers("backbone.blocks.2.attn.qkv.weight", config, DEPTH)
    assert (found.lr, found.weight_decay) == (0.5, 1.0)
    assert multipliers("dino_head.mlp.0.weight", config, DEPTH).is_head


def test_heads_and_backbone_have_learning_rates_of_their_own() -> None:
    model = build("full", layerwise_decay=1.0, patch_embed_lr_mult=1.0)
    optimizer = build_optimizer(model.student, model.config, DEPTH)
    names = {id(p): name for name, p in model.student.named_parameters()}

    def rates() -> dict[str, float]:
        return {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}

    apply_schedule(optimizer, ScheduleValues(0.1, 0, 0, 0, 0.3, None, None, 0.2))
    for name, rate in rates().items():
        wanted = 0.3 if "last_layer" in name else 0.1 if name.startswith("backbone.") else 0.2
        assert rate == wanted, name
    apply_schedule(optimizer, ScheduleValues(0.1, 0, 0, 0, 0.3, None, None))
    assert {rate for name, rate in rates().items() if "last_layer" not in name} == {0.1}


def test_runs_are_described_alike_exactly_when_they_train_the_same() -> None:
    def described(mode: str, **student) -> str:
        return describe_trained(flatten(config_of(mode)) | {f"student.{k}": v for k, v in student.items()})

    assert describe_trained({}) == described("full") == described("full", lora_rank=3) == "full"
    assert described("norms") == described("norms", unfrozen_blocks=2)
    assert described("last_n") == "last_n (1 blocks)"
    assert described("last_n") != described("last_n", unfrozen_blocks=2)
    assert described("lora") == "lora (rank 2, scale 3.0, targets q v, 1 unfrozen blocks)"
    assert described("lora", lora_targets=["v", "q"]) == described("lora")
    assert described("lora", lora_targets=["proj", "qkv"]) == described("lora", lora_targets=["q", "k", "v", "proj"])
    assert described("lora", lora_alpha=None) == described("lora", lora_alpha=2)
    for other in ({"lora_rank": 4}, {"lora_alpha": 2}, {"lora_targets": ["q"]}, {"unfrozen_blocks": 0}):
        assert described("lora", **other) != described("lora")


def test_full_training_has_the_plain_backbone() -> None:
    model = build("full")
    plain = DinoVisionTransformer(SETTINGS).state_dict()
    assert model.student["backbone"].state_dict().keys() == plain.keys()
