"""Search an index: one shard, or all of them merged. Neither torch nor Ray is imported here.

score is the cosine of query and item, because both are L2-normalised and FAISS is asked for inner products.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from idem import manifest, storage
from idem.types import Hit
from index import filters, kinds, release
from index.filters import Where
from index.shard import FILTER_COLUMNS, META_COLUMNS, names
from index.shard import make_index as make_index  # for later stages, which import of this package its reader alone
from train.neighbours import nearest

EXACT_ROWS = 65_536  # so few are compared one by one, which costs less than an index that has to look for them in more lists
KEPT_FILTERS = 16  # each a bit an item, and the stored vectors of EXACT_ROWS at most
SPARE, TIED = 4, 32  # FAISS cuts ties in an order of its own: a few more are fetched, and many where all those are as near as the last

_forked = False  # OpenMP's threads are not there in a forked child, which would wait for them for ever: it works on one


def _in_child() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_in_child)


def _checked(vectors: np.ndarray, dim: int, k: int) -> np.ndarray:
    vectors = np.ascontiguousarray(vectors, np.float32)
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise ValueError(f"query vectors must be (n, {dim}), as the index; found {vectors.shape}")
    lengths = np.einsum("nd,nd->n", vectors, vectors)
    if not np.isfinite(lengths).all() and not np.isfinite(vectors).all():
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        raise ValueError(f"query vectors must be finite; NaN or infinity in {len(bad)} of {len(vectors)}, the first is number {bad[0]}")
    if k < 1:
        raise ValueError(f"k is how many items are wanted, at least 1; found {k}")
    if not lengths.all() and not (there := vectors.any(axis=1)).all():
        zero = np.flatnonzero(~there)
        raise ValueError(f"a query vector of zeros is near nothing; {len(zero)} of {len(vectors)} are, the first is number {zero[0]}")
    return vectors


def _index_of(path: str) -> str:
    """The index at `path`, or the one that the release there binds."""
    uri = storage.join(path, manifest.NAME)
    if storage.exists(uri) and manifest.Manifest.model_validate_json(storage.read_bytes(uri)).kind == "index":
        return path
    if not storage.exists(uri) and not storage.exists(storage.join(path, manifest.POINTER)):
        raise ValueError(f"no finished index and no release at {path}: {manifest.NAME} is missing")
    return release.Release.open(path).index


def exact(vectors: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The yardstick: scores (q, k) and rows (q, k) of the k largest inner products, best first, ties to the smaller row.

    vectors (n, dim), queries (q, dim), float32; k is cut to n.
    """
    return nearest(_checked(queries, vectors.shape[1], k), vectors, k)


