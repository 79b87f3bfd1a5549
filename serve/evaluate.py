"""Evaluate a release on any parquet with the columns of the public sets; the metrics are its JSON line.

The gallery is embedded with the release's embedder, by the fields its index was built from, and searched exactly
(--index: with the release's kind of index). Rows with a query's own image_id never answer it; rows collapse to
product_id before any @K. Levels come from --qrels (3 - grade, unlisted 3), else from product, family and category.
G counts over the gallery, for reranking alone over the candidates; queries with G = 0 are dropped and counted.
Of a reranker's r: its calibration, and precision, recall and F1 at 0.5; its latency also with 8, 50 and 100 candidates.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from idem import job, manifest, metrics
from idem.qrels import read_qrels
from idem.types import Query, Ranking
from index.release import Release
from serve import ranking, reranking, retrieval, tables
from serve.encoding import Encode, Fields
from serve.engine import trained_reranker
from serve.retrieval import Found
from train.embedder import Embedder, HistogramEmbedder
from train.reranker import Reranker

QueryFields = Literal["image", "text", "both"]
Rerank = Literal["none", "pointwise", "listwise"]
Baseline = Literal["release", "untrained", "histogram"]


class Task(BaseModel):
    """What is asked on the command line."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    release: str = Field(description="folder of a release, or root/releases for the current one")
    gallery: str = Field(description="parquet with image_id, product_id, and image or title")
    queries: str = Field(description="parquet with image_id or query_id, and image, title or query")
    qrels: str | None = Field(None, description="parquet with query_id, product_id, grade (3 is best)")
    query_fields: QueryFields = Field("image", description="what is read of a query; of the public image rows, the title is the answer")
    rerank: Rerank = Field("none", description="how the best --depth products are ordered again")
    index: bool = Field(False, description="search the release's kind of index over the gallery instead of exactly")
    embedder: Baseline = Field("release", description="the release's embedder, or a baseline")
    depth: int = Field(20, ge=1, description="products that are reranked")
    gallery_filter: str = Field("", description="SQL on the columns, e.g. \"style = 'noto' and id_split = 'dev_unseen'\"")
    query_filter: str = Field("", description="the same for the queries")
    gallery_per_product: int = Field(0, ge=0, description="at most so many gallery rows a product, drawn by --seed; 0 for all")
    products: str | None = Field(None, description="parquet with product_id and family_id or coarse, category or group")
    seed: int = 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m serve.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, field in Task.model_fields.items():
        flag, said = "--" + name.replace("_", "-"), (field.description or "").replace("%", "%%")
        if field.annotation is bool:
            made.add_argument(flag, action="store_true", help=said)
            continue
        allowed = get_args(field.annotation) if field.annotation in (QueryFields, Rerank, Baseline) else None
        value = int if field.annotation is int else str
        shown = said if field.is_required() or field.default in (None, "") else f"{said} (default: {field.default})".strip()
        made.add_argument(
            flag,
            type=value,
            choices=allowed,
            required=field.is_required(),
            default=None if field.is_required() else field.default,
            help=shown,
        )
    return made


def _check(task: Task) -> None:
    if task.rerank != "none" and task.embedder != "release":
        raise ValueError(f"--embedder {task.embedder} is a baseline of retrieval alone; it takes --rerank none")
    if task.embedder == "histogram" and task.query_fields != "image":
        raise ValueError(f"--embedder histogram reads pictures alone; it takes --query-fields image, found {task.query_fields}")


def _encoder(task: Task, release: Release, index: Mapping[str, Any]) -> tuple[Encode, Fields]:
    """What embeds, and the fields of the gallery that it reads: those of the release's index."""
    if task.embedder == "histogram":
        return HistogramEmbedder().encode, "image"
    embedder = Embedder.load(release.embedder, weights="untrained" if task.embedder == "untrained" else "model")
    return embedder.encode, "both" if index["fields"] == "both" else "image_or_text"


def _read(task: Task) -> tuple[tables.Rows, tables.Rows]:
    gallery = tables.read(task.gallery, condition=task.gallery_filter, products=task.products)
    queries = tables.read(task.queries, condition=task.query_filter, products=task.products, need_product=task.qrels is None)
    if task.gallery_per_product:
        gallery = tables.per_product(gallery, task.gallery_per_product, task.seed)
    for rows, what in ((gallery, "gallery"), (queries, "queries")):
        print(f"serve.evaluate: {len(rows):,} rows in the {what}; families and categories from {rows.attributes}", file=sys.stderr)  # noqa: T201
    return gallery, queries


def ask(task: Task, found: Found, rankings: Mapping[int, np.ndarray], *, depth: int = 0) -> list[reranking.Asked]:
    """The queries of `rankings` (query -> gallery rows), each with its first `depth` candidates, 0 for the task's own."""
    places = np.array(list(rankings), np.int64)
    pictures = found.queries.images(places) if task.query_fields != "text" else [None] * len(places)
    texts = found.queries.texts[places] if task.query_fields != "image" else [""] * len(places)
    candidates = [rankings[q][: depth or task.depth] for q in places.tolist()]
    return [
        reranking.Asked(query=Query(image=picture, text=text), rows=rows, scores=found.cosines(q, rows))
        for q, picture, text, rows in zip(places.tolist(), pictures, texts, candidates, strict=True)
    ]


