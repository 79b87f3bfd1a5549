"""Neighbour search over vectors in hand."""

import numpy as np


def nearest(queries: np.ndarray, vectors: np.ndarray, k: int, *, block: int = 1024) -> tuple[np.ndarray, np.ndarray]:
    """Cosines (n, k) and rows (n, k) of the k nearest of `vectors` (U, D) to each of `queries` (n, D), both L2-normalised.

    Exact, in blocks, best first; ties go to the smaller row. k is bounded by U.
    """
    k = min(k, len(vectors))
    scores = np.empty((len(queries), k), np.float32)
    rows = np.empty((len(queries), k), np.int64)
    for start in range(0, len(queries), block):
        cosine = queries[start : start + block] @ vectors.T
        order = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
        rows[start : start + block] = order
        scores[start : start + block] = np.take_along_axis(cosine, order, 1)
    return scores, rows


def neighbours(vectors: np.ndarray, k: int) -> np.ndarray:
    """Rows (U, k) of the nearest others of each vector."""
    _, rows = nearest(vectors, vectors, k + 1)
    others = rows != np.arange(len(vectors))[:, None]
    others[others.all(1), -1] = False  # a duplicate may have pushed the row itself out of its own list
    return rows[others].reshape(len(vectors), -1)
