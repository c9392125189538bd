"""A frozen teacher that is distilled: what it is read from, what its targets are, what it is not."""

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dinoscope.data.collate import Collate
from dinoscope.data.crops import Crops
from dinoscope.errors import ConfigError
from dinoscope.files import write_json
from dinoscope.models.heads import DINOHead
from dinoscope.models.registry import settings_from_config
from dinoscope.models.weights import load_backbone
from dinoscope.recipe import resolve_recipe
from dinoscope.train.distillation import (
    HeadShape,
    TeacherShape,
    build_teacher,
    check_teacher,
    read_teacher,
    teacher_parts,
    teacher_shape,
)
from dinoscope.train.distributed import World, joined_world
from dinoscope.train.flops import step_flops
from dinoscope.train.forecast import forecast
from dinoscope.train.ssl_step import SSLModel, build_heads
from dinoscope.train.starting import fresh_backbone
from dinoscope.train.teacher_heads import Moments, made_head, make_heads

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
    shape = teacher_shape(read_teacher(teacher), recipe(STUDENT))
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


def smooth_batch(seed: int, tiles: int):
    """Blurred noise of random colours: images that differ in more than their pixels' noise."""
    rng = np.random.default_rng(seed)

    def crop(side: int) -> np.ndarray:
        small = rng.integers(0, 256, (3, 3, 3), np.uint8)
        return cv2.resize(small, (side, side), interpolation=cv2.INTER_CUBIC)

    crops = [Crops(np.stack([crop(64)] * 2), np.stack([crop(32) for _ in range(2)]), None) for _ in range(tiles)]
    return Collate(tiles, 16, 0.5, (0.1, 0.5), False, seed)(list(enumerate(crops)))


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
    shape = teacher_shape(read_teacher(teacher), recipe(STUDENT))
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


@pytest.mark.long
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


def test_what_does_not_fit_is_refused_with_both_values(teacher: Path) -> None:
    file = read_teacher(teacher)
    check_teacher(file, recipe(STUDENT))
    other = {"dino": {"head_n_prototypes": 32}, "crops": {"rgb_mean": [0.5, 0.5, 0.5]}}
    with pytest.raises(
        ConfigError, match=r"dino\.head_n_prototypes is 32, the teacher's is 24; crops\.rgb_mean is \[0\.5"
    ):
        check_teacher(file, recipe(STUDENT, other))


