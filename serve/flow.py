"""One request through the parts of the service, each behind an awaitable call: what runs at once, what may fail, by when.

Plain asyncio, so that deadlines and degraded answers are tested without Ray. The answer is that of serve.engine.Engine
on the same parts whenever nothing fails.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from idem.types import Hit, Query, Ranking
from index.merge import merge
from serve.engine import ROWS_PER_PRODUCT, Answer, compose, shortlist

log = logging.getLogger(__name__)
T = TypeVar("T")

RERANK = "rerank"


class PartError(Exception):
    """A part of the service could not do its work."""


class Overloaded(PartError):
    """A part has as many requests waiting as it may have; try again after `retry_after_s`."""

    def __init__(self, part: str, retry_after_s: int = 1) -> None:
        super().__init__(f"the {part} has no room for another request now; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class DeadlineExceeded(PartError):
    """A part that no answer can do without did not finish within the request's time."""


class Unanswerable(PartError):
    """The query itself cannot be used, which was seen only by the embedder."""


@dataclass(frozen=True, kw_only=True)
class Flow:
    """embed: a query to its vector (1, dim). shards: by name, vector and k to hits, best first. rerank: None without a reranker.

    timeout_s bounds a whole request; shard_timeout_s one shard, so that a dead shard leaves time for the reranker.
    """

    embed: Callable[[Query], Awaitable[np.ndarray]]
    shards: Mapping[str, Callable[[np.ndarray, int], Awaitable[list[Hit]]]]
    rerank: Callable[[Query, list[Hit]], Awaitable[Ranking]] | None
    timeout_s: float = 5.0
    shard_timeout_s: float = 1.0
    rows_per_product: int = ROWS_PER_PRODUCT

    async def search(self, query: Query, *, top_k: int, rerank: bool, depth: int) -> Answer:
        """Overloaded, DeadlineExceeded or PartError where not even a partial answer is possible."""
        start = time.perf_counter()
        deadline = start + self.timeout_s
        try:
            vector = await _until(deadline, self.embed(query))
        except TimeoutError as error:
            raise DeadlineExceeded(f"the embedder did not answer within {self.timeout_s:g} s") from error
        embedded = time.perf_counter()
        count = max(top_k, depth)
        found, degraded = await self._search_shards(vector, count * self.rows_per_product, deadline)
        retrieved = shortlist(merge(found, count * self.rows_per_product), count)
        searched = time.perf_counter()
        ranking = None
        if rerank and self.rerank is not None and retrieved:
            ranking = await self._try(RERANK, deadline, self.rerank(query, retrieved[:depth]))
            if ranking is None or ranking.degraded:
                ranking, degraded = None, [*degraded, RERANK]
        end = time.perf_counter()
        spans = {"embed": embedded - start, "search": searched - embedded, "rerank": end - searched, "total": end - start}
        return compose(retrieved, ranking, top_k=top_k, degraded=degraded, timings_ms={k: v * 1e3 for k, v in spans.items()})

    async def _search_shards(self, vector: np.ndarray, k: int, deadline: float) -> tuple[list[list[Hit]], list[str]]:
        """All shards at once; the hits of those that answered, and the names of those that did not."""
        until = min(deadline, time.perf_counter() + self.shard_timeout_s)
        answers = await asyncio.gather(*(self._try(name, until, call(vector, k)) for name, call in self.shards.items()))
        lost = [name for name, hits in zip(self.shards, answers, strict=True) if hits is None]
        if len(lost) == len(self.shards):
            raise PartError(f"no shard answered; asked were {', '.join(lost)}")
        return [hits for hits in answers if hits is not None], lost

    async def _try(self, name: str, deadline: float, call: Awaitable[T]) -> T | None:
        """The result of a part that an answer can do without, or None where it fails or is late."""
        try:
            return await _until(deadline, call)
        except (TimeoutError, PartError) as error:
            log.warning("answering without %s: %s", name, error or "too late")
            return None


async def _until(deadline: float, call: Awaitable[T]) -> T:
    return await asyncio.wait_for(call, max(deadline - time.perf_counter(), 0))
