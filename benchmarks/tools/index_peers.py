"""What the sharded index is measured against: bare FAISS, hnswlib, usearch and LanceDB's own indexes, each behind one small interface.

Every contender is built from all vectors, searches a batch on THREADS threads, and says how many bytes a vector it keeps.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from idem import manifest
from index import plan, shard
from index.searcher import Searcher

THREADS = 2
NPROBES, FACTORS, EFS = (4, 8, 16, 32, 64, 128, 256), (2, 4, 10, 20), (16, 32, 64, 128, 256, 512)
Setting = Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """search(queries (q, dim), k, setting) -> rows (q, k); bytes_each: of what is searched, a vector; queries: the most it is asked,
    where it is asked one by one and takes long."""

    name: str
    bytes_each: float
    settings: list[Setting]
    search: Callable[[np.ndarray, int, Setting], np.ndarray]
    queries: int = 1000


@dataclass(frozen=True, kw_only=True)
class Sharded(Contender):
    """Ours, with the searcher itself; number_of: the row at each of its positions, and -1 at -1."""

    searcher: Searcher
    number_of: np.ndarray


def _lists(factory: str) -> list[Setting]:
    refined = "Refine" in factory or "RFlat" in factory
    return [{"nprobe": n, **({"k_factor_rf": f} if refined else {})} for n in NPROBES for f in (FACTORS if refined else FACTORS[:1])]


def _written(setting: Setting) -> str:
    return ",".join(f"{name}={value}" for name, value in setting.items())


def build_sharded(folder: Path, vectors: np.ndarray, factory: str, shards: int, categories: np.ndarray | None = None) -> str:
    """An index of `shards` shards below `folder`, as the job of index.run makes it: trained once, filled apart. Item i is called by i."""
    sample = vectors[shard.sampled(len(vectors))]
    empty = shard.empty_index(lambda: sample, dim=vectors.shape[1], total=len(vectors), factory=factory)
    made = manifest.Plan(parent=str(folder), kind="index", config={"factory": factory, "shards": shards}, inputs={})
    ids = np.array([f"{i:09d}" for i in range(len(vectors))])
    files: list[str] = []
    for number, rows in enumerate(plan.shards(ids.tolist(), shards)):
        index = faiss.clone_index(empty)
        index.add(vectors[rows])
        meta = {name: ids[rows] for name in shard.META_COLUMNS}
        if categories is not None:
            meta["category"] = categories[rows]
        files += shard.write(made.folder, number, index=index, meta=pa.table(meta))
    made.write(figures={}, files=files)
    return made.folder


def ours(folder: str, name: str, factory: str) -> "Sharded":
    searcher = Searcher.open(folder, threads=THREADS)
    number_of = np.array([*(int(item_id) for item_id in searcher.item_ids), -1])
    size = sum(path.stat().st_size for path in Path(folder).glob("shard-*.faiss"))

    def search(queries: np.ndarray, k: int, setting: Setting) -> np.ndarray:
        for each in searcher.shards:
            faiss.ParameterSpace().set_index_parameters(each.index, _written(setting))
        return number_of[searcher.find(queries, k)[1]]

    each = size / (len(number_of) - 1)
    return Sharded(name=name, bytes_each=each, settings=_lists(factory), search=search, searcher=searcher, number_of=number_of)


def bare(vectors: np.ndarray, name: str, factory: str) -> Contender:
    faiss.omp_set_num_threads(THREADS)
    index = shard.make_index(vectors, factory=factory)

    def search(queries: np.ndarray, k: int, setting: Setting) -> np.ndarray:
        faiss.omp_set_num_threads(THREADS)
        faiss.ParameterSpace().set_index_parameters(index, _written(setting))
        return index.search(queries, k)[1]

    size = len(faiss.serialize_index(index)) / len(vectors)
    return Contender(name=name, bytes_each=size, settings=_lists(factory), search=search)


def hnswlib_of(vectors: np.ndarray) -> Contender:
    import hnswlib  # pyright: ignore[reportMissingImports]

    index = hnswlib.Index("ip", vectors.shape[1])
    index.init_index(len(vectors), ef_construction=100, M=16)
    index.add_items(vectors, num_threads=THREADS)

    def search(queries: np.ndarray, k: int, setting: Setting) -> np.ndarray:
        index.set_ef(setting["ef"])
        return index.knn_query(queries, k, num_threads=THREADS)[0].astype(np.int64)

    with tempfile.NamedTemporaryFile() as file:
        index.save_index(file.name)
        size = Path(file.name).stat().st_size / len(vectors)
    return Contender(name="hnswlib", bytes_each=size, settings=[{"ef": ef} for ef in EFS], search=search)


def usearch_of(vectors: np.ndarray, kind: str) -> Contender:
    from usearch.index import Index  # pyright: ignore[reportMissingImports]

    index: Any = Index(ndim=vectors.shape[1], metric="cos", dtype=kind, connectivity=16, expansion_add=100)
    index.add(np.arange(len(vectors)), vectors, threads=THREADS)

    def search(queries: np.ndarray, k: int, setting: Setting) -> np.ndarray:
        index.expansion_search = setting["ef"]
        return index.search(queries, k, threads=THREADS).keys.astype(np.int64)

    size = index.serialized_length / len(vectors)
    return Contender(name=f"usearch {kind}", bytes_each=size, settings=[{"ef": ef} for ef in EFS], search=search)


@contextmanager
def lancedb_of(vectors: np.ndarray, kind: Any, folder: Path) -> Iterator[list[Contender]]:
    """Its index alone, and refined from the stored vectors, which count then. One query at a time on each thread, as it has no batches."""
    import lancedb  # pyright: ignore[reportMissingImports]

    array = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    rows = pa.table({"id": np.arange(len(vectors)), "vector": array})
    table = lancedb.connect(str(folder)).create_table(kind.lower(), rows, mode="overwrite")
    settings: dict[str, Any] = {"num_partitions": max(16, round(len(vectors) ** 0.5))}
    if kind == "IVF_PQ":
        settings["num_sub_vectors"] = vectors.shape[1] // 4
    table.create_index(metric="cosine", vector_column_name="vector", index_type=kind, **settings)
    size = sum(path.stat().st_size for path in folder.rglob("_indices/**/*") if path.is_file()) / len(vectors)
    pool = ThreadPoolExecutor(THREADS)

    def search(queries: np.ndarray, k: int, setting: Setting) -> np.ndarray:
        def one(query: np.ndarray) -> list[int]:
            asked = table.search(query).metric("cosine").nprobes(setting["nprobes"]).limit(k).select(["id", "_distance"])
            asked = asked.refine_factor(setting["refine"]) if "refine" in setting else asked
            return asked.to_arrow()["id"].to_pylist()

        found = np.full((len(queries), k), -1)
        for i, row in enumerate(pool.map(one, queries)):
            found[i, : len(row)] = row
        return found

    plain: list[Setting] = [{"nprobes": n} for n in (16, 64)]
    refined: list[Setting] = [{"nprobes": n, "refine": 10} for n in (8, 16, 64)]
    stored = 4 * vectors.shape[1]
    try:
        yield [
            Contender(name=f"lancedb {kind}", bytes_each=size, settings=plain, search=search, queries=50),
            Contender(name=f"lancedb {kind} refined", bytes_each=size + stored, settings=refined, search=search, queries=50),
        ]
    finally:
        pool.shutdown()
