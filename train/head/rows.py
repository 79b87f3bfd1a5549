"""The rows of the prototype head and their optimizer: on the device, in host memory, or in a memory-mapped file.

A row that nobody has written needs no storage, since a rule gives its start value; what the optimizer knows of a row is kept
from its first step on. So files are sparse, and the state of a billion rows costs four bytes each until they are touched.
"""

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Storage = Literal["device", "host", "file"]
Start = Callable[[Tensor], Tensor]  # global row ids (n,) int64 -> start values (n, D)
SCALARS = ("second", "count", "last", "wins")  # of a touched row, int32; the first holds the bits of a float32
UNWRITTEN, STATELESS = 0, -1  # in `slot`; s > 0 is place s - 1 of the state
BETAS, EPS = (0.9, 0.98), 1e-8


def pseudo_random_rows(ids: Tensor, dim: int, seed: int) -> Tensor:
    """(n, dim) float32 unit vectors, uniform on the sphere, that depend on (seed, id) alone: hashed, no generator's state.

    A 64-bit mix (the finaliser of splitmix64, shifts without sign) of the counter gives four 16-bit numbers, whose sum is near normal.
    """
    offset = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> np.uint64(1))
    x = (ids[:, None] * dim + torch.arange(dim, device=ids.device)) + offset
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    x = x ^ ((x >> 31) & ((1 << 33) - 1))
    normal = torch.stack([(x >> part) & 0xFFFF for part in (0, 16, 32, 48)]).sum(0).float() - 2 * 65535
    return torch.nn.functional.normalize(normal, dim=1)


