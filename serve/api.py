"""The HTTP interface of the service. Ray is not needed: what answers is any Backend."""

import asyncio
import logging
import re
import time
from typing import Any, Protocol
from urllib.parse import quote
from uuid import uuid4

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import idem
from idem.types import Query
from serve import page
from serve.engine import DEPTH, Answer
from serve.flow import DeadlineExceeded, Overloaded, PartError, Unanswerable
from serve.intake import ApiError, Limits, read_search, request_schema

log = logging.getLogger(__name__)

DECODERS = 2  # pictures decoded at once: each may take 150 MB at the limit of pixels


class Result(BaseModel):
    """rank and retrieval_rank count from 1; score is a cosine; relevance is P(the very same product), null where not reranked."""

    rank: int
    item_id: str
    product_id: str
    title: str
    category: str
    score: float
    relevance: float | None
    retrieval_rank: int
    image_url: str


class SearchResponse(BaseModel):
    """degraded: parts that failed or came too late, empty for a full answer. timings_ms: wall time by stage, in the gateway."""

    request_id: str
    release: str
    results: list[Result]
    degraded: list[str]
    timings_ms: dict[str, float]


class Picture(BaseModel):
    data: bytes
    mime: str


class Backend(Protocol):
    """What answers behind the interface. `search` raises the errors of serve.flow; what is unknown is None."""

    @property
    def release(self) -> str: ...
    async def search(self, query: Query, *, top_k: int, rerank: bool, depth: int) -> Answer: ...
    async def item(self, item_id: str) -> dict[str, Any] | None: ...
    async def picture(self, item_id: str) -> Picture | None: ...
    async def ready(self) -> dict[str, bool]: ...


def image_url(item_id: str) -> str:
    return f"/v1/items/{quote(item_id, safe='/')}/image"


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


def create_gateway(backend: Backend, *, limits: Limits | None = None, depth: int = DEPTH, settings: str = "") -> FastAPI:
    """The ASGI application over `backend`; `settings` is what /version tells of the settings that answers depend on."""
    # The interactive documents of FastAPI load scripts from elsewhere, so there is the schema alone.
    app = FastAPI(title="Idem", version=idem.__version__, docs_url=None, redoc_url=None)
    limits = limits or Limits()
    app.add_middleware(Envelope, limit=limits.max_body)
    _answer_errors(app)
    _add_search(app, backend, limits, depth)
    _add_items(app, backend)
    _add_state(app, backend, settings)
    return app


def _add_search(app: FastAPI, backend: Backend, limits: Limits, depth: int) -> None:
    decoders = asyncio.Semaphore(DECODERS)
    shown = page.load()

    @app.post("/v1/search", openapi_extra={"requestBody": request_schema()})
    async def search(request: Request) -> SearchResponse:
        start = time.perf_counter()
        asked, query = await read_search(request, limits, decoders)
        read_ms = (time.perf_counter() - start) * 1e3
        answer = await backend.search(query, top_k=asked.top_k, rerank=asked.rerank, depth=asked.depth or depth)
        timings = {"read": round(read_ms, 2), **answer.timings_ms, "total": round((time.perf_counter() - start) * 1e3, 2)}
        return respond(answer, request_id=request.state.request_id, release=backend.release, timings_ms=timings)

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(shown.html, headers=shown.headers)


def _add_items(app: FastAPI, backend: Backend) -> None:
    @app.get("/v1/items/{item_id:path}/image")
    async def picture(item_id: str) -> Response:
        found = await backend.picture(item_id)
        if found is None:
            raise ApiError(404, "image_not_found", f"no item {item_id!r} with a picture in release {backend.release}")
        return Response(found.data, media_type=found.mime, headers={"Cache-Control": "public, max-age=3600"})

    @app.get("/v1/items/{item_id:path}")
    async def item(item_id: str) -> dict[str, Any]:
        found = await backend.item(item_id)
        if found is None:
            raise ApiError(404, "item_not_found", f"no item {item_id!r} in release {backend.release}")
        return {**found, "image_url": image_url(item_id)}


def _add_state(app: FastAPI, backend: Backend, settings: str) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        parts = await backend.ready()
        ready = all(parts.values())
        return JSONResponse({"ready": ready, "parts": parts}, status_code=200 if ready else 503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"name": "idem", "version": idem.__version__, "release": backend.release, "settings": settings}


class Envelope:
    """Around every request: its id, a bound on its body (declared, and as it arrives), and the headers of every answer."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        scope.setdefault("state", {})["request_id"] = _request_id(headers)
        declared = headers.get("content-length", "0")
        refused = declared.isdigit() and int(declared) > self.limit
        read = 0

        async def bounded() -> Message:
            nonlocal read
            message: Message = {"type": "http.request"} if refused else await receive()
            read += len(message.get("body", b""))
            if refused or read > self.limit:
                raise ApiError(413, "request_too_large", f"the request is too large; at most {self.limit:,} bytes are allowed")
            return message

        async def dressed(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(page.COMMON_HEADERS)
            await send(message)

        await self.app(scope, bounded, dressed)


def _request_id(headers: Headers) -> str:
    """The caller's X-Request-ID if it is harmless in a log, else a new one."""
    given = headers.get("x-request-id", "")
    return given if re.fullmatch(r"[\w.\-]{1,64}", given) else uuid4().hex


def _error(request: Request, error: ApiError) -> JSONResponse:
    """The one body of every error."""
    said = {"code": error.code, "message": str(error), "request_id": request.state.request_id}
    return JSONResponse({"error": said}, status_code=error.status, headers=error.headers)


def _answer_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        return _error(request, error)

    @app.exception_handler(HTTPException)
    async def unrouted(request: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        return _error(request, ApiError(error.status_code, code, f"{request.method} {request.url.path}: {error.detail}", error.headers))

    @app.exception_handler(PartError)
    async def failed(request: Request, error: PartError) -> JSONResponse:
        if isinstance(error, Overloaded):
            return _error(request, ApiError(503, "overloaded", str(error), {"Retry-After": str(error.retry_after_s)}))
        if isinstance(error, Unanswerable):
            return _error(request, ApiError(422, "query_unusable", str(error)))
        if isinstance(error, DeadlineExceeded):
            return _error(request, ApiError(504, "deadline_exceeded", str(error)))
        return _error(request, ApiError(503, "unavailable", str(error), {"Retry-After": "5"}))

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        log.error("request %s failed", request.state.request_id, exc_info=error)
        return _error(request, ApiError(500, "internal", "an error of ours; the log has it under this request_id"))
