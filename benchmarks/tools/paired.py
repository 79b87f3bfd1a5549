"""Hits of two ways to train, query by query: means over tasks, and how sure their difference is."""

from collections.abc import Mapping, Sequence

import numpy as np

Hits = Mapping[str, str]  # of each task, a "1" or "0" for each query


def mean(hits: Hits) -> float:
    """R@1 averaged over the tasks."""
    return float(np.mean([said.count("1") / len(said) for said in hits.values()]))


def difference(ours: Sequence[Hits], theirs: Sequence[Hits], families: Mapping[str, np.ndarray]) -> tuple[float, float, float]:
    """Mean difference of `mean`, seeds paired, and its 95 % interval, as `interval`.

    families: of each task, the family of each query.
    """
    gained = {task: np.mean([_array(a[task]) - _array(b[task]) for a, b in zip(ours, theirs, strict=True)], axis=0) for task in families}
    return interval(gained, families)


def interval(gained: Mapping[str, np.ndarray], families: Mapping[str, np.ndarray]) -> tuple[float, float, float]:
    """Mean over tasks of what each query gained, and its 95 % interval: a bootstrap over families (METHOD.md section 7)."""
    known = np.unique(np.concatenate(list(families.values())))
    gains, asked = [], []
    for task, family in families.items():
        place = np.searchsorted(known, family)
        gains.append(np.bincount(place, gained[task], len(known)))
        asked.append(np.bincount(place, minlength=len(known)))
    gains_TF, asked_TF = np.stack(gains), np.stack(asked)
    drawn = np.random.default_rng(0).multinomial(len(known), np.full(len(known), 1 / len(known)), size=4000).T
    resampled = ((gains_TF @ drawn) / np.maximum(asked_TF @ drawn, 1)).mean(0)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float((gains_TF.sum(1) / asked_TF.sum(1)).mean()), float(low), float(high)


def _array(said: str) -> np.ndarray:
    return np.frombuffer(said.encode(), np.uint8).astype(np.float64) - ord("0")
