"""Build one shard: a FAISS index and, in the same row order, what is known of its items without their pictures."""

from dataclasses import dataclass
from pathlib import Path

import faiss
import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.items import open_items

META_COLUMNS = ["item_id", "product_id", "family_id", "category", "title"]
TRAIN_ROWS = 262_144  # 64 points a centroid for 4096 lists; more costs time and gains nothing measurable


def names(number: int) -> tuple[str, str]:
    """File names of shard `number`: the index and the metadata."""
    return f"shard-{number:03d}.faiss", f"shard-{number:03d}.parquet"


def make_index(vectors: np.ndarray, *, factory: str, parameters: str = "") -> faiss.Index:
    """Train (on a sample) and fill an inner-product index of `vectors` (n, dim) float32 by a FAISS factory string.

    `parameters` are search settings kept in the file, e.g. "nprobe=16,k_factor_rf=4". ValueError where FAISS refuses.
    """
    n, dim = vectors.shape
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            rows = np.random.default_rng(0).permutation(n)[:TRAIN_ROWS]
            index.train(np.ascontiguousarray(vectors[rows]))
        index.add(vectors)
        if parameters:
            faiss.ParameterSpace().set_index_parameters(index, parameters)
    except RuntimeError as error:
        asked = f"factory {factory!r}" + (f" with {parameters!r}" if parameters else "")
        raise ValueError(f"FAISS cannot build {asked} for {n} vectors of {dim} dimensions: {error}") from error
    return index


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Shard `number` of `folder`: `rows` of the vectors.lance at `vectors`, which are the items at `offsets` of that version."""

    folder: str
    number: int
    vectors: str
    rows: np.ndarray
    items: str
    version: int
    offsets: np.ndarray
    factory: str
    parameters: str = ""


def as_matrix(column: pa.ChunkedArray) -> np.ndarray:
    """A column of fixed-size lists as (n, dim) float32."""
    array = column.combine_chunks()
    return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), array.type.list_size)


def build_from(work: Work) -> list[str]:
    """Read what a shard is made of and build it; return the names of its files. Runs in a worker that needs no torch."""
    taken = lance.dataset(work.vectors).take(work.rows.tolist(), columns=["item_id", "vector"])
    meta = open_items(work.items, version=work.version).take_rows(work.offsets, META_COLUMNS)
    assert taken["item_id"].to_pylist() == meta["item_id"].to_pylist(), "vectors and items are in another order"
    matrix = as_matrix(taken["vector"])
    return build(work.folder, work.number, vectors=matrix, meta=meta, factory=work.factory, parameters=work.parameters)


def build(folder: str, number: int, *, vectors: np.ndarray, meta: pa.Table, factory: str, parameters: str = "") -> list[str]:
    """Write shard `number` into `folder` and return the names of its files.

    vectors: (n, dim) float32, L2-normalised; meta: META_COLUMNS of the same n items in the same order.
    A file has its name only when it is whole: a builder that is killed leaves nothing that looks like a shard.
    """
    assert len(vectors) == meta.num_rows
    index = make_index(np.ascontiguousarray(vectors, np.float32), factory=factory, parameters=parameters)
    made = names(number)
    partial = [Path(folder, f".{name}.partial") for name in made]
    Path(folder).mkdir(parents=True, exist_ok=True)
    faiss.write_index(index, str(partial[0]))
    pq.write_table(meta.select(META_COLUMNS), partial[1])
    for path, name in zip(partial, made, strict=True):
        path.replace(Path(folder, name))
    return list(made)
