"""The prototype head: one row an instance ID, rows sharded over the workers, full or sparse softmax over all of them.

Each worker holds U/world prototypes and the whole global batch of B embeddings: it computes its own columns of the logits, and
two small all-reduces give every worker the exact loss. The slow twin is `train.losses.reference_loss`. At serving time the head
is dropped (METHOD.md section 2, stage 3). Rows and their optimizer are the head's own (`train.head.rows`), not a module's parameters.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from train.head import candidates, files
from train.head.batch import Batch, everyones
from train.head.config import HeadConfig
from train.head.loss import Columns, Objective, cross_entropies
from train.head.masks import Duplicates
from train.head.neighbourhood import Neighbourhood
from train.head.rows import SCALARS, UNWRITTEN, Fetched, Rows, Start, merged, pseudo_random_rows
from train.head.sharding import gather, gathered_rows, shard_range
from train.losses import reference_loss, weighted_mean

__all__ = ["HeadConfig", "PrototypeHead", "gather", "reference_loss", "shard_range", "whole_head"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
APART = 0.5  # how far further sub-centres start from the centroid: a cosine of 0.89, near enough to win members, not to be the same


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
        self.neighbourhood = Neighbourhood(
            rows,
            dim,
            self.start,
            self.stop,
            self._dominant,
            refresh=config.rebuilt_every(rows),
            device=self.device,
            group=group,
            world=world,
            index=index,
        )
        self.born: int | None = None  # the first step since the rows started; no row is stale before
        self.pending: list[Fetched] = []

    def _start_rule(self, start: Start | None) -> Start:
        k = self.config.subcentres

        def rule(ids: Tensor) -> Tensor:
            own = pseudo_random_rows(ids, self.dim, self.seed)
            return own if start is None else self._apart(start(ids // k).to(own), own, ids % k)

        return rule

    def _apart(self, centres: Tensor, noise: Tensor, sub: Tensor) -> Tensor:
        """Centres (n, D), moved where they are a further sub-centre: equal rows would stay equal for ever."""
        return torch.where((sub > 0)[:, None], F.normalize(F.normalize(centres, dim=1) + APART * noise, dim=1), centres)

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
        self.neighbourhood.forget()

    def rejuvenate(self) -> None:
        """Count steps anew: what an earlier run touched, at whatever step, was touched before the first of this one."""
        self.store.scalars[: self.store.used, SCALARS.index("last")] = 0
        self.born = None

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

    def near(self, labels: np.ndarray, k: int) -> np.ndarray:
        """(n, k) global ids of the nearest other prototypes of each label, best first, by the whole row; k is bounded by U - 1.

        The same on every worker. Collective. Exact up to 50,000 prototypes a worker and on a GPU; beyond, by the index of the
        last refresh (`train.head.neighbourhood.Neighbourhood.near`).
        """
        return self.neighbourhood.near(labels, k)

    # --- The step

    def _columns(self, labels: Tensor, step: int) -> Tensor:
        """Local prototypes (C,), ascending, that this worker's columns are. Collective."""
        if self.config.kind == "full":
            return self._all_own()
        random = candidates.random_share(self.rows, self.config.random, seed=self.seed, step=step)
        chosen = self.neighbourhood.candidates(np.unique(labels.cpu().numpy()), self.config.neighbours, random)
        return torch.from_numpy(chosen).to(self.device)

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
        if bad := [d for d in prefixes if not 1 <= d <= self.dim]:
            raise ValueError(f"prefixes {bad} are not in 1..{self.dim}, the head's dimensions")
        batch = Batch(labels=labels_b.to(self.device), weights=None if weights_b is None else weights_b.to(self.device).float())
        labels, weights = everyones(batch, len(h_bD), self.rows, group=self.group, world=self.world)
        own = self._columns(labels, step)
        ids = self._row_ids(own)
        leaf = self.store.fetch(ids).requires_grad_(torch.is_grad_enabled())
        columns = Columns(ids=own + self.start, rows=leaf, subcentres=self.config.subcentres)
        objective = Objective(prefixes=prefixes, scale=scale, margin=margin, filter=self.config.filter)
        with torch.autocast(self.device.type, enabled=False):
            h = h_bD.float()
            h = gather(h, scale=float(self.world), group=self.group) if self.world > 1 else h
            each, won = cross_entropies(h, labels, columns, objective, self.duplicates, group=self.group, world=self.world)
        self._remember(ids, leaf, won, step)
        return weighted_mean(each.mean(0), weights)

    def _remember(self, ids: Tensor, leaf: Tensor, won: Tensor, step: int) -> None:
        if not leaf.requires_grad:
            return
        self.born = step if self.born is None else self.born
        self.pending = [p for p in self.pending if p.step == step]
        self.pending.append(Fetched(ids=ids, leaf=leaf, wins=torch.bincount(won, minlength=len(ids)), step=step))

    def discard(self) -> None:
        """Forget the gradients of this step: a step that is skipped must not move rows."""
        self.pending = []

    def update(self, lr: float) -> None:
        """Move the rows that this step's losses used, by their gradients; the optimizer's state and the rows are written back."""
        used = [p for p in self.pending if p.leaf.grad is not None and len(p.ids)]
        self.pending = []
        self.neighbourhood.moved()
        if used:
            seed = int(np.random.SeedSequence((self.seed, used[0].step, self.rank)).generate_state(1)[0])
            self.store.descend(merged(used), lr=lr, generator=torch.Generator(self.device).manual_seed(seed))

    # --- Files

    def save(self, folder: Path) -> list[str]:
        """Write this worker's rows and optimizer state; the names of the files. Rows that the start rule gives are left out."""
        name = f"head-{self.rank}-of-{self.world}.safetensors"
        files.write_rows(self.store, folder / name, self._said())
        return [name]

    def restore(self, folder: Path, mapping: np.ndarray | None = None) -> None:
        """Take the rows of a checkpoint that any number of workers wrote, bit for bit, with their state.

        mapping (U,) names the old row of each prototype of this head, -1 for one that is new and keeps its start value; without
        it, both heads must have the same prototypes. ValueError names what is missing or does not fit.
        """
        read = files.parts(folder)
        said, own = read[0].said, self._said()
        if bad := [k for k in ("dim", "subcentres") if said[k] != own[k]]:
            raise ValueError(f"the checkpoint at {folder} has {[(k, said[k]) for k in bad]}, this run {[(k, own[k]) for k in bad]}")
        old = files.old_ids(mapping, self.rows, said["rows"])
        files.take(self.store, read, old, seed=self.seed, rule=self.rule)
        self.born, self.pending = said["born"], []
        self.neighbourhood.forget()

    def _said(self) -> dict[str, Any]:
        """What a checkpoint says of the head besides its rows."""
        said = {k: getattr(self, k) for k in ("rows", "dim", "seed", "rule", "born")}
        return {**said, "subcentres": self.config.subcentres, "dtype": self.config.dtype}


def whole_head(folder: Path) -> dict[str, Tensor]:
    """All prototypes of a checkpoint however many workers wrote it: `weight` (U, D) as stored (of sub-centres the dominant one).

    Beside it, of all rows (U * K): `rows`, `moment`, `second`, `count`, `last`, `wins`. ValueError names what is missing.
    """
    said = files.parts(folder)[0].said
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
