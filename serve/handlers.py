"""Every fault as an ApiError, and every ApiError in the one body of errors."""

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from serve.errors import ApiError, invalid
from serve.flow import DeadlineExceeded, Overloaded, PartError, Unanswerable
from serve.replies import ErrorReply, Told

log = logging.getLogger(__name__)


def known(error: Exception) -> ApiError | None:
    """The answer to a fault that can be told to whoever asked; None for one of ours."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Overloaded):
        return ApiError(503, "overloaded", str(error), {"Retry-After": str(error.retry_after_s)})
    if isinstance(error, Unanswerable):
        return ApiError(422, "query_unusable", str(error))
    if isinstance(error, DeadlineExceeded):
        return ApiError(504, "deadline_exceeded", str(error))
    if isinstance(error, PartError):
        return ApiError(503, "unavailable", str(error), {"Retry-After": "5"})
    if isinstance(error, ClientDisconnect):
        return ApiError(400, "client_gone", "the connection ended before the request did")
    return None


def internal(request_id: str, error: Exception) -> ApiError:
    """A fault of ours, whose details stay in the log."""
    log.error("request %s failed", request_id, exc_info=error)
    return ApiError(500, "internal", "an error of ours; the log has it under this request_id")


def told(request_id: str, error: ApiError) -> Told:
    return Told(code=error.code, message=str(error), request_id=request_id)


def _reply(request: Request, error: ApiError) -> JSONResponse:
    body = ErrorReply(error=told(request.state.request_id, error))
    headers = {**error.headers, "X-Request-ID": request.state.request_id}  # of 500 nothing else comes by to add it
    return JSONResponse(body.model_dump(), status_code=error.status, headers=headers)


def answer_errors(app: FastAPI) -> None:
    async def refused(request: Request, error: Exception) -> JSONResponse:
        return _reply(request, known(error) or internal(request.state.request_id, error))

    for kind in (ApiError, PartError, ClientDisconnect, Exception):
        app.add_exception_handler(kind, refused)

    @app.exception_handler(HTTPException)
    async def unrouted(request: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        return _reply(request, ApiError(error.status_code, code, f"{request.method} {request.url.path}: {error.detail}", error.headers))

    @app.exception_handler(RequestValidationError)
    async def misread(request: Request, error: RequestValidationError) -> JSONResponse:
        return _reply(request, invalid("; ".join(f"{fault['loc'][-1]}: {fault['msg']}" for fault in error.errors()[:3])))
