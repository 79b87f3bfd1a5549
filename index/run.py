"""The job that builds an index (Ray): choose the gallery, encode it, build shards in parallel, check them, publish.

Both artifacts it makes, vectors and index, are skipped where they are finished already.
"""

import collections
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.exceptions
from pydantic import Field
from tqdm import tqdm

from idem import cluster, job, manifest, storage
from idem.config import Table
from index import plan, shard, vectors
from index.searcher import Searcher, Shard, exact
from pipelines.items import Items, open_items

RECALL_AT, RECALL_QUERIES = 10, 200
SAME_SCORE = 1e-5  # float32 sums in another order; nearer than this two items are equally good answers


class IndexConfig(Table):
    """gallery: SQL filter on items, empty for the automatic rule; per_product: the most items of one product, 0 for the rule's own;
    fields: what of an item is encoded; factory, parameters: FAISS; encoders: actors, batch_size: items a forward pass;
    min_recall: the least recall@10 against exact search at which the index is published.
    """

    gallery: str = ""
    per_product: int = Field(0, ge=0)
    fields: Literal["both", "image"] = "both"
    factory: str = "Flat"
    parameters: str = ""
    shards: int = Field(2, ge=1)
    batch_size: int = Field(64, ge=1)
    encoders: int = Field(2, ge=1)
    min_recall: float = Field(0.9, ge=0, le=1)


@dataclass(frozen=True, slots=True)
class Chosen:
    """offsets (n,): positions of the gallery in the scan order of the items, ascending; item_ids in that order."""

    offsets: np.ndarray
    item_ids: list[str]
    figures: dict[str, Any]


def choose(items: Items, gallery: str, per_product: int) -> Chosen:
    """Apply the filter or the automatic rule to the items at hand. ValueError for a filter that Lance cannot read."""
    table = items.table(plan.GALLERY_COLUMNS)
    positions = np.arange(table.num_rows)
    if gallery:
        try:
            kept = items.table(["item_id"], gallery)
        except ValueError as error:
            raise ValueError(f"the filter gallery = {gallery!r} cannot be applied to the items: {error}") from error
        positions = np.flatnonzero(pc.is_in(table["item_id"], value_set=kept["item_id"].combine_chunks()).to_numpy())
    chosen = plan.choose_gallery(table.take(pa.array(positions)), filter_was_given=bool(gallery), per_product=per_product)
    offsets = positions[chosen.rows]
    rows = table.take(pa.array(offsets))
    figures = {
        "gallery": len(offsets),
        "products": len(rows["product_id"].unique()),
        "products_of_all_items": len(table["product_id"].unique()),
        "rule": chosen.rule,
    }
    return Chosen(offsets, rows["item_id"].to_pylist(), figures)


def in_parallel(task: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], *, desc: str) -> list[Any]:
    """task(*each) as Ray tasks, results in order. A worker that dies is replaced and its task alone repeated.

    What failed is raised once, all of it together, when every task has ended: ValueError.
    """
    remote = ray.remote(num_cpus=1, max_retries=3)(_captured)
    waiting = [remote.remote(task, each) for each in arguments]
    number = {ref: i for i, ref in enumerate(waiting)}
    results: list[tuple[Any, str]] = [(None, "not run")] * len(waiting)
    with tqdm(total=len(waiting), desc=desc, unit=desc) as bar:
        while waiting:
            (ref,), waiting = ray.wait(waiting, num_returns=1)
            try:
                results[number[ref]] = ray.get(ref)
            except ray.exceptions.RayError as error:
                results[number[ref]] = (None, f"the worker failed: {error}")
            bar.update()
    if failed := [f"{desc} {i}: {error}" for i, (_, error) in enumerate(results) if error]:
        raise ValueError(f"{len(failed)} of {len(arguments)} failed: " + "; ".join(failed))
    return [value for value, _ in results]


def _captured(task: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, str]:
    try:
        return task(*arguments), ""
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        return None, f"{type(error).__name__}: {error}"


def check(folder: str, shards: int, item_ids: list[str], matrix: np.ndarray) -> float:
    """Recall@10 of the shards in `folder`; ValueError unless every item is in exactly one of them."""
    searcher = Searcher([Shard.read(folder, number) for number in range(shards)])
    indexed = collections.Counter(searcher.item_ids)
    if wrong := [f"{item_id} in {indexed[item_id]}" for item_id in {*item_ids, *indexed} if indexed[item_id] != 1]:
        raise ValueError(f"{len(wrong)} items are not in exactly one shard: {', '.join(sorted(wrong)[:5])}")
    return recall(searcher, item_ids, matrix)


