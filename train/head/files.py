"""The prototype head on disk: one safetensors file a worker, read by any number of workers, with prototypes added, removed or merged.

A file holds the rows that were written and the optimizer's state of those that were touched, in blocks, so that a head beyond
memory can be saved and read; what it leaves out the start rule gives again.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from train.head.rows import SCALARS, STATELESS, UNWRITTEN, Rows, pseudo_random_rows

HEAD = re.compile(r"head-(\d+)-of-(\d+)\.safetensors")
BLOCK = 1 << 18  # rows read or written together
PUBLISHED = 1 << 16  # prototypes read together to be published
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int32: "I32", torch.int64: "I64"}

Streams = Mapping[str, tuple[torch.dtype, tuple[int, ...], Callable[[], Iterator[Tensor]]]]


def write_streams(path: Path, streams: Streams, said: Mapping[str, Any]) -> None:
    """A safetensors file of tensors that come in pieces: (dtype, shape, pieces along the first dimension) by name."""
    header: dict[str, Any] = {"__metadata__": {"head": json.dumps(said)}}
    end = 0
    for name, (dtype, shape, _) in streams.items():
        begin, end = end, end + int(np.prod(shape)) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, pieces in streams.values():
            for piece in pieces():
                file.write(piece.cpu().contiguous().view(torch.uint8).numpy().data if piece.numel() else b"")
        assert file.tell() == 8 + len(text) + end


def write_rows(store: Rows, path: Path, said: Mapping[str, Any]) -> None:
    """The rows of one worker: `ids` (m,) global and ascending, `weight` (m, D); of the touched also `touched` (t,), `moment`, `scalars`."""

    def where(least: int) -> Iterator[Tensor]:
        for a in range(0, store.n, BLOCK):
            slots = store.slot[a : a + BLOCK]
            yield ((slots > 0) if least else (slots != UNWRITTEN)).nonzero()[:, 0] + a

    def places() -> Iterator[Tensor]:
        return (store.slot[ids].long() - 1 for ids in where(1))

    m, t = (sum(len(ids) for ids in where(least)) for least in (0, 1))
    write_streams(
        path,
        {
            "ids": (torch.int64, (m,), lambda: (ids + store.first for ids in where(0))),
            "weight": (store.dtype, (m, store.dim), lambda: (store.weight[ids] for ids in where(0))),
            "touched": (torch.int64, (t,), lambda: (ids + store.first for ids in where(1))),
            "moment": (store.dtype, (t, store.dim), lambda: (store.moment[at] for at in places())),
            "scalars": (torch.int32, (t, len(SCALARS)), lambda: (store.scalars[at] for at in places())),
        },
        said,
    )


class Part:
    """One worker's file, mapped: what is not asked for is not read."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            self.said: dict[str, Any] = json.loads((file.metadata() or {}).get("head", "null")) or {}
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        if not self.said or {"ids", "weight", "touched", "moment", "scalars"} - set(self.tensors):
            raise ValueError(f"{path} is not a file of a prototype head; it holds {sorted(self.tensors)}")

    def at(self, key: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Where `rows` (n,) are among the ids of `key`: which of them are (n,) bool, and the places of those that are."""
        ids = self.tensors[key]
        place = torch.searchsorted(ids, rows)
        there = place < len(ids)
        there[there.clone()] = ids[place[there]] == rows[there]
        return there, place[there]


def parts(folder: Path) -> list[Part]:
    """The files of all workers of one checkpoint. ValueError if there are none, if one is missing, or if they are of two checkpoints."""
    found = sorted((int(m[2]), int(m[1])) for path in folder.iterdir() if (m := HEAD.fullmatch(path.name)))
    worlds = sorted({world for world, _ in found})
    if len(worlds) != 1 or [rank for _, rank in found] != list(range(worlds[0])):
        known = [f"{rank} of {world}" for world, rank in found]
        raise ValueError(f"the checkpoint at {folder} needs the head's rows of every worker of one run; it holds those of workers {known}")
    read = [Part(folder / f"head-{rank}-of-{worlds[0]}.safetensors") for rank in range(worlds[0])]
    keys = ("rows", "dim", "subcentres", "seed", "rule", "dtype", "born")
    if odd := [r for r, part in enumerate(read) if any(part.said[k] != read[0].said[k] for k in keys)]:
        raise ValueError(f"the checkpoint at {folder} is of two minds: workers {odd} say {read[odd[0]].said}, worker 0 {read[0].said}")
    return read


def old_ids(mapping: np.ndarray | None, rows: int, old_rows: int) -> np.ndarray | None:
    """`mapping` checked: (rows,) of -1..old_rows-1. None stays None where the numbers of prototypes agree."""
    if mapping is None:
        if rows != old_rows:
            raise ValueError(f"the checkpoint has {old_rows} prototypes, this run {rows}; without a mapping they must agree")
        return None
    mapping = np.asarray(mapping, np.int64)
    if mapping.shape != (rows,):
        raise ValueError(f"the mapping gives the old row of each of {rows} prototypes, found shape {mapping.shape}")
    if len(bad := mapping[(mapping < -1) | (mapping >= old_rows)]):
        raise ValueError(f"the mapping names old prototypes {bad[:3].tolist()}; allowed are -1 (new) and 0..{old_rows - 1}")
    return mapping


def take_block(store: Rows, read: Sequence[Part], new: Tensor, old: Tensor, *, same_rule: bool) -> None:
    """Rows `old` (n,) global of a checkpoint become the rows `new` (n,) local of a store, with their state."""
    store.slot[new.to(store.home)] = UNWRITTEN
    missing = torch.ones(len(old), dtype=torch.bool)
    for part in read:
        there, place = part.at("ids", old)
        store.write(new[there], part.tensors["weight"][place])
        missing &= ~there
        there, place = part.at("touched", old)
        at = store.places(new[there].to(store.home))
        store.moment[at] = part.tensors["moment"][place].to(store.home, store.dtype)
        store.scalars[at] = part.tensors["scalars"][place].to(store.home)
    said = read[0].said
    if said["rule"] == "pseudo-random":  # by an id and a seed that may be others now
        missing &= (new + store.first != old) | (not same_rule)
        store.write(new[missing], pseudo_random_rows(old[missing], store.dim, said["seed"]))


def take(store: Rows, read: Sequence[Part], old: np.ndarray | None, *, seed: int, rule: str) -> None:
    """The whole store from a checkpoint; old: checked mapping of all this run's prototypes, or None for the same ones."""
    k, said = read[0].said["subcentres"], read[0].said
    store.forget_state()
    for a in range(0, store.n, BLOCK):
        new = torch.arange(a, min(a + BLOCK, store.n))
        rows = new + store.first
        if old is not None:
            of = torch.from_numpy(old[rows.numpy() // k])
            rows = torch.where(of >= 0, of * k + rows % k, -1)
        take_block(store, read, new[rows >= 0], rows[rows >= 0], same_rule=said["seed"] == seed and said["rule"] == rule)
    assert bool((store.slot >= STATELESS).all())


def normalised(folder: Path, block: int = PUBLISHED) -> Iterator[np.ndarray]:
    """All prototypes of a checkpoint in their order, `block` at a time: (n, D) float32, normalised; of sub-centres the one that won most.

    Twin of `train.head.prototypes.whole_head`, for heads that memory does not hold several times. ValueError for rows that nobody wrote
    and the files do not tell the value of.
    """
    read = parts(folder)
    said, k = read[0].said, read[0].said["subcentres"]
    for start in range(0, said["rows"], block):
        ids = torch.arange(start * k, min(start + block, said["rows"]) * k)
        rows, wins = torch.zeros(len(ids), said["dim"]), torch.zeros(len(ids), dtype=torch.int32)
        missing = torch.ones(len(ids), dtype=torch.bool)
        for part in read:
            there, place = part.at("ids", ids)
            rows[there] = part.tensors["weight"][place].float()
            missing &= ~there
            there, place = part.at("touched", ids)
            wins[there] = part.tensors["scalars"][place, SCALARS.index("wins")]
        if missing.any() and said["rule"] != "pseudo-random":
            raise ValueError(f"the checkpoint at {folder} leaves row {ids[missing][0]} to a start rule that it does not know")
        rows[missing] = pseudo_random_rows(ids[missing], said["dim"], said["seed"]).to(read[0].tensors["weight"].dtype).float()
        first = torch.arange(0, len(ids), k)
        yield F.normalize(rows[first + wins.view(-1, k).argmax(1)], dim=1).numpy()