def by_id(scores: np.ndarray, rows: np.ndarray, places_at: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Rows (n, m) whose scores fall, those of equal score in the order of their item_id: places_at(rows) tells the place of each in it."""
    there, place = rows >= 0, np.zeros(rows.shape, np.int64)
    place[there] = places_at(rows[there])
    return np.take_along_axis(rows, np.lexsort((place, -scores)), 1)


def _places(item_ids: pa.Array) -> np.ndarray:
    """(n,) int32 or, beyond its range, int64: the place of each in the order of all, from 1."""
    places = pc.rank(item_ids, tiebreaker="min").to_numpy()
    return places.astype(np.int32) if len(places) < 1 << 31 else places


def combined(vectors: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """One query (1, dim) of several pictures or texts: their vectors (n, dim), weighted, summed and normalised.

    ValueError for weights that do not fit or cancel one another out.
    """
    if len(weights) != len(vectors):
        raise ValueError(f"{len(vectors)} parts of a query need as many weights; found {len(weights)}")
    summed: Any = np.asarray(weights, np.float32) @ vectors
    length = float(np.linalg.norm(summed))
    if not np.isfinite(length) or length < 1e-6:
        raise ValueError(f"the weights {list(weights)} leave nothing of the query")
    return (summed / length)[None]


@dataclass(frozen=True, slots=True)
class Allowed:
    """The rows of a shard that may be returned. count: how many; bits: the mask, packed as FAISS reads it; where they are few, rows (m,)
    and few, an index of them alone."""

    count: int
    bits: np.ndarray
    rows: np.ndarray | None
    few: Any

    @classmethod
    def of(cls, index: Any, mask: np.ndarray) -> "Allowed":
        count, bits = int(np.count_nonzero(mask)), np.packbits(mask, bitorder="little")
        rows = np.flatnonzero(mask) if 0 < count <= min(EXACT_ROWS, index.ntotal // 4) else None
        few = kinds.compact(index, rows) if rows is not None else None
        return cls(count, bits, rows if few is not None else None, few)


@dataclass(frozen=True)
class Shard:
    """One FAISS index and what is known of its items in the same order: META_COLUMNS, and columns to filter by.

    exact: searches in place of the index (index.devices.Exact); None for the index itself.
    """

    index: faiss.Index
    meta: pa.Table
    threads: int = 1
    exact: Any = None

    @classmethod
    def open(cls, folder: str, number: int, *, threads: int = 1, mapped: bool = True) -> "Shard":
        """Shard `number` of the finished index at `folder`, its two files verified. ValueError names what is missing or damaged."""
        made = manifest.read(folder, kind="index")
        mine = names(number)
        if not set(mine) <= set(made.files):
            raise ValueError(f"the index at {folder} has no shard {number}; it has {len(made.files) // 2}, numbered from 0")
        manifest.verify(folder, made.model_copy(update={"files": {name: made.files[name] for name in mine}}))
        shard = cls.read(folder, number, threads=threads, mapped=mapped)
        if tuned := made.figures.get("parameters"):
            faiss.ParameterSpace().set_index_parameters(shard.index, tuned)
        return shard

    @classmethod
    def read(cls, folder: str, number: int, *, threads: int = 1, mapped: bool = True, columns: Sequence[str] | None = None) -> "Shard":
        """As `open`, of an index that has no manifest yet. mapped: leave the stored vectors in the file, where the kind allows it; columns:
        what of its items is read, None for all."""
        index_path, meta_path = (str(storage.local_path(storage.join(folder, name))) for name in names(number))
        index = faiss.read_index(index_path, faiss.IO_FLAG_MMAP_IFC if mapped else 0)
        known = columns and list(columns)
        meta = pq.read_table(meta_path, columns=known, read_dictionary=["category", *FILTER_COLUMNS])
        # A column in pieces is put together at every take, and one of strings, not large_string, ends at 2 GiB.
        large = [field.with_type(pa.large_string()) if field.type == pa.string() else field for field in meta.schema]
        return cls(index, meta.cast(pa.schema(large)).combine_chunks(), threads)

    @property
    def dim(self) -> int:
        return self.index.d

    @property
    def item_ids(self) -> list[str]:
        return self.meta["item_id"].to_pylist()

    def nearest(self, vectors: np.ndarray, k: int, allowed: Allowed | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Scores (n, m) and rows (n, m) of the k best and SPARE more, m at most the shard's size; row -1 where fewer were found. Where all
        of those are as near as the k-th, the smaller item_ids of up to TIED are taken."""
        scores, rows = self._fetched(vectors, k, SPARE, allowed)
        if scores.shape[1] <= k:
            return scores, rows
        cut = (scores[:, -1] == scores[:, k - 1]) & (rows[:, -1] >= 0)
        if cut.any():
            more, found = self._fetched(vectors[cut], k, TIED, allowed)
            scores[cut], rows[cut] = more[:, : scores.shape[1]], by_id(more, found, self.places.__getitem__)[:, : scores.shape[1]]
        return scores, rows

    @cached_property
    def places(self) -> np.ndarray:
        """The place of each row in the order of item_ids, so that ties need no strings; a third of a second for a million."""
        return _places(self.meta["item_id"].combine_chunks())

    def _fetched(self, vectors: np.ndarray, k: int, spare: int, allowed: Allowed | None) -> tuple[np.ndarray, np.ndarray]:
        """The k best and `spare` more, as FAISS has them."""
        faiss.omp_set_num_threads(1 if _forked else self.threads)  # OpenMP keeps this per calling thread, so it is set at every call
        wanted = min(k + spare, self.index.ntotal)
        if not wanted or not len(vectors):
            return np.zeros((len(vectors), 0), np.float32), np.zeros((len(vectors), 0), np.int64)
        if self.exact is not None:
            return self.exact.search(vectors, wanted, None if allowed is None else allowed.bits)
        if allowed is None or allowed.count == self.index.ntotal:
            return self.index.search(vectors, wanted, params=kinds.parameters(self.index, k, wanted - min(k, wanted)))
        if not allowed.count:
            return np.zeros((len(vectors), 0), np.float32), np.zeros((len(vectors), 0), np.int64)
        wanted = min(wanted, allowed.count)
        if allowed.few is not None and allowed.rows is not None:
            scores, found = allowed.few.search(vectors, wanted)
            return scores, allowed.rows[found]
        selector: Any = faiss.IDSelectorBitmap(allowed.bits)  # pyright: ignore[reportCallIssue]
        settings = kinds.parameters(self.index, k, wanted - min(k, wanted), selector, allowed.count / self.index.ntotal)
        try:
            return self.index.search(vectors, wanted, params=settings)
        except RuntimeError:  # a kind of index that takes no selector
            return self._sifted(vectors, wanted, allowed)

    def _sifted(self, vectors: np.ndarray, wanted: int, allowed: Allowed) -> tuple[np.ndarray, np.ndarray]:
        """More and more is fetched, until enough of it may be returned."""
        mask = np.unpackbits(allowed.bits, count=self.index.ntotal, bitorder="little").astype(bool)
        fetched = wanted
        while True:
            fetched = min(4 * fetched, self.index.ntotal)
            scores, rows = self.index.search(vectors, fetched)
            kept = (rows >= 0) & mask[rows]
            if fetched == self.index.ntotal or (kept.sum(axis=1) >= wanted).all():
                break
        order = np.argsort(~kept, axis=1, kind="stable")[:, :wanted]
        scores, rows = np.where(kept, scores, -np.inf), np.where(kept, rows, -1)
        return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)

    def on(self, device: str) -> "Shard":
        """The same on a torch device, "cuda" or "cuda:1"; "cpu" is FAISS as it is. ValueError for an index that keeps no vectors."""
        if device == "cpu":
            return self
        from index import devices  # torch, which searching on the CPU does without

        made = devices.on(self.index, device)
        return replace(self, exact=made) if isinstance(made, devices.Exact) else replace(self, index=made)

    def search(self, vectors: np.ndarray, k: int, *, where: Where | None = None) -> list[list[Hit]]:
        """The k best items (fewer where the shard is smaller) for each of `vectors` (n, dim), sorted by `index.merge.best_first`."""
        return Searcher([self]).search(vectors, k, where=where)


