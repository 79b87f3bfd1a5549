"""What every reranker is held to, and its trivial twins, which need no training: for tests, baselines and services without one."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from idem.types import Document, Query, Ranking

Mode = Literal["listwise", "pointwise"]
MODES: tuple[Mode, ...] = ("listwise", "pointwise")
GRAM = 3


def check(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; allowed are {', '.join(MODES)}")


def canonical(documents: Sequence[Document]) -> list[int]:
    """Positions, best retrieval score first, ties by what the documents are, so that the order they came in tells nothing.
    A score that is not finite counts as the worst."""
    keys = [(-d.score if math.isfinite(d.score) else math.inf, d.item_id, d.text, d.image or b"", i) for i, d in enumerate(documents)]
    return [key[-1] for key in sorted(keys)]


def retrieved(order: Sequence[int]) -> Ranking:
    """Retrieval's order, of which nothing could be judged."""
    unknown = (math.nan,) * len(order)
    return Ranking(order=tuple(order), relevance=unknown, null=unknown, degraded=True)


class IdentityReranker:
    """Retrieval's order stands. It knows no probability: what it gives as r is the cosine, cut to 0..1, good for comparisons
    alone. A service tells it by `identity` and serves retrieval, without an r. NULL is a cosine of zero."""

    identity = True

    def __init__(self) -> None:
        self.faults = 0

    def rerank(self, query: Query, documents: Sequence[Document], *, mode: Mode = "listwise", max_ms: float | None = None) -> Ranking:
        check(mode)
        scores = [d.score if math.isfinite(d.score) else -1.0 for d in documents]
        return Ranking(
            order=tuple(canonical(documents)), relevance=tuple(min(max(s, 0.0), 1.0) for s in scores), null=tuple(float(s) for s in scores)
        )


class OverlapReranker:
    """By the letters that query and document share: r is the cosine of their counts of character trigrams, ties keep retrieval's
    order. Without a text of the query that is retrieval's order."""

    identity = False

    def __init__(self) -> None:
        self.faults = 0

    def rerank(self, query: Query, documents: Sequence[Document], *, mode: Mode = "listwise", max_ms: float | None = None) -> Ranking:
        check(mode)
        asked = _grams(query.text)
        r = [_cosine(asked, _grams(document.text)) for document in documents]
        order = sorted(canonical(documents), key=lambda i: -r[i])
        return Ranking(order=tuple(order), relevance=tuple(r), null=tuple(r))


def _grams(text: str) -> Counter[str]:
    plain = f" {' '.join(text.casefold().split())} "
    return Counter(plain[i : i + GRAM] for i in range(len(plain) - GRAM + 1))


def _cosine(one: Counter[str], other: Counter[str]) -> float:
    """In 0..1; 0 where either is empty."""
    lengths = math.sqrt(sum(n * n for n in one.values()) * sum(n * n for n in other.values()))
    return min(1.0, sum(n * other[gram] for gram, n in one.items()) / lengths) if lengths else 0.0
