"""What a measurement of the running service found, as it is stored: evaluation/<id>/measured.json."""

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from idem import manifest, metrics, storage
from idem.config import Table

KIND = "evaluation"
NAME = "measured.json"
COLUMNS = ("R@1", "R@10", "I-HR@1", "I-HR@5", "nDCG@10", "sibling_R@1", "p50_ms", "p99_ms")
UNSEEN = "id_split = 'dev_unseen'"


class EvaluateConfig(Table):
    """url: the running service; queries: SQL filter on items (those of the index never ask, nor do products it lacks);
    max_queries: whole products are drawn until so many; top_k: products asked for; depth: products reranked (0: as served);
    concurrency: requests in flight; timed: queries asked one at a time before, for the latency.
    """

    url: str = "http://127.0.0.1:8000"
    queries: str = UNSEEN
    max_queries: int = Field(300, ge=1)
    top_k: int = Field(50, ge=10, le=100)
    depth: int = Field(0, ge=0, le=100)
    concurrency: int = Field(2, ge=1)
    timed: int = Field(100, ge=1)
    seed: int = 0


class Row(BaseModel):
    """One way to answer: its metrics, R@K for K = 1..top_k, and latency where it was asked over HTTP."""

    model_config = ConfigDict(frozen=True)
    name: str
    metrics: dict[str, float | int | None]
    recall: list[float]

    def cells(self) -> list[float | int | None]:
        return [self.metrics.get(column) for column in COLUMNS]


class Answered(BaseModel):
    """One query: gallery items in the order of retrieval and after reranking, best first, with their levels."""

    model_config = ConfigDict(frozen=True)
    item_id: str
    product_id: str
    title: str
    retrieved: list[str]
    retrieved_levels: list[int]
    reranked: list[str]
    reranked_levels: list[int]
    relevance: list[float | None]  # of `reranked`


class Measured(BaseModel):
    """rows: from the weakest to the whole system; answers: a query each; degraded: answers that lacked a part of the service."""

    model_config = ConfigDict(frozen=True)
    release: str
    queries: str
    gallery_items: int
    gallery_products: int
    query_products: int
    timed: int
    degraded: int
    rows: list[Row]
    answers: list[Answered]


def row(name: str, levels: Sequence[np.ndarray], counts: np.ndarray, top_k: int, latency: dict[str, float] | None = None) -> Row:
    """Summarise rankings given as levels, best first. counts (q, 4) are those of the gallery."""
    kept = [found for found, count in zip(levels, counts, strict=True) if count[0] + count[1] > 0]
    recall = [round(float(np.mean([metrics.recall_at(found, k) for found in kept])), 4) for k in range(1, top_k + 1)] if kept else []
    return Row(name=name, metrics={**metrics.summarise(levels, counts), **(latency or {})}, recall=recall)


def load(root: str) -> Measured:
    """The latest measurement of the run; ValueError where there is none."""
    folder = manifest.current(storage.join(root, KIND), kind=KIND)
    manifest.read(folder, kind=KIND)
    return Measured.model_validate_json(storage.read_bytes(storage.join(folder, NAME)))


def _cell(column: str, value: float | int | None) -> str:
    return "-" if value is None else f"{value:.0f}" if column.endswith("_ms") else f"{value:.3f}"


def caution(result: Measured) -> str:
    """What has to be said beside the table, "" where every answer was whole."""
    if not result.degraded:
        return ""
    return (
        f"{result.degraded} of {2 * len(result.answers)} answers lacked a part of the service, however often they were asked for: "
        "these figures are not those of the release; measure again"
    )


def told(result: Measured) -> str:
    """The table of the rows, and below it what has to be said."""
    return "\n".join(filter(None, (table(result.rows), caution(result))))


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    lines = [["", *COLUMNS]] + [[r.name, *(_cell(c, v) for c, v in zip(COLUMNS, r.cells(), strict=True))] for r in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]) for line in lines
    )
