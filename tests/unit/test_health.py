"""Signs of collapse against plain float64 formulas and numpy's SVD."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from dinoscope.losses.dino import dino_loss
from dinoscope.losses.sinkhorn import sinkhorn_knopp
from dinoscope.train.distributed import World
from dinoscope.train.health import HealthWindow, entropy, mean_pairwise_cosine, rankme

KEYS = {"teacher_entropy", "target_marginal_entropy", "teacher_student_kl", "rankme", "mean_cosine"}


def plain_entropy(probs: np.ndarray) -> float:
    return -sum(p * math.log(p) for p in probs.astype(float) if p > 0)


def plain_rankme(features: np.ndarray) -> float:
    singular = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    shares = singular / singular.sum() + 1e-7
    return math.exp(-sum(share * math.log(share) for share in shares))


def plain_cosine(features: np.ndarray) -> float:
    rows = [row / math.sqrt(sum(row * row)) for row in features.astype(np.float64)]
    pairs = [sum(a * b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
    return sum(pairs) / len(pairs)


def features_of(kind: str, num: int = 60, width: int = 48) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(num, width, generator=generator)
    return {
        "random": noise,
        "wide": torch.randn(20, 100, generator=generator),
        "few dimensions": noise[:, :5] @ torch.randn(5, width, generator=generator),
        "nearly one point": 1 + 1e-3 * noise,
        "decaying": noise * 0.7 ** torch.arange(width),
        "large": 1e4 * noise,
    }[kind]


KINDS = pytest.mark.parametrize("kind", ["random", "wide", "few dimensions", "nearly one point", "decaying", "large"])


@KINDS
def test_rankme_is_that_of_numpys_svd(kind: str) -> None:
    features = features_of(kind)
    assert rankme(features) == pytest.approx(plain_rankme(features.numpy()), rel=1e-5)


@KINDS
def test_cosine_is_that_of_a_double_loop(kind: str) -> None:
    features = features_of(kind)
    assert mean_pairwise_cosine(features) == pytest.approx(plain_cosine(features.numpy()), abs=1e-9)


def test_known_ranks_and_cosines() -> None:
    assert rankme(torch.eye(64)) == pytest.approx(64, rel=1e-4)
    assert rankme(torch.ones(64, 32)) == pytest.approx(1, abs=1e-3)
    assert rankme(torch.zeros(8, 32)) == 1.0
    assert mean_pairwise_cosine(torch.eye(64)) == 0.0
    assert mean_pairwise_cosine(torch.ones(64, 32)) == pytest.approx(1.0)
    assert mean_pairwise_cosine(torch.tensor([[1.0, 0.0], [-2.0, 0.0]])) == -1.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_entropy_is_that_of_a_loop(dtype: torch.dtype) -> None:
    logits = torch.randn(7, 300, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 8)[:, None] ** 2
    probs = torch.softmax(logits.double(), -1).to(dtype)
    probs[-1] = torch.nn.functional.one_hot(torch.tensor(5), 300)
    expected = [plain_entropy(row) for row in probs.double().numpy()]
    found = entropy(probs)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-6, atol=1e-7)
    assert found[-1] == 0


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield World(0, 0, 1, torch.device("cpu"))
    dist.destroy_process_group()


def steps(num_steps: int, batch: int = 6, num_prototypes: int = 40, width: int = 24) -> list[tuple[torch.Tensor, ...]]:
    """Teacher logits (2, B, K), student logits (2, B, K) and features (B, D) of each step."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, batch, num_prototypes), (2, batch, num_prototypes), (batch, width)]
    return [tuple(torch.randn(shape, generator=generator) for shape in shapes) for _ in range(num_steps)]


@pytest.mark.parametrize("ignore_diagonal", [False, True])
def test_a_window_says_what_plain_formulas_say(world: World, ignore_diagonal: bool) -> None:
    window, losses, kls, probs, rows = HealthWindow(world, num_features=16), [], [], [], []
    for teacher, student, features in steps(4):
        targets = sinkhorn_knopp(0.1 * teacher.flatten(0, 1), 0.04)
        window.add(targets, features)
        losses.append(float(dino_loss(student, targets.unflatten(0, (2, -1)), ignore_diagonal=ignore_diagonal)))
        log_student = torch.log_softmax(student.double() / 0.1, -1).numpy()
        target = targets.double().numpy().reshape(2, 6, -1)
        for t in range(2):
            for s in range(2):
                if not (ignore_diagonal and s == t):
                    kls += [(target[t, b] * (np.log(target[t, b]) - log_student[s, b])).sum() for b in range(6)]
        probs += list(target.reshape(12, -1))
        rows += list(features.numpy())
    line = window.close(float(np.mean(losses)))
    assert set(line) == KEYS
    assert line["teacher_entropy"] == pytest.approx(np.mean([plain_entropy(row) for row in probs]), rel=1e-6)
    assert line["target_marginal_entropy"] == pytest.approx(plain_entropy(np.mean(probs, 0)), rel=1e-6)
    assert line["teacher_student_kl"] == pytest.approx(np.mean(kls), rel=1e-5)
    last = np.stack(rows[-16:])
    assert line["rankme"] == pytest.approx(plain_rankme(last), rel=1e-6)
    assert line["mean_cosine"] == pytest.approx(plain_cosine(last), abs=1e-9)


