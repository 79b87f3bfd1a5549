"""Search an index: one shard, or all of them merged. Neither torch nor Ray is imported here.

score is the cosine of query and item, because both are L2-normalised and FAISS is asked for inner products.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from idem import manifest, storage
from idem.types import Hit
from index import release
from index.merge import best_first, merge
from index.shard import META_COLUMNS, names
from index.shard import make_index as make_index  # for later stages, which import of this package its reader alone
from train.neighbours import nearest

SPARE = 16  # FAISS cuts ties in an order of its own: so many more are fetched and ordered by item_id before the cut


def _checked(vectors: np.ndarray, dim: int, k: int) -> np.ndarray:
    vectors = np.ascontiguousarray(vectors, np.float32)
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise ValueError(f"query vectors must be (n, {dim}), as the index; found {vectors.shape}")
    if not np.isfinite(vectors).all():
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        raise ValueError(f"query vectors must be finite; NaN or infinity in {len(bad)} of {len(vectors)}, the first is number {bad[0]}")
    if k < 1:
        raise ValueError(f"k is how many items are wanted, at least 1; found {k}")
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


@dataclass(frozen=True, slots=True)
class Shard:
    """One FAISS index and META_COLUMNS of its items in the same order."""

    index: faiss.Index
    meta: pa.Table
    threads: int = 1

    @classmethod
    def open(cls, folder: str, number: int, *, threads: int = 1) -> "Shard":
        """Shard `number` of the finished index at `folder`, its two files verified. ValueError names what is missing or damaged."""
        made = manifest.read(folder, kind="index")
        mine = names(number)
        if not set(mine) <= set(made.files):
            raise ValueError(f"the index at {folder} has no shard {number}; it has {len(made.files) // 2}, numbered from 0")
        manifest.verify(folder, made.model_copy(update={"files": {name: made.files[name] for name in mine}}))
        return cls.read(folder, number, threads=threads)

    @classmethod
    def read(cls, folder: str, number: int, *, threads: int = 1) -> "Shard":
        """As `open`, of an index that has no manifest yet."""
        index_path, meta_path = (str(storage.local_path(storage.join(folder, name))) for name in names(number))
        return cls(faiss.read_index(index_path), pq.read_table(meta_path), threads)

    @property
    def dim(self) -> int:
        return self.index.d

    @property
    def item_ids(self) -> list[str]:
        return self.meta["item_id"].to_pylist()

    def search(self, vectors: np.ndarray, k: int) -> list[list[Hit]]:
        """The k best items (fewer where the shard is smaller) for each of `vectors` (n, dim), sorted by `best_first`."""
        vectors = _checked(vectors, self.dim, k)
        faiss.omp_set_num_threads(self.threads)  # OpenMP keeps this per calling thread, so it is set at every call
        scores, rows = self.index.search(vectors, min(k + SPARE, self.index.ntotal))
        return [sorted(self._hits(s[r >= 0], r[r >= 0]), key=best_first)[:k] for s, r in zip(scores, rows, strict=True)]

    def _hits(self, scores: np.ndarray, rows: np.ndarray) -> list[Hit]:
        known = self.meta.take(pa.array(rows))
        columns = (known[name].to_pylist() for name in META_COLUMNS)
        return [
            Hit(item_id=i, product_id=p, family_id=f, category=c, title=t, score=s)
            for i, p, f, c, t, s in zip(*columns, scores.tolist(), strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Searcher:
    """All shards of an index in one process, one after the other."""

    shards: Sequence[Shard]

    @classmethod
    def open(cls, path: str, *, threads: int = 1) -> "Searcher":
        """The index at `path`: the folder of an index or of a release (or `root/releases`, for the current one)."""
        folder = _index_of(path)
        count = len(manifest.read(folder, kind="index").files) // 2
        return cls([Shard.open(folder, number, threads=threads) for number in range(count)])

    @property
    def dim(self) -> int:
        return self.shards[0].dim

    @property
    def item_ids(self) -> list[str]:
        return [item_id for shard in self.shards for item_id in shard.item_ids]

    def search(self, vectors: np.ndarray, k: int) -> list[list[Hit]]:
        """The k best items for each of `vectors` (n, dim), best first, ties to the smaller item_id."""
        found = [shard.search(vectors, k) for shard in self.shards]
        return [merge(per_shard, k) for per_shard in zip(*found, strict=True)]
