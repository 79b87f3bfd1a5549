"""Writes what a judge says of candidates, offline; and what is left of their levels where judges agree.

The judge is anything with `rerank(query, documents).relevance`, here a reranker of this project, best the pointwise one. For each pair
of a list two rows are written, what the metadata say and what the judge does, unless the judge is not sure; a reranker that is
trained with them (`rerank.judgements`) learns from no pair of which judges disagree (METHOD.md section 3).
"""

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field
from tqdm import tqdm

from idem import job, manifest, schema, storage
from idem.config import Table
from idem.types import Document, Query, Ranking
from pipelines.items import Items, open_items
from train.reranker import Reranker

NAME = "judgements.parquet"
METADATA = "metadata"
COLUMNS = ["title", "image"]


class Judge(Protocol):
    def rerank(self, query: Query, documents: Sequence[Document], *, mode: Any = ...) -> Ranking: ...


class LabelConfig(Table):
    """judge: folder of the reranker that judges. sure: r from which it says yes and, from 1 - sure down, no; between them it says
    nothing."""

    judge: str
    sure: Annotated[float, Field(gt=0.5, le=1)] = 0.9


def verdict(relevance: float, level: int, sure: float) -> int | None:
    """The level that a judge gives a pair of `level`, None where it is not sure: it tells the very same from all else, no more."""
    if relevance >= sure:
        return 0
    return max(level, 1) if relevance <= 1 - sure else None


def rows(found: Mapping[str, Any], relevance: Sequence[float], name: str, sure: float) -> list[dict[str, Any]]:
    """JUDGEMENTS of one row of CANDIDATES, given r of its documents."""
    made = []
    for item_id, level, r in zip(found["item_ids"], found["levels"], relevance, strict=True):
        said = verdict(r, level, sure)
        told = [(level, METADATA, 1.0), *([(said, name, max(r, 1 - r))] if said is not None else [])]
        made += [{"query_id": found["query_id"], "item_id": item_id, "level": v, "judge": j, "confidence": c} for v, j, c in told]
    return made


def agreed(table: pa.Table, judgements: pa.Table) -> pa.Table:
    """CANDIDATES with the levels that judges agree on; a document of which they disagree leaves its list, one that nobody judged stays as
    it is. A list left without documents goes."""
    said, made = _said(judgements), []
    for row in table.to_pylist():
        pairs = [set(said.get((row["query_id"], item), [level])) for item, level in zip(row["item_ids"], row["levels"], strict=True)]
        kept = [i for i, levels in enumerate(pairs) if len(levels) == 1]
        lists = {name: [row[name][i] for i in kept] for name in ("item_ids", "scores")}
        made += [{**row, **lists, "levels": [min(pairs[i]) for i in kept]}] if kept else []
    return pa.Table.from_pylist(made, schema=table.schema)


def _said(judgements: pa.Table) -> dict[tuple[str, str], list[int]]:
    """The levels that were given to each pair of query and item."""
    said: dict[tuple[str, str], list[int]] = defaultdict(list)
    for query, item, level in zip(*(judgements[name].to_pylist() for name in ("query_id", "item_id", "level")), strict=True):
        said[query, item].append(level)
    return said


def asked(judge: Judge, items: Items, found: Mapping[str, Any]) -> Sequence[float]:
    """What `judge` says of the documents of one row of CANDIDATES."""
    said = found["text"]
    query = Query(text=said) if said is not None else Query(image=items.take([found["query_id"]], ["image"])["image"][0].as_py())
    known = items.take(found["item_ids"], COLUMNS).to_pylist()
    documents = [
        Document(item_id=i, text=told["title"], image=told["image"], score=score)
        for i, told, score in zip(found["item_ids"], known, found["scores"], strict=True)
    ]
    return judge.rerank(query, documents, mode="pointwise").relevance


def run(config: LabelConfig) -> dict[str, Any]:
    """Judge the current candidates, or find them judged."""
    layout = storage.Layout(config.root)
    items, embedder = open_items(layout.items), manifest.current(layout.embedder, kind="embedder")
    candidates = manifest.current(layout.candidates, kind="candidates")
    name = manifest.read(config.judge, kind="reranker").id
    inputs = {"items": items.id, "candidates": manifest.read(candidates, kind="candidates").id, "judge": name}
    made = manifest.Plan(parent=layout.judgements, kind="judgements", config={"sure": config.sure}, inputs=inputs)
    if before := made.finished():
        return {**before.figures, "file": storage.join(made.folder, NAME), "skipped": True}
    judge = Reranker.load(config.judge, embedder_path=embedder)
    if judge.identity:
        raise ValueError(f"the reranker at {config.judge} found too little to learn from: it judges nothing")
    found: list[dict[str, Any]] = []
    (file,) = manifest.read(candidates, kind="candidates").files
    asking = pq.read_table(storage.local_path(storage.join(candidates, file)), schema=schema.CANDIDATES)
    for row in tqdm(asking.to_pylist(), desc="judge", unit="query"):
        found += rows(row, asked(judge, items, row), name, config.sure)
    table = pa.Table.from_pylist(found, schema=schema.JUDGEMENTS)
    storage.local_path(made.folder).mkdir(parents=True, exist_ok=True)
    pq.write_table(table, storage.local_path(storage.join(made.folder, NAME)))
    figures = counted(table)
    made.write(figures=figures, files=[NAME])
    return {**figures, "file": storage.join(made.folder, NAME)}


def counted(judgements: pa.Table) -> dict[str, int]:
    """Pairs, those that the judge was sure of, and those of them where it says other than the metadata."""
    said = _said(judgements)
    sure = [levels for levels in said.values() if len(levels) > 1]
    return {"pairs": len(said), "sure": len(sure), "disagreed": sum(len(set(levels)) > 1 for levels in sure)}


if __name__ == "__main__":
    sys.exit(job.main("train.rerank_label", "rerank_label", LabelConfig, run))
