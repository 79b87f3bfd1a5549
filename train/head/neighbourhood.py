"""The neighbours of prototypes over all workers: each indexes its own rows, on a schedule, and keeps what was looked up since."""

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from train.head import candidates
from train.head.sharding import all_reduce

TOGETHER = 4096  # prototypes looked up at once
KNOWN = 1 << 16  # lists kept between rebuilds; 33 MB with 64 neighbours


class Neighbourhood:
    """`own(ids) -> (n, D)` gives rows of this worker's prototypes `start` to `stop`, ids counted from `start`.

    Neighbours are looked up by the whole row, which is what is served; not by its prefixes. Every worker makes the same calls.
    Index and lists are in no checkpoint: a run that goes on builds them anew, so that its lists are fresher than they would have been.
    """

    def __init__(
        self,
        rows: int,
        dim: int,
        start: int,
        stop: int,
        own: Callable[[Tensor], Tensor],
        *,
        refresh: int,
        device: torch.device,
        group: dist.ProcessGroup | None,
        world: int,
        index: candidates.Index | None = None,
    ) -> None:
        self.rows, self.dim, self.start, self.stop, self.own = rows, dim, start, stop, own
        self.refresh, self.device, self.group, self.world = refresh, device, group, world
        self.index = index or candidates.suitable(stop - start, device)
        self.forget()

    def forget(self) -> None:
        """The rows are others now: build anew when next asked."""
        self.built, self.age = False, 0
        self.known: dict[int, np.ndarray] = {}

    def moved(self) -> None:
        """The rows moved by a step."""
        self.age += 1

    def build_if_due(self) -> None:
        """Build the index where there is none, or where rows have moved for `refresh` steps since."""
        if not self.built or self.age >= self.refresh:
            self.forget()
            self.index.build(candidates.normalised(self.own, self.stop - self.start, self.device), self.stop - self.start)
            self.built = True

    def _look_up(self, ids: np.ndarray, k: int) -> np.ndarray:
        """(n, k) global ids of the nearest others, -1 where the index found fewer. Collective."""
        itself = torch.from_numpy(ids).to(self.device)
        mine = (itself >= self.start) & (itself < self.stop)
        vectors = torch.zeros(len(ids), self.dim, device=self.device)
        vectors[mine] = F.normalize(self.own(itself[mine] - self.start), dim=1)
        all_reduce(vectors, group=self.group, world=self.world)
        found, cosine = candidates.nearest_of_all(self.index, vectors, itself, k, first=self.start, group=self.group, world=self.world)
        return found.masked_fill(cosine == float("-inf"), -1).cpu().numpy()

    def near(self, labels: np.ndarray, k: int) -> np.ndarray:
        """(n, k) global ids of the nearest others of each label, best first; k is bounded by U - 1. Collective.

        Where the index's cells hold fewer than k, a row goes round what was found again; where they hold none, it is the next id.
        """
        self.build_if_due()
        labels, k = np.asarray(labels, np.int64), min(k, self.rows - 1)
        parts = [self._look_up(labels[a : a + TOGETHER], k) for a in range(0, len(labels), TOGETHER)]
        found = np.concatenate([np.empty((0, k), np.int64), *parts])
        found[:, 0] = np.where(found[:, 0] < 0, (labels + 1) % self.rows, found[:, 0])
        known = np.maximum((found >= 0).sum(1, keepdims=True), 1)
        return np.take_along_axis(found, np.arange(k)[None] % known, 1)

    def candidates(self, targets: np.ndarray, neighbours: int, random: np.ndarray) -> np.ndarray:
        """This worker's prototypes (C,), counted from `start`, ascending, of a step's targets (distinct), their neighbours and `random`.

        Neighbours are looked up once between rebuilds. Collective.
        """
        self.build_if_due()
        if len(self.known) > KNOWN:
            self.known.clear()
        missing = np.array([t for t in targets.tolist() if t not in self.known], np.int64)
        if len(missing):
            self.known.update(zip(missing.tolist(), self._look_up(missing, min(neighbours, self.rows - 1)), strict=True))
        chosen = np.unique(np.concatenate([targets, random, *(self.known[t] for t in targets.tolist())]))
        return chosen[(chosen >= self.start) & (chosen < self.stop)] - self.start