def test_sums_begin_anew_with_each_line_while_features_are_kept(world: World) -> None:
    window, (first, second) = HealthWindow(world, num_features=12), steps(2)
    window.add(torch.softmax(first[0].flatten(0, 1), -1), first[2])
    assert set(window.close(1.0)) == KEYS - {"rankme", "mean_cosine"}  # 6 features of 12 as yet
    targets = torch.softmax(3 * second[0].flatten(0, 1), -1)
    window.add(targets, second[2])
    line = window.close(1.0)
    assert line["teacher_entropy"] == pytest.approx(float(entropy(targets).mean()), rel=1e-6)
    assert line["rankme"] == pytest.approx(plain_rankme(torch.cat([first[2], second[2]]).numpy()), rel=1e-6)
    assert set(window.close(1.0)) == {"rankme", "mean_cosine"}


def test_steps_without_numbers_are_left_out(world: World) -> None:
    window, (first, second, third) = HealthWindow(world, num_features=6), steps(3)
    good = torch.softmax(first[0].flatten(0, 1), -1)
    window.add(good, first[2])
    window.add(torch.full_like(good, torch.nan), second[2].fill_(torch.inf))
    line = window.close(1.0)
    assert set(line) == KEYS - {"rankme", "mean_cosine"}
    assert line["teacher_entropy"] == pytest.approx(float(entropy(good).mean()), rel=1e-6)
    window.add(torch.full_like(good, torch.nan), third[2])
    assert set(window.close(1.0)) == {"rankme", "mean_cosine"}


def test_collapse_shows(world: World) -> None:
    generator = torch.Generator().manual_seed(0)
    lines = []
    for features in (torch.randn(64, 48, generator=generator), 1 + 1e-2 * torch.randn(64, 48, generator=generator)):
        window = HealthWindow(world, num_features=64)
        window.add(torch.full((128, 40), 1 / 40), features)
        lines.append(window.close(math.log(40)))
    assert lines[0]["rankme"] > 30 > 2 > lines[1]["rankme"]
    assert abs(lines[0]["mean_cosine"]) < 0.1 < 0.99 < lines[1]["mean_cosine"]
    assert lines[0]["teacher_entropy"] == pytest.approx(math.log(40))
    assert lines[0]["teacher_student_kl"] == pytest.approx(0, abs=1e-6)


def test_no_view_of_the_batch_is_kept(world: World) -> None:
    window = HealthWindow(world, num_features=8)
    tokens = torch.zeros(4, 500, 24)
    for _ in range(5):
        window.add(torch.full((8, 40), 1 / 40), tokens[:, 0])
        assert window._features.untyped_storage().nbytes() <= (8 + 4) * 24 * 4


def on_rank(rank: int, folder: Path, num_features: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=3)
    window = HealthWindow(World(rank, rank, 3, torch.device("cpu")), num_features)
    lines = []
    for number, (teacher, _, features) in enumerate(steps(4)):
        window.add(torch.softmax(teacher, -1)[:, 2 * rank : 2 * rank + 2].flatten(0, 1), features[2 * rank :][:2])
        if number in (0, 3):
            lines.append(window.close(5.0))
    torch.save(lines, folder / f"{rank}.pth")
    dist.destroy_process_group()


def test_three_ranks_say_what_one_says(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(on_rank, args=(tmp_path, 11), nprocs=3)
    of_ranks = [torch.load(tmp_path / f"{rank}.pth") for rank in range(3)]
    for line in of_ranks[0] + of_ranks[1] + of_ranks[2]:
        assert KEYS - {"rankme", "mean_cosine"} <= set(line)
    assert of_ranks[0][0] == of_ranks[1][0] == of_ranks[2][0]
    assert set(of_ranks[0][1]) == KEYS
    assert set(of_ranks[1][1]) == KEYS - {"rankme", "mean_cosine"}
    targets = torch.cat([torch.softmax(teacher.double(), -1).flatten(0, 1) for teacher, _, _ in steps(4)[1:]])
    line = of_ranks[0][1]
    assert line["teacher_entropy"] == pytest.approx(float(entropy(targets).mean()), rel=1e-6)
    assert line["target_marginal_entropy"] == pytest.approx(plain_entropy(targets.mean(0).numpy()), rel=1e-6)
    # 11 features of 3 ranks: 4 of each, the last one of all left out
    last_two = [features for _, _, features in steps(4)[2:]]
    rows = torch.cat([torch.cat([features[2 * rank :][:2] for features in last_two]) for rank in range(3)])[:11]
    assert line["rankme"] == pytest.approx(plain_rankme(rows.numpy()), rel=1e-6)
    assert line["mean_cosine"] == pytest.approx(plain_cosine(rows.numpy()), abs=1e-9)
