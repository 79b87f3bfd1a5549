"""Reranks what exact retrieval found in a gallery, and judges the reranker's r, its order and its speed."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from tqdm import tqdm

from idem import folds, metrics
from idem.types import Document, Query, Ranking
from serve.tables import Rows

Mode = Literal["pointwise", "listwise"]
CHUNK = 256  # queries whose candidates' pictures are in memory together
ABSENT = 0.3  # share of the queries whose product is taken out of the gallery, to judge r (METHOD.md section 4)
THRESHOLD = 0.5  # of r, from which on a candidate is called the very same product
SIZES = (8, 50, 100)  # candidates of a query, at which the reranker is timed
TIMED, TIMED_S = 10, 20.0  # queries timed at each size, and the seconds after which no other is begun
FLIPS = 100  # queries asked again with their candidates shuffled


class Reranker(Protocol):
    """What train.reranker.Reranker and its trivial twin offer."""

    def rerank(self, query: Query, documents: Sequence[Document], *, mode: Mode) -> Ranking: ...


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One query with its candidates (gallery rows, best first) and their cosines."""

    query: Query
    rows: np.ndarray
    scores: np.ndarray


def documents(gallery: Rows, asked: Sequence[Asked]) -> Iterator[list[Document]]:
    """The candidates of each query as documents; pictures are read for CHUNK queries at a time, each picture once."""
    for at in range(0, len(asked), CHUNK):
        part = asked[at : at + CHUNK]
        rows = np.unique(np.concatenate([a.rows for a in part]))
        pictures = dict(zip(rows.tolist(), gallery.images(rows), strict=True))
        for a in part:
            yield [
                Document(item_id=str(gallery.ids[row]), text=str(gallery.texts[row]), image=pictures[row], score=float(score))
                for row, score in zip(a.rows.tolist(), a.scores, strict=True)
            ]


def rerank_all(
    reranker: Reranker, gallery: Rows, asked: Sequence[Asked], mode: Mode, *, shuffle: int | None = None, what: str = "rerank"
) -> tuple[list[Ranking], np.ndarray]:
    """A ranking per query, in terms of its candidates' order in `asked`, and the seconds each took (q,).

    With `shuffle` the candidates are shown in an order drawn by that seed; the ranking is told in the original order.
    """
    rankings, seconds = [], []
    with tqdm(total=len(asked), desc=what, unit="query", mininterval=0.5) as bar:
        for number, (a, shown) in enumerate(zip(asked, documents(gallery, asked), strict=True)):
            order = np.arange(len(shown)) if shuffle is None else np.random.default_rng([shuffle, number]).permutation(len(shown))
            start = time.perf_counter()
            ranking = reranker.rerank(a.query, [shown[i] for i in order], mode=mode)
            seconds.append(time.perf_counter() - start)
            rankings.append(_restored(ranking, order))
            bar.update()
    return rankings, np.array(seconds)


def _restored(ranking: Ranking, order: np.ndarray) -> Ranking:
    back = np.argsort(order)
    return Ranking(
        order=tuple(int(order[i]) for i in ranking.order),
        relevance=tuple(ranking.relevance[i] for i in back),
        null=tuple(ranking.null[i] for i in back),
    )


def is_absent(query_id: str) -> bool:
    """Is the product of this query taken out of the gallery when r is judged? Drawn by a hash: the same queries in every run."""
    return folds.uniform(query_id, "absent") < ABSENT


def calibration(rankings: Sequence[Ranking], levels: Sequence[np.ndarray]) -> dict[str, float | int | None]:
    """How far r of the top-1 answer can be trusted; `levels` are those of the candidates in the order of the rankings' documents."""
    top = [(ranking.relevance[ranking.order[0]], found[ranking.order[0]] == 0) for ranking, found in zip(rankings, levels, strict=True)]
    if not top:
        return {"queries": 0, "ECE": None, "brier_skill": None, "base_rate": None}
    r, happened = (np.array(column, float) for column in zip(*top, strict=True))
    return {
        "queries": len(top),
        "ECE": round(metrics.expected_calibration_error(r, happened), 4),
        "brier_skill": round(metrics.brier_skill(r, happened), 4),
        "base_rate": round(float(happened.mean()), 4),
    }


def instances(rankings: Sequence[Ranking], levels: Sequence[np.ndarray]) -> dict[str, float | int | None]:
    """Precision, recall and F1 of "r is at least THRESHOLD" as a verdict on the very same product, over all candidates together."""
    r = np.concatenate([np.zeros(0), *(ranking.relevance for ranking in rankings)])
    same = np.concatenate([np.zeros(0, bool), *(found == 0 for found in levels)])
    said = r >= THRESHOLD
    right, claimed, there = (int(mask.sum()) for mask in (said & same, said, same))
    return {
        "threshold": THRESHOLD,
        "precision": round(right / claimed, 4) if claimed else None,
        "recall": round(right / there, 4) if there else None,
        "F1": round(2 * right / (claimed + there), 4) if claimed + there else None,
        "candidates": len(r),
        "same": there,
    }


def speeds(reranker: Reranker, gallery: Rows, asked: Sequence[Asked], mode: Mode) -> dict[str, dict[str, float | int]]:
    """Latency at each of SIZES that the candidates of `asked` reach; one query before the others as warm-up."""
    return {str(size): _speed(reranker, gallery, kept, mode) for size in SIZES if (kept := _cut(asked, size))}


def _cut(asked: Sequence[Asked], size: int) -> list[Asked]:
    long = [a for a in asked if len(a.rows) >= size][: TIMED + 1]
    return [Asked(query=a.query, rows=a.rows[:size], scores=a.scores[:size]) for a in long]


def _speed(reranker: Reranker, gallery: Rows, asked: Sequence[Asked], mode: Mode) -> dict[str, float | int]:
    seconds: list[float] = []
    until = time.perf_counter() + TIMED_S
    for a, shown in zip(asked, documents(gallery, asked), strict=True):
        start = time.perf_counter()
        reranker.rerank(a.query, shown, mode=mode)
        seconds.append(time.perf_counter() - start)
        if time.perf_counter() > until:
            break
    return latency(seconds[1:] or seconds)


def latency(seconds: Sequence[float] | np.ndarray) -> dict[str, float | int]:
    """p50 and p99 in milliseconds, and of how many queries."""
    p50, p99 = np.percentile(np.asarray(seconds) * 1000, [50, 99])
    return {"p50_ms": round(float(p50), 2), "p99_ms": round(float(p99), 2), "queries": len(seconds)}


def flips(
    reranker: Reranker, gallery: Rows, asked: Sequence[Asked], rankings: Sequence[Ranking], mode: Mode
) -> dict[str, float | int | None]:
    """Permutation flip rate: the share of FLIPS queries whose top-1 changes when their candidates are shuffled."""
    sample = [i for i, a in enumerate(asked) if len(a.rows) > 1][:FLIPS]
    shuffled, _ = rerank_all(reranker, gallery, [asked[i] for i in sample], mode, shuffle=1, what="rerank, shuffled")
    changed = [rankings[i].order[0] != again.order[0] for i, again in zip(sample, shuffled, strict=True)]
    return {"flip_rate": round(float(np.mean(changed)), 4) if changed else None, "flip_queries": len(changed)}
