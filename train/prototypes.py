"""The prototype head: one row an instance ID, rows sharded over the workers, full or sparse softmax over all of them.

Each worker holds U/world prototypes and the whole global batch of B embeddings: it computes its own columns of the logits, and
two small all-reduces give every worker the exact loss. The slow twin is `train.losses.reference_loss`. At serving time the head
is dropped (METHOD.md section 2, stage 3). Rows and their optimizer are the head's own (`train.rows`), not a module's parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from train import candidates, head_files
from train.capacity import Capacity, capacity, room_here
from train.losses import angular_margin, prefix, reference_loss, weighted_mean
from train.masks import Duplicates
from train.rows import SCALARS, UNWRITTEN, Rows, Start, Storage, pseudo_random_rows
from train.sharding import all_reduce, gather, gathered_rows, shard_range, sharded_cross_entropy

__all__ = ["HeadConfig", "PrototypeHead", "capacity", "gather", "reference_loss", "shard_range", "whole_head"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
APART = 0.5  # how far further sub-centres start from the centroid: a cosine of 0.89, near enough to win members, not to be the same
LOOKED_UP = 4096  # prototypes whose neighbours are looked up together


class HeadConfig(BaseModel):
    """`neighbours`, `random` and `refresh` matter to the sparse form; `filter` is a cosine, 0 is off."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["full", "sparse"] = "full"
    neighbours: Annotated[int, Field(ge=1)] = 64  # nearest prototypes of each target that enter the denominator
    random: Annotated[int, Field(ge=0)] = 2048  # further prototypes drawn at random a step, over all workers
    refresh: Annotated[int, Field(ge=1)] = 200  # steps between rebuilds of the index over the prototypes
    storage: Storage = "device"
    dtype: Literal["float32", "bfloat16"] = "float32"
    subcentres: Annotated[int, Field(ge=1, le=16)] = 1  # rows a prototype, the nearest counts (sub-centre ArcFace)
    filter: Annotated[float, Field(ge=0, le=1)] = 0.0  # other prototypes with a cosine above it take no part


@dataclass
class _Fetched:
    """Rows of one loss, until the update: ids (n,) ascending, their values as a leaf, and how often each won its target."""

    ids: Tensor
    leaf: Tensor
    wins: Tensor
    step: int


