import asyncio
from dataclasses import replace

import numpy as np
import pytest

from idem.types import Hit, Query, Ranking
from index.release import Release
from serve import engine
from serve.flow import DeadlineExceeded, Flow, Overloaded, PartError
from train.reranker import IdentityReranker, Reranker


def make_engine(shop, **changes):
    parts = {"encoder": shop.encoder, "searcher": shop.searcher, "pictures": shop, "reranker": shop.reranker, "depth": 3}
    return engine.Engine(**{**parts, **changes})


def make_flow(shop, *, delay=None, error=None, **settings) -> Flow:
    """The parts of `shop` behind awaitables; those named in `delay` (seconds) or `error` are late or raise."""

    async def part(name, work):
        await asyncio.sleep((delay or {}).get(name, 0))
        if name in (error or {}):
            raise error[name]
        return work()

    def shard(number):
        return lambda vector, k: part(f"shard-{number}", lambda: shop.shards[number].search(vector, k)[0])

    return Flow(
        embed=lambda query: part("embedder", lambda: engine.embed(shop.encoder, [query])),
        shards={f"shard-{number}": shard(number) for number in range(2)},
        rerank=lambda query, hits: part("rerank", lambda: engine.rerank(shop.reranker, shop, query, hits, "listwise")),
        **settings,
    )


def ask(flow: Flow, query: Query, *, top_k=4, rerank=True, depth=3) -> engine.Answer:
    return asyncio.run(flow.search(query, top_k=top_k, rerank=rerank, depth=depth))


def ids(hits) -> list[str]:
    return [hit.product_id for hit in hits]


def test_a_picture_finds_its_product_first_and_every_product_once(colour_shop):
    answers = make_engine(colour_shop).search([Query(image=p) for p in colour_shop.pictures.values()], top_k=5, rerank="none")
    assert [answer.hits[0].product_id for answer in answers] == ids(colour_shop.hits)
    assert all(len(set(ids(answer.hits))) == 5 for answer in answers)
    assert all(answer.relevance == (None,) * 5 and answer.hits == answer.retrieved for answer in answers)


def test_reranking_orders_its_depth_and_leaves_the_rest_where_it_was(colour_shop):
    answer = make_engine(colour_shop).search([Query(text="red")], top_k=4)[0]
    before = ids(answer.retrieved)
    assert ids(answer.hits) == [before[2], before[1], before[0], before[3]]
    assert answer.relevance == (0.75, 0.5, 0.25, None)
    assert set(answer.timings_ms) == {"embed", "search", "rerank", "total"}


def test_a_hit_from_below_top_k_can_be_lifted_into_it(colour_shop):
    answer = make_engine(colour_shop).search([Query(text="red")], top_k=1)[0]
    assert ids(answer.hits) == [ids(answer.retrieved)[2]]


def test_without_a_reranker_retrieval_stands(colour_shop):
    answer = make_engine(colour_shop, reranker=None).search([Query(text="red")], top_k=2)[0]
    assert answer.hits == answer.retrieved[:2]
    assert answer.degraded == ()


def test_the_identity_is_no_reranker_and_a_cosine_no_probability(identity_releases, releases, colour_shop):
    opened = engine.Engine.open(identity_releases)
    answer = opened.search([Query(image=colour_shop.pictures["red/0"])], top_k=3)[0]
    assert opened.reranker is None
    assert answer.hits == answer.retrieved[:3]
    assert answer.relevance == (None,) * 3
    assert engine.trained_reranker(Release.open(releases)) == Release.open(releases).reranker
    assert isinstance(Reranker.load(str(Release.open(identity_releases).reranker), embedder_path=""), IdentityReranker)


def test_a_batch_answers_as_one_query_at_a_time(colour_shop):
    alone, queries = make_engine(colour_shop), [Query(text=name) for name in ("red", "blue", "plum")]
    batch = alone.search(queries, top_k=3)
    singles = [alone.search([q], top_k=3)[0] for q in queries]
    for together, one in zip(batch, singles, strict=True):
        assert [hit.item_id for hit in together.hits] == [hit.item_id for hit in one.hits]
        # A product of matrices of another shape may round otherwise in its last bit.
        assert [hit.score for hit in together.hits] == pytest.approx([hit.score for hit in one.hits], abs=1e-6)
    assert alone.search([]) == []


