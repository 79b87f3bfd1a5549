"""Around every request: its id, a bound on its body, and the headers of every answer."""

import re
from uuid import uuid4

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve import page
from serve.errors import ApiError

SMALL = 65_536  # bytes of a body that no route has asked for more of


def allow(request: Request, most: int) -> None:
    """How many bytes the body of this request may have, declared and as it arrives; called before it is read."""
    request.state.max_body = most


class Envelope:
    """The request's id is `request.state.request_id`, and a header of the answer. A body that is too large is ApiError 413."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        state = scope.setdefault("state", {})
        state["request_id"], state["max_body"] = _request_id(headers), SMALL
        length = headers.get("content-length", "0")
        declared = int(length[:19]) if length.isdecimal() else 0  # enough of any number to see that it is too large
        read = 0

        async def bounded() -> Message:
            nonlocal read
            message: Message = {"type": "http.request"} if declared > state["max_body"] else await receive()
            read += len(message.get("body", b""))
            if max(declared, read) > state["max_body"]:
                most = state["max_body"]
                raise ApiError(413, "request_too_large", f"the request is too large; at most {most:,} bytes are allowed")
            return message

        async def dressed(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update({**page.COMMON_HEADERS, "X-Request-ID": state["request_id"]})
            await send(message)

        await self.app(scope, bounded, dressed)


def _request_id(headers: Headers) -> str:
    """The caller's X-Request-ID if it is harmless in a log and a header, else a new one."""
    given = headers.get("x-request-id", "")
    return given if re.fullmatch(r"[\w.\-]{1,64}", given, re.ASCII) else uuid4().hex
