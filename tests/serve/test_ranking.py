"""Exact ranking against its obvious twin, and counts of what can be found."""

import numpy as np
import pytest

from serve import ranking


@pytest.mark.parametrize(("rows", "products", "dim"), [(1, 1, 2), (7, 3, 4), (60, 60, 8), (200, 17, 3)])
def test_the_fast_ranking_agrees_with_the_obvious_one(rows, products, dim):
    rng = np.random.default_rng(rows)
    codes = np.unique(rng.integers(0, products, rows), return_inverse=True)[1]
    vectors = np.round(rng.normal(size=(rows, dim)), 1).astype(np.float32)  # rounded: ties happen
    queries = np.round(rng.normal(size=(5, dim)), 1).astype(np.float32)
    own = [rng.choice(rows, size=min(rows - 1, n), replace=False) for n in range(5)]
    fast = ranking.rank(queries, vectors, codes, own)
    for query, mine, found in zip(queries, own, fast, strict=True):
        slow = ranking.rank_slowly(query, vectors, codes, mine)
        scores = vectors @ query
        assert len(found) == len(slow) == len(set(codes[found]))
        assert not set(found) & set(mine)
        np.testing.assert_allclose(scores[found], scores[slow], atol=1e-6)  # equal scores may come in another order
        assert {codes[row] for row in found} == {codes[row] for row in slow}


def test_blocks_of_queries_do_not_change_the_answer(monkeypatch):
    rng = np.random.default_rng(0)
    vectors, queries = rng.normal(size=(30, 4)).astype(np.float32), rng.normal(size=(9, 4)).astype(np.float32)
    codes, own = np.arange(30) // 2, [np.zeros(0, np.int64)] * 9
    whole = ranking.rank(queries, vectors, codes, own)
    monkeypatch.setattr(ranking, "BLOCK", 60)
    for a, b in zip(whole, ranking.rank(queries, vectors, codes, own), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_only_the_query_itself_shows_cannot_be_found():
    known = ranking.Gallery.of(["i1", "i2", "i3", "i4"], ["a", "a", "b", "c"], ["f", "f", "f", ""], ["x", "x", "x", "x"])
    levels = known.levels(("a", "f", "x"))
    assert known.names.tolist() == ["a", "b", "c"]
    assert levels.tolist() == [0, 1, 2]
    own = known.own_rows(["i1", "i3", "elsewhere"])
    assert [rows.tolist() for rows in own] == [[0], [2], []]
    assert known.counts(levels, own[0]).tolist() == [1, 1, 1, 0]  # the other picture of a is left
    assert known.counts(known.levels(("b", "f", "x")), own[1]).tolist() == [0, 1, 1, 0]
    assert known.graded({"c": 1, "zzz": 0, "a": 0}).tolist() == [0, 3, 1]
