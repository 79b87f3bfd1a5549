"""Measure the running service over HTTP with photos of products that were never trained on, beside two baselines.

Every query is asked twice, without and with reranking, by its picture alone. The baselines (colour histogram, untrained
embedder) search the same gallery exactly, in this process. Latency is that of one request at a time, after a warm-up.
An answer that lacks a part of the service is asked for again; a measurement that still holds one is told, and made anew
by the next run.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
from tqdm import tqdm

from idem import folds, job, manifest, metrics, storage
from index.release import Release
from index.searcher import Searcher
from pipelines.items import Items, open_items
from serve import measured, ranking
from serve.client import TIMEOUT_S, interview, require_release
from serve.encoding import Encode, Fields, encode_batch
from serve.measured import Answered, EvaluateConfig, Measured, Row
from train.embedder import Embedder, HistogramEmbedder

COLUMNS = ["item_id", "product_id", "family_id", "category", "title"]
BATCH = 256
SPLIT_RULE = "rows of split train"  # as index.plan.choose_gallery says it in the index's manifest


@dataclass(frozen=True, kw_only=True)
class Exam:
    """What is asked and what can be found: queries (COLUMNS), the gallery, levels (p,) and counts (q, 4) of each query."""

    queries: pa.Table
    known: ranking.Gallery
    levels: list[np.ndarray]
    counts: np.ndarray

    def level(self, query: int, rows: np.ndarray) -> np.ndarray:
        return self.levels[query][self.known.codes[rows]]


def asking(config: EvaluateConfig, rule: str) -> EvaluateConfig:
    """Who asks. Photos of one product share the scene (METHOD.md section 7): where an index took photos of split train by its own
    rule, those that it left out do not ask unless `queries` was chosen."""
    if rule != SPLIT_RULE or config.queries != measured.UNSEEN:
        return config
    return config.model_copy(update={"queries": f"{measured.UNSEEN} AND split != 'train'"})


def draw(queries: pa.Table, limit: int, seed: int) -> pa.Table:
    """Whole products, in an order drawn by `seed`, until there are `limit` queries; of the first product never more than `limit`."""
    products = np.array(queries["product_id"].to_pylist(), object)
    order = sorted(set(products), key=lambda product: (folds.uniform(product, f"measure/{seed}"), product))
    kept: list[int] = []
    for product in order:
        rows = np.flatnonzero(products == product).tolist()
        if kept and len(kept) + len(rows) > limit:
            break
        kept += rows[:limit]
    return queries.take(pa.array(kept, pa.int64()))


def prepare(items: Items, meta: pa.Table, config: EvaluateConfig) -> Exam:
    """Choose the queries among the items; `meta` is what the index knows of its gallery. ValueError where no item can ask."""
    known = ranking.Gallery.of(*(meta[name].to_pylist() for name in COLUMNS[:4]))
    try:
        candidates = items.table(COLUMNS, f"({config.queries}) AND width > 0" if config.queries else "width > 0")
    except (ValueError, OSError) as error:
        raise ValueError(f"the filter evaluate.queries = {config.queries!r} cannot be applied to the items: {error}") from error
    gallery, products = set(known.ids), set(known.names)
    pairs = zip(candidates["item_id"].to_pylist(), candidates["product_id"].to_pylist(), strict=True)
    queries = candidates.filter(pa.array([item not in gallery and product in products for item, product in pairs], pa.bool_()))
    if not len(queries):
        raise ValueError(
            f"no item can ask: {len(candidates):,} items with a picture pass evaluate.queries = {config.queries!r}, none of them is "
            f"outside the index with its product inside; the index holds {len(gallery):,} items of {len(products):,} products"
        )
    queries = draw(queries, config.max_queries, config.seed)
    triples = list(zip(*(queries[name].to_pylist() for name in ("product_id", "family_id", "category")), strict=True))
    levels = [known.levels(triple) for triple in triples]
    counts = np.stack([known.counts(level, np.zeros(0, np.int64)) for level in levels])
    return Exam(queries=queries, known=known, levels=levels, counts=counts)


def rows_of(exam: Exam, answers: Sequence[dict[str, Any]]) -> list[np.ndarray]:
    """Gallery rows of the answers, one a product, best first. ValueError for an item that the index does not hold."""
    row_of = {item_id: row for row, item_id in enumerate(exam.known.ids)}
    found = []
    for answer in answers:
        ids = [result["item_id"] for result in answer["results"]]
        if unknown := [item_id for item_id in ids if item_id not in row_of]:
            raise ValueError(f"the service answered with {unknown[0]!r}, which the index of release {answer['release']} does not hold")
        rows = np.array([row_of[item_id] for item_id in ids], np.int64)
        found.append(rows[metrics.collapse(exam.known.codes[rows].tolist())])
    return found


def embed_items(encode: Encode, items: Items, item_ids: Sequence[str], titles: Sequence[str], fields: Fields, what: str) -> np.ndarray:
    """Vectors (n, d) of items, BATCH pictures in memory at a time; an item that cannot be embedded is the zero vector, near nothing."""
    vectors: np.ndarray | None = None
    for at in tqdm(range(0, len(item_ids), BATCH), desc=what, unit="batch", leave=False):
        made, reasons = encode_batch(encode, items.images(item_ids[at : at + BATCH]), titles[at : at + BATCH], fields)
        good = at + np.flatnonzero([not reason for reason in reasons])
        if len(good):
            vectors = np.zeros((len(item_ids), made.shape[1]), np.float32) if vectors is None else vectors
            vectors[good] = made
    if vectors is None:
        raise ValueError(f"{what}: none of {len(item_ids)} items can be embedded by {fields}")
    return vectors


def baseline(name: str, encode: Encode, fields: Fields, items: Items, exam: Exam, titles: Sequence[str], top_k: int) -> Row:
    """Exact search of the whole gallery by another embedding."""
    gallery = embed_items(encode, items, list(exam.known.ids), titles, fields, f"{name}: gallery")
    query_ids = exam.queries["item_id"].to_pylist()
    asked = embed_items(encode, items, query_ids, [""] * len(query_ids), "image", f"{name}: photos")
    rankings = ranking.rank(asked, gallery, exam.known.codes, [np.zeros(0, np.int64)] * len(asked), top_k)
    return measured.row(name, [exam.level(q, rows) for q, rows in enumerate(rankings)], exam.counts, top_k)


def baselines(release: Release, items: Items, exam: Exam, titles: Sequence[str], top_k: int) -> list[Row]:
    fields: Fields = "both" if manifest.read(release.index, kind="index").config["fields"] == "both" else "image_or_text"
    untrained = Embedder.load(release.embedder, weights="untrained")
    return [
        baseline("colour histogram", HistogramEmbedder().encode, "image", items, exam, titles, top_k),
        baseline("untrained embedder", untrained.encode, fields, items, exam, titles, top_k),
    ]


def question(client: httpx.Client, pictures: Sequence[bytes], exam: Exam, config: EvaluateConfig) -> tuple[list[Row], list[Answered], int]:
    """Ask everything both ways: a row for each way, the answers, and how many of them lacked a part of the service."""
    plain, plain_ms = interview(client, pictures, config, rerank=False, what="ask, retrieval alone")
    full, full_ms = interview(client, pictures, config, rerank=True, what="ask, with reranking")
    before, after = rows_of(exam, plain), rows_of(exam, full)
    levels = [[exam.level(q, rows) for q, rows in enumerate(found)] for found in (before, after)]
    rows = [
        measured.row("trained retrieval", levels[0], exam.counts, config.top_k, plain_ms),
        measured.row("+ reranking", levels[1], exam.counts, config.top_k, full_ms),
    ]
    answers = [
        Answered(
            item_id=query["item_id"],
            product_id=query["product_id"],
            title=query["title"],
            retrieved=exam.known.ids[before[q]].tolist(),
            retrieved_levels=levels[0][q].tolist(),
            reranked=exam.known.ids[after[q]].tolist(),
            reranked_levels=levels[1][q].tolist(),
            relevance=[result["relevance"] for result in full[q]["results"]][: len(after[q])],
        )
        for q, query in enumerate(exam.queries.to_pylist())
    ]
    return rows, answers, sum(bool(answer["degraded"]) for answer in plain + full)


def plan_of(config: EvaluateConfig, release: Release, service: str) -> manifest.Plan:
    """What the measurement depends on; `service` is the hash of the settings that the running service answers with."""
    settings = {name: value for name, value in config.settings().items() if name not in ("url", "concurrency")}
    inputs = {"release": release.id, "service": service}
    return manifest.Plan(parent=storage.join(config.root, measured.KIND), kind=measured.KIND, config=settings, inputs=inputs)


def whole(plan: manifest.Plan) -> manifest.Manifest | None:
    """The measurement if it was made and every answer in it was whole."""
    made = plan.finished()
    return made if made and not made.figures["degraded"] else None


def run(config: EvaluateConfig) -> dict[str, Any]:
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line a request otherwise
    release = Release.open(storage.Layout(config.root).releases)
    config = asking(config, manifest.read(release.index, kind="index").figures.get("rule", ""))
    with httpx.Client(base_url=config.url, timeout=TIMEOUT_S) as client:
        plan = plan_of(config, release, require_release(client, release.name, config.url))
        if made := whole(plan):
            print(measured.told(measured.load(config.root)), file=sys.stderr)  # noqa: T201
            return {**made.figures, "evaluation": plan.folder, "skipped": True}
        result = measure(config, release, client)
    storage.write_bytes(storage.join(plan.folder, measured.NAME), result.model_dump_json(indent=1).encode())
    figures = {"queries": len(result.answers), "degraded": result.degraded, **{row.name: row.metrics for row in result.rows}}
    plan.write(figures=figures, files=[measured.NAME])
    print(measured.told(result), file=sys.stderr)  # noqa: T201
    return {**figures, "evaluation": plan.folder}


def measure(config: EvaluateConfig, release: Release, client: httpx.Client) -> Measured:
    """Ask the service behind `client` and search by the baselines."""
    items = open_items(release.items, release.items_version)
    meta = pa.concat_tables([shard.meta for shard in Searcher.open(release.index).shards])
    exam = prepare(items, meta, config)
    pictures = [picture or b"" for picture in items.images(exam.queries["item_id"].to_pylist())]
    rows, answers, degraded = question(client, pictures, exam, config)
    rows = baselines(release, items, exam, meta["title"].to_pylist(), config.top_k) + rows
    return Measured(
        release=release.name,
        queries=config.queries,
        gallery_items=len(exam.known),
        gallery_products=len(exam.known.names),
        query_products=len(set(exam.queries["product_id"].to_pylist())),
        timed=min(config.timed, len(pictures)),
        degraded=degraded,
        rows=rows,
        answers=answers,
    )


if __name__ == "__main__":
    sys.exit(job.main("serve.measure", "evaluate", EvaluateConfig, run))
