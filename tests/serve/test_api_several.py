"""Several queries through an embedder that takes one, and documents that no retrieval has scored."""

import asyncio

import numpy as np
import pytest

from idem.types import Document, Query, Ranking
from serve.flow import DeadlineExceeded, Overloaded, Unanswerable
from serve.several import embed_each, rank

QUERIES = [Query(text=str(i)) for i in range(10)]
DOCUMENTS = [Document(item_id=str(i), text=str(i), image=None, score=9.0) for i in range(3)]


def vector(query: Query) -> np.ndarray:
    return np.array([float(query.text), 1], np.float32)


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_vectors_come_in_order_and_few_wait_at_once(at_once):
    waiting, most = 0, 0

    async def embed(query: Query) -> np.ndarray | str:
        nonlocal waiting, most
        waiting += 1
        most = max(most, waiting)
        await asyncio.sleep(0.002 * (10 - int(query.text)))
        waiting -= 1
        return "odd" if query.text == "4" else vector(query)

    found = asyncio.run(embed_each(embed, QUERIES, at_once=at_once, timeout_s=5))
    assert found[4] == "odd"
    assert [int(each[0]) for each in found if not isinstance(each, str)] == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert most == min(at_once, 10)
    assert asyncio.run(embed_each(embed, [], at_once=at_once, timeout_s=5)) == []


def test_one_that_fails_or_is_late_ends_all():
    ended = []

    async def embed(query: Query) -> np.ndarray:
        try:
            if query.text == "3":
                raise Overloaded("embedder")
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append(query.text)
            raise
        return vector(query)

    async def run(queries, timeout_s) -> None:
        await embed_each(embed, queries, at_once=100, timeout_s=timeout_s)
        await asyncio.sleep(0)

    with pytest.raises(Overloaded):
        asyncio.run(run(QUERIES, 30))
    assert len(ended) == 9
    with pytest.raises(DeadlineExceeded, match="embedder"):
        asyncio.run(run(QUERIES[:2], 0.01))


def test_documents_are_compared_with_their_cosines():
    seen: list[Document] = []

    async def embed(queries) -> list[np.ndarray | str]:
        assert [query.text for query in queries] == ["2", "0", "1", "2"]
        return [vector(query) for query in queries]

    async def compare(query: Query, documents: list[Document]) -> Ranking:
        seen.extend(documents)
        return Ranking(order=(2, 1, 0), relevance=(0.1, 0.2, 0.3), null=(0.0,) * 3)

    ranking = asyncio.run(rank(Query(text="2"), DOCUMENTS, embed=embed, compare=compare, timeout_s=5))
    assert ranking.order == (2, 1, 0)
    assert [document.score for document in seen] == [1, 3, 5]
    assert [document.text for document in seen] == ["0", "1", "2"]


@pytest.mark.parametrize(("bad", "said"), [(0, "query: odd"), (2, "documents.1: odd")])
def test_what_cannot_be_embedded_is_named(bad, said):
    async def embed(queries) -> list[np.ndarray | str]:
        return ["odd" if i == bad else vector(query) for i, query in enumerate(queries)]

    async def compare(query: Query, documents: list[Document]) -> Ranking:
        raise AssertionError("nothing is to be compared")

    with pytest.raises(Unanswerable, match=said):
        asyncio.run(rank(Query(text="2"), DOCUMENTS, embed=embed, compare=compare, timeout_s=5))


def test_a_comparison_that_is_late():
    async def embed(queries) -> list[np.ndarray | str]:
        return [vector(query) for query in queries]

    async def compare(query: Query, documents: list[Document]) -> Ranking:
        await asyncio.sleep(60)
        raise AssertionError

    with pytest.raises(DeadlineExceeded, match="reranker"):
        asyncio.run(rank(Query(text="2"), DOCUMENTS, embed=embed, compare=compare, timeout_s=0.01))