@pytest.fixture(scope="module")
def headless(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same backbone, as a published file: no heads."""
    path = tmp_path_factory.mktemp("headless") / "backbone.pth"
    tensors = torch.load(teacher, weights_only=True)["teacher"]
    torch.save({k.removeprefix("backbone."): v for k, v in tensors.items() if k.startswith("backbone.")}, path)
    shutil.copy(teacher.with_name("model.json"), path.with_name("model.json"))
    return path


def test_heads_that_a_file_lacks_have_the_recipes_prototypes(headless: Path) -> None:
    shape = teacher_shape(read_teacher(headless), recipe(STUDENT))
    assert shape.made == ("dino_head", "ibot_head")
    assert shape.heads["dino_head"] == HeadShape(24, 16, 16, 1)
    assert shape.heads["ibot_head"] == HeadShape(28, 16, 16, 1)
    assert TeacherShape.from_dict(shape.as_dict()) == shape
    assert sorted(teacher_parts(read_teacher(headless))) == ["backbone"]


@pytest.fixture
def one_rank() -> Iterator[World]:
    before = dict(os.environ)
    try:
        with joined_world() as world:
            yield world
    finally:
        os.environ.clear()
        os.environ.update(before)


def test_moments_are_those_of_all_tokens(one_rank: World) -> None:
    tokens = 100 + torch.randn(900, 5, generator=torch.Generator().manual_seed(0)) @ torch.randn(5, 5)
    moments = Moments(5)
    for part in tokens.split(250):
        moments.add(part)
    mean, covariance = moments.mean_and_covariance(one_rank)
    assert np.allclose(mean, tokens.double().mean(0))
    # sums of products in float32 lose what the mean squared is larger than the variance
    assert np.allclose(covariance, np.cov(tokens.double().numpy().T, bias=True), atol=0.02)


def entropy_share(logits: torch.Tensor) -> float:
    """Mean entropy of the softmax, of that of an even one."""
    return float(torch.special.entr(logits.double().softmax(1)).sum(1).mean() / math.log(logits.shape[1]))


def sharpness(directions: int, prototypes: int) -> float:
    """What round tokens and random prototypes give, drawn here."""
    rng = np.random.default_rng(0)
    tokens, others = (rng.normal(size=(number, directions)) for number in (2000, prototypes))
    cosines = (tokens @ others.T) / np.linalg.norm(tokens, axis=1)[:, None] / np.linalg.norm(others, axis=1)
    return entropy_share(torch.from_numpy(cosines * np.sqrt(directions * np.log(prototypes))))


@pytest.mark.parametrize("bottleneck", [8, 64])
def test_a_made_head_whitens_and_is_as_sharp_as_it_says(bottleneck: int) -> None:
    """On tokens of a normal distribution that is far from round, whatever the temperature."""
    rng, width, prototypes = torch.Generator().manual_seed(1), 32, 512
    mixing = torch.randn(width, width, generator=rng) * torch.logspace(0, -1, width)
    tokens = 3 + torch.randn(20_000, width, generator=rng) @ mixing.T
    covariance = torch.from_numpy(np.cov(tokens.double().numpy().T, bias=True))
    shape = HeadShape(prototypes, bottleneck, bottleneck, 1)
    for temperature in (0.04, 0.1):
        head = DINOHead(width, prototypes, hidden_dim=bottleneck, bottleneck_dim=bottleneck, num_layers=1)
        head.load_state_dict(made_head(tokens.double().mean(0), covariance, shape, temperature, seed=0))
        with torch.no_grad():
            inner, logits = head.mlp(tokens), head(tokens)
        kept = min(bottleneck, width)
        assert inner[:, kept:].abs().max() == 0 if bottleneck > width else True
        assert inner.mean(0).abs().max() < 0.05
        spread = torch.linalg.eigvalsh(torch.cov(inner[:, :kept].T))
        assert spread.max() < 1.01 and spread.max() - spread.min() < (0.05 if bottleneck == 8 else 1)
        assert (logits / temperature).var() == pytest.approx(math.log(prototypes), rel=0.1)
        assert entropy_share(logits / temperature) == pytest.approx(sharpness(kept, prototypes), abs=0.03)


@pytest.mark.long
def test_what_made_heads_say_is_worth_learning_and_learnt(headless: Path, one_rank: World) -> None:
    """Heads that are merely random say the same of every token; made ones do not, and the student comes to agree."""
    config = recipe(STUDENT, {"student": {"layerscale": None}})
    file = read_teacher(headless)
    shape = teacher_shape(file, config)
    model = SSLModel(config, settings_from_config(config.student), shape)
    torch.manual_seed(0)
    for network in (model.student, model.teacher, model.distilled_teacher):
        for part in network.values():
            part.init_weights()
    model.distilled_teacher["backbone"].load_state_dict(teacher_parts(file)["backbone"])
    batches = [smooth_batch(seed, 16) for seed in range(4)]

    def left_open() -> float:
        """Entropy of the targets of CLS tokens, of that of even ones."""
        (targets,) = model.targets(batches[:1], 0.07)
        return entropy_share(targets.cls_2BK.flatten(0, 1).clamp(min=1e-30).log())

    assert left_open() > 0.99
    assert make_heads(model, shape.made, batches, one_rank, seed=0) == 4 * 32
    assert left_open() < 0.8
    optimizer = torch.optim.AdamW(model.student.parameters(), lr=3e-3, weight_decay=0)
    losses = []
    for _ in range(80):
        loss, terms = model(batches[0], model.targets(batches[:1], 0.07)[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(terms["dino_global_crops_loss"]))
    gap = (1 - left_open()) * math.log(24)
    assert losses[0] - losses[-1] > 0.5 * gap


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
    shape, config = teacher_shape(read_teacher(teacher), recipe(STUDENT)), recipe(STUDENT)
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