def test_the_shortlist_keeps_the_best_row_of_each_product():
    hits = [
        Hit(item_id=str(i), product_id=p, family_id="", category="", title="", score=1 - i / 10)
        for i, p in enumerate(["a", "a", "b", "a", "c"])
    ]
    assert [hit.item_id for hit in engine.shortlist(hits, 2)] == ["0", "2"]
    assert engine.shortlist([], 2) == []


def test_a_ranking_that_loses_a_candidate_is_refused(colour_shop):
    hits = colour_shop.hits[:3]
    with pytest.raises(AssertionError, match="permutation"):
        engine.compose(hits, Ranking(order=(0, 0, 1), relevance=(0, 0, 0), null=(0, 0, 0)), top_k=3, timings_ms={})


@pytest.mark.parametrize("rerank", [True, False])
@pytest.mark.parametrize("top_k", [1, 3, 5])
def test_the_flow_of_the_service_answers_as_the_engine(colour_shop, rerank, top_k):
    for query in [Query(text="sand"), Query(image=colour_shop.pictures["plum/1"])]:
        measured = make_engine(colour_shop).search([query], top_k=top_k, rerank="listwise" if rerank else "none")[0]
        served = ask(make_flow(colour_shop), query, top_k=top_k, rerank=rerank)
        assert replace(served, timings_ms={}) == replace(measured, timings_ms={})


@pytest.mark.parametrize(
    "fault", [{"delay": {"rerank": 5}}, {"error": {"rerank": Overloaded("rerank")}}, {"error": {"rerank": PartError("x")}}]
)
def test_a_reranker_that_is_late_full_or_broken_leaves_the_order_of_retrieval(colour_shop, fault):
    answer = ask(make_flow(colour_shop, timeout_s=0.2, **fault), Query(text="red"))
    assert answer.degraded == ("rerank",)
    assert answer.hits == answer.retrieved[:4]
    assert answer.timings_ms["total"] < 1000


@pytest.mark.parametrize("fault", [{"delay": {"shard-1": 5}}, {"error": {"shard-1": PartError("gone")}}])
def test_a_missing_shard_gives_what_the_others_hold_and_says_so(colour_shop, fault):
    answer = ask(make_flow(colour_shop, shard_timeout_s=0.1, **fault), Query(text="red"))
    assert answer.degraded == ("shard-1",)
    assert {hit.item_id for hit in answer.hits} <= {hit.item_id for hit in colour_shop.shards[0].hits}
    assert answer.relevance[0] is not None, "the time a shard loses is not the reranker's"


def test_without_any_shard_there_is_no_answer(colour_shop):
    with pytest.raises(PartError, match="shard-0, shard-1"):
        ask(make_flow(colour_shop, error={"shard-0": PartError(""), "shard-1": PartError("")}), Query(text="red"))


def test_shards_are_asked_at_once(colour_shop):
    answer = ask(make_flow(colour_shop, delay={"shard-0": 0.3, "shard-1": 0.3}), Query(text="red"))
    assert 300 <= answer.timings_ms["search"] < 550


def test_an_embedder_that_is_late_or_full_is_an_error(colour_shop):
    with pytest.raises(DeadlineExceeded, match=r"0\.1 s"):
        ask(make_flow(colour_shop, delay={"embedder": 5}, timeout_s=0.1), Query(text="red"))
    with pytest.raises(Overloaded):
        ask(make_flow(colour_shop, error={"embedder": Overloaded("embedder")}), Query(text="red"))


def test_a_bad_query_does_not_fail_its_batch(colour_shop):
    queries = [Query(text="red"), Query(image=b"not a picture"), Query(text="blue")]
    first, bad, last = engine.embed_apart(colour_shop.encoder, queries)
    assert np.array_equal([first, last], engine.embed(colour_shop.encoder, [queries[0], queries[2]]))
    assert "not a picture" in bad


def test_an_empty_index_is_an_empty_answer(colour_shop):
    class Nothing:
        def search(self, vectors, k):
            return [[] for _ in vectors]

    answer = make_engine(colour_shop, searcher=Nothing()).search([Query(text="red")])[0]
    assert answer.hits == answer.relevance == ()
    assert np.isfinite(answer.timings_ms["total"])
