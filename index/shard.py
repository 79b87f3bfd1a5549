"""Build one shard: a FAISS index and, in the same row order, what is known of its items without their pictures."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import faiss
import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from idem import schema
from index import kinds
from pipelines.items import open_items

META_COLUMNS = ["item_id", "product_id", "family_id", "category", "title"]
FILTER_COLUMNS = ["lang", "role", "style"]  # besides category and the attributes that the items were ingested with
AT_ONCE = 65_536  # vectors in memory beside the index that they go into
META_AT_ONCE = 16 * AT_ONCE  # items; texts lie packed, so that taking few here and there reads nearly as much as taking all
SAME_LENGTH = 0.01  # from 1; an encoder that computes in half precision stays far below it
RUN, A_LIST = 8, 40
TRAIN_ROWS = 262_144  # 64 points a centroid for 4096 lists; more costs time and gains nothing measurable


def names(number: int) -> tuple[str, str]:
    """File names of shard `number`: the index and the metadata."""
    return f"shard-{number:03d}.faiss", f"shard-{number:03d}.parquet"


def finished(folder: str, number: int) -> bool:
    """Are the files of shard `number` in `folder`? They have their names only when they are whole."""
    return all(Path(folder, name).exists() for name in names(number))


def empty_index(sample: Callable[[], np.ndarray], *, dim: int, total: int, factory: str, parameters: str = "") -> faiss.Index:
    """An inner-product index by a FAISS factory string, trained where it has to be, without vectors.

    sample() gives (m, dim) float32 of the `total` vectors; it is called only to train. `parameters` are search settings kept in the
    file, e.g. "nprobe=16,k_factor_rf=4". ValueError where FAISS refuses.
    """
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            with kinds.clustered_on_gpus(index):
                index.train(np.ascontiguousarray(sample(), np.float32))
        if parameters:
            faiss.ParameterSpace().set_index_parameters(index, parameters)
    except RuntimeError as error:
        asked = f"factory {factory!r}" + (f" with {parameters!r}" if parameters else "")
        raise ValueError(f"FAISS cannot build {asked} for {total} vectors of {dim} dimensions: {error}") from error
    return index


def sampled(total: int, lists: int = 0) -> np.ndarray:
    """Which of `total` rows an index of so many lists is trained on: TRAIN_ROWS at most, or A_LIST a list; ascending, always the same.

    Drawn evenly, RUN neighbours at a time where there are many: reading single rows of a large table costs more than training on them.
    """
    wanted = max(TRAIN_ROWS, A_LIST * lists)
    if total <= wanted:
        return np.arange(total)
    starts = np.sort(np.random.default_rng(0).choice(total // RUN, wanted // RUN, replace=False)) * RUN
    return (starts[:, None] + np.arange(RUN)).ravel()


def make_index(vectors: np.ndarray, *, factory: str, parameters: str = "") -> faiss.Index:
    """`empty_index`, filled with `vectors` (n, dim)."""
    vectors = np.ascontiguousarray(vectors, np.float32)
    n, dim = vectors.shape
    index = empty_index(lambda: vectors[sampled(n)], dim=dim, total=n, factory=factory, parameters=parameters)
    index.add(vectors)
    return index


def prepare(path: str, vectors: str, factory: str, parameters: str) -> str:
    """Write the empty, trained index that all shards of the vectors.lance at `vectors` begin with; its path."""
    dataset = lance.dataset(vectors)
    total, dim = dataset.count_rows(), dataset.schema.field("vector").type.list_size

    def sample() -> np.ndarray:
        return as_matrix(dataset.take(sampled(total, kinds.lists_of(factory)).tolist(), columns=["vector"])["vector"])

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    faiss.omp_set_num_threads(os.cpu_count() or 1)  # the shards wait for it: nothing else runs
    faiss.write_index(empty_index(sample, dim=dim, total=total, factory=factory, parameters=parameters), f"{path}.partial")
    Path(f"{path}.partial").replace(path)
    return path


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Shard `number` of `folder`: `rows` of the vectors.lance at `vectors`, which are the items at `offsets` of that version; `trained` is
    the path of the index that it begins with (`prepare`)."""

    folder: str
    number: int
    vectors: str
    rows: np.ndarray
    items: str
    version: int
    offsets: np.ndarray
    trained: str


def as_matrix(column: pa.ChunkedArray) -> np.ndarray:
    """A column of fixed-size lists as (n, dim) float32."""
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # which copies a single one, too
    return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), array.type.list_size)


def unit(vectors: np.ndarray, item_ids: pa.ChunkedArray) -> np.ndarray:
    """`vectors` (n, dim), that are of length 1: what is NaN, infinite or zero has no cosine, and would be found always or never. ValueError
    names items that are not."""
    lengths = np.linalg.norm(vectors, axis=1)
    wrong = np.flatnonzero(~(np.abs(lengths - 1) < SAME_LENGTH))
    if len(wrong):
        named = ", ".join(f"{item_ids[i].as_py()} ({lengths[i]:.3g})" for i in wrong[:5].tolist())
        raise ValueError(f"vectors must be of length 1; {len(wrong)} of {len(vectors)} are not, such as those of {named}")
    return vectors


def build_from(work: Work) -> list[str]:
    """Read what a shard is made of, AT_ONCE vectors at a time, and build it; the names of its files. Runs in a worker without torch."""
    index, source = faiss.read_index(work.trained), lance.dataset(work.vectors)
    items = open_items(work.items, version=work.version)
    attributes = [name for name in items.dataset.schema.names if name == schema.ATTRIBUTES]

    def added() -> Iterator[pa.Table]:
        for start in range(0, max(1, len(work.rows)), META_AT_ONCE):
            meta = items.take_rows(work.offsets[start : start + META_AT_ONCE], [*META_COLUMNS, *FILTER_COLUMNS, *attributes])
            for some in range(0, meta.num_rows, AT_ONCE):
                rows = work.rows[start + some : start + some + min(AT_ONCE, meta.num_rows - some)]
                taken = source.take(rows.tolist(), columns=["item_id", "vector"])
                same = taken["item_id"].to_pylist() == meta["item_id"].slice(some, AT_ONCE).to_pylist()
                assert same, "vectors and items are in another order"
                index.add(unit(as_matrix(taken["vector"]), taken["item_id"]))
            yield meta

    return write(work.folder, work.number, index=index, meta=added())


def write(folder: str, number: int, *, index: faiss.Index, meta: Iterable[pa.Table]) -> list[str]:
    """Write shard `number` into `folder` and return the names of its files; meta: META_COLUMNS of the index's items and what they are
    filtered by, in its order, in parts, behind the last of which the index is complete.

    A file has its name only when it is whole: a builder that is killed leaves nothing that looks like a shard.
    """
    made = names(number)
    partial = [Path(folder, f".{name}.partial") for name in made]
    Path(folder).mkdir(parents=True, exist_ok=True)
    parts = (part.flatten() for part in meta)  # attributes become columns of their own, `attributes.price`
    first = next(parts)
    with pq.ParquetWriter(partial[1], first.schema) as writer:
        rows = 0
        for part in chain([first], parts):
            writer.write_table(part)
            rows += part.num_rows
    assert index.ntotal == rows
    faiss.write_index(index, str(partial[0]))
    for path, name in zip(partial, made, strict=True):
        path.replace(Path(folder, name))
    return list(made)
