"""Merges: invariants over a grid, the published rule by its definition, pool adjacent violators against a slow solver."""

import numpy as np
import pytest

from train.rerank_merge import (
    RRF,
    Choice,
    Scored,
    arrange,
    blended,
    fused,
    isotonic,
    kway,
    local_orders,
    pool_adjacent_violators,
    probability,
)
from train.rerank_select import CHOICES, RETRIEVAL


def scored(count: int, chunk: int, *, seed: int = 0, ties: bool = False) -> Scored:
    random = np.random.default_rng([seed, count, chunk])
    local, logit = random.normal(size=(2, count)).round(0 if ties else 9)
    finalists = np.sort(np.argsort(-logit, kind="stable")[:chunk])
    final = random.normal(size=len(finalists)).round(0 if ties else 9)
    return Scored(chunk=chunk, local=local, null=np.zeros(count), logit=logit, finalists=finalists, final=final)


@pytest.mark.parametrize("count", [0, 1, 2, 9, 10, 11, 37])
@pytest.mark.parametrize("ties", [False, True])
def test_every_choice_gives_a_permutation(count: int, ties: bool) -> None:
    for choice in CHOICES:
        assert sorted(arrange(scored(count, 10, ties=ties), choice)) == list(range(count)), choice


@pytest.mark.parametrize("count", [3, 10, 25])
def test_merges_keep_the_order_within_each_chunk(count: int) -> None:
    s = scored(count, 5)
    orders = local_orders(s.local, 5)
    for merge in (kway, isotonic):
        place = np.argsort(merge(orders, probability(s.logit)))
        assert all((np.diff(place[order]) > 0).all() for order in orders)


def test_kway_emits_the_head_with_the_largest_r() -> None:
    s = scored(23, 5)
    r = probability(s.logit)
    queues = [list(order) for order in local_orders(s.local, 5)]
    slow = []
    while any(queues):
        best = max((queue for queue in queues if queue), key=lambda queue: r[queue[0]])
        slow.append(best.pop(0))
    assert kway(local_orders(s.local, 5), r) == slow


def test_fusion_is_the_sum_of_reciprocal_ranks() -> None:
    random = np.random.default_rng(0)
    rankings = [random.permutation(9).tolist(), random.permutation(9).tolist(), [4, 2], [7, 0, 1]]
    key = [sum(1 / (RRF + 1 + ranking.index(i)) for ranking in rankings if i in ranking) for i in range(9)]
    assert fused(rankings, 9) == sorted(range(9), key=lambda i: (-round(key[i], 12), i))
    assert fused([], 3) == [0, 1, 2]


def test_a_bad_head_holds_up_kway_but_not_isotonic() -> None:
    orders, r = [[0, 1], [2, 3]], np.array([0.1, 0.9, 0.4, 0.3])
    assert kway(orders, r) == [2, 3, 0, 1]
    assert isotonic(orders, r) == [0, 1, 2, 3]


def test_pool_adjacent_violators_against_min_max() -> None:
    """The textbook formula: fitted_i = min over a <= i of max over b >= i of mean(values[a..b])."""
    for seed in range(30):
        values = np.random.default_rng(seed).normal(size=8)
        mean = lambda a, b: values[a : b + 1].mean()  # noqa: B023, E731
        slow = [min(max(mean(a, b) for b in range(i, 8)) for a in range(i + 1)) for i in range(8)]
        np.testing.assert_allclose(pool_adjacent_violators(values), slow, atol=1e-12)


def test_blending_runs_from_retrieval_to_the_reranked_order() -> None:
    reranked = np.random.default_rng(0).permutation(12).tolist()
    assert blended(reranked, 0.0) == list(range(12))
    assert blended(reranked, 1.0) == reranked
    assert blended([1, 0, 2], 0.5) == [0, 1, 2], "ties go to retrieval"
    assert arrange(scored(12, 5), RETRIEVAL) == list(range(12))


def test_the_last_comparison_leads_and_moves_nothing_else() -> None:
    s = scored(30, 10)
    without, with_last = arrange(s, Choice(last=False)), arrange(s, Choice(last=True))
    assert with_last[:10] == s.finalists[np.argsort(-s.final)].tolist()
    assert with_last[10:] == [i for i in without if i not in set(s.finalists.tolist())]


def test_relevance_orders_by_r_alone() -> None:
    s = scored(30, 10)
    assert arrange(s, Choice(merge="relevance", last=False)) == np.argsort(-s.logit, kind="stable").tolist()
