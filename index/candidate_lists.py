"""Queries and a gallery, as vectors, to candidate lists: pure.

A list holds products, each by its best row, as the reranker is served them.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from idem import metrics, schema
from index.searcher import exact
from index.text_queries import TextQueries

COLUMNS = ["item_id", "product_id", "family_id", "category"]
IRRELEVANT = metrics.LEVELS - 1


def nearest(queries: np.ndarray, gallery: np.ndarray, products: np.ndarray, k: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Of vectors (n, dim) and (m, dim) the cosines and gallery rows of each query's k nearest products; products (m,). Ties go to the
    earlier row."""
    rows_a_product = int(np.unique(products, return_counts=True)[1].max())  # so many rows hold k products, however they fall
    scores, rows = exact(gallery, queries, k * rows_a_product)
    best = [metrics.collapse(products[near].tolist())[:k] for near in rows]
    return [row[kept] for row, kept in zip(scores, best, strict=True)], [row[kept] for row, kept in zip(rows, best, strict=True)]


def of_pictures(fold: str, queries: pa.Table, gallery: pa.Table, vectors: np.ndarray, gallery_vectors: np.ndarray, k: int) -> pa.Table:
    """CANDIDATES of one fold: for each query its k nearest products, best first, with cosines and levels.

    queries and gallery have COLUMNS; their vectors are (n, dim) in the same order.
    """
    item_ids, products, families, categories = (gallery[name].to_numpy() for name in COLUMNS)
    scores, rows = nearest(vectors, gallery_vectors, products, k)
    asked = zip(*(queries[name].to_pylist() for name in COLUMNS[1:]), strict=True)
    levels = [metrics.levels_of(query, products[r], families[r], categories[r]) for query, r in zip(asked, rows, strict=True)]
    unsaid = pa.nulls(len(rows), pa.string())
    return _table(fold, queries["item_id"], [item_ids[r] for r in rows], scores, levels, unsaid)


def of_texts(fold: str, asked: TextQueries, gallery: pa.Table, vectors: np.ndarray, gallery_vectors: np.ndarray, k: int) -> pa.Table:
    """As `of_pictures`; levels are those of the judgements, IRRELEVANT where there is none."""
    item_ids, products = (gallery[name].to_numpy() for name in COLUMNS[:2])
    scores, rows = nearest(vectors, gallery_vectors, products, k)
    levels = [np.array([of.get(p, IRRELEVANT) for p in products[r]], np.int8) for of, r in zip(asked.levels, rows, strict=True)]
    return _table(fold, pa.array(asked.ids), [item_ids[r] for r in rows], scores, levels, pa.array(asked.texts))


def _table(
    fold: str,
    query_ids: pa.Array | pa.ChunkedArray,
    item_ids: Sequence[np.ndarray],
    scores: Sequence[np.ndarray],
    levels: Sequence[np.ndarray],
    texts: pa.Array,
) -> pa.Table:
    columns = {"query_id": query_ids, "fold": pa.array([fold] * len(scores)), "item_ids": item_ids, "scores": scores, "levels": levels}
    return pa.table({**columns, "text": texts}, schema=schema.CANDIDATES)
