"""A frozen teacher that is distilled: what it is read from, what its targets are, what it is not."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dinoscope.data.collate import Collate
from dinoscope.data.crops import Crops
from dinoscope.errors import ConfigError, WeightsError
from dinoscope.files import write_json
from dinoscope.models.registry import settings_from_config
from dinoscope.models.weights import load_backbone
from dinoscope.recipe import resolve_recipe
from dinoscope.train.distillation import (
    TeacherShape,
    build_teacher,
    check_teacher,
    read_teacher,
    teacher_parts,
    teacher_shape,
)
from dinoscope.train.flops import step_flops
from dinoscope.train.forecast import forecast
from dinoscope.train.ssl_step import SSLModel, build_heads
from dinoscope.train.starting import fresh_backbone

TEACHER = {
    "student": {"arch": "vit_micro", "n_storage_tokens": 2, "layerscale": None},
    "dino": {"head_n_prototypes": 24, "head_hidden_dim": 20, "head_bottleneck_dim": 12, "head_nlayers": 3},
    "ibot": {"head_n_prototypes": 28, "head_hidden_dim": 16, "head_bottleneck_dim": 8, "head_nlayers": 2},
}
STUDENT = {
    "student": {"arch": "vit_nano", "drop_path_rate": 0.0},
    "crops": {"global_crops_size": 64, "local_crops_size": 32, "local_crops_number": 2},
    "dino": {"head_n_prototypes": 24, "head_hidden_dim": 32, "head_bottleneck_dim": 16},
    "ibot": {"head_n_prototypes": 28, "head_hidden_dim": 32, "head_bottleneck_dim": 16},
    "distillation": {"enabled": True, "checkpoint_path": "teacher.pth"},
    "train": {"batch_size_per_gpu": 3},
}


def recipe(*layers: dict):
    return resolve_recipe([("test", layer) for layer in layers], "test")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported teacher of random weights, heads of sizes of their own."""
    config, path = recipe(TEACHER), tmp_path_factory.mktemp("teacher") / "teacher_checkpoint.pth"
    backbone = fresh_backbone(settings_from_config(config.student), 1)
    heads = build_heads(config, backbone.settings)
    torch.manual_seed(2)
    for head in heads.values():
        head.init_weights()
    parts = {"backbone": backbone, **heads}
    tensors = {f"{part}.{name}": 5 * t for part, module in parts.items() for name, t in module.state_dict().items()}
    tensors["backbone.rope_embed.periods"] /= 5
    torch.save({"teacher": tensors}, path)
    card = {"backbone": backbone.settings.as_dict(), "mean": list(config.crops.rgb_mean), "origin": "a seed"}
    write_json(path.with_name("model.json"), card | {"std": list(config.crops.rgb_std)})
    return path


def filled(teacher: Path) -> SSLModel:
    config = recipe(STUDENT)
    shape = teacher_shape(read_teacher(teacher))
    model = SSLModel(config, settings_from_config(config.student), shape)
    torch.manual_seed(0)
    for network in (model.student, model.teacher):
        for part in network.values():
            part.init_weights()
    for name, state in teacher_parts(read_teacher(teacher)).items():
        model.distilled_teacher[name].load_state_dict(state)
    return model


def batch(tiles: int = 3):
    rng = torch.Generator().manual_seed(3)
    crops = [
        Crops(*(torch.randint(0, 256, (n, s, s, 3), dtype=torch.uint8, generator=rng).numpy() for n, s in kinds), None)
        for kinds in [((2, 64), (2, 32))] * tiles
    ]
    return Collate(tiles, 16, 0.5, (0.1, 0.5), False, 0)(list(enumerate(crops)))


def sinkhorn(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Three turns in float64, from the formula."""
    q = torch.exp((logits.double() - logits.double().max()) / temperature).T
    q /= q.sum()
    prototypes, samples = q.shape
    for _ in range(3):
        q /= q.sum(1, keepdim=True) * prototypes
        q /= q.sum(0, keepdim=True) * samples
    return (q * samples).T


def test_sizes_are_read_off_the_tensors(teacher: Path) -> None:
    shape = teacher_shape(read_teacher(teacher))
    assert (shape.settings.arch, shape.settings.num_storage_tokens, shape.settings.layerscale) == ("vit_micro", 2, None)
    assert vars(shape.heads["dino_head"]) == {
        "num_prototypes": 24,
        "hidden_dim": 20,
        "bottleneck_dim": 12,
        "num_layers": 3,
    }
    assert vars(shape.heads["ibot_head"]) == {
        "num_prototypes": 28,
        "hidden_dim": 16,
        "bottleneck_dim": 8,
        "num_layers": 2,
    }
    assert TeacherShape.from_dict(shape.as_dict()) == shape
    built = build_teacher(shape)
    for name, state in teacher_parts(read_teacher(teacher)).items():
        built[name].load_state_dict(state, strict=True)


def test_targets_are_the_files_and_not_the_emas(teacher: Path) -> None:
    """Against the file's backbone and heads, put together here, and Sinkhorn-Knopp in float64."""
    model, drawn = filled(teacher), batch()
    (targets,) = model.targets([drawn], 0.07)
    backbone, tensors = load_backbone(teacher), torch.load(teacher, weights_only=True)["teacher"]
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (backbone.mean, backbone.std))
    images = (drawn.global_crops.permute(0, 3, 1, 2).float() / 255 - mean) / std
    features = backbone.forward_features(images)

    def logits(tokens: torch.Tensor, head: str) -> torch.Tensor:
        layers = sorted({int(k.split(".")[2]) for k in tensors if k.startswith(f"{head}.mlp.")})
        for layer in layers:
            weight, bias = (tensors[f"{head}.mlp.{layer}.{kind}"] for kind in ("weight", "bias"))
            tokens = tokens @ weight.T + bias
            tokens = torch.nn.functional.gelu(tokens) if layer != layers[-1] else tokens
        return (tokens / tokens.norm(dim=-1, keepdim=True)) @ tensors[f"{head}.last_layer.weight"].T

    expected = sinkhorn(logits(features["cls"], "dino_head"), 0.07)
    assert torch.allclose(targets.cls_2BK.flatten(0, 1).double(), expected, rtol=1e-4, atol=1e-6)
    masked = features["patches"].flatten(0, 1)[drawn.masks.flatten()]
    assert torch.allclose(
        targets.patches_MK.double(), sinkhorn(logits(masked, "ibot_head"), 0.07), rtol=1e-4, atol=1e-6
    )
    # the run's health is told by the EMA of the student
    (ema,) = model.teacher["backbone"].forward_crops([images[:3]])
    assert torch.allclose(targets.cls_BD, ema.cls_BD, atol=1e-5)