class PrototypeHead:
    """U prototypes of K sub-centres and D dimensions; this worker holds the prototypes `start` to `stop`.

    `duplicates` (p, 2): pairs that are known to be one thing, which never compete. `start(ids) -> (n, D)` gives rows nobody has
    touched; by default pseudo-random unit vectors, which need no storage. Collective calls say so.
    """

    def __init__(
        self,
        rows: int,
        dim: int,
        config: HeadConfig,
        *,
        rank: int = 0,
        world: int = 1,
        group: dist.ProcessGroup | None = None,
        device: str | torch.device = "cpu",
        seed: int = 0,
        folder: Path | None = None,
        duplicates: np.ndarray | None = None,
        start: Start | None = None,
        index: candidates.Index | None = None,
    ) -> None:
        if rows < 2:
            raise ValueError(f"ID recognition needs at least 2 products to tell apart, found {rows}")
        self.rows, self.dim, self.config, self.seed = rows, dim, config, seed
        self.rank, self.world, self.group, self.device = rank, world, group, torch.device(device)
        self.start, self.stop = shard_range(rows, rank, world)
        self.rule = "given" if start else "pseudo-random"
        self.duplicates = Duplicates(duplicates, rows, self.device)
        k = config.subcentres
        self.store = Rows(
            (self.stop - self.start) * k,
            dim,
            first=self.start * k,
            start=self._start_rule(start),
            storage=config.storage,
            dtype=DTYPES[config.dtype],
            device=self.device,
            folder=folder,
        )
        self.given_index, self.step, self.born = index, 0, None
        self.pending: list[_Fetched] = []
        self._forget_neighbours()

    def _start_rule(self, start: Start | None) -> Start:
        k = self.config.subcentres

        def rule(ids: Tensor) -> Tensor:
            own = pseudo_random_rows(ids, self.dim, self.seed)
            return own if start is None else self._apart(start(ids // k).to(own), own, ids % k)

        return rule

    def _apart(self, centres: Tensor, noise: Tensor, sub: Tensor) -> Tensor:
        """Centres (n, D), moved where they are a further sub-centre: equal rows would stay equal for ever."""
        return torch.where((sub > 0)[:, None], F.normalize(F.normalize(centres, dim=1) + APART * noise, dim=1), centres)

    def _forget_neighbours(self) -> None:
        self.index: candidates.Index | None = None
        self.near_known: dict[int, np.ndarray] = {}
        self.built_ago = 0

    # --- Rows

    def _row_ids(self, own: Tensor) -> Tensor:
        """Local prototypes (n,) -> their rows (n * K,)."""
        k = self.config.subcentres
        return (own[:, None] * k + torch.arange(k, device=own.device)).reshape(-1)

    def _dominant(self, own: Tensor) -> Tensor:
        """Rows (n, D) of local prototypes as stored; of the sub-centres, the one that won most of its members."""
        if self.config.subcentres == 1:
            return self.store.fetch(own)
        ids = self._row_ids(own)
        wins = self.store.scalar("wins", ids).view(len(own), -1)
        return self.store.fetch(ids.view(len(own), -1).gather(1, wins.argmax(1, keepdim=True).to(ids.device))[:, 0])

    def _all_own(self) -> Tensor:
        return torch.arange(self.stop - self.start, device=self.device)

    def start_from(self, centroids_UD: Tensor) -> None:
        """Take this worker's rows of the centroids, forget the optimizer's state; a random start is unstable at large label counts.

        A centroid of length 0 (nobody's) leaves the start rule's value. ValueError for another shape.
        """
        if tuple(centroids_UD.shape) != (self.rows, self.dim):
            raise ValueError(f"the head has {self.rows} prototypes of {self.dim} dimensions, the centroids are {tuple(centroids_UD.shape)}")
        self.store.forget_state()
        for own in self._all_own().split(candidates.BLOCK):
            ids = self._row_ids(own)
            centres = centroids_UD[(own + self.start).to(centroids_UD.device)].to(self.device).float()
            centres = centres.repeat_interleave(self.config.subcentres, 0)
            sub = ids % self.config.subcentres
            rows = self._apart(centres, pseudo_random_rows(ids + self.store.first, self.dim, self.seed), sub)
            self.store.write(ids, torch.where(centres.any(1, keepdim=True), rows, self.store.start_values(ids)))
        self.pending, self.born = [], None
        self._forget_neighbours()

    def whole(self) -> Tensor:
        """(U, D) on every worker: normalised, of the sub-centres the dominant one. Collective; for a U that fits."""
        ranges = [shard_range(self.rows, r, self.world) for r in range(self.world)]
        own = F.normalize(self._dominant(self._all_own()), dim=1)
        return gathered_rows(own, [b - a for a, b in ranges], group=self.group)

    def stale_share(self, step: int, age: int) -> float:
        """The share of this worker's rows that were not touched in the last `age` steps before `step`; 0 for a head younger than that."""
        if self.born is None or self.born > step - age or not self.store.n:
            return 0.0
        last = self.store.scalars[: self.store.used, 2]
        return 1 - int((last > step - age).sum()) / self.store.n

    # --- Neighbours

    def _blocks(self) -> candidates.Blocks:
        return candidates.normalised(self._dominant, self.stop - self.start, self.device)

    def _fresh_index(self) -> candidates.Index:
        if self.index is None or self.built_ago >= self.config.refresh:
            self._forget_neighbours()
            self.index = self.given_index or candidates.suitable(self.stop - self.start, self.device)
            self.index.build(self._blocks(), self.stop - self.start)
        return self.index

    def _look_up(self, ids: np.ndarray, k: int) -> np.ndarray:
        """(n, k) global ids of the nearest others, -1 where the index found fewer. Collective."""
        index = self._fresh_index()
        itself = torch.from_numpy(ids).to(self.device)
        mine = (itself >= self.start) & (itself < self.stop)
        vectors = torch.zeros(len(ids), self.dim, device=self.device)
        vectors[mine] = F.normalize(self._dominant(itself[mine] - self.start), dim=1)
        all_reduce(vectors, group=self.group, world=self.world)
        found, cosine = candidates.nearest_of_all(index, vectors, itself, k, first=self.start, group=self.group, world=self.world)
        return found.masked_fill(cosine == float("-inf"), -1).cpu().numpy()

    def near(self, labels: np.ndarray, k: int) -> np.ndarray:
        """(n, k) global ids of the nearest other prototypes of each label, best first, by the whole row; k is bounded by U - 1.

        The same on every worker. Collective. Exact up to 50,000 prototypes a worker and on a GPU; beyond, the index of the last
        refresh is asked, and where its cells hold fewer than k a row is filled up by repeating what was found.
        """
        labels, k = np.asarray(labels, np.int64), min(k, self.rows - 1)
        parts = [self._look_up(labels[a : a + LOOKED_UP], k) for a in range(0, len(labels), LOOKED_UP)]
        found = np.concatenate(parts) if parts else np.empty((0, k), np.int64)
        if (found[:, :1] < 0).any():  # nothing in its cells: any other prototype will do
            found[:, 0] = np.where(found[:, 0] < 0, (labels + 1) % self.rows, found[:, 0])
        known = np.maximum((found >= 0).sum(1, keepdims=True), 1)
        return np.take_along_axis(found, np.arange(k)[None] % known, 1)

    def _neighbours(self, targets: np.ndarray) -> np.ndarray:
        """Global ids (T * k,) of the targets' neighbours, of which some may be -1; looked up once between rebuilds. Collective."""
        self._fresh_index()
        missing = np.array([t for t in targets.tolist() if t not in self.near_known], np.int64)
        if len(missing):
            found = self._look_up(missing, min(self.config.neighbours, self.rows - 1))
            self.near_known.update(zip(missing.tolist(), found, strict=True))
        return np.concatenate([self.near_known[t] for t in targets.tolist()])

    # --- The step

    def _columns(self, labels: Tensor, step: int) -> Tensor:
        """Local prototypes (C,), ascending, that this worker's columns are. Collective."""
        if self.config.kind == "full":
            return self._all_own()
        targets = np.unique(labels.cpu().numpy())
        random = candidates.random_share(self.rows, self.config.random, seed=self.seed, step=step)
        chosen = np.unique(np.concatenate([targets, self._neighbours(targets), random]))
        chosen = chosen[(chosen >= self.start) & (chosen < self.stop)] - self.start
        return torch.from_numpy(chosen).to(self.device)

    def _check(self, h: Tensor, labels: Tensor, weights: Tensor | None, prefixes: Sequence[int]) -> None:
        """ValueError, on every worker alike, for what would hang or mislead further on. Collective."""
        if bad := [d for d in prefixes if not 1 <= d <= self.dim]:
            raise ValueError(f"prefixes {bad} are not in 1..{self.dim}, the head's dimensions")
        low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
        said = torch.tensor([[len(h), len(labels), low, high, int(weights is not None)]], device=self.device)
        said = (gather(said, group=self.group) if self.world > 1 else said).tolist()
        if len({(n, weighted) for n, _, _, _, weighted in said}) > 1 or any(n != y for n, y, *_ in said):
            raise ValueError(f"every worker needs as many embeddings as labels, and as the others; found (embeddings, labels, ...) {said}")
        if not said[0][0]:
            raise ValueError("the batch is empty; the head needs at least 1 embedding a worker")
        for worker, (_, _, low, high, _) in enumerate(said):
            if low < 0 or high >= self.rows:
                bad = low if low < 0 else high
                raise ValueError(f"label {bad} of worker {worker} is not among the {self.rows} prototypes; allowed are 0..{self.rows - 1}")

    def loss(
        self,
        h_bD: Tensor,
        labels_b: Tensor,
        *,
        prefixes: Sequence[int],
        scale: float,
        margin: float,
        step: int = 0,
        weights_b: Tensor | None = None,
    ) -> Tensor:
        """Mean over the global batch (weighted where `weights_b`, not negative, are given) and over prefixes, the same on every worker.

        h_bD (b, D) normalised and labels_b (b,) are this worker's, b is the same on each. P(y|h) of METHOD.md section 2, stage 3,
        with tau = 1 / scale. After `backward`, `update` moves the rows; several losses of one step add up until then, those of
        earlier steps are dropped. Sparse: candidates are chosen for each loss by its own targets. Collective.
        """
        labels_b = labels_b.to(self.device)
        self._check(h_bD, labels_b, weights_b, prefixes)
        everywhere = self.world > 1
        labels = gather(labels_b, group=self.group) if everywhere else labels_b
        weights = weights_b if weights_b is None else weights_b.to(self.device).float()
        weights = gather(weights, group=self.group) if everywhere and weights is not None else weights
        if weights is not None and not (weights.min() >= 0 and weights.sum() > 0):
            raise ValueError(f"weights are at least 0 and not all 0; found {weights.min().item()} to {weights.max().item()}")
        with torch.autocast(self.device.type, enabled=False):
            h = h_bD.float()
            h = gather(h, scale=float(self.world), group=self.group) if everywhere else h
            each_PB = self._cross_entropies(h, labels, self._columns(labels, step), prefixes, scale, margin, step)
            return weighted_mean(each_PB.mean(0), weights)

    def _cross_entropies(
        self, h: Tensor, labels: Tensor, own: Tensor, prefixes: Sequence[int], scale: float, margin: float, step: int
    ) -> Tensor:
        """(P, B) of the global batch, with this worker's columns `own`; remembers the rows for the update. Collective."""
        k, ids = self.config.subcentres, self._row_ids(own)
        leaf = self.store.fetch(ids).requires_grad_(torch.is_grad_enabled())
        mine = (labels >= self.start) & (labels < self.stop)
        column = torch.searchsorted(own, labels - self.start).clamp(max=max(len(own) - 1, 0))
        rows = mine.nonzero()[:, 0]
        logits, targets, winner = [], [], column[rows]
        for dim in prefixes:
            x, w = prefix(h, dim), F.normalize(leaf[:, :dim], dim=1)
            logits.append(self._nearest_sub(scale * x @ w.T))
            to_target = torch.einsum("bd,bkd->bk", x[rows], w.view(len(own), k, dim)[column[rows]])
            with_margin = scale * angular_margin(to_target.amax(1), margin)
            targets.append(torch.zeros(len(h), device=self.device).index_put((rows,), with_margin))
            winner = to_target.argmax(1) if dim == max(prefixes) else winner
        out = self._left_out(h, leaf, labels, own)
        stacked = torch.stack(logits)
        if out is not None:
            stacked = stacked.masked_fill(out, float("-inf"))
        self._remember(ids, leaf, column[rows] * k + winner, step)
        return sharded_cross_entropy(stacked, torch.stack(targets), column, mine, group=self.group, world=self.world)

    def _nearest_sub(self, cosine: Tensor) -> Tensor:
        """(B, C * K) -> (B, C)"""
        k = self.config.subcentres
        return cosine if k == 1 else cosine.unflatten(1, (-1, k)).amax(2)

    @torch.no_grad()
    def _left_out(self, h: Tensor, leaf: Tensor, labels: Tensor, own: Tensor) -> Tensor | None:
        """(B, C) where a column takes no part: inter-class filtering by the whole embedding, known duplicates. None where none can be."""
        out = None
        if self.config.filter:
            out = self._nearest_sub(F.normalize(h, dim=1) @ F.normalize(leaf, dim=1).T) > self.config.filter
        if len(self.duplicates):
            out = torch.zeros(len(h), len(own), dtype=torch.bool, device=self.device) if out is None else out
            self.duplicates.mark(out, labels, own + self.start)
        return out

    def _remember(self, ids: Tensor, leaf: Tensor, won: Tensor, step: int) -> None:
        if not leaf.requires_grad:
            return
        self.born = step if self.born is None else self.born
        self.pending = [p for p in self.pending if p.step == step]
        self.pending.append(_Fetched(ids, leaf, torch.bincount(won, minlength=len(ids)), step))
        self.step = step

    def discard(self) -> None:
        """Forget the gradients of this step: a step that is skipped must not move rows."""
        self.pending = []

    def update(self, lr: float) -> None:
        """Move the rows that this step's losses used, by their gradients; the optimizer's state and the rows are written back."""
        used = [p for p in self.pending if p.leaf.grad is not None]
        self.pending = []
        self.built_ago += 1
        if not used or not sum(len(p.ids) for p in used):
            return
        ids, leaf, grad, wins = used[0].ids, used[0].leaf.detach(), used[0].leaf.grad, used[0].wins
        assert grad is not None
        if len(used) > 1:
            ids, at = torch.cat([p.ids for p in used]).unique(return_inverse=True)
            leaf = grad.new_empty(len(ids), self.dim).index_copy_(0, at, torch.cat([p.leaf.detach() for p in used]))
            grad = torch.zeros_like(leaf).index_add_(0, at, torch.cat([p.leaf.grad for p in used if p.leaf.grad is not None]))
            wins = torch.zeros_like(ids).index_add_(0, at, torch.cat([p.wins for p in used]))
        seed = int(np.random.SeedSequence((self.seed, self.step, self.rank)).generate_state(1)[0])
        generator = torch.Generator(self.device).manual_seed(seed)
        self.store.descend(ids, leaf, grad, wins, lr=lr, step=self.step, generator=generator)

    # --- Files, and what it all takes

    def save(self, folder: Path) -> list[str]:
        """Write this worker's rows and optimizer state; the names of the files. Rows that the start rule gives are left out."""
        name = f"head-{self.rank}-of-{self.world}.safetensors"
        head_files.write_rows(self.store, folder / name, self._said())
        return [name]

    def restore(self, folder: Path, mapping: np.ndarray | None = None) -> None:
        """Take the rows of a checkpoint that any number of workers wrote, bit for bit, with their state.

        mapping (U,) names the old row of each prototype of this head, -1 for one that is new and keeps its start value; without
        it, both heads must have the same prototypes. ValueError names what is missing or does not fit.
        """
        read = head_files.parts(folder)
        said, own = read[0].said, self._said()
        if bad := [k for k in ("dim", "subcentres") if said[k] != own[k]]:
            raise ValueError(f"the checkpoint at {folder} has {[(k, said[k]) for k in bad]}, this run {[(k, own[k]) for k in bad]}")
        old = head_files.old_ids(mapping, self.rows, said["rows"])
        head_files.take(self.store, read, old, seed=self.seed, rule=self.rule)
        self.born, self.step, self.pending = said["born"], said["step"], []
        self._forget_neighbours()

    def _said(self) -> dict[str, Any]:
        """What a checkpoint says of the head besides its rows."""
        said = {k: getattr(self, k) for k in ("rows", "dim", "seed", "rule", "born", "step")}
        return {**said, "subcentres": self.config.subcentres, "dtype": self.config.dtype}

    def capacity(self, *, batch: int = 256, prefixes: int = 1, workers_here: int = 1) -> Capacity:
        """What this head takes, and how many prototypes would fit where; `str` of it is to be read.

        batch: embeddings a step over all workers; workers_here: how many of them share this machine's memory and disk.
        """
        c = self.config
        return capacity(
            self.rows,
            self.dim,
            dtype=c.dtype,
            storage=c.storage,
            kind=c.kind,
            subcentres=c.subcentres,
            room=room_here(self.device, self.store.folder, share=workers_here),
            world=self.world,
            columns=batch * (1 + c.neighbours) + c.random,
            batch=batch,
            prefixes=prefixes,
            exact_index=isinstance(candidates.suitable(self.stop - self.start, self.device), candidates.ExactIndex),
        )


def whole_head(folder: Path) -> dict[str, Tensor]:
    """All prototypes of a checkpoint however many workers wrote it: `weight` (U, D) as stored (of sub-centres the dominant one).

    Beside it, of all rows (U * K): `rows`, `moment`, `second`, `count`, `last`, `wins`. ValueError names what is missing.
    """
    said = head_files.parts(folder)[0].said
    config = HeadConfig(subcentres=said["subcentres"], dtype=said["dtype"])
    head = PrototypeHead(said["rows"], said["dim"], config, seed=said["seed"])
    head.rule = said["rule"]
    head.restore(folder)
    store, every = head.store, torch.arange(head.store.n)
    unwritten = int((store.slot == UNWRITTEN).sum())
    if unwritten and said["rule"] == "given":
        raise ValueError(f"the checkpoint at {folder} leaves {unwritten} of {store.n} rows to a start rule that it does not know")
    slots = store.slot.long()
    moment = torch.where((slots > 0)[:, None], store.moment[(slots - 1).clamp(min=0)], 0)
    scalars = {name: store.scalar(name, every) for name in SCALARS}
    scalars["second"] = scalars["second"].view(torch.float32)
    found = {"weight": head._dominant(head._all_own()), "rows": store.fetch(every)}
    return {**{name: rows.to(store.dtype) for name, rows in found.items()}, "moment": moment, **scalars}
