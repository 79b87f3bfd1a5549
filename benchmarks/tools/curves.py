"""Recall against queries a second: curves, and what two of them say at the same recall. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Point:
    """One setting of a contender: its recall and the queries it answers a second."""

    recall: float
    rate: float
    setting: str = ""


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both, from low to high recall."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.recall, -p.rate)):
        if not best or point.rate > best[-1].rate:
            best.append(point)
    return best[::-1]


def rate_at(points: Sequence[Point], recall: float) -> float:
    """Queries a second at `recall`, between the points of the front on a logarithmic scale; 0 where it is not reached."""
    known = front(points)
    if not known or known[-1].recall < recall:
        return 0.0
    if recall <= known[0].recall:
        return known[0].rate
    return float(np.exp(np.interp(recall, [p.recall for p in known], [np.log(p.rate) for p in known])))


def recall_of(found: np.ndarray, exact: np.ndarray) -> float:
    """The share of `exact` (q, k) that is in `found` (q, k)."""
    return float(np.mean([len(set(f) & set(e)) / len(e) for f, e in zip(found.tolist(), exact.tolist(), strict=True)]))
