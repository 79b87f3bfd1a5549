"""The HTTP interface of the service. Ray is not needed: what answers is any Backend."""

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse

import idem
from serve import catalogue, compatible, page, searching
from serve.access import TENANT, Admit
from serve.backend import Backend as Backend
from serve.backend import Picture as Picture
from serve.backend import Search as Search
from serve.described import describe
from serve.engine import DEPTH
from serve.envelope import Envelope
from serve.handlers import answer_errors
from serve.intake import Limits
from serve.pictures import Fetch, Pictures
from serve.replies import Health, Readiness, Version

ABOUT = """The very same product among billions, from a photo, a text, or both.

Every error has one body, `{"error": {"code", "message", "request_id"}}`: codes are stable, messages are for people. Unknown fields
are refused. Every answer has the header `X-Request-ID`, which is the caller's own where it sent one. `X-Timeout-Ms` says after how
many milliseconds an answer is of no use any more. 429 and 503 come with `Retry-After`.
"""


def create_gateway(
    backend: Backend,
    *,
    limits: Limits | None = None,
    depth: int = DEPTH,
    settings: str = "",
    admit: Admit | None = None,
    fetch: Fetch | None = None,
) -> FastAPI:
    """The ASGI application over `backend`; `settings` is what /version tells of the settings that answers depend on.

    admit: a request and the scope it needs to the tenant that asks, or ApiError; without it all are the tenant "default" and may do all.
    fetch: the bytes behind an image_url, or ApiError; without it every image_url is refused.
    """
    # The interactive documents of FastAPI load scripts from elsewhere, so there is the schema alone.
    app = FastAPI(
        title="Idem",
        version=idem.__version__,
        description=ABOUT,
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
    )
    limits = limits or Limits()
    pictures = Pictures(limits, fetch)
    app.add_middleware(Envelope)
    answer_errors(app)
    searching.add(app, backend, limits, pictures, depth=depth, admit=admit)
    compatible.add(app, backend, limits, pictures, admit=admit)
    catalogue.add(app, backend, limits, pictures, admit=admit)
    _add_state(app, backend, settings)
    _add_page(app)
    describe(app, keys=admit is not None)
    return app


def _add_state(app: FastAPI, backend: Backend, settings: str) -> None:
    """For whoever runs the service: no scope is needed, and nothing of a catalogue is told."""

    @app.get("/healthz")
    async def healthz() -> Health:
        return Health()

    @app.get("/readyz", response_model=Readiness, responses={503: {"model": Readiness, "description": "A part does not answer."}})
    async def readyz() -> JSONResponse:
        parts = await backend.ready(TENANT)
        ready = all(parts.values())
        return JSONResponse({"ready": ready, "parts": parts}, status_code=200 if ready else 503)

    @app.get("/version")
    async def version() -> Version:
        return Version(name="idem", version=idem.__version__, release=backend.release, settings=settings)


def _add_page(app: FastAPI) -> None:
    shown = page.load()

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(shown.html, headers=shown.headers)