def recall(searcher: Searcher, item_ids: list[str], matrix: np.ndarray) -> float:
    """Recall@10 of the sharded search against exact search, on up to 200 gallery vectors, each without itself.

    An item found counts if it is as near as the tenth of the exact answer: duplicates are equally good answers.
    """
    rows = np.linspace(0, len(matrix) - 1, min(RECALL_QUERIES, len(matrix))).astype(int)
    k = min(RECALL_AT, len(matrix) - 1)
    if k == 0:
        return 1.0
    row_of = {item_id: i for i, item_id in enumerate(item_ids)}
    found = searcher.search(matrix[rows], k + 1)
    right = 0
    for row, scores, hits in zip(rows, exact(matrix, matrix[rows], k + 1)[0], found, strict=True):
        others = [row_of[hit.item_id] for hit in hits if hit.item_id != item_ids[row]][:k]
        right += int((matrix[others] @ matrix[row] >= scores[k] - SAME_SCORE).sum())
    return right / (len(rows) * k)


def make_vectors(config: IndexConfig, items: Items, chosen: Chosen) -> manifest.Plan:
    """Encode the gallery, or find it encoded."""
    layout = storage.Layout(config.root)
    embedder = manifest.current(layout.embedder, kind="embedder")
    made = manifest.Plan(
        parent=layout.vectors,
        kind="vectors",
        config={"gallery": config.gallery, "per_product": config.per_product, "fields": config.fields},
        inputs={"items": items.id, "items_version": str(items.version), "embedder": manifest.read(embedder, kind="embedder").id},
    )
    if not made.finished():
        start = time.perf_counter()
        storage.remove_tree(made.folder)  # what an interrupted run left
        cluster.connect()
        source = vectors.Source(
            embedder=embedder, items=layout.items, version=items.version, fields=config.fields, batch_size=config.batch_size
        )
        files = vectors.encode(chosen.offsets, source, folder=made.folder, encoders=config.encoders)
        seconds = time.perf_counter() - start
        made.write(figures={**chosen.figures, "encode_seconds": round(seconds, 2), "encoders": config.encoders}, files=files)
    return made


def make_shards(config: IndexConfig, made: manifest.Plan, uri: str, items: Items, chosen: Chosen) -> dict[str, Any]:
    """Build, check and publish the index; its figures. ValueError, and nothing published, where recall is below `min_recall`."""
    start = time.perf_counter()
    storage.remove_tree(made.folder)
    parts = plan.shards(chosen.item_ids, config.shards)
    cluster.connect()
    (trained,) = in_parallel(
        shard.prepare, [(storage.join(made.folder, ".trained.faiss"), uri, config.factory, config.parameters)], desc="train"
    )
    work = [
        shard.Work(
            folder=made.folder,
            number=number,
            vectors=uri,
            rows=rows,
            items=storage.Layout(config.root).items,
            version=items.version,
            offsets=chosen.offsets[rows],
            trained=trained,
        )
        for number, rows in enumerate(parts)
    ]
    files = in_parallel(shard.build_from, [(each,) for each in work], desc="shard")
    storage.remove(trained)
    item_ids, matrix = vectors.read(uri)
    found = check(made.folder, config.shards, item_ids, matrix)
    if found < config.min_recall:
        storage.remove_tree(made.folder)
        raise ValueError(
            f"recall@{RECALL_AT} of {config.factory} against exact search is {found:.3f}, below min_recall = {config.min_recall}; nothing "
            "was published. Take a factory that keeps more (Flat is exact), or search more of it (parameters, e.g. nprobe=16)"
        )
    figures = {
        **chosen.figures,
        "shards": config.shards,
        "shard_sizes": [len(part) for part in parts],
        "dim": matrix.shape[1],
        f"recall@{RECALL_AT}": round(found, 4),
        "shard_seconds": round(time.perf_counter() - start, 2),
    }
    made.write(figures=figures, files=[name for pair in files for name in pair])
    return figures


def run(config: IndexConfig) -> dict[str, Any]:
    """Make the vectors and the index of a run, or find them made."""
    items = open_items(storage.Layout(config.root).items)
    chosen = choose(items, config.gallery, config.per_product)
    plan.shards(chosen.item_ids, config.shards)  # a wrong number is refused before the work, not after it
    encoded = make_vectors(config, items, chosen)
    made = manifest.Plan(
        parent=storage.Layout(config.root).index,
        kind="index",
        config={
            **encoded.config,
            "factory": config.factory,
            "parameters": config.parameters,
            "shards": config.shards,
            "min_recall": config.min_recall,
        },
        inputs={"vectors": encoded.id, **encoded.inputs},
    )
    if there := made.finished():
        return {"index": made.id, **there.figures, "skipped": True}
    return {"index": made.id, **make_shards(config, made, storage.join(encoded.folder, vectors.NAME), items, chosen)}


if __name__ == "__main__":
    sys.exit(job.main("index.run", "index", IndexConfig, run))
