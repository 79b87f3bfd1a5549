"""The routes that search: one at a time, and several at once."""

import asyncio
import time
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request

from serve.access import Admit, Needs
from serve.backend import Backend, Search
from serve.bodies import BatchRequest, SearchRequest
from serve.catalogue import image_url
from serve.described import POSTED, body, errors
from serve.engine import Answer
from serve.errors import invalid
from serve.handlers import internal, known, told
from serve.intake import Limits, checked, deadline, read_json, read_search, require_at_most, validated, where_of
from serve.pictures import Pictures, Room
from serve.replies import BatchEntry, BatchResponse, Result, SearchResponse

AT_ONCE = 4  # searches of one batch, which leaves room for those of others


def respond(answer: Answer, *, request_id: str, release: str, timings_ms: dict[str, float]) -> SearchResponse:
    """The answer as it goes out, with the place of every hit before reranking."""
    before = {hit.item_id: rank for rank, hit in enumerate(answer.retrieved, 1)}
    results = [
        Result(
            rank=rank,
            item_id=hit.item_id,
            product_id=hit.product_id,
            title=hit.title,
            category=hit.category,
            score=round(hit.score, 6),
            relevance=None if relevance is None else round(relevance, 6),
            retrieval_rank=before[hit.item_id],
            image_url=image_url(hit.item_id),
        )
        for rank, (hit, relevance) in enumerate(zip(answer.hits, answer.relevance, strict=True), 1)
    ]
    return SearchResponse(request_id=request_id, release=release, results=results, degraded=list(answer.degraded), timings_ms=timings_ms)


@dataclass(frozen=True, kw_only=True)
class Asker:
    """Answers searches for one tenant until a time. depth: where a search names none."""

    backend: Backend
    pictures: Pictures
    depth: int
    tenant: str
    until: float | None

    async def answer(
        self, asked: SearchRequest, request_id: str, start: float, *, data: bytes | None = None, room: Room | None = None
    ) -> SearchResponse:
        """start: time.perf_counter() when the request came; data: the picture that a form brought."""
        query = await self.pictures.query(asked.shown(), data=data, crop=asked.crop, room=room)
        read_ms = (time.perf_counter() - start) * 1e3
        search = Search(
            query=query,
            top_k=asked.top_k,
            rerank=asked.rerank,
            depth=asked.depth or self.depth,
            where=where_of(asked),
            min_score=asked.min_score,
            release=asked.release,
            tenant=self.tenant,
            deadline=self.until,
        )
        found = await self.backend.search(search)
        timings = {"read": round(read_ms, 2), **found.timings_ms, "total": round((time.perf_counter() - start) * 1e3, 2)}
        return respond(found, request_id=request_id, release=asked.release or self.backend.release, timings_ms=timings)

    async def entry(self, fields: Any, request_id: str, limits: Limits, room: Room) -> BatchEntry:
        """As `answer`; what goes wrong is told as a value."""
        start = time.perf_counter()
        try:
            asked = checked(validated(SearchRequest, fields), limits)
            return BatchEntry(status=200, answer=await self.answer(asked, request_id, start, room=room))
        except Exception as error:
            fault = known(error) or internal(request_id, error)
            return BatchEntry(status=fault.status, error=told(request_id, fault))


def add(app: FastAPI, backend: Backend, limits: Limits, pictures: Pictures, *, depth: int, admit: Admit | None) -> None:
    needs = Needs("search", admit)

    def asker(request: Request, tenant: str) -> Asker:
        return Asker(backend=backend, pictures=pictures, depth=depth, tenant=tenant, until=deadline(request))

    @app.post("/v1/search", openapi_extra=body(SearchRequest, form=True, waits=True), responses=errors(*POSTED))
    async def search(request: Request, tenant: Annotated[str, Depends(needs)]) -> SearchResponse:
        """The products that a picture, a text, or both show, best first, one result a product."""
        start, asks = time.perf_counter(), asker(request, tenant)
        asked, data = await read_search(request, limits)
        return await asks.answer(asked, request.state.request_id, start, data=data)

    @app.post(
        "/v1/search:batch",
        openapi_extra=body(BatchRequest, waits=True),
        responses=errors(*POSTED),
    )
    async def search_batch(request: Request, tenant: Annotated[str, Depends(needs)]) -> BatchResponse:
        """Several searches, answered in their order; each has its own status, and an answer or an error, and a request_id of its own."""
        asks, name = asker(request, tenant), request.state.request_id
        sent = await read_json(request, limits.max_many_body)
        if not isinstance(sent, list):
            raise invalid(f"the body must be a JSON list of searches, found {type(sent).__name__}")
        require_at_most("the number of searches", len(sent), limits.max_searches)
        room, turns = pictures.room(), asyncio.Semaphore(AT_ONCE)

        async def one(number: int, fields: Any) -> BatchEntry:
            async with turns:
                return await asks.entry(fields, f"{name}-{number}", limits, room)

        return BatchResponse(request_id=name, answers=await asyncio.gather(*(one(i, each) for i, each in enumerate(sent))))
