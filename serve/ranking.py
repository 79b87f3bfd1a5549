"""Exact ranking of products and the levels it is judged by; plain numpy, the yardstick of every figure that is published.

A gallery has n rows of p products. A ranking is an array of gallery rows, the best row of each product, best product first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from idem import metrics

DEPTH = 1000  # rankings are cut here: what lies deeper counts as not found
BLOCK = 1 << 25  # scores held at once: 128 MiB of float32

Strings = Sequence[str] | np.ndarray


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """ids, products, families, categories: (n,) of str. `codes` (n,) numbers the products; `names` (p,) are they, sorted."""

    ids: np.ndarray
    families: np.ndarray  # (p,)
    categories: np.ndarray  # (p,)
    names: np.ndarray
    codes: np.ndarray
    sizes: np.ndarray  # (p,) rows of each product

    @classmethod
    def of(cls, ids: Strings, products: Strings, families: Strings, categories: Strings) -> "Gallery":
        names, first, codes, sizes = np.unique(
            np.asarray(products, dtype=object), return_index=True, return_inverse=True, return_counts=True
        )
        family, category = np.asarray(families, dtype=object)[first], np.asarray(categories, dtype=object)[first]
        return cls(ids=np.asarray(ids, dtype=object), families=family, categories=category, names=names, codes=codes, sizes=sizes)

    def __len__(self) -> int:
        return len(self.ids)

    def levels(self, query: tuple[str, str, str]) -> np.ndarray:
        """(p,) levels of all products for a query given as (product_id, family_id, category)."""
        return metrics.levels_of(query, self.names, self.families, self.categories)

    def graded(self, judged: Mapping[str, int]) -> np.ndarray:
        """(p,) levels of all products from judgements; what is not listed has level 3."""
        result = np.full(len(self.names), 3, np.int8)
        for product, level in judged.items():
            at = np.searchsorted(self.names, product)
            if at < len(self.names) and self.names[at] == product:
                result[at] = level
        return result

    def own_rows(self, query_ids: Strings) -> list[np.ndarray]:
        """The gallery rows that are the query itself, for each query; they never answer it."""
        order = np.argsort(self.ids, kind="stable")
        first, last = (np.searchsorted(self.ids[order], np.asarray(query_ids, dtype=object), side=side) for side in ("left", "right"))
        return [order[a:b] for a, b in zip(first, last, strict=True)]

    def counts(self, levels: np.ndarray, own: np.ndarray) -> np.ndarray:
        """(4,) products of each level that can be found, where `own` rows cannot."""
        left = self.sizes.copy()
        np.subtract.at(left, self.codes[own], 1)
        return np.bincount(levels[left > 0], minlength=metrics.LEVELS)


def rank(queries: np.ndarray, vectors: np.ndarray, codes: np.ndarray, own: Sequence[np.ndarray], depth: int = DEPTH) -> list[np.ndarray]:
    """Exact rankings of (q, d) queries among (n, d) vectors by inner product, at most `depth` products each.

    Ties between products go to the smaller name, between rows of one product to the earlier row in the table.
    """
    order = np.argsort(codes, kind="stable")
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    step = max(1, BLOCK // max(1, len(vectors)))
    found = []
    for at in range(0, len(queries), step):
        scores = queries[at : at + step] @ vectors.T
        for scored, rows in zip(scores, own[at : at + step], strict=True):
            scored[rows] = -np.inf
        found += _best(scores[:, order], order, starts, depth)
    return found


def _best(scores: np.ndarray, order: np.ndarray, starts: np.ndarray, depth: int) -> list[np.ndarray]:
    """Rankings from scores (q, n) whose columns are grouped by product; `order` maps a column to its row."""
    highest = np.maximum.reduceat(scores, starts, axis=1)  # (q, p)
    sizes = np.diff(starts, append=scores.shape[1])
    columns = np.where(scores == np.repeat(highest, sizes, axis=1), np.arange(scores.shape[1]), scores.shape[1])
    best = order[np.minimum.reduceat(columns, starts, axis=1)]  # (q, p) the best row of each product
    ranked = np.argsort(-highest, axis=1, kind="stable")[:, :depth]
    return [best[q, r[np.isfinite(highest[q, r])]] for q, r in enumerate(ranked)]


def rank_slowly(query: np.ndarray, vectors: np.ndarray, codes: np.ndarray, own: np.ndarray) -> list[int]:
    """The obvious version of `rank` for one query: sort all rows, then keep the first of each product."""
    scored = sorted((-float(query @ vector), int(code), row) for row, (vector, code) in enumerate(zip(vectors, codes, strict=True)))
    rows = [row for _, _, row in scored if row not in own]
    return [rows[i] for i in metrics.collapse([str(codes[row]) for row in rows])]
