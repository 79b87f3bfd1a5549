"""Is an index what it should be? Every item in one shard, and enough of what exact search finds. Vectors are read in blocks."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import faiss
import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from index import kinds, plan
from index.filters import Where
from index.searcher import SPARE, Searcher, Shard
from index.shard import as_matrix

K = 10
SAME_SCORE = 1e-5  # float32 sums in another order; nearer than this two items are equally good answers
BLOCK = 65_536


@dataclass(frozen=True, slots=True)
class Asked:
    """Queries (q, dim) of one kind. own: (q,) the row of the vectors that each query is itself, which is no answer; None where none is."""

    queries: np.ndarray
    own: np.ndarray | None = None


def blocks(dataset: lance.LanceDataset) -> Iterator[np.ndarray]:
    """The vectors in their order, (up to BLOCK, dim) at a time."""
    for batch in dataset.to_batches(columns=["vector"], batch_size=BLOCK, scan_in_order=True):
        yield as_matrix(pa.chunked_array([batch.column("vector")]))


def exact_of(parts: Iterable[np.ndarray], queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """As `index.searcher.exact`, over vectors that come in parts; rows (q, k) count through all of them, -1 where there are fewer.

    Equal scores come in no particular order.
    """
    scores, rows, start = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int64), 0
    for part in parts:
        cosines = queries @ part.T
        near = np.flatnonzero((cosines > scores[:, -1:]).any(axis=0))  # after the first parts next to nothing is nearer than what is known
        scores = np.concatenate([scores, cosines[:, near]], axis=1)
        rows = np.concatenate([rows, np.broadcast_to(near + start, (len(queries), len(near)))], axis=1)
        best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        best = np.take_along_axis(best, np.argsort(-np.take_along_axis(scores, best, 1), axis=1, kind="stable"), 1)
        scores, rows = np.take_along_axis(scores, best, 1), np.take_along_axis(rows, best, 1)
        start += len(part)
    return scores, rows


class AsServed(Searcher):
    """Finds what a process finds that has joined these shards, which stay in their files: so an index larger than memory is checked too.

    Each shard refining for itself would refine many times as many candidates, and the recall of it would be too good.
    """

    @classmethod
    def of(cls, shards: Sequence[Shard]) -> Searcher:
        """Where they will not be joined, or nothing is refined, searching one after the other finds the same."""
        indexes = [faiss.downcast_index(shard.index) for shard in shards]
        apart = len(shards) == 1 or not all(isinstance(index, faiss.IndexRefine) for index in indexes) or not kinds.joinable(indexes)
        return Searcher(shards) if apart else cls(shards)

    def find(self, vectors: np.ndarray, k: int, *, where: Where | None = None) -> tuple[np.ndarray, np.ndarray]:
        """As in Searcher, but for the order of equals; there is nothing to filter by."""
        assert not where
        total = int(self.starts[-1])
        k = min(k, total)
        wanted = min(k + SPARE, total)
        settings = kinds.parameters(self.shards[0].index, k, wanted - k)
        scores, rows = self._candidates(vectors, min(int(wanted * settings.k_factor), total))
        scores = np.where(rows >= 0, self._refined(vectors, rows), -np.inf)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, best, 1), np.take_along_axis(rows, best, 1)

    def _candidates(self, vectors: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores (n, count) before refining and positions (n, count), -1 where there are fewer, in no order."""
        found = []
        for shard, start in zip(self.shards, self.starts[:-1], strict=True):
            faiss.omp_set_num_threads(shard.threads)
            scores, rows = faiss.downcast_index(shard.index).base_index.search(vectors, min(count, shard.index.ntotal))
            found.append((np.where(rows >= 0, scores, -np.inf), np.where(rows >= 0, rows + start, -1)))
        scores, rows = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
        best = np.argpartition(-scores, count - 1, axis=1)[:, :count]
        return np.take_along_axis(scores, best, 1), np.take_along_axis(rows, best, 1)

    def _refined(self, vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Scores (n, m) of positions (n, m) by the stored vectors of the refine steps; of -1 anything."""
        needed, place = np.unique(np.maximum(rows, 0), return_inverse=True)
        stored = np.empty((len(needed), self.dim), np.float32)
        for shard, start, end in zip(self.shards, self.starts[:-1], self.starts[1:], strict=True):
            mine = (needed >= start) & (needed < end)
            if mine.any():
                stored[mine] = faiss.downcast_index(faiss.downcast_index(shard.index).refine_index).reconstruct_batch(needed[mine] - start)
        return np.stack([stored[at] @ vector for at, vector in zip(place.reshape(rows.shape), vectors, strict=True)])


def in_one_shard(indexed: pa.ChunkedArray, expected: pa.ChunkedArray) -> None:
    """ValueError unless every item_id of `expected`, and no other, is in `indexed` once."""
    found, asked = (np.sort(plan.hashes(ids)) for ids in (indexed, expected))
    if np.array_equal(found, asked) and (found[1:] != found[:-1]).all():
        return  # 64 bits of each id; what follows compares the ids themselves, and takes minutes and memory for many
    expected, counts = expected.cast(indexed.type), pc.value_counts(indexed)
    often, names = counts.field("counts").to_numpy(), counts.field("values")
    wrong = [f"{names[int(i)]} in {often[i]}" for i in np.flatnonzero(often != 1)]
    lost = expected.filter(pc.invert(pc.is_in(expected, value_set=names))).to_pylist()
    extra = names.filter(pc.invert(pc.is_in(names, value_set=expected))).to_pylist()
    wrong += [f"{name} in 0" for name in lost] + [f"{name}, which is no item," for name in extra]
    if wrong:
        raise ValueError(f"{len(wrong)} items are not in exactly one shard: {', '.join(sorted(wrong)[:5])}")


def require(least: float, recalls: Mapping[str, float], factory: str) -> None:
    """ValueError that names each kind of query whose recall is below `least`."""
    if low := {kind: value for kind, value in recalls.items() if value < least}:
        failed = ", ".join(f"{value:.3f} of queries by {kind}" for kind, value in low.items())
        raise ValueError(
            f"recall@{K} of {factory} against exact search is {failed}, below min_recall = {least}; nothing was published. Take a "
            "factory that keeps more (Flat is exact), search more of it (parameters, e.g. nprobe=16), or set target_recall, and the "
            "cheapest settings that reach it are found"
        )


def hits(asked: Asked, rows: np.ndarray, scores: np.ndarray, best: np.ndarray, k: int) -> float:
    """Recall@k. rows (q, m) were found, of exact scores (q, m); best (q, >= k) are the exact scores, best first, both without the query
    itself. What is as near as the k-th exact answer counts: duplicates are equally good."""
    mine = rows >= 0
    if asked.own is not None:
        mine &= rows != asked.own[:, None]
    mine &= np.cumsum(mine, axis=1) <= k
    return float((mine & (scores >= best[:, k - 1 : k] - SAME_SCORE)).sum() / (len(rows) * k))


@dataclass(frozen=True, slots=True, kw_only=True)
class Yardstick:
    """Queries of several kinds with the scores (q, k + 1) of their exact answers, best first.

    order: (items,) the row of `dataset` at each of a searcher's positions.
    """

    asked: Mapping[str, Asked]
    best: Mapping[str, np.ndarray]
    dataset: lance.LanceDataset
    order: np.ndarray

    @classmethod
    def of(cls, asked: Mapping[str, Asked], dataset: lance.LanceDataset, order: np.ndarray) -> "Yardstick":
        """The vectors are read once for all kinds."""
        every = np.concatenate([each.queries for each in asked.values()])
        exact = exact_of(blocks(dataset), every, min(K + 1, len(order)))[0]
        ends = np.cumsum([len(each.queries) for each in asked.values()])[:-1]
        return cls(asked=asked, best=dict(zip(asked, np.split(exact, ends), strict=True)), dataset=dataset, order=order)

    def half(self, number: int) -> "Yardstick":
        """Every second query of each kind, beginning with `number` (0 or 1); of a kind with one query, that one both times."""
        mine = {kind: slice(number if len(each.queries) > 1 else 0, None, 2) for kind, each in self.asked.items()}
        asked = {
            kind: Asked(each.queries[mine[kind]], None if each.own is None else each.own[mine[kind]]) for kind, each in self.asked.items()
        }
        best = {kind: scores[mine[kind]] for kind, scores in self.best.items()}
        return Yardstick(asked=asked, best=best, dataset=self.dataset, order=self.order)

    def recalls(self, searcher: Searcher) -> dict[str, float]:
        """Recall@10 (less where there are fewer items) of each kind that has queries."""
        return {kind: self._recall(searcher, each, self.best[kind]) for kind, each in self.asked.items() if len(each.queries)}

    def _recall(self, searcher: Searcher, asked: Asked, best: np.ndarray) -> float:
        itself = asked.own is not None
        k = min(K, len(self.order) - itself)
        if k == 0:
            return 1.0
        _, positions = searcher.find(asked.queries, k + itself)
        there = positions >= 0
        rows = np.where(there, self.order[positions], -1)
        needed, place = np.unique(rows[there], return_inverse=True)
        vectors = as_matrix(self.dataset.take(needed.tolist(), columns=["vector"])["vector"])
        scores = np.full(rows.shape, -np.inf, np.float32)
        scores[there] = np.einsum("md,md->m", vectors[place], asked.queries[np.nonzero(there)[0]])
        return hits(asked, rows, scores, best[:, 1:] if itself else best, k)  # a query that is indexed is its own nearest
