"""What answers behind the interface: a protocol that serve.app's gateway and the tests' fakes keep to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from pydantic import BaseModel

from idem.types import Document, Query, Ranking
from serve.engine import Answer

UNHELD = "min_score"  # in Answer.degraded, where nothing was reranked that could be compared with it


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """One search. depth: products that the reranker sees. where: what the items must be like, as index.filters reads it.

    min_score: the least r of a result (0 to 1), None for all. release: the name of the one that must answer, None for the current one.
    deadline: time.monotonic() by which the asker has given up, None for the backend's own patience.
    """

    query: Query
    top_k: int
    rerank: bool
    depth: int
    where: Mapping[str, Any] | None = None
    min_score: float | None = None
    release: str | None = None
    tenant: str
    deadline: float | None = None


class Picture(BaseModel):
    data: bytes
    mime: str


class Backend(Protocol):
    """Every call names the tenant. Errors: those of serve.errors (NotSupported for what it cannot do at all, ReleaseNotServed, Unusable)
    and those of serve.flow; anything else is a fault of ours.

    embed: a vector (dim,) float32, L2-normalised, or what is wrong with the query. rerank: Document.score is not looked at. put: rows of
    schema.items, whole items; delete: known or not; both tell the sequence number of the last change. feedback: schema.EVENTS. item and
    picture: None for what is unknown. ready: whether each part answers.
    """

    @property
    def release(self) -> str: ...
    async def search(self, asked: Search) -> Answer: ...
    async def embed(self, tenant: str, queries: Sequence[Query]) -> list[np.ndarray | str]: ...
    async def rerank(self, tenant: str, query: Query, documents: Sequence[Document]) -> Ranking: ...
    async def put(self, tenant: str, rows: pa.Table) -> int: ...
    async def delete(self, tenant: str, item_ids: Sequence[str]) -> int: ...
    async def feedback(self, tenant: str, events: pa.Table) -> None: ...
    async def item(self, tenant: str, item_id: str) -> dict[str, Any] | None: ...
    async def picture(self, tenant: str, item_id: str) -> Picture | None: ...
    async def ready(self, tenant: str) -> dict[str, bool]: ...


def wanted(asked: Search) -> int:
    """How many hits to look for, so that `held` has top_k left wherever there are so many: the reranker's order is not that of r."""
    return asked.top_k if asked.min_score is None else max(asked.top_k, asked.depth)


def held(answer: Answer, asked: Search) -> Answer:
    """At most top_k hits, each of r >= min_score where one is asked for; those that the reranker did not see have none and go.

    Where it saw none at all, because it failed or there is no reranker, all stay and `degraded` says that min_score was not held to.
    """
    least = asked.min_score
    if least is None:
        return _cut(answer, range(min(asked.top_k, len(answer.hits))))
    known = [i for i, r in enumerate(answer.relevance) if r is not None]
    if answer.hits and not known:
        return _cut(replace(answer, degraded=(*answer.degraded, UNHELD)), range(min(asked.top_k, len(answer.hits))))
    return _cut(answer, [i for i in known if (r := answer.relevance[i]) is not None and r >= least][: asked.top_k])


def _cut(answer: Answer, kept: Sequence[int]) -> Answer:
    return replace(answer, hits=tuple(answer.hits[i] for i in kept), relevance=tuple(answer.relevance[i] for i in kept))
