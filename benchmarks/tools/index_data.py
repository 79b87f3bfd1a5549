"""Data for the benchmark of the index: three sets of unit vectors with queries, and the root of a run with as many as wanted."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import faiss
import lance
import numpy as np
import pyarrow as pa

from idem import manifest, schema, storage
from index import vectors
from pipelines.table import ID_KEY
from pipelines.table import ITEMS as DATASET

SETS = ("sift", "synthetic", "emoji")
DIM, BLOCK = 128, 65_536
CENTRES, NOISE, NEAR = 10_000, 0.7, 0.03
MADE = f"{CENTRES:,} Gaussian centres, noise {NOISE}; queries are members with noise {NEAR}"


@dataclass(frozen=True, slots=True)
class Data:
    """vectors (n, dim), queries (q, dim), exact (q, k): rows of the nearest by cosine, best first; made: of what, for the record."""

    name: str
    vectors: np.ndarray
    queries: np.ndarray
    exact: np.ndarray
    made: str

    @classmethod
    def of(cls, name: str, vectors: np.ndarray, queries: np.ndarray, made: str, k: int = 10) -> "Data":
        return cls(name, vectors, queries, exact(queries, vectors, k), made)


def exact(queries: np.ndarray, vectors: np.ndarray, k: int) -> np.ndarray:
    """Rows (q, k) of the nearest by inner product, best first."""
    faiss.omp_set_num_threads(os.cpu_count() or 1)
    return faiss.knn(queries, np.ascontiguousarray(vectors), k, metric=faiss.METRIC_INNER_PRODUCT)[1]


def unit(vectors: np.ndarray) -> np.ndarray:
    vectors = np.ascontiguousarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def clustered(n: int, seed: int = 0) -> Iterator[np.ndarray]:
    """n unit vectors around CENTRES points, BLOCK at a time, each block by its own number."""
    centres = np.random.default_rng(seed).standard_normal((CENTRES, DIM), dtype=np.float32)
    for start in range(0, n, BLOCK):
        rng, count = np.random.default_rng((seed, start)), min(BLOCK, n - start)
        yield unit(centres[rng.integers(CENTRES, size=count)] + NOISE * rng.standard_normal((count, DIM), dtype=np.float32))


def synthetic(n: int, queries: int) -> Data:
    vectors, rng = np.concatenate(list(clustered(n))), np.random.default_rng(1)
    noise = NEAR * rng.standard_normal((queries, DIM), dtype=np.float32)
    return Data.of("synthetic", vectors, unit(vectors[rng.integers(n, size=queries)] + noise), MADE)


def sift(folder: Path) -> Data:
    """The descriptors of photos in `folder`, by cosine."""
    return Data.of("sift", unit(np.load(folder / "base.npy")), unit(np.load(folder / "queries.npy")), "descriptors of photos, by cosine")


def emoji(folder: Path, embedder: str, queries: int = 1000) -> Data:
    """Pictures of the emoji by the embedder in a folder, or by random weights of the compact backbone; `queries` of them ask."""
    import pyarrow.parquet as pq

    from train.backbones.compact import Compact, CompactConfig
    from train.embedder import Embedder

    pictures = pq.read_table(folder / "images.parquet", columns=["image"])["image"].to_pylist()
    encoder = Embedder.load(embedder) if embedder else Embedder(Compact(CompactConfig()))
    made_by = "a trained embedder" if embedder else "an UNTRAINED compact backbone: their neighbours mean little"
    return of_embeddings(encoder.encode(pictures, None), queries, f"pictures by {made_by}")


def of_embeddings(vectors: np.ndarray, queries: int, made: str) -> Data:
    """Every so many of `vectors` (n, dim) ask for the others."""
    if vectors.ndim != 2 or len(vectors) <= queries:
        raise ValueError(f"embeddings must be (n, dim) with n above {queries}, as so many of them ask; found {vectors.shape}")
    asking = np.zeros(len(vectors), bool)
    asking[:: len(vectors) // queries] = True
    return Data.of("emoji", unit(vectors[~asking]), unit(vectors[asking]), made)


def named(name: str, folder: Path, *, rows: int, queries: int, embedder: str = "", embeddings: str = "") -> Data:
    """One of SETS; folder: of the public sets; rows: of the synthetic one; embedder, embeddings: of the emoji."""
    if name == "sift":
        return sift(folder / "sift_vectors")
    if name == "synthetic":
        return synthetic(rows, queries)
    if embeddings:
        return of_embeddings(np.load(embeddings), queries, f"as given in {Path(embeddings).name}")
    return emoji(folder / "emoji", embedder, queries)


def factory_of(n: int, dim: int, store: str) -> str:
    """What we would choose for so many vectors."""
    return f"IVF{1 << round(np.log2(max(16, n**0.5)))},PQ{dim // 2}x4fs,{store}"


def fill(root: str, n: int) -> None:
    """Items without pictures and their vectors, `n` of them, as an ingest and an encoding would have left them; in bounded memory."""
    items = storage.join(storage.Layout(root).items, DATASET)
    known = {ID_KEY: manifest.fingerprint("items", {"rows": n}, {})}
    lance.write_dataset(_items(n).replace_schema_metadata(known) if n <= BLOCK else _batches(n, known), items, mode="overwrite")
    made = manifest.Plan(parent=storage.Layout(root).vectors, kind="vectors", config={"rows": n}, inputs={})
    kind = schema.vectors(DIM)
    reader = pa.RecordBatchReader.from_batches(kind, (_vectors(start, part, kind) for start, part in _numbered(clustered(n))))
    lance.write_dataset(reader, storage.join(made.folder, vectors.NAME))
    root_of = storage.local_path(made.folder)
    made.write(figures={}, files=sorted(str(p.relative_to(root_of)) for p in root_of.rglob("*") if p.is_file()))


def _numbered(parts: Iterator[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    start = 0
    for part in parts:
        yield start, part
        start += len(part)


def _vectors(start: int, part: np.ndarray, kind: pa.Schema) -> pa.RecordBatch:
    ids = names(start, len(part))
    array = pa.FixedSizeListArray.from_arrays(pa.array(part.ravel()), DIM)
    return pa.record_batch([ids, array, pa.array(["e"] * len(part)), ids], schema=kind)


def names(start: int, count: int) -> pa.Array:
    return pa.array([f"item-{i:010d}" for i in range(start, start + count)])


def _batches(n: int, known: dict[str, str]) -> pa.RecordBatchReader:
    kind = schema.ITEMS.with_metadata(known)
    parts = (_items(min(BLOCK, n - start), start).to_batches()[0] for start in range(0, n, BLOCK))
    return pa.RecordBatchReader.from_batches(kind, (pa.record_batch(part.columns, schema=kind) for part in parts))


def _items(count: int, start: int = 0) -> pa.Table:
    ids = names(start, count)
    empty = {field.name: pa.array([""] * count) for field in schema.ITEMS if field.type == pa.string() and field.name != "item_id"}
    rest = {field.name: pa.nulls(count, field.type) for field in schema.ITEMS if field.nullable}
    numbers = {
        field.name: pa.array([0] * count, field.type) for field in schema.ITEMS if not field.nullable and pa.types.is_integer(field.type)
    }
    columns = {"item_id": ids, **empty, **rest, **numbers, "product_id": ids, "family_id": ids, "title": ids, "content_hash": ids}
    return pa.table({field.name: columns[field.name] for field in schema.ITEMS}, schema=schema.ITEMS)
