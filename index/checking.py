"""Is an index what it should be? Every item in one shard, and enough of what exact search finds. Vectors are read in blocks."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from index.searcher import Searcher
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


def in_one_shard(indexed: pa.ChunkedArray, expected: pa.ChunkedArray) -> None:
    """ValueError unless every item_id of `expected`, and no other, is in `indexed` once."""
    counts = pc.value_counts(indexed.combine_chunks())
    often, names = counts.field("counts").to_numpy(), counts.field("values")
    wrong = [f"{names[int(i)]} in {often[i]}" for i in np.flatnonzero(often != 1)]
    lost = expected.filter(pc.invert(pc.is_in(expected, value_set=names))).to_pylist()
    extra = names.filter(pc.invert(pc.is_in(names, value_set=expected.combine_chunks()))).to_pylist()
    wrong += [f"{name} in 0" for name in lost] + [f"{name}, which is no item," for name in extra]
    if wrong:
        raise ValueError(f"{len(wrong)} items are not in exactly one shard: {', '.join(sorted(wrong)[:5])}")


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
        """Every second query of each kind, beginning with `number` (0 or 1)."""
        asked = {
            kind: Asked(each.queries[number::2], each.own[number::2] if each.own is not None else None) for kind, each in self.asked.items()
        }
        best = {kind: scores[number::2] for kind, scores in self.best.items()}
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
