"""The job that builds an index (Ray): choose the gallery, encode it, build shards in parallel, check them, publish.

Both artifacts it makes, vectors and index, are skipped where they are finished already.
"""

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import lance
import numpy as np
import pyarrow as pa
from pydantic import Field

from idem import cluster, job, manifest, storage
from idem.config import Table
from index import plan, shard, tuning, vectors
from index.checking import Asked, AsServed, Yardstick, in_one_shard, require
from index.searcher import Shard
from index.shard import as_matrix
from index.tasks import in_parallel
from pipelines.items import Items, open_items

RECALL_AT, RECALL_QUERIES = 10, 100  # of each kind: recall to a point or so
TRAINED = ".trained.faiss"
log = logging.getLogger("index.run")


class IndexConfig(Table):
    """gallery: SQL filter on items, empty for the automatic rule; per_product: the most items of one product, 0 for the rule's own;
    fields: what of an item is encoded; factory, parameters: FAISS; encoders: actors, batch_size: items a forward pass;
    min_recall: the least recall@10 against exact search, of any kind of query, at which the index is published; target_recall: search
    settings are chosen to reach it, 0 for those of `parameters`.
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
    target_recall: float = Field(0, ge=0, le=1)


@dataclass(frozen=True, slots=True)
class Chosen:
    """offsets (n,): positions of the gallery in the scan order of the items, ascending; item_ids in that order."""

    offsets: np.ndarray
    item_ids: pa.ChunkedArray
    figures: dict[str, Any]


def choose(items: Items, gallery: str, per_product: int) -> Chosen:
    """Apply the filter or the automatic rule to the items at hand. ValueError for a filter that Lance cannot read."""
    if gallery:
        try:
            allowed, positions = items.table(plan.NAMES, gallery), items.positions(gallery)
        except ValueError as error:
            raise ValueError(f"the filter gallery = {gallery!r} cannot be applied to the items: {error}") from error
    else:
        allowed = items.table(plan.GALLERY_COLUMNS)
        positions = np.arange(allowed.num_rows)
    chosen = plan.choose_gallery(allowed, filter_was_given=bool(gallery), per_product=per_product)
    offsets, names = positions[chosen.rows], plan.names_at(allowed, chosen.rows)
    products = plan.distinct(names["product_id"])
    everything = len(offsets) == items.count()
    figures = {
        "gallery": len(offsets),
        "products": products,
        "products_of_all_items": products if everything else plan.distinct(items.table(["product_id"])["product_id"]),
        "rule": chosen.rule,
    }
    return Chosen(offsets, names["item_id"], figures)


def _some(rows: np.ndarray) -> np.ndarray:
    """RECALL_QUERIES of these at most, drawn evenly, always the same."""
    return np.sort(np.random.default_rng(0).choice(rows, min(RECALL_QUERIES, len(rows)), replace=False))


def asked_of(items: Items, chosen: Chosen, dataset: lance.LanceDataset, embedder: str) -> dict[str, Asked]:
    """What the index is checked with: pictures, and titles, of items outside the gallery, each alone, and vectors of the gallery."""
    own = _some(np.arange(len(chosen.offsets)))
    asked = {"gallery": Asked(as_matrix(dataset.take(own.tolist(), columns=["vector"])["vector"]), own)}
    outside = np.setdiff1d(np.arange(items.count()), chosen.offsets, assume_unique=True)
    known = items.take_rows(_some(outside) if len(outside) else outside, ["image", "title"])
    pictures = [image for image in known["image"].to_pylist() if image]
    titles = [title for title in known["title"].to_pylist() if title.strip()]
    if not known.num_rows:
        return asked
    from train.embedder import Embedder  # torch, which the workers that build shards live without

    encoder = Embedder.load(embedder)
    if pictures:
        asked["image"] = Asked(encoder.encode(pictures, None))
    if titles:
        asked["text"] = Asked(encoder.encode([None] * len(titles), titles))
    return asked


def check(folder: str, order: Sequence[np.ndarray], dataset: lance.LanceDataset, asked: dict[str, Asked], target: float) -> dict[str, Any]:
    """Recall@10 of the shards in `folder`, by kind of query, and the search settings that were chosen where there is a `target`.

    order: for each shard the rows of `dataset` in it. ValueError unless every item is in exactly one of them.
    """
    # Of the items their ids alone, which decide between two that are equally near.
    searcher = AsServed.of([Shard.read(folder, number, columns=["item_id"]) for number in range(len(order))])
    indexed = pa.chunked_array([chunk for each in searcher.shards for chunk in each.meta["item_id"].chunks], pa.large_string())
    in_one_shard(indexed, dataset.to_table(["item_id"])["item_id"])
    yardstick = Yardstick.of(asked, dataset, np.concatenate(order))
    tuned = {}
    if target:
        tuned = {"parameters": tuning.tune(searcher, yardstick.half(0), target)}
        yardstick = yardstick.half(1)
    recalls = {kind: round(value, 4) for kind, value in yardstick.recalls(searcher).items()}
    return {f"recall@{RECALL_AT}": min(recalls.values()), "recall_by": recalls, **tuned}


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
        if _damaged(made.folder) or not storage.exists(storage.join(made.folder, vectors.PARTS)):
            storage.remove_tree(made.folder)  # what an interrupted run left says which parts of it are whole
        cluster.connect()
        source = vectors.Source(
            embedder=embedder, items=layout.items, version=items.version, fields=config.fields, batch_size=config.batch_size
        )
        source = replace(source, earlier=vectors.earlier_vectors(layout.vectors, source, made.inputs["embedder"]))
        encoded = vectors.encode(chosen.offsets, source, folder=made.folder, encoders=config.encoders)
        figures = {
            **chosen.figures,
            "encode_seconds": round(time.perf_counter() - start, 2),
            "encoders": config.encoders,
            "encoded": len(chosen.offsets) - encoded.reused,
            "reused": encoded.reused,
        }
        made.write(figures=figures, files=encoded.files)
    storage.remove_tree(storage.join(made.folder, vectors.PARTS))  # only now: checksums take a while, in which a run can be killed
    return made


def _damaged(folder: str) -> bool:
    """Of an artifact that is not finished: was it, and lost something since? An interrupted run leaves no manifest."""
    return storage.exists(storage.join(folder, manifest.NAME))


def make_shards(config: IndexConfig, made: manifest.Plan, uri: str, items: Items, chosen: Chosen) -> dict[str, Any]:
    """Build, check and publish the index; its figures. ValueError, and nothing published, where a recall is below `min_recall`.

    What an interrupted run has finished is kept: its shards began with the same training, which is there until all are finished.
    """
    start = time.perf_counter()
    dataset = lance.dataset(uri)
    dim = dataset.schema.field("vector").type.list_size
    told = plan.outline(total=len(chosen.offsets), dim=dim, factory=config.factory, shards=config.shards)
    log.info("%s", "\n".join(told.lines()))
    trained = storage.join(made.folder, TRAINED)
    if _damaged(made.folder) or not storage.exists(trained):
        storage.remove_tree(made.folder)
    parts = plan.shards(chosen.item_ids, config.shards)
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
    left = [each for each in work if not shard.finished(made.folder, each.number)]
    cluster.connect()
    if not storage.exists(trained):
        in_parallel(shard.prepare, [(trained, uri, config.factory, config.parameters)], desc="train", on_gpu=True)
    begun = time.perf_counter()
    in_parallel(shard.build_from, [(each,) for each in left], desc="shard")
    built = time.perf_counter()
    embedder = storage.join(storage.Layout(config.root).embedder, made.inputs["embedder"])
    asked = asked_of(items, chosen, dataset, embedder)
    try:
        found = check(made.folder, parts, dataset, asked, config.target_recall)
        require(config.min_recall, found["recall_by"], config.factory)
    except ValueError:
        storage.remove_tree(made.folder)  # the same shards would fail again, and what is asked for next has another folder
        raise
    figures = {
        **chosen.figures,
        "shards": config.shards,
        "shard_sizes": [len(part) for part in parts],
        "dim": dim,
        **found,
        "train_seconds": round(begun - start, 2),
        "shard_seconds": round(built - begun, 2),
        "check_seconds": round(time.perf_counter() - built, 2),
    }
    made.write(figures=figures, files=[name for number in range(config.shards) for name in shard.names(number)])
    storage.remove(trained)
    return figures


def run(config: IndexConfig) -> dict[str, Any]:
    """Make the vectors and the index of a run, or find them made."""
    items = open_items(storage.Layout(config.root).items)
    chosen = choose(items, config.gallery, config.per_product)
    plan.check_count(config.shards, len(chosen.offsets))  # before the work, not after it
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
            **({"target_recall": config.target_recall} if config.target_recall else {}),
        },
        inputs={"vectors": encoded.id, **encoded.inputs},
    )
    if there := made.finished():
        storage.remove(storage.join(made.folder, TRAINED))  # of a run that was killed at its very end
        return {"index": made.id, **there.figures, "skipped": True}
    return {"index": made.id, **make_shards(config, made, storage.join(encoded.folder, vectors.NAME), items, chosen)}


if __name__ == "__main__":
    sys.exit(job.main("index.run", "index", IndexConfig, run))
