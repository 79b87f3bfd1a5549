"""What the sharded index is measured against: bare FAISS, hnswlib, usearch and LanceDB's own indexes, each behind one small interface.

Settings begin so low that a recall of .95 lies between two of them: below the first, its rate would stand for a faster one.
Every contender is built from all vectors, searches a batch on THREADS threads, and says how many bytes a vector it keeps.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from benchmarks.tools.curves import Point, recall_of
from benchmarks.tools.index_data import Data
from idem import manifest
from index import kinds, plan, shard
from index.searcher import Searcher

THREADS = 2
NPROBES, FACTORS, EFS = (1, 2, 4, 8, 16, 32, 64, 128, 256), (2, 4, 10, 20), (10, 16, 32, 64, 128, 256, 512)
M, EF_CONSTRUCTION = 16, 100  # of every graph
PEERS = ("hnswlib", "usearch f32", "usearch f16", "usearch i8", "lancedb IVF_PQ", "lancedb IVF_SQ", "lancedb IVF_HNSW_SQ")
LIBRARIES = ("hnswlib", "usearch", "lancedb")
REFINED = ((4, 2), (8, 2), (32, 2), (8, 10), (32, 10), (128, 10))  # nprobes and refine_factor of LanceDB
REPEATS = 5
Setting = Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """search(queries (q, dim), k, setting) -> rows (q, k), as it numbers them; bytes_each: of what is searched, a vector; queries: the most
    it is asked, where it takes long."""

    name: str
    bytes_each: float
    settings: list[Setting]
    search: Callable[[np.ndarray, int, Setting], np.ndarray]
    queries: int = 1000

    def numbered(self, found: np.ndarray) -> np.ndarray:
        """What was found, in rows of the data: looked up outside the clock, since no user asks for it."""
        return found


@dataclass(frozen=True, kw_only=True)
class Sharded(Contender):
    """Ours, with the searcher itself; number_of: the row at each of its positions, and -1 at -1."""

    searcher: Searcher
    number_of: np.ndarray

    def numbered(self, found: np.ndarray) -> np.ndarray:
        return self.number_of[found]


def _lists(factory: str) -> list[Setting]:
    """The same for ours and bare FAISS. Both probe no more lists than there are."""
    refined, lists = "Refine" in factory or "RFlat" in factory, kinds.lists_of(factory)
    probed = sorted({min(n, lists) for n in NPROBES})
    return [{"nprobe": n, **({"k_factor_rf": f} if refined else {})} for n in probed for f in (FACTORS if refined else FACTORS[:1])]


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
        files += shard.write(made.folder, number, index=index, meta=[pa.table(meta)])
    made.write(figures={}, files=files)
    return made.folder


def ours(folder: str, name: str, factory: str) -> "Sharded":
    searcher = Searcher.open(folder, threads=THREADS)
    number_of = np.array([*(int(item_id) for item_id in searcher.item_ids), -1])
    size = sum(path.stat().st_size for path in Path(folder).glob("shard-*.faiss"))

    def search(queries: np.ndarray, k: int, setting: Setting) -> np.ndarray:
        for each in searcher.shards:
            faiss.ParameterSpace().set_index_parameters(each.index, _written(setting))
        return searcher.find(queries, k)[1]

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
    index.init_index(len(vectors), ef_construction=EF_CONSTRUCTION, M=M)
    index.add_items(vectors, num_threads=THREADS)

    def search(queries: np.ndarray, k: int, setting: Setting) -> np.ndarray:
        index.set_ef(setting["ef"])
        return index.knn_query(queries, k, num_threads=THREADS)[0].astype(np.int64)

    with tempfile.NamedTemporaryFile() as file:
        index.save_index(file.name)
        size = Path(file.name).stat().st_size / len(vectors)
    return Contender(name="hnswlib", bytes_each=size, settings=[{"ef": ef} for ef in EFS], search=search)


def usearch_of(vectors: np.ndarray, kind: str) -> Contender:
    """i8 is handed whole numbers that fill its range: those that usearch makes of unit vectors use a part of it, and find fewer."""
    from usearch.index import Index  # pyright: ignore[reportMissingImports]

    scale = 127 / np.abs(vectors).max()

    def as_kind(some: np.ndarray) -> np.ndarray:
        return np.clip(np.rint(some * scale), -127, 127).astype(np.int8) if kind == "i8" else some

    index: Any = Index(ndim=vectors.shape[1], metric="cos", dtype=kind, connectivity=M, expansion_add=EF_CONSTRUCTION)
    index.add(np.arange(len(vectors)), as_kind(vectors), threads=THREADS)

    def search(queries: np.ndarray, k: int, setting: Setting) -> np.ndarray:
        index.expansion_search = setting["ef"]
        return index.search(as_kind(queries), k, threads=THREADS).keys.astype(np.int64)

    size = index.serialized_length / len(vectors)
    return Contender(name=f"usearch {kind}", bytes_each=size, settings=[{"ef": ef} for ef in EFS], search=search)


def in_rows(asked_by: np.ndarray, found: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """One list of hits, best first, and the query of each -> rows `shape` (q, k), -1 where a query has fewer."""
    order = np.argsort(asked_by, kind="stable")
    query, rows = asked_by[order], np.full(shape, -1)
    rows[query, np.arange(len(query)) - np.searchsorted(query, query)] = found[order]
    return rows


def lancedb_of(vectors: np.ndarray, kind: str, folder: Path) -> list[Contender]:
    """Its index alone, and refined from the stored vectors, which count then. It takes a batch in one call, on all cores of the machine."""
    import lancedb  # pyright: ignore[reportMissingImports]
    from lancedb.index import HnswSq, IvfPq, IvfSq  # pyright: ignore[reportMissingImports]

    n, dim = vectors.shape
    lists = max(16, round(n**0.5))
    configs: Mapping[str, Callable[[], Any]] = {
        "IVF_PQ": lambda: IvfPq(distance_type="cosine", num_partitions=lists, num_sub_vectors=dim // 2),
        "IVF_SQ": lambda: IvfSq(distance_type="cosine", num_partitions=lists),
        "IVF_HNSW_SQ": lambda: HnswSq(distance_type="cosine", m=M, ef_construction=EF_CONSTRUCTION),
    }
    rows = pa.table({"id": np.arange(n), "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), dim)})
    table: Any = lancedb.connect(str(folder)).create_table(kind.lower(), rows, mode="overwrite")
    table.create_index("vector", config=configs[kind]())
    size = sum(path.stat().st_size for path in folder.rglob("_indices/**/*") if path.is_file()) / n

    def search(queries: np.ndarray, k: int, setting: Setting) -> np.ndarray:
        asked = table.search(list(queries)).distance_type("cosine").limit(k).select(["id", "_distance"])
        for name, value in setting.items():
            asked = getattr(asked, name)(value)
        found = asked.to_arrow()
        return in_rows(found["query_index"].to_numpy(), found["id"].to_numpy(), (len(queries), k))

    # A graph must be walked for as many as are refined.
    knob, values, few = ("ef", EFS, ((32, 2), (64, 2), (128, 10), (256, 10))) if "HNSW" in kind else ("nprobes", NPROBES, REFINED)
    plain: list[Setting] = [{knob: value} for value in values]
    refined: list[Setting] = [{knob: value, "refine_factor": factor} for value, factor in few]
    return [
        Contender(name=f"lancedb {kind}", bytes_each=size, settings=plain, search=search),
        Contender(name=f"lancedb {kind} refined", bytes_each=size + 4 * dim, settings=refined, search=search, queries=200),
    ]


def peers(vectors: np.ndarray, folder: Path, wanted: Sequence[str] = PEERS) -> Iterator[Contender]:
    """Those of `wanted`, each made when its turn comes."""
    for name in wanted:
        library, _, kind = name.partition(" ")
        if library == "hnswlib":
            yield hnswlib_of(vectors)
        elif library == "usearch":
            yield usearch_of(vectors, kind)
        else:
            yield from lancedb_of(vectors, kind, folder / kind)


def seconds_of(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def curves(contenders: Sequence[Contender], data: Data) -> dict[str, list[Point]]:
    """Each contender over its settings; those given together take turns."""
    found: dict[str, list[Point]] = {each.name: [] for each in contenders}
    k = data.exact.shape[1]
    asked = data.queries[: min(each.queries for each in contenders)]
    for settings in zip(*(each.settings for each in contenders), strict=True):
        pairs = list(zip(contenders, settings, strict=True))
        recalls = [recall_of(each.numbered(each.search(asked, k, setting)), data.exact[: len(asked)]) for each, setting in pairs]
        times = np.median([[seconds_of(partial(e.search, asked, k, s)) for e, s in pairs] for _ in range(REPEATS)], axis=0)
        for (each, setting), recall, taken in zip(pairs, recalls, times, strict=True):
            found[each.name].append(Point(recall, len(asked) / taken, ",".join(f"{k}={v}" for k, v in setting.items())))
    return found
