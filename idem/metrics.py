"""Metrics of METHOD.md section 4 (Pailitao-VL, arXiv 2602.13704, and ours), pure numpy.

Levels: 0 the very same product, 1 same concept, 2 same function, 3 irrelevant. A ranking is the array of levels of the
products found, best first, after rows were collapsed to products. `counts[q, l]` is how many products of level l the
gallery holds for query q; G = counts[0] + counts[1].
"""

from collections.abc import Sequence

import numpy as np

LEVELS = 4


def levels_of(query: tuple[str, str, str], products: np.ndarray, families: np.ndarray, categories: np.ndarray) -> np.ndarray:
    """Levels (n,) int8 of n products for a query given as (product_id, family_id, category); an empty name matches nothing."""
    product, family, category = query
    result = np.full(len(products), 3, np.int8)
    if category:
        result[categories == category] = 2
    if family:
        result[families == family] = 1
    if product:
        result[products == product] = 0
    return result


def collapse(products: Sequence[str]) -> list[int]:
    """Positions of the first (best) row of each product, in order."""
    seen: set[str] = set()
    return [i for i, product in enumerate(products) if not (product in seen or seen.add(product))]


def recall_at(ranking: np.ndarray, k: int) -> float:
    """R@K: 1 if the same product is among the first k."""
    return float((ranking[:k] == 0).any())


def hit_rate_at(ranking: np.ndarray, k: int, relevant: int, best: int = 0) -> float:
    """I-HR@K (best = 0) and C-HR@K (best = 1): share of the first min(K, G) that have level <= best."""
    k = min(k, relevant)
    return float((ranking[:k] <= best).sum() / k)


def ndcg_at(ranking: np.ndarray, k: int, counts: np.ndarray) -> float:
    """nDCG@K with gain 2^(3 - level) - 1 and the ideal order of the whole gallery."""
    discounts = 1 / np.log2(np.arange(2, k + 2))
    ideal_levels = np.repeat(np.arange(LEVELS), np.minimum(counts, k))[:k]
    ideal = ((2.0 ** (3 - ideal_levels) - 1) * discounts[: len(ideal_levels)]).sum()
    found = ranking[:k]
    gained = ((2.0 ** (3.0 - found) - 1) * discounts[: len(found)]).sum()
    return float(gained / ideal) if ideal > 0 else 0.0


def average_precision_at_r(ranking: np.ndarray, same: int) -> float:
    """mAP@R of one query: mean over the first R = `same` ranks of precision where the rank is a hit."""
    if same == 0:
        return 0.0
    hits = ranking[:same] == 0
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return float((precision * hits).sum() / same)


def sibling_recall(ranking: np.ndarray, counts: np.ndarray) -> float | None:
    """R@1 within the family: of the products found at level 0 or 1, is the first level 0? None where there is no sibling."""
    if counts[0] == 0 or counts[1] == 0:
        return None
    family = ranking[ranking <= 1]
    return float(len(family) > 0 and family[0] == 0)


def _mean(values: Sequence[float]) -> float | None:
    return round(float(np.mean(values)), 4) if len(values) else None


def summarise(rankings: Sequence[np.ndarray], counts: np.ndarray) -> dict[str, float | int | None]:
    """Means over the queries with G > 0; the others are dropped and counted. `counts` is (queries, 4)."""
    assert len(rankings) == len(counts)
    kept = [(r, c) for r, c in zip(rankings, counts, strict=True) if c[0] + c[1] > 0]
    siblings = [s for r, c in kept if (s := sibling_recall(r, c)) is not None]
    return {
        "queries": len(kept),
        "dropped_no_relevant": len(rankings) - len(kept),
        "R@1": _mean([recall_at(r, 1) for r, _ in kept]),
        "R@5": _mean([recall_at(r, 5) for r, _ in kept]),
        "R@10": _mean([recall_at(r, 10) for r, _ in kept]),
        "I-HR@1": _mean([hit_rate_at(r, 1, int(c[0] + c[1])) for r, c in kept]),
        "I-HR@5": _mean([hit_rate_at(r, 5, int(c[0] + c[1])) for r, c in kept]),
        "C-HR@10": _mean([hit_rate_at(r, 10, int(c[0] + c[1]), best=1) for r, c in kept]),
        "nDCG@10": _mean([ndcg_at(r, 10, c) for r, c in kept]),
        "mAP@R": _mean([average_precision_at_r(r, int(c[0])) for r, c in kept]),
        "sibling_R@1": _mean(siblings),
        "sibling_queries": len(siblings),
    }


def expected_calibration_error(probability: np.ndarray, happened: np.ndarray, bins: int = 15) -> float:
    """ECE over equal-width bins: mean |observed - predicted|, weighted by the size of the bin."""
    which = np.minimum((probability * bins).astype(int), bins - 1)
    total = 0.0
    for b in range(bins):
        inside = which == b
        if inside.any():
            total += inside.mean() * abs(happened[inside].mean() - probability[inside].mean())
    return float(total)


def brier_skill(probability: np.ndarray, happened: np.ndarray) -> float:
    """1 - Brier score / Brier score of always saying the base rate; 0 for the base rate itself, negative below it."""
    base = happened.mean()
    reference = ((base - happened) ** 2).mean()
    return float(1 - ((probability - happened) ** 2).mean() / reference) if reference > 0 else 0.0
