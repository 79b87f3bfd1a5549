"""Finds the answers of queries in a gallery, both given as tables: exactly, or by a FAISS index of any kind."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from idem import metrics
from index.searcher import make_index
from serve import ranking
from serve.encoding import Encode, Fields, encode_batch, encode_rows
from serve.reranking import latency
from serve.tables import Rows

TIMED = 50  # queries asked one at a time for the latency of embedding and search

# queries (q, d), vectors (n, d), codes (n,), rows that are the query itself -> a ranking for each query
Search = Callable[[np.ndarray, np.ndarray, np.ndarray, Sequence[np.ndarray]], list[np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class Found:
    """What retrieval yields, for each of q queries: its ranking (gallery rows), levels (p,), counts (4,) and vector.

    set_aside: rows of the gallery and of the queries that could not be embedded, by reason.
    """

    gallery: Rows
    queries: Rows
    known: ranking.Gallery
    vectors: np.ndarray
    asked: np.ndarray
    rankings: list[np.ndarray]
    levels: list[np.ndarray]
    counts: np.ndarray
    set_aside: dict[str, dict[str, int]]

    def level(self, query: int, rows: np.ndarray) -> np.ndarray:
        """Levels of what stands in these gallery rows, for one query."""
        return self.levels[query][self.known.codes[rows]]

    def cosines(self, query: int, rows: np.ndarray) -> np.ndarray:
        return self.vectors[rows] @ self.asked[query]


def search_with(factory: str, parameters: str) -> Search:
    """`ranking.rank` by a FAISS index: what it misses is missing from the rankings. It is built once for the same vectors."""
    built: list[tuple[np.ndarray, Any]] = []

    def search(queries: np.ndarray, vectors: np.ndarray, codes: np.ndarray, own: Sequence[np.ndarray]) -> list[np.ndarray]:
        if not built or built[0][0] is not vectors:
            built[:] = [(vectors, make_index(vectors, factory=factory, parameters=parameters))]
        _, rows = built[0][1].search(queries, min(ranking.DEPTH, len(vectors)))
        kept = [row[(row >= 0) & ~np.isin(row, mine)] for row, mine in zip(rows, own, strict=True)]
        return [row[metrics.collapse(codes[row].tolist())] for row in kept]

    return search


def levels_of(known: ranking.Gallery, queries: Rows, judged: Mapping[str, Mapping[str, int]] | None) -> list[np.ndarray]:
    """(p,) levels of the gallery's products for each query, by judgements or by attributes; equal queries share one array."""
    if judged is not None:
        return [known.graded(judged.get(query, {})) for query in queries.ids]
    triples = list(zip(queries.products, queries.families, queries.categories, strict=True))
    of = {triple: known.levels(triple) for triple in set(triples)}
    return [of[triple] for triple in triples]


def find(
    gallery: Rows,
    queries: Rows,
    *,
    encode: Encode,
    gallery_fields: Fields,
    query_fields: Fields,
    judged: Mapping[str, Mapping[str, int]] | None = None,
    search: Search = ranking.rank,
) -> Found:
    """Embed both, search, and look up what the answers are worth. ValueError where nothing is left to embed."""
    gallery, vectors, gallery_aside = encode_rows(encode, gallery, gallery_fields, "gallery")
    queries, asked, query_aside = encode_rows(encode, queries, query_fields, "queries")
    known = ranking.Gallery.of(gallery.ids, gallery.products, gallery.families, gallery.categories)
    own = known.own_rows(queries.ids)
    levels = levels_of(known, queries, judged)
    return Found(
        gallery=gallery,
        queries=queries,
        known=known,
        vectors=vectors,
        asked=asked,
        rankings=search(asked, vectors, known.codes, own),
        levels=levels,
        counts=np.stack([known.counts(level, rows) for level, rows in zip(levels, own, strict=True)]),
        set_aside={"gallery": dict(gallery_aside), "queries": dict(query_aside)},
    )


def time_search(found: Found, encode: Encode, fields: Fields, search: Search) -> dict[str, float | int]:
    """Embedding and search of one query after the other by what found the answers, the first left out as warm-up."""
    sample = range(min(TIMED + 1, len(found.queries)))
    seconds: list[float] = []
    for i, picture in zip(sample, found.queries.images(sample), strict=True):
        start = time.perf_counter()
        vector, _ = encode_batch(encode, [picture], [found.queries.texts[i]], fields)
        search(vector, found.vectors, found.known.codes, [np.zeros(0, np.int64)])
        seconds.append(time.perf_counter() - start)
    return latency(seconds[1:] or seconds)


def per_style(styles: np.ndarray, rankings: Sequence[np.ndarray], counts: np.ndarray) -> dict[str, dict[str, Any]]:
    """The main figures for each style of the queries; nothing where there is one style alone."""
    if len(set(styles)) < 2:
        return {}
    parts = {style: np.flatnonzero(styles == style) for style in sorted(set(styles))}
    made = {style: metrics.summarise([rankings[i] for i in part.tolist()], counts[part]) for style, part in parts.items()}
    return {style: {name: m[name] for name in ("queries", "R@1", "R@10", "sibling_R@1")} for style, m in made.items()}


def level_counts(counts: np.ndarray) -> dict[str, int]:
    """How many queries have at least one product of each level in the gallery."""
    totals = Counter({str(level): int((counts[:, level] > 0).sum()) for level in range(metrics.LEVELS)})
    return dict(sorted(totals.items()))