def rerank(task: Task, found: Found, reranker: reranking.Reranker) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Rankings with the first `depth` of each ordered again, and what there is to say of the reranker itself."""
    mode: reranking.Mode = "pointwise" if task.rerank == "pointwise" else "listwise"
    kept = [q for q, rows in enumerate(found.rankings) if len(rows) and found.counts[q, :2].sum()]
    if not kept:
        return found.rankings, {"reranking_alone": {"queries": 0}}
    asked = ask(task, found, {q: found.rankings[q] for q in kept})
    verdicts, seconds = reranking.rerank_all(reranker, found.gallery, asked, mode)
    rankings = list(found.rankings)
    for q, a, verdict in zip(kept, asked, verdicts, strict=True):
        rankings[q] = np.concatenate([a.rows[list(verdict.order)], found.rankings[q][task.depth :]])
    levels = [found.level(q, a.rows) for q, a in zip(kept, asked, strict=True)]
    within = np.stack([np.bincount(level, minlength=metrics.LEVELS) for level in levels])
    return rankings, {
        "reranking_alone": metrics.summarise([level[list(v.order)] for level, v in zip(levels, verdicts, strict=True)], within),
        "rerank_latency": {**reranking.latency(seconds), "depth": task.depth},
        "rerank_latency_at": _speeds(task, found, reranker, mode, kept),
        "calibration": _calibration(task, found, reranker, mode, dict(zip(kept, verdicts, strict=True))),
        "instances": reranking.instances(verdicts, levels),
        **reranking.flips(reranker, found.gallery, asked, verdicts, mode),
    }


def _speeds(task: Task, found: Found, reranker: reranking.Reranker, mode: reranking.Mode, kept: Sequence[int]) -> dict[str, Any]:
    """Latency at several numbers of candidates, of the queries of `kept` that have the most."""
    longest = sorted(kept, key=lambda q: -len(found.rankings[q]))[: reranking.TIMED + 1]
    asked = ask(task, found, {q: found.rankings[q] for q in longest}, depth=max(reranking.SIZES))
    return reranking.speeds(reranker, found.gallery, asked, mode)


def _calibration(
    task: Task, found: Found, reranker: reranking.Reranker, mode: reranking.Mode, verdicts: Mapping[int, Ranking]
) -> dict[str, Any]:
    """r of the top-1 where some queries have their product removed from the gallery: those are retrieved and reranked once more."""
    absent = [q for q in verdicts if reranking.is_absent(found.queries.ids[q])]
    without = {q: rows for q in absent if len(rows := found.rankings[q][found.level(q, found.rankings[q]) > 0])}
    again = ask(task, found, without)
    verdicts_again, _ = reranking.rerank_all(reranker, found.gallery, again, mode, what="rerank, product removed")
    present = [q for q in verdicts if q not in set(absent)]
    levels = [found.level(q, found.rankings[q][: task.depth]) for q in present]
    levels += [found.level(q, a.rows) for q, a in zip(without, again, strict=True)]
    return {**reranking.calibration([verdicts[q] for q in present] + verdicts_again, levels), "removed": len(without)}


def evaluate(task: Task) -> dict[str, Any]:
    """Run the task and return its figures. ValueError for what cannot be evaluated."""
    release = Release.open(task.release)
    _check(task)
    index = manifest.read(release.index, kind="index").config
    gallery, queries = _read(task)
    encode, fields = _encoder(task, release, index)
    search = retrieval.search_with(index["factory"], index["parameters"]) if task.index else ranking.rank
    found = retrieval.find(
        gallery,
        queries,
        encode=encode,
        gallery_fields=fields,
        query_fields=task.query_fields,
        judged=read_qrels(task.qrels) if task.qrels else None,
        search=search,
    )
    said = {"retrieval_latency": retrieval.time_search(found, encode, task.query_fields, search)}
    levels = [found.level(q, rows) for q, rows in enumerate(found.rankings)]
    if task.rerank != "none" and (path := trained_reranker(release)):
        rankings, judged = rerank(task, found, Reranker.load(path, embedder_path=release.embedder))
        said |= {"retrieval": metrics.summarise(levels, found.counts), **judged}
        levels = [found.level(q, rows) for q, rows in enumerate(rankings)]
    return {
        **metrics.summarise(levels, found.counts),
        "release": release.name,
        "embedder": task.embedder,
        "gallery_fields": fields,
        "query_fields": task.query_fields,
        "rerank": task.rerank,
        "reranker": "trained" if trained_reranker(release) else "identity",  # which keeps the order of retrieval
        "search": index["factory"] if task.index else "exact",
        "gallery_rows": len(found.gallery),
        "gallery_products": len(found.known.names),
        "set_aside": found.set_aside,
        "queries_with_level": retrieval.level_counts(found.counts),
        **said,
        "per_style": retrieval.per_style(found.queries.styles, levels, found.counts),
    }


def main(argv: Sequence[str] | None = None) -> int:
    arguments = vars(parser().parse_args(argv))
    return job.guarded("serve.evaluate", lambda: evaluate(Task(**arguments)))


if __name__ == "__main__":
    sys.exit(main())
