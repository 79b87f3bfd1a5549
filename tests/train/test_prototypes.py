"""The sharded head against the slow twin: the same loss and the same gradients on 1, 2 and 4 workers."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from train import losses
from train.prototypes import PrototypeHead, gather, reference_loss, shard_range

B, D, U = 8, 12, 7
SETTINGS = {"prefixes": (4, 12), "scale": 16.0, "margin": 0.25}


def _problem() -> tuple[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Linear(5, D)
    return net, torch.randn(B, 5), torch.tensor([0, 6, 6, 0, 3, 3, 5, 5]), F.normalize(torch.randn(U, D), dim=1)


def _alone() -> dict[str, torch.Tensor]:
    net, x, labels, rows = _problem()
    rows.requires_grad_()
    h = F.normalize(net(x), dim=1)
    loss = reference_loss(h, labels, rows, **SETTINGS)
    loss.backward()
    head = {"loss": loss.detach(), "rows": rows.grad, "net": net.weight.grad.clone()}
    net.zero_grad()
    h = F.normalize(net(x), dim=1)
    nce = losses.info_nce(h, h, labels, labels, torch.arange(B), prefixes=(4, 12), tau=0.1)
    nce.backward()
    return {**head, "nce": nce.detach(), "nce_net": net.weight.grad}


def _worker(rank: int, world: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/meet", rank=rank, world_size=world)
    net, x, labels, rows = _problem()
    net = DistributedDataParallel(net)
    mine = slice(rank * B // world, (rank + 1) * B // world)
    head = PrototypeHead(U, D, rank=rank, world=world)
    head.start_from(rows)
    assert torch.equal(head.whole(), rows)
    loss = head.loss(F.normalize(net(x[mine]), dim=1), labels[mine], **SETTINGS)
    loss.backward()
    said = {"loss": loss.detach(), "rows": head.weight.grad.clone(), "net": net.module.weight.grad.clone()}
    net.zero_grad()
    h = F.normalize(net(x[mine]), dim=1)
    own = torch.arange(len(h)) + rank * len(h)
    nce = losses.info_nce(h, gather(h), labels[mine], gather(labels[mine]), own, prefixes=(4, 12), tau=0.1)
    nce.backward()
    dist.all_reduce(nce_mean := nce.detach().clone())
    said |= {"nce": nce_mean / world, "nce_net": net.module.weight.grad}
    torch.save(said, Path(out) / f"{rank}.pt")
    dist.barrier()  # who leaves first breaks the others' connections
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_sharded_head_and_gathered_warm_up_equal_one_worker(world, tmp_path):
    mp.spawn(_worker, args=(world, str(tmp_path)), nprocs=world)
    parts = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(world)]
    alone = _alone()
    found = {
        "loss": [p["loss"] for p in parts],
        "rows": [torch.cat([p["rows"] for p in parts])],
        "net": [p["net"] for p in parts],
        "nce": [p["nce"] for p in parts],
        "nce_net": [p["nce_net"] for p in parts],
    }
    largest = {k: max(float((x - alone[k]).abs().max() / alone[k].abs().max()) for x in xs) for k, xs in found.items()}
    print(world, "workers, largest relative differences:", {k: f"{v:.1e}" for k, v in largest.items()})  # noqa: T201
    assert all(v < 5e-6 for v in largest.values())


@pytest.mark.parametrize("rows", [1, 2, 7, 100])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_shards_cover_every_row_once(rows, world):
    ranges = [shard_range(rows, r, world) for r in range(world)]
    assert [i for a, b in ranges for i in range(a, b)] == list(range(rows))
    sizes = [b - a for a, b in ranges]
    assert max(sizes) - min(sizes) <= 1


def test_one_product_cannot_be_told_from_others():
    with pytest.raises(ValueError, match="at least 2 products"):
        PrototypeHead(1, 4)
