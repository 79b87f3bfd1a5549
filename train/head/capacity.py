"""How many prototypes fit on a cluster, in device memory, in host memory or on disk, and what a head takes: said before it starts."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from train.head import candidates
from train.head.config import HeadConfig

ITEM = {"float32": 4, "bfloat16": 2}
SLOT, SCALARS = 4, 16  # bytes: where a row's state is; its second moment, counts and last step
CELL_INDEX = 1.15  # of the index on a CPU: a byte a dimension and 8 for the id, plus what lists leave unused


@dataclass(frozen=True, kw_only=True)
class Room:
    """Bytes that one worker may use of each tier; 0 where there is none."""

    device: int
    host: int
    file: int


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Bytes a prototype takes. stored: row; moment and scalars: what its first step adds; slot: where they are; index: if sparse."""

    stored: int
    moment: int
    scalars: int
    slot: int
    index: int


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """prototypes: how many fit by tier, over all workers, if each is touched; takes: bytes of this head a worker, by what they are for."""

    rows: int
    world: int
    storage: str
    prototypes: Mapping[str, int]
    room: Room
    takes: Mapping[str, int]

    @property
    def fits(self) -> bool:
        return self.rows <= self.prototypes[self.storage]

    def refuse(self) -> None:
        """ValueError where the rows alone, as they are before the first step, exceed their tier."""
        have, need = getattr(self.room, self.storage), self.takes["rows"]
        if need <= have:
            return
        others = [f"head.storage = {tier!r}" for tier, n in self.prototypes.items() if n >= self.rows]
        others.append(f"{-(-need * self.world // max(have, 1)):,} workers like these")
        raise ValueError(
            f"{self.rows:,} prototypes over {self.world} worker(s) need {need / 2**30:,.1f} GiB a worker for their rows alone, tier "
            f"{self.storage!r} has {have / 2**30:,.1f}; what would hold them: {', '.join(others)}, or a smaller dimension or head.dtype"
        )

    def __str__(self) -> str:
        head = f"the head: {self.rows:,} prototypes over {self.world} worker(s), rows in tier {self.storage!r}"
        tiers = [
            f"  {tier:<6} {getattr(self.room, tier) / 2**30:10,.1f} GiB a worker, {n:>17,} prototypes on this cluster"
            for tier, n in self.prototypes.items()
        ]
        takes = ", ".join(f"{name} {size / 2**20:,.1f}" for name, size in self.takes.items())
        verdict = "" if self.fits else f"\n  it does not fit tier {self.storage!r} once every row is touched"
        return "\n".join([head, *tiers, f"  takes at most, MiB a worker: {takes}"]) + verdict


def needs(dim: int, dtype: str, subcentres: int, *, sparse: bool, exact_index: bool) -> Needs:
    """Bytes a prototype of `subcentres` rows of `dim` numbers."""
    row = dim * ITEM[dtype]
    index = int((dim + 8) * CELL_INDEX) if sparse and not exact_index else 0
    return Needs(stored=row * subcentres, moment=row * subcentres, scalars=SCALARS * subcentres, slot=SLOT * subcentres, index=index)


def capacity(
    rows: int,
    dim: int,
    *,
    dtype: str,
    storage: str,
    kind: str,
    subcentres: int,
    room: Room,
    world: int,
    columns: int,
    batch: int,
    prefixes: int,
    exact_index: bool = False,
) -> Capacity:
    """What fits and what is taken. columns: prototypes of one worker's step (sparse); batch: embeddings over all workers.

    In device memory row, state, slot and the step's own memory share the device; in tier "file" rows and moments are on disk,
    scalars, slots and the index in host memory.
    """
    need = needs(dim, dtype, subcentres, sparse=kind == "sparse", exact_index=exact_index)
    own = -(-rows // world)
    active = own if kind == "full" else min(columns, own)
    step = 4 * active * (4 * dim * subcentres + 3 * batch * max(prefixes, 1))
    rows_and_moments, beside = need.stored + need.moment, need.scalars + need.slot
    room_for = {
        "device": (room.device - step) // (rows_and_moments + beside),
        "host": (room.host - step) // (rows_and_moments + beside + need.index),
        "file": min(room.file // rows_and_moments, (room.host - step) // (beside + need.index)),
    }
    each = {"rows": need.stored, "moments": need.moment, "scalars": need.scalars, "slots": need.slot, "index": need.index}
    takes = {**{name: size * own for name, size in each.items()}, "step": step}
    return Capacity(
        rows=rows,
        world=world,
        storage=storage,
        prototypes={tier: max(0, n) * world for tier, n in room_for.items()},
        room=room,
        takes=takes,
    )


def _host_bytes() -> int:
    """Memory that can be had: what the kernel calls available, or what the container is allowed, whichever is less."""
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    free = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")]
    allowed, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if allowed.exists() and used.exists() and (limit := allowed.read_text().strip()).isdigit():
        free.append(int(limit) - int(used.read_text()))
    return min(free) if free else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def room_here(device: torch.device, folder: Path | None, *, share: int = 1) -> Room:
    """What this machine has free now. share: workers that divide its memory and disk between them; a GPU is one worker's."""
    host = _host_bytes() // share
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host
    disk = folder or Path()
    return Room(device=free, host=host, file=shutil.disk_usage(disk if disk.exists() else Path()).free // share)


def workers_here(world: int) -> int:
    """How many of the workers share this machine: as the launcher says (torchrun and Ray Train do), else all."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world))


def capacity_of(rows: int, dim: int, config: HeadConfig, *, device: torch.device, world: int, batch: int, prefixes: int) -> Capacity:
    """What a head of `config` would take on this machine and its like, before it is made. batch: embeddings a step, over all workers."""
    return capacity(
        rows,
        dim,
        dtype=config.dtype,
        storage=config.storage,
        kind=config.kind,
        subcentres=config.subcentres,
        room=room_here(device, Path(config.folder or tempfile.gettempdir()), share=workers_here(world)),
        world=world,
        columns=batch * (1 + config.neighbours) + config.random,
        batch=batch,
        prefixes=prefixes,
        exact_index=isinstance(candidates.suitable(-(-rows // world), device), candidates.ExactIndex),
    )