def test_only_the_student_learns_and_it_comes_nearer(teacher: Path) -> None:
    model, drawn = filled(teacher), batch()
    before = {name: tensor.clone() for name, tensor in model.distilled_teacher.state_dict().items()}
    optimizer = torch.optim.AdamW(model.student.parameters(), lr=3e-3, weight_decay=0)
    losses = []
    for _ in range(30):
        loss, terms = model(drawn, model.targets([drawn], 0.07)[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(terms["dino_global_crops_loss"] + terms["ibot_loss"]))
    assert all(not p.requires_grad and p.grad is None for p in model.distilled_teacher.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.distilled_teacher.state_dict().items())
    (targets,) = model.targets([drawn], 0.07)
    lowest = float(torch.special.entr(targets.cls_2BK).sum(-1).mean())
    # at first as far from the targets as even guesses are, later much nearer
    assert losses[-1] < losses[0] - 0.3 * (torch.log(torch.tensor(24.0)) - lowest)


def test_what_does_not_fit_is_refused_with_both_values(teacher: Path, tmp_path: Path) -> None:
    file = read_teacher(teacher)
    check_teacher(file, recipe(STUDENT))
    other = {"dino": {"head_n_prototypes": 32}, "crops": {"rgb_mean": [0.5, 0.5, 0.5]}}
    with pytest.raises(
        ConfigError, match=r"dino\.head_n_prototypes is 32, the teacher's is 24; crops\.rgb_mean is \[0\.5"
    ):
        check_teacher(file, recipe(STUDENT, other))
    tensors = {k: v for k, v in torch.load(teacher, weights_only=True)["teacher"].items() if k.startswith("backbone.")}
    torch.save({"teacher": tensors}, tmp_path / "teacher.pth")
    with pytest.raises(WeightsError, match=r"has no dino_head, .* first train heads on your data"):
        read_teacher(tmp_path / "teacher.pth")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distillation": {"checkpoint_path": ""}}, "distillation.enabled needs distillation.checkpoint_path"),
        (
            {"distillation": {"enabled": False}},
            "distillation.checkpoint_path is set, but distillation.enabled is false",
        ),
        ({"gram": {"use_loss": True, "ema_teacher": True}}, "gram.ema_teacher and distillation.enabled exclude"),
    ],
)
def test_settings_that_contradict_each_other(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(STUDENT, changes)


def test_a_published_recipe_that_distils_loads() -> None:
    config = recipe(STUDENT, {"distillation": {"full_cfg_path": "configs/teacher.yaml"}})
    assert config.distillation.enabled


def test_operations_and_memory_count_the_teacher(teacher: Path) -> None:
    model, drawn = filled(teacher), batch()
    shape, config = teacher_shape(read_teacher(teacher)), recipe(STUDENT)
    # as plain products: those of fused attention are not counted on CPUs
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.targets([drawn], 0.07)
    plain = SSLModel(recipe({**STUDENT, "distillation": {}}), model.settings)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as plain_counter:
        plain.targets([drawn], 0.07)
    counted, plainly = (
        step_flops(config, model.settings, 3, len(drawn.mask_indices), distilled=kind) for kind in (shape, None)
    )
    assert counter.get_total_flops() - plain_counter.get_total_flops() == counted - plainly
    with_teacher = forecast(config, model.settings, 1, 10, "cpu", distilled=shape)
    without = forecast(recipe({**STUDENT, "distillation": {}}), model.settings, 1, 10, "cpu")
    weights = sum(p.numel() for p in model.distilled_teacher.parameters()) * 4
    assert with_teacher.memory.weights - without.memory.weights == pytest.approx(weights, rel=0.01)
    assert with_teacher.disk.checkpoint == without.disk.checkpoint
    assert with_teacher.disk.frozen == pytest.approx(weights, rel=0.1)
