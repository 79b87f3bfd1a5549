"""A client of the service over HTTP, for Python.

    with Client("http://127.0.0.1:8000", key="idem_...") as idem:
        for result in idem.search(image="photo.jpg", top_k=5).results:
            ...

429 and 503 are tried again within `retry_s`, after the time that the service asks for; so is nothing else, because whether a request that
got no answer was done is not known. All errors are IdemError.
"""

import asyncio
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, TypeVar, Unpack

import httpx

from serve import sdk_calls
from serve.replies import BatchResponse, Changed, FeedbackResponse, RerankResponse, SearchResponse
from serve.sdk_calls import Ask, Call, Embedded, Happened, IdemError, ItemFields, Shown

__all__ = ["Ask", "AsyncClient", "Client", "Embedded", "Happened", "IdemError", "ItemFields", "Shown"]

T = TypeVar("T")

TIMEOUT_S = 30.0  # of one attempt
RETRY_S = 30.0


class _Attempts:
    """The attempts of one call: send `request`, show the answer to `seconds`, and wait so long before the next."""

    def __init__(self, call: Call[Any], key: str, retry_s: float) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.request: dict[str, Any] = {"method": call.method, "url": call.path.lstrip("/"), "headers": headers}
        if call.body is not None:
            self.request["json"] = call.body
        self.number, self.until = 0, time.monotonic() + retry_s

    def seconds(self, response: httpx.Response) -> float | None:
        waited = sdk_calls.wait_s(response, self.number, self.until - time.monotonic())
        self.number += 1
        return waited


def _unreachable(error: httpx.HTTPError) -> IdemError:
    return IdemError(0, "unreachable", f"no answer: {type(error).__name__} {error}")


class Client:
    """key: sent where the service asks for one. retry_s: for how long 429 and 503 are tried again, 0 for never.

    http: a client of httpx to use in place of one of our own, with its base_url set; who made it closes it.
    """

    def __init__(
        self, url: str = "", *, key: str = "", timeout_s: float = TIMEOUT_S, retry_s: float = RETRY_S, http: httpx.Client | None = None
    ) -> None:
        self.key, self.retry_s, self.owned = key, retry_s, http is None
        self.http = http or httpx.Client(base_url=url, timeout=timeout_s)

    def search(self, **ask: Unpack[Ask]) -> SearchResponse:
        """The products that a picture (a path or bytes), a text, or both show."""
        return self._do(sdk_calls.search(ask))

    def search_batch(self, asks: Sequence[Ask]) -> BatchResponse:
        """Several searches; each has a status of its own, with an answer or an error."""
        return self._do(sdk_calls.search_batch(asks))

    def embed(self, inputs: Sequence[str | Shown], *, dimensions: int | None = None) -> Embedded:
        """A vector for each input."""
        return self._do(sdk_calls.embed(inputs, dimensions))

    def rerank(self, query: str | Shown, documents: Sequence[str | Shown], *, top_n: int | None = None) -> RerankResponse:
        """Documents by how likely they are the very same product as the query."""
        return self._do(sdk_calls.rerank(query, documents, top_n))

    def put(self, item_id: str, **item: Unpack[ItemFields]) -> Changed:
        """Put a whole item, in place of the one with this id if there is one."""
        return self._do(sdk_calls.put(item_id, item))

    def delete(self, item_id: str) -> Changed:
        """Delete an item, known or not."""
        return self._do(sdk_calls.delete(item_id))

    def feedback(self, events: Sequence[Happened]) -> FeedbackResponse:
        """Clicks and purchases."""
        return self._do(sdk_calls.feedback(events))

    def _do(self, call: Call[T]) -> T:
        attempts = _Attempts(call, self.key, self.retry_s)
        while True:
            try:
                response = self.http.request(**attempts.request)
            except httpx.HTTPError as error:
                raise _unreachable(error) from error
            if (waited := attempts.seconds(response)) is None:
                return sdk_calls.understood(call, response)
            time.sleep(waited)

    def close(self) -> None:
        if self.owned:
            self.http.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class AsyncClient:
    """As Client, for asyncio. Files of pictures are read on the event loop."""

    def __init__(
        self, url: str = "", *, key: str = "", timeout_s: float = TIMEOUT_S, retry_s: float = RETRY_S, http: httpx.AsyncClient | None = None
    ) -> None:
        self.key, self.retry_s, self.owned = key, retry_s, http is None
        self.http = http or httpx.AsyncClient(base_url=url, timeout=timeout_s)

    async def search(self, **ask: Unpack[Ask]) -> SearchResponse:
        return await self._do(sdk_calls.search(ask))

    async def search_batch(self, asks: Sequence[Ask]) -> BatchResponse:
        return await self._do(sdk_calls.search_batch(asks))

    async def embed(self, inputs: Sequence[str | Shown], *, dimensions: int | None = None) -> Embedded:
        return await self._do(sdk_calls.embed(inputs, dimensions))

    async def rerank(self, query: str | Shown, documents: Sequence[str | Shown], *, top_n: int | None = None) -> RerankResponse:
        return await self._do(sdk_calls.rerank(query, documents, top_n))

    async def put(self, item_id: str, **item: Unpack[ItemFields]) -> Changed:
        return await self._do(sdk_calls.put(item_id, item))

    async def delete(self, item_id: str) -> Changed:
        return await self._do(sdk_calls.delete(item_id))

    async def feedback(self, events: Sequence[Happened]) -> FeedbackResponse:
        return await self._do(sdk_calls.feedback(events))

    async def _do(self, call: Call[T]) -> T:
        attempts = _Attempts(call, self.key, self.retry_s)
        while True:
            try:
                response = await self.http.request(**attempts.request)
            except httpx.HTTPError as error:
                raise _unreachable(error) from error
            if (waited := attempts.seconds(response)) is None:
                return sdk_calls.understood(call, response)
            await asyncio.sleep(waited)

    async def close(self) -> None:
        if self.owned:
            await self.http.aclose()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()