def _side_by_side(found: Sequence[tuple[np.ndarray, np.ndarray]], starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What each shard found, its rows as positions in all of them, best first."""
    rows = np.concatenate([np.where(r >= 0, r + start, -1) for (_, r), start in zip(found, starts[:-1], strict=True)], axis=1)
    scores = np.where(rows >= 0, np.concatenate([s for s, _ in found], axis=1), -np.inf)
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


def _joined(left: Shard, right: Shard) -> Shard:
    kinds.join(left.index, right.index)
    return replace(left, meta=pa.concat_tables([left.meta, right.meta]).unify_dictionaries().combine_chunks())


@dataclass(frozen=True)
class Searcher:
    """All shards of an index in one process.

    hidden: (items,) bool by position, the items that are never returned because they were deleted or replaced; None for none.
    """

    shards: Sequence[Shard]
    hidden: np.ndarray | None = None
    _allowed: dict[str, list[Allowed]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, path: str, *, threads: int = 1, device: str = "cpu") -> "Searcher":
        """The index at `path`: the folder of an index or of a release (or `root/releases`, for the current one); device: as `Shard.on`.

        Shards that were trained together become one index in memory: searching four costs what searching one does
        (docs/decisions/0009). A single shard, and kinds that cannot be joined, stay in their files as far as FAISS maps them.
        """
        folder = _index_of(path)
        count = len(manifest.read(folder, kind="index").files) // 2
        shards = [Shard.open(folder, number, threads=threads, mapped=count == 1) for number in range(count)]
        opened = cls([shard.on(device) for shard in cls.of(shards).shards])
        for shard in opened.shards:
            _ = shard.places  # before the first query
        return opened

    @classmethod
    def of(cls, shards: Sequence[Shard]) -> "Searcher":
        """Over these shards, which are used up where they can be joined."""
        return cls([reduce(_joined, shards)] if len(shards) > 1 and kinds.joinable([shard.index for shard in shards]) else shards)

    @property
    def dim(self) -> int:
        return self.shards[0].dim

    @property
    def item_ids(self) -> list[str]:
        return [item_id for shard in self.shards for item_id in shard.item_ids]

    @property
    def starts(self) -> np.ndarray:
        """(shards + 1,): the position of each shard's first item in `item_ids`, and their number."""
        return np.cumsum([0, *(shard.index.ntotal for shard in self.shards)])

    def allowed(self, where: Where | None) -> list[Allowed] | list[None]:
        """Of each shard the rows that pass the filter and are not hidden. ValueError for a filter that cannot be used."""
        if not where and self.hidden is None:
            return [None] * len(self.shards)
        key = json.dumps(where or {}, sort_keys=True, default=sorted)
        if key not in self._allowed:
            masks = [filters.mask(shard.meta, where or {}) for shard in self.shards]
            if self.hidden is not None:
                masks = [mask & ~self.hidden[start : start + len(mask)] for mask, start in zip(masks, self.starts, strict=False)]
            while len(self._allowed) >= KEPT_FILTERS:
                self._allowed.pop(next(iter(self._allowed)), None)
            self._allowed[key] = [Allowed.of(shard.index, mask) for shard, mask in zip(self.shards, masks, strict=True)]
        return self._allowed[key]

    def find(self, vectors: np.ndarray, k: int, *, where: Where | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Scores (n, k) and positions in `item_ids` (n, k) of the k best for each of `vectors` (n, dim), best first, ties to the smaller
        item_id; k is cut to the number of items. Where fewer are found, the score is -inf and the position -1.

        where: what the items must be like (index.filters). Twin of `index.merge.merge`, for whole batches.
        """
        vectors, starts = _checked(vectors, self.dim, k), self.starts
        found = [shard.nearest(vectors, k, allowed) for shard, allowed in zip(self.shards, self.allowed(where), strict=True)]
        scores, rows = found[0] if len(found) == 1 else _side_by_side(found, starts)
        if (none := rows < 0).any():
            scores = np.where(none, -np.inf, scores)
        k = min(k, int(starts[-1]))
        if short := max(0, k - rows.shape[1]):
            rows = np.pad(rows, ((0, 0), (0, short)), constant_values=-1)
            scores = np.pad(scores, ((0, 0), (0, short)), constant_values=-np.inf)
        tied = ((scores[:, 1:] == scores[:, :-1]) & (rows[:, 1:] >= 0))[:, :k].any(axis=1)
        if tied.any():
            rows[tied] = by_id(scores[tied], rows[tied], self._places_at)
        return scores[:, :k], rows[:, :k]

    def _places_at(self, positions: np.ndarray) -> np.ndarray:
        """Of a single shard as it knows them; of several only among these."""
        if len(self.shards) == 1:
            return self.shards[0].places[positions]
        return _places(self.meta(positions, ["item_id"])["item_id"].combine_chunks())

    def meta(self, positions: np.ndarray, columns: Sequence[str] = META_COLUMNS) -> pa.Table:
        """What is known of items by their positions (m,) in `item_ids`, in that order."""
        if len(self.shards) == 1:
            return self.shards[0].meta.select(list(columns)).take(pa.array(positions))
        shard_of = np.searchsorted(self.starts, positions, side="right") - 1
        by_shard = np.argsort(shard_of, kind="stable")
        parts = [
            shard.meta.select(list(columns)).take(pa.array(positions[by_shard][shard_of[by_shard] == number] - start))
            for number, (shard, start) in enumerate(zip(self.shards, self.starts[:-1], strict=True))
        ]
        return pa.concat_tables(parts, promote_options="permissive").take(pa.array(np.argsort(by_shard)))

    def search(self, vectors: np.ndarray, k: int, *, where: Where | None = None) -> list[list[Hit]]:
        """The k best items for each of `vectors` (n, dim), fewer where there are fewer, in the order of `find`."""
        scores, positions = self.find(vectors, k, where=where)
        there = positions >= 0
        known = self.meta(positions[there])
        columns = [known[name].to_pylist() for name in META_COLUMNS]
        hits = [
            Hit(item_id=i, product_id=p, family_id=f, category=c, title=t, score=s)
            for i, p, f, c, t, s in zip(*columns, scores[there].tolist(), strict=True)
        ]
        ends = np.cumsum(there.sum(axis=1))
        return [hits[end - count : end] for end, count in zip(ends.tolist(), there.sum(axis=1).tolist(), strict=True)]
