"""Losses on two gloo ranks equal one process on the joined batch: values and gradients."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from dinoscope.losses.kde import distributed_kde_loss, kde_loss
from dinoscope.losses.koleo import distributed_koleo_loss
from dinoscope.losses.sinkhorn import sinkhorn_knopp
from reference_numbers import FOLDER, load_reference

WORLD_SIZE = 2
SINKHORN_CASES = {
    "even": (10, 10),
    "uneven": (17, 3),
    "empty": (0, 9),
    "extreme": (16, 16),
}
KOLEO_CASES = [(1, None), (2, None), (1, 8), (2, 8), (1, 4), (3, 4)]
KDE_INPUTS = ["random", "near", "twins", "single"]
KDE_CONCENTRATIONS = [1.0, 5.0, 100.0]


def sinkhorn_input(case):
    logits = torch.randn(sum(SINKHORN_CASES[case]), 24, generator=torch.Generator().manual_seed(0))
    if case == "extreme":
        logits = logits.clamp(-1, 1) * 100
        logits[:16] -= 100
    return logits


def koleo_input():
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(1))


def kde_input(name):
    """Random features; nearly collapsed ones; features that coincide with one of the other rank; one a rank."""
    features = koleo_input()
    return {
        "random": features,
        "near": 1 + 0.1 * features,
        "twins": features[:8].repeat(2, 1),
        "single": features[:2],
    }[name]


def add_kde(results, rank):
    for name in KDE_INPUTS:
        for concentration in KDE_CONCENTRATIONS:
            x = kde_input(name).chunk(WORLD_SIZE)[rank].clone().requires_grad_()
            loss = distributed_kde_loss(x, concentration)
            loss.backward()
            results[f"kde.{name}.{concentration}"] = (loss.detach(), x.grad)
    results["kde.local"] = kde_loss(kde_input("random").chunk(WORLD_SIZE)[rank])


def compute_on_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD_SIZE)
    results = {}
    for case, sizes in SINKHORN_CASES.items():
        results[case] = sinkhorn_knopp(sinkhorn_input(case).split(sizes)[rank], 0.04)
    alone = dist.new_group([0])
    if rank == 0:
        results["group_of_one"] = sinkhorn_knopp(sinkhorn_input("uneven").split((17, 3))[0], 0.04, group=alone)
    inputs = {"random": koleo_input()}
    if FOLDER.exists():
        tensors, _ = load_reference("losses")
        inputs["published"] = tensors["koleo.x"]
        for kind, sizes in (("cls", (6, 6)), ("patch", (17, 9))):
            for temperature in ("0.04", "0.07"):
                rows = tensors[f"sk.{kind}_logits"].split(sizes)[rank]
                results[f"sk.{kind}.{temperature}"] = sinkhorn_knopp(rows, float(temperature))
    for name, features in inputs.items():
        for topk, group_size in KOLEO_CASES:
            x = features.chunk(WORLD_SIZE)[rank].clone().requires_grad_()
            loss = distributed_koleo_loss(x, topk, group_size)
            loss.backward()
            results[f"koleo.{name}.{topk}.{group_size}"] = (loss.detach(), x.grad)
    add_kde(results, rank)
    torch.save(results, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank computed."""
    folder = tmp_path_factory.mktemp("losses")
    torch.multiprocessing.spawn(compute_on_rank, (folder,), nprocs=WORLD_SIZE)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize("case", SINKHORN_CASES)
def test_sinkhorn_equals_the_joined_batch(ranks, case):
    joined = torch.cat([results[case] for results in ranks])
    assert [len(results[case]) for results in ranks] == list(SINKHORN_CASES[case])
    assert torch.isfinite(joined).all()
    torch.testing.assert_close(joined, sinkhorn_knopp(sinkhorn_input(case), 0.04), rtol=1e-5, atol=1e-6)


def test_sinkhorn_in_a_group_of_its_own(ranks):
    expected = sinkhorn_knopp(sinkhorn_input("uneven")[:17], 0.04)
    torch.testing.assert_close(ranks[0]["group_of_one"], expected)
    assert (expected - ranks[0]["uneven"]).abs().max() > 1e-3


@pytest.mark.parametrize(("topk", "group_size"), KOLEO_CASES)
def test_koleo_equals_the_joined_batch(ranks, topk, group_size):
    x = koleo_input().requires_grad_()
    joined = distributed_koleo_loss(x, topk, group_size)
    joined.backward()
    losses, grads = zip(*(results[f"koleo.random.{topk}.{group_size}"] for results in ranks), strict=True)
    torch.testing.assert_close(torch.stack(losses).mean(), joined.detach())
    # each rank holds the gradient of the sum over ranks; averaging over ranks, as training does, gives the joined one
    torch.testing.assert_close(torch.cat(grads) / WORLD_SIZE, x.grad)


@pytest.mark.parametrize("name", KDE_INPUTS)
@pytest.mark.parametrize("concentration", KDE_CONCENTRATIONS)
def test_kde_equals_the_joined_batch(ranks, name, concentration):
    x = kde_input(name).requires_grad_()
    joined = kde_loss(x, concentration)
    joined.backward()
    losses, grads = zip(*(results[f"kde.{name}.{concentration}"] for results in ranks), strict=True)
    torch.testing.assert_close(torch.stack(losses).mean(), joined.detach())
    # each rank holds the gradient of the sum over ranks; averaging over ranks, as training does, gives the joined one
    torch.testing.assert_close(torch.cat(grads) / WORLD_SIZE, x.grad)


def test_kde_of_a_rank_alone_is_another_loss(ranks):
    for rank, results in enumerate(ranks):
        expected = kde_loss(kde_input("random").chunk(WORLD_SIZE)[rank])
        torch.testing.assert_close(results["kde.local"], expected)
        assert (expected - results["kde.random.5.0"][0]).abs() > 1e-3


@pytest.mark.parametrize("name", ["cls.0.04", "cls.0.07", "patch.0.04", "patch.0.07"])
def test_published_sinkhorn(ranks, name):
    tensors, _ = load_reference("losses")
    joined = torch.cat([results[f"sk.{name}"] for results in ranks])
    torch.testing.assert_close(joined, tensors[f"sk.{name}.w2"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("group_size", [None, 8])
def test_published_koleo(ranks, topk, group_size):
    tensors, values = load_reference("losses")
    losses, grads = zip(*(results[f"koleo.published.{topk}.{group_size}"] for results in ranks), strict=True)
    name = f"koleo.topk{topk}.group{group_size}"
    assert [loss.item() for loss in losses] == pytest.approx(values[f"{name}.w2.loss_per_rank"], rel=1e-5)
    torch.testing.assert_close(torch.cat(grads), tensors[f"{name}.grad.w2"], rtol=0, atol=1e-6)
