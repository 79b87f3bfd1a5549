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


def flips(
    reranker: Reranker, gallery: Rows, asked: Sequence[Asked], rankings: Sequence[Ranking], mode: Mode
) -> dict[str, float | int | None]:
    """Permutation flip rate: the share of FLIPS queries whose top-1 changes when their candidates are shuffled."""
    sample = [i for i, a in enumerate(asked) if len(a.rows) > 1][:FLIPS]
    shuffled, _ = rerank_all(reranker, gallery, [asked[i] for i in sample], mode, shuffle=1, what="rerank, shuffled")
    changed = [rankings[i].order[0] != again.order[0] for i, again in zip(sample, shuffled, strict=True)]
    return {"flip_rate": round(float(np.mean(changed)), 4) if changed else None, "flip_queries": len(changed)}
