"""The sharded head against the slow twin: the same loss and the same gradients on 1, 2 and 4 workers, full and sparse."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from train import losses
from train.head.prototypes import HeadConfig, PrototypeHead, gather, reference_loss, shard_range

B, D, U = 8, 12, 23
SETTINGS = {"prefixes": (4, 12), "scale": 16.0, "margin": 0.25}
LABELS = torch.tensor([0, 22, 22, 0, 3, 3, 15, 9])
PAIRS = torch.tensor([0, 6, 6, 0, 3, 3, 5, 5])  # for the warm-up, where each worker's mean is over anchors that have a positive
DUPLICATES = np.array([[0, 3], [9, 10], [22, 1]])
WEIGHTS = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 1.0, 0.25, 1.0])
CASES = {
    "full": {},
    "sparse": {"kind": "sparse", "neighbours": 3, "random": 4},
    "sparse with all": {"kind": "sparse", "neighbours": U},
    "noise measures": {"subcentres": 2, "filter": 0.5},
    "sparse noise measures": {"kind": "sparse", "neighbours": 2, "random": 3, "subcentres": 2, "filter": 0.5},
    "from a file": {"kind": "sparse", "neighbours": 3, "random": 4, "storage": "file"},
}


def problem():
    torch.manual_seed(0)
    return nn.Linear(5, D), torch.randn(B, 5), F.normalize(torch.randn(U, D), dim=1)


def head_of(case, rows, folder, rank=0, world=1):
    folder = folder / f"{case}-{world}".replace(" ", "-") / str(rank)
    duplicates = DUPLICATES if "noise" in case else None
    head = PrototypeHead(U, D, HeadConfig(**CASES[case]), rank=rank, world=world, duplicates=duplicates, folder=folder)
    head.start_from(rows)
    return head


def weights_of(case):
    return WEIGHTS if "noise" in case else None


def own_gradients(head):
    """(n * K, D) of the worker's rows, 0 where a row took no part, and which took part."""
    grad, part = torch.zeros(head.store.n, D), torch.zeros(head.store.n, dtype=torch.bool)
    for fetched in head.pending:
        grad[fetched.ids] += fetched.leaf.grad
        part[fetched.ids] = True
    return grad, part