def round_stochastically(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """float32 -> dtype; to bfloat16 up or down with the probability that makes the mean right, or small steps would be lost."""
    if dtype != torch.bfloat16:
        return x.to(dtype)
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    rounded = ((x.contiguous().view(torch.int32) + noise) & -65536).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(dtype)


def allocate(shape: tuple[int, ...], dtype: torch.dtype, *, storage: Storage, device: torch.device, path: Path | None) -> Tensor:
    """Memory that costs nothing until it is written; on the device, where there is no such thing, what it holds at first is undefined."""
    if storage == "device":
        return torch.empty(shape, dtype=dtype, device=device)
    size = max(int(np.prod(shape)) * dtype.itemsize, 1)
    if storage == "host":
        return torch.from_numpy(np.zeros(size, np.uint8))[: int(np.prod(shape)) * dtype.itemsize].view(dtype).view(shape)
    assert path is not None
    with path.open("w+b") as file:
        file.truncate(size)
        mapped = mmap.mmap(file.fileno(), size)
    mapped.madvise(mmap.MADV_RANDOM)  # rows are visited in no order: reading ahead would only fill the memory
    return torch.frombuffer(mapped, dtype=dtype, count=int(np.prod(shape))).view(shape)


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """Rows of one step: distinct ids (n,), their values (n, D) as a leaf that gets a gradient, how often each was the nearest sub-centre
    of its own prototype."""

    ids: Tensor
    leaf: Tensor
    wins: Tensor
    step: int


def merged(used: Sequence[Fetched]) -> Fetched:
    """Several losses of one step as one: gradients and wins of the same row add up."""
    if len(used) == 1:
        return used[0]
    ids, at = torch.cat([p.ids for p in used]).unique(return_inverse=True)
    rows = torch.cat([p.leaf.detach() for p in used])
    leaf = rows.new_empty(len(ids), rows.shape[1]).index_copy_(0, at, rows)
    leaf.grad = torch.zeros_like(leaf).index_add_(0, at, torch.cat([p.leaf.grad for p in used if p.leaf.grad is not None]))
    wins = torch.zeros_like(ids).index_add_(0, at, torch.cat([p.wins for p in used]))
    return Fetched(ids=ids, leaf=leaf, wins=wins, step=used[0].step)


class Rows:
    """(n, D) rows, `first` the global id of the first. Ids below are local, 0..n-1; values come and go as float32 on `device`.

    The optimizer is Adam with one second moment a row (the mean square of its gradient) and a step count a row, so that a row
    that is visited rarely is corrected for its own few steps; the first moment is kept in the rows' dtype.
    """

    def __init__(
        self,
        n: int,
        dim: int,
        *,
        first: int,
        start: Start,
        storage: Storage,
        dtype: torch.dtype,
        device: torch.device,
        folder: Path | None,
    ) -> None:
        if storage == "file" and folder is None:
            raise ValueError('storage "file" needs a folder for the rows, found None')
        self.n, self.dim, self.first, self.start = n, dim, first, start
        self.storage: Storage = storage
        self.dtype, self.device, self.folder = dtype, device, folder
        self.home = device if storage == "device" else torch.device("cpu")
        if folder is not None and storage == "file":
            folder.mkdir(parents=True, exist_ok=True)
        self.weight = self._allocate("weight", (n, dim), dtype, storage=storage)
        self.slot = allocate((n,), torch.int32, storage="host", device=device, path=None).to(self.home)
        self.forget_state()

    def _allocate(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, *, storage: Storage) -> Tensor:
        path = self.folder / f"{name}-{self.first}.rows" if self.folder else None
        return allocate(shape, dtype, storage=storage, device=self.home, path=path)

    def forget_state(self) -> None:
        """Drop what the optimizer knows; the rows stay."""
        self.slot[self.slot > 0] = STATELESS
        self.used = 0
        self.moment = self._moment(self.n if self.storage == "file" else min(self.n, 1 << 14))
        self.scalars = self._scalars(min(self.n, 1 << 14))

    def _moment(self, room: int) -> Tensor:
        return self._allocate("moment", (room, self.dim), self.dtype, storage=self.storage)

    def _scalars(self, room: int) -> Tensor:
        """In memory even where rows are in a file: writing to a page of a file for the first time costs more than the step's arithmetic."""
        return self._allocate("scalars", (room, len(SCALARS)), torch.int32, storage="device" if self.storage == "device" else "host")

    def fetch(self, ids: Tensor) -> Tensor:
        """(n,) int64 -> (n, D) float32 on the device."""
        ids = ids.to(self.home)
        written = self.slot[ids] != UNWRITTEN
        if written.all():
            return self.weight[ids].to(self.device).float()
        rows = torch.empty(len(ids), self.dim, device=self.device)
        at = written.nonzero()[:, 0].to(self.device)
        rows[at] = self.weight[ids[written]].to(self.device).float()
        rows[(~written).nonzero()[:, 0].to(self.device)] = self.start_values(ids[~written])
        return rows

    def start_values(self, ids: Tensor) -> Tensor:
        """What rows that nobody wrote are, (n, D) as exact as they would be stored."""
        return self.start(ids.to(self.device) + self.first).to(self.device, self.dtype).float()

    def write(self, ids: Tensor, rows: Tensor) -> None:
        """Put rows (n, D) of `dtype` at ids; what the optimizer knows of them stays."""
        ids = ids.to(self.home)
        self.weight[ids] = rows.to(self.home, self.dtype)
        fresh = ids[self.slot[ids] == UNWRITTEN]
        self.slot[fresh] = STATELESS

    def places(self, ids: Tensor) -> Tensor:
        """(n,) places of the state of distinct ids, given out where a row has none yet."""
        slots = self.slot[ids]
        new = ids[slots <= 0]
        if len(new):
            self.reserve(self.used + len(new))
            given = torch.arange(self.used, self.used + len(new), device=self.home)
            self.moment[given] = 0
            self.scalars[given] = 0
            self.slot[new] = (given + 1).to(torch.int32)
            self.used += len(new)
            slots = self.slot[ids]
        return slots.long() - 1

    def reserve(self, wanted: int) -> None:
        """Room for the state of `wanted` rows, so that it need not grow step by step."""
        for name, make in (("moment", self._moment), ("scalars", self._scalars)):
            old = getattr(self, name)
            if wanted > len(old):
                new = make(min(self.n, max(wanted, len(old) * 3 // 2)))
                new[: self.used] = old[: self.used]
                setattr(self, name, new)

    def descend(self, used: Fetched, *, lr: float, generator: torch.Generator) -> None:
        """One step of the optimizer for the rows used, which are then written."""
        grad = used.leaf.grad
        assert grad is not None
        ids = used.ids.to(self.home)
        places = self.places(ids)
        scalars = self.scalars[places].to(self.device)
        count = scalars[:, 1] + 1
        first = self.moment[places].to(self.device).float().mul_(BETAS[0]).add_(grad, alpha=1 - BETAS[0])
        second = scalars[:, 0].contiguous().view(torch.float32) * BETAS[1] + grad.square().mean(1) * (1 - BETAS[1])
        spread = (second / (1 - BETAS[1] ** count)).sqrt() + EPS
        moved = used.leaf.detach() - first * (lr / ((1 - BETAS[0] ** count) * spread))[:, None]
        self.weight[ids] = round_stochastically(moved, self.dtype, generator).to(self.home)
        self.moment[places] = first.to(self.home, self.dtype)
        kept = [second.view(torch.int32), count, torch.full_like(count, used.step), scalars[:, 3] + used.wins.to(torch.int32)]
        self.scalars[places] = torch.stack(kept, 1).to(self.home)

    def scalar(self, name: str, ids: Tensor) -> Tensor:
        """(n,) int32 of distinct or repeated ids, 0 where a row has no state."""
        slots = self.slot[ids.to(self.home)].long()
        found = self.scalars[(slots - 1).clamp(min=0), SCALARS.index(name)]
        return torch.where(slots > 0, found, 0)
