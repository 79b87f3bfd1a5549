"""Which prototypes enter a sparse step: the targets, their nearest neighbours, and a random share; found by an index over the rows.

Every worker indexes its own rows and looks up all targets; only the cosines of what was found are exchanged, so that the k
nearest over all workers are known to each, on any number of workers.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from train.head.sharding import gather

BLOCK = 1 << 16  # rows looked at together
EXACT_ROWS = 50_000  # a worker's rows up to which the exact search is quick enough on a CPU

Blocks = Callable[[], Iterator[tuple[int, Tensor]]]  # (first id, normalised rows (n, D)) of one block after the other


class Index(Protocol):
    """Finds the rows of one worker that are nearest to given vectors."""

    def build(self, blocks: Blocks, n: int) -> None:
        """Take the n rows as they are now."""

    def search(self, vectors: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(T, D) normalised -> cosines (T, k) float32, best first, and local ids (T, k) int64; -inf where there is none."""
        ...


class ExactIndex:
    """All rows, in blocks: the slow twin of the other, and quick on a GPU. Sees the rows as they are when it searches."""

    def build(self, blocks: Blocks, n: int) -> None:
        self.blocks = blocks

    def search(self, vectors: Tensor, k: int) -> tuple[Tensor, Tensor]:
        best = vectors.new_full((len(vectors), k), float("-inf"))
        found = torch.zeros(len(vectors), k, dtype=torch.int64, device=vectors.device)
        for first, rows in self.blocks():
            cosine, at = (vectors @ rows.T).topk(min(k, len(rows)), dim=1)
            best, order = torch.cat([best, cosine], 1).topk(k, dim=1)
            found = torch.cat([found, at + first], 1).gather(1, order)
        return best, found


class CellIndex:
    """faiss: rows in the cells of an inverted multi-index, one byte a dimension; looks into the cells nearest to a vector.

    Halves of a vector have 2^bits centres each, and a cell is a pair of them: sorting n rows into 4^bits cells costs n D 2^bits,
    where one level of as many cells would cost n D 4^bits. A cell holds some dozens of rows whatever n is, and as many cells are
    visited as hold some 1,500 rows, so that a search does not grow with n.
    """

    A_CELL, VISITED, TRAINED_ON = 40, 1536, 100_000

    def build(self, blocks: Blocks, n: int) -> None:
        import faiss

        bits = max(1, round(np.log2(max(n / self.A_CELL, 4)) / 2))
        index = None
        for _, rows in blocks():
            x = np.ascontiguousarray(rows.float().cpu().numpy())
            if index is None:
                index = faiss.index_factory(x.shape[1], f"IMI2x{bits},SQ8")
                index.train(self._sample(blocks, n) if n > len(x) else x)
            index.add(x)
        assert index is not None
        faiss.extract_index_ivf(index).nprobe = max(1, self.VISITED * 4**bits // n)
        self.index = index

    def _sample(self, blocks: Blocks, n: int) -> np.ndarray:
        every = max(1, n // self.TRAINED_ON)
        return np.concatenate([rows[::every].float().cpu().clone().numpy() for _, rows in blocks()])  # a view would keep its block

    def search(self, vectors: Tensor, k: int) -> tuple[Tensor, Tensor]:
        squared, found = self.index.search(vectors.float().cpu().numpy(), k)
        cosine = 1 - squared / 2  # of vectors of length 1; the multi-index knows distances only
        cosine[found < 0] = -np.inf
        return torch.from_numpy(cosine).to(vectors.device), torch.from_numpy(found.clip(0)).to(vectors.device)


def suitable(n: int, device: torch.device) -> Index:
    """Exact on a GPU whatever n, at a cost that grows with it, but slowly: an H200 took 10 to 18 ms a step from 1e5 to 1e9 prototypes."""
    return ExactIndex() if device.type == "cuda" or n <= EXACT_ROWS else CellIndex()


def nearest_of_all(
    index: Index, vectors: Tensor, itself: Tensor, k: int, *, first: int, group: dist.ProcessGroup | None, world: int
) -> tuple[Tensor, Tensor]:
    """The k nearest other prototypes of each of T targets: global ids (T, k) and their cosines, the same on every worker.

    vectors (T, D) are the targets' own rows, itself (T,) their global ids; -inf marks a place that is empty. Collective.
    """
    cosine, found = index.search(vectors, k + 1)
    found = found + first
    cosine = cosine.masked_fill(found == itself[:, None], float("-inf"))
    if world > 1:
        cosine = torch.cat(gather(cosine.contiguous(), group=group).chunk(world), 1)
        found = torch.cat(gather(found.contiguous(), group=group).chunk(world), 1)
    order = found.sort(dim=1, stable=True).indices  # ties go to the smaller id, on any number of workers
    cosine, found = cosine.gather(1, order), found.gather(1, order)
    order = cosine.sort(dim=1, stable=True, descending=True).indices[:, :k]
    return found.gather(1, order), cosine.gather(1, order)


def normalised(rows: Callable[[Tensor], Tensor], n: int, device: torch.device) -> Blocks:
    """Blocks of the prototypes 0..n-1 of one worker, at their full length: that of the embeddings that are served."""

    def blocks() -> Iterator[tuple[int, Tensor]]:
        for a in range(0, n, BLOCK):
            yield a, F.normalize(rows(torch.arange(a, min(a + BLOCK, n), device=device)), dim=1)

    return blocks


def random_share(rows: int, count: int, *, seed: int, step: int) -> np.ndarray:
    """`count` of the global ids 0..rows-1 (at most all; drawn with repetition, at a cost that ignores rows), the same on every worker."""
    if count >= rows:
        return np.arange(rows)
    return np.random.default_rng((seed, step, 7)).integers(rows, size=count)