def worker(rank, world, out):
    torch.set_num_threads(1)  # gloo threads beside OpenMP's: two would wait for one another
    dist.init_process_group("gloo", init_method=f"file://{out}/meet-{world}", rank=rank, world_size=world)
    net, x, rows = problem()
    net = DistributedDataParallel(net)
    mine = slice(rank * B // world, (rank + 1) * B // world)
    said = {}
    for case in CASES:
        head = head_of(case, rows, Path(out), rank, world)
        weights = weights_of(case)
        net.zero_grad()
        weights = None if weights is None else weights[mine]
        loss = head.loss(F.normalize(net(x[mine]), dim=1), LABELS[mine], **SETTINGS, step=5, weights_b=weights)
        loss.backward()
        grad, part = own_gradients(head)
        said[case] = {"loss": loss.detach(), "net": net.module.weight.grad.clone(), "rows": grad, "part": part}
        said[case] |= {"all": head.whole(), "near": torch.from_numpy(head.near(np.arange(U), 5))}
        head.update(0.01)
        said[case] |= {"moved": head.store.fetch(torch.arange(head.store.n))}
    net.zero_grad()
    h = F.normalize(net(x[mine]), dim=1)
    own = torch.arange(len(h)) + rank * len(h)
    nce = losses.info_nce(h, gather(h), PAIRS[mine], gather(PAIRS[mine]), own, prefixes=(4, 12), tau=0.1)
    nce.backward()
    dist.all_reduce(nce_mean := nce.detach().clone())
    said["nce"] = {"loss": nce_mean / world, "net": net.module.weight.grad}
    few = PrototypeHead(3, D, HeadConfig(), rank=rank, world=world)  # some of four workers have no row
    few.start_from(rows[:3])
    few.loss(F.normalize(x[mine] @ torch.ones(5, D), dim=1), LABELS[mine] % 3, **SETTINGS).backward()
    few.update(0.01)
    said["few"] = {"all": few.whole(), "near": torch.from_numpy(few.near(np.arange(3), 2))}
    errors = []
    bad_batches = (torch.tensor([U] if rank else [0]), torch.tensor([], dtype=torch.int64), torch.arange(1 + rank))
    for bad in bad_batches if world > 1 else ():
        with pytest.raises(ValueError, match=r"label 23 of worker|empty|as many embeddings") as error:
            head_of("full", rows, Path(out), rank, world).loss(torch.zeros(len(bad), D), bad, **SETTINGS)
        errors.append(str(error.value))
    said["errors"] = errors
    torch.save(said, Path(out) / f"{rank}-of-{world}.pt")
    dist.barrier()  # who leaves first breaks the others' connections
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each worker found, by the number of workers."""
    out = tmp_path_factory.mktemp("workers")
    known = {}
    worker(0, 1, str(out))
    known[1] = [torch.load(out / "0-of-1.pt", weights_only=True)]
    for world in (2, 4):
        mp.spawn(worker, args=(world, str(out)), nprocs=world)
        known[world] = [torch.load(out / f"{r}-of-{world}.pt", weights_only=True) for r in range(world)]
    return known


def alone(case, folder, part):
    """The slow twin on one worker, over the prototypes that took part."""
    net, x, rows = problem()
    every = head_of(case, rows, folder).store
    weight = every.fetch(torch.arange(every.n)).requires_grad_()
    k = CASES[case].get("subcentres", 1)
    masked = ~part[::k].expand(B, -1)
    for one, other in DUPLICATES if "noise" in case else ():
        masked = masked.clone()
        masked[one == LABELS, other] = masked[other == LABELS, one] = True
    h = F.normalize(net(x), dim=1)
    kept = {"filter": CASES[case].get("filter", 0.0), "subcentres": k}
    loss = reference_loss(h, LABELS, weight, masked=masked, weights=weights_of(case), **kept, **SETTINGS)
    loss.backward()
    return {"loss": loss.detach(), "net": net.weight.grad, "rows": weight.grad}


def difference(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_loss_and_gradients_equal_the_twin(found, world, case, tmp_path):
    parts = [p[case] for p in found[world]]
    together = {key: torch.cat([p[key] for p in parts]) for key in ("rows", "part")}
    twin = alone(case, tmp_path, together["part"])
    largest = {
        "loss": max(difference(p["loss"], twin["loss"]) for p in parts),
        "net": max(difference(p["net"], twin["net"]) for p in parts),
        "rows": difference(together["rows"], twin["rows"]),
    }
    print(world, "workers,", case, "largest relative differences:", {k: f"{v:.1e}" for k, v in largest.items()})  # noqa: T201
    assert all(v < 5e-6 for v in largest.values())


@pytest.mark.parametrize("case", CASES)
def test_the_number_of_workers_changes_nothing(found, case):
    one = found[1][0][case]
    for world in (2, 4):
        parts = [p[case] for p in found[world]]
        assert torch.equal(torch.cat([p["part"] for p in parts]), one["part"])
        torch.testing.assert_close(torch.cat([p["moved"] for p in parts]), one["moved"], atol=2e-6, rtol=1e-5)
        for p in parts:
            assert torch.equal(p["near"], one["near"])
            torch.testing.assert_close(p["all"], one["all"])


@pytest.mark.parametrize("world", [2, 4])
def test_workers_without_a_row_take_part(found, world):
    for p in found[world]:
        torch.testing.assert_close(p["few"]["all"], found[1][0]["few"]["all"])
        assert torch.equal(p["few"]["near"], found[1][0]["few"]["near"])


def test_a_sparse_step_looks_at_a_part_that_holds_the_nearest(found):
    _, _, rows = problem()
    part = found[1][0]["sparse"]["part"]
    assert part.sum() < U
    for y in LABELS.unique():
        nearest = (rows @ rows[y]).argsort(descending=True)[:4]
        assert part[nearest].all()
    assert torch.equal(found[1][0]["sparse with all"]["loss"], found[1][0]["full"]["loss"])


@pytest.mark.parametrize("world", [2, 4])
def test_the_gathered_warm_up_equals_one_worker(found, world):
    net, x, _ = problem()
    h = F.normalize(net(x), dim=1)
    nce = losses.info_nce(h, h, PAIRS, PAIRS, torch.arange(B), prefixes=(4, 12), tau=0.1)
    nce.backward()
    for p in found[world]:
        assert difference(p["nce"]["loss"], nce.detach()) < 5e-6
        assert difference(p["nce"]["net"], net.weight.grad) < 5e-6


def test_every_worker_says_what_is_wrong_with_a_batch(found):
    for parts in (found[2], found[4]):
        for p in parts:
            assert p["errors"] == parts[0]["errors"]
        label, empty, uneven = parts[0]["errors"]
        assert label == "label 23 of worker 1 is not among the 23 prototypes; allowed are 0..22"
        assert "empty" in empty
        assert "as many embeddings as labels" in uneven


@pytest.mark.parametrize("rows", [1, 2, 7, 100])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_shards_cover_every_row_once(rows, world):
    ranges = [shard_range(rows, r, world) for r in range(world)]
    assert [i for a, b in ranges for i in range(a, b)] == list(range(rows))
    sizes = [b - a for a, b in ranges]
    assert max(sizes) - min(sizes) <= 1


def test_one_product_cannot_be_told_from_others():
    with pytest.raises(ValueError, match="at least 2 products"):
        PrototypeHead(1, 4, HeadConfig())
