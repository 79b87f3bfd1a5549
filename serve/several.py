"""Several queries, or a query and documents that came with it, through parts that take one query each. Plain asyncio, as serve.flow."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import numpy as np

from idem.types import Document, Query, Ranking
from serve.flow import DeadlineExceeded, Unanswerable

Embed = Callable[[Query], Awaitable[np.ndarray | str]]
EmbedAll = Callable[[Sequence[Query]], Awaitable[list[np.ndarray | str]]]
Compare = Callable[[Query, list[Document]], Awaitable[Ranking]]


async def embed_each(embed: Embed, queries: Sequence[Query], *, at_once: int, timeout_s: float) -> list[np.ndarray | str]:
    """A vector (dim,) each or what is wrong with the query, in their order; at most `at_once` wait for the embedder, so that others get
    their turn between them. timeout_s: for each. DeadlineExceeded, or what `embed` raises, ends all."""
    turns = asyncio.Semaphore(at_once)

    async def one(query: Query) -> np.ndarray | str:
        async with turns:
            try:
                return await asyncio.wait_for(embed(query), timeout_s)
            except TimeoutError as error:
                raise DeadlineExceeded(f"the embedder did not answer within {timeout_s:g} s") from error

    tasks = [asyncio.ensure_future(one(query)) for query in queries]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def rank(query: Query, documents: Sequence[Document], *, embed: EmbedAll, compare: Compare, timeout_s: float) -> Ranking:
    """The reranker's verdict over documents that no retrieval has scored: their cosines, on which r depends too, are computed here.

    timeout_s: for the comparison. Unanswerable names the query or the document that cannot be embedded; DeadlineExceeded.
    """
    vectors = await embed([query, *(Query(image=document.image, text=document.text) for document in documents)])
    known = [vector for vector in vectors if not isinstance(vector, str)]
    if len(known) < len(vectors):
        bad, said = next((i, vector) for i, vector in enumerate(vectors) if isinstance(vector, str))
        raise Unanswerable(f"documents.{bad - 1}: {said}" if bad else f"query: {said}")
    scored = [replace(document, score=float(known[0] @ vector)) for document, vector in zip(documents, known[1:], strict=True)]
    try:
        return await asyncio.wait_for(compare(query, scored), timeout_s)
    except TimeoutError as error:
        raise DeadlineExceeded(f"the reranker did not answer within {timeout_s:g} s") from error
