"""Hits of two ways to train, query by query: means over tasks, and how sure their difference is."""

from collections.abc import Mapping, Sequence

import numpy as np

Hits = Mapping[str, str]  # of each task, a "1" or "0" for each query


def mean(hits: Hits) -> float:
    """R@1 averaged over the tasks."""
    return float(np.mean([said.count("1") / len(said) for said in hits.values()]))


def difference(ours: Sequence[Hits], theirs: Sequence[Hits], families: Mapping[str, np.ndarray]) -> tuple[float, float, float]:
    """Mean difference of `mean`, seeds paired, and its 95 % interval: a bootstrap over families (METHOD.md section 7).

    families: of each task, the family of each query.
    """
    known = np.unique(np.concatenate(list(families.values())))
    gained, asked = [], []
    for task, family in families.items():
        each = np.mean([_array(a[task]) - _array(b[task]) for a, b in zip(ours, theirs, strict=True)], axis=0)
        place = np.searchsorted(known, family)
        gained.append(np.bincount(place, each, len(known)))
        asked.append(np.bincount(place, minlength=len(known)))
    gained_TF, asked_TF = np.stack(gained), np.stack(asked)
    drawn = np.random.default_rng(0).multinomial(len(known), np.full(len(known), 1 / len(known)), size=4000).T
    resampled = ((gained_TF @ drawn) / np.maximum(asked_TF @ drawn, 1)).mean(0)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float((gained_TF.sum(1) / asked_TF.sum(1)).mean()), float(low), float(high)


def _array(said: str) -> np.ndarray:
    return np.frombuffer(said.encode(), np.uint8).astype(np.float64) - ord("0")
