"""The client of our own against the gateway in this process, and against answers that come otherwise than they should."""

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient

from serve import sdk_calls
from serve.api import create_gateway
from serve.errors import ApiError
from serve.intake import Limits
from serve.sdk import AsyncClient, Client, IdemError

ROOT = Path(__file__).resolve().parents[2]


def waiting(monkeypatch) -> list[float]:
    """What would have been waited, in place of waiting."""
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr("serve.sdk.time.sleep", waited.append)
    monkeypatch.setattr("serve.sdk.asyncio.sleep", sleep)
    return waited


def within(backend, use: Callable[[AsyncClient], Awaitable[None]], **options) -> None:
    async def run() -> None:
        transport = httpx.ASGITransport(create_gateway(backend, limits=Limits(max_documents=3), **options))
        async with httpx.AsyncClient(transport=transport, base_url="http://idem") as http:
            await use(AsyncClient(http=http, key="idem_a_b"))

    asyncio.run(run())


def test_every_call_over_asgi(backend, colour_shop, tmp_path):
    picture, path = colour_shop.pictures["red/0"], tmp_path / "red.png"
    path.write_bytes(picture)

    async def use(idem: AsyncClient) -> None:
        for source in (picture, path, str(path)):
            found = await idem.search(image=source, text="", top_k=2, rerank=False, filter={"category": "things"}, crop=(0, 0, 1, 1))
            assert [each.product_id for each in found.results] == ["red", "plum"]
            assert found.results[0].score == pytest.approx(1)
        batch = await idem.search_batch([{"text": "blue", "top_k": 1}, {"text": " "}])
        assert [each.status for each in batch.answers] == [200, 422]
        assert batch.answers[0].answer
        embedded = await idem.embed(["red", {"image": picture}], dimensions=2)
        assert embedded.vectors.shape == (2, 2)
        assert embedded.vectors.dtype == np.float32
        assert (embedded.model, embedded.tokens) == ("test-release", 65)
        ranked = await idem.rerank({"image": picture}, ["blue", "red"], top_n=1)
        assert [each.index for each in ranked.results] == [1]
        put = await idem.put("a/b ?#%", product_id="a", title="b", image=path, attributes={"price": 1.5})
        assert (put.item_id, put.sequence) == ("a/b ?#%", 1)
        assert (await idem.delete("a/b ?#%")).sequence == 2
        events = await idem.feedback(
            [
                {"query_id": found.request_id, "item_id": "a", "kind": "click", "time": datetime(2026, 1, 1, tzinfo=UTC)},
                {"query_id": found.request_id, "item_id": "a", "kind": "purchase"},
            ]
        )
        assert events.taken == 2

    within(backend, use)
    assert backend.changes[0]["image"].to_pylist() == [picture]
    assert backend.changes[1] == ["a/b ?#%"]


def test_the_key_is_sent_and_refusals_are_typed(backend):
    async def admit(request, scope) -> str:
        assert request.headers["authorization"] == "Bearer idem_a_b"
        if scope == "write":
            raise ApiError(403, "scope_missing", "this needs the scope 'write'")
        return "default"

    async def use(idem: AsyncClient) -> None:
        with pytest.raises(IdemError) as told:
            await idem.delete("a")
        assert (told.value.status, told.value.code, told.value.message) == (403, "scope_missing", "this needs the scope 'write'")
        assert told.value.request_id
        with pytest.raises(IdemError, match="1 to 3"):
            await idem.rerank("red", ["x"] * 4)

    within(backend, use, admit=admit)


def test_both_clients_have_the_same_calls(backend):
    with TestClient(create_gateway(backend)) as http:  # a client of httpx2, which asks alike
        idem = Client(http=http)  # pyright: ignore[reportArgumentType]
        assert idem.search(text="red", top_k=1).results[0].rank == 1
        assert idem.embed(["red"]).vectors.shape == (1, 3)
    public = [{name for name in vars(kind) if name[0] != "_"} for kind in (Client, AsyncClient)]
    assert public[0] == public[1]


ANSWER = {"request_id": "r", "item_id": "a", "sequence": 1}


def answering(*replies: httpx.Response) -> tuple[Client, AsyncClient, list[httpx.Request]]:
    """A client of each kind, whose requests are answered in turn, over and over."""
    asked: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        reply = replies[(len(asked) - 1) % len(replies)]
        return httpx.Response(reply.status_code, content=reply.content, headers=reply.headers)

    transport = httpx.MockTransport(handle)
    blocking = Client(http=httpx.Client(transport=transport, base_url="http://idem/prefix"), retry_s=20)
    return blocking, AsyncClient(http=httpx.AsyncClient(transport=transport, base_url="http://idem/prefix"), retry_s=20), asked


def busy(status: int, **headers: str) -> httpx.Response:
    body = {"error": {"code": "overloaded", "message": "later", "request_id": "r"}}
    return httpx.Response(status, json=body, headers={name.replace("_", "-"): value for name, value in headers.items()})


@pytest.mark.parametrize("status", [429, 503])
def test_it_comes_back_when_it_is_told_to(monkeypatch, status):
    waited = waiting(monkeypatch)
    blocking, awaiting, asked = answering(busy(status, retry_after="3"), busy(status), httpx.Response(200, json=ANSWER))
    assert blocking.delete("a").sequence == 1
    assert asyncio.run(awaiting.delete("a")).sequence == 1
    assert waited == [3, 1, 3, 1]
    assert {str(request.url) for request in asked} == {"http://idem/prefix/v1/items/a"}


def test_it_gives_up_rather_than_wait_beyond_its_time(monkeypatch):
    waited = waiting(monkeypatch)
    for reply, waits in ((busy(503, retry_after="21"), []), (busy(400), []), (busy(500, retry_after="1"), []), (busy(502), [])):
        blocking, awaiting, asked = answering(reply)
        for call in (lambda: blocking.delete("a"), lambda: asyncio.run(awaiting.delete("a"))):  # noqa: B023
            with pytest.raises(IdemError) as told:
                call()
            assert (told.value.status, told.value.code, told.value.request_id) == (reply.status_code, "overloaded", "r")
        assert len(asked) == 2
        assert waited == waits


def test_the_time_runs_out(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("serve.sdk.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("serve.sdk.time.sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    blocking, _, asked = answering(busy(429, retry_after="6"))
    with pytest.raises(IdemError):
        blocking.delete("a")
    assert len(asked) == 4
    assert clock[0] == 18


def test_how_long_a_wait_is():
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=10), usegmt=True)
    past = format_datetime(datetime.now(UTC) - timedelta(seconds=10), usegmt=True)
    told = [sdk_calls.wait_s(busy(503, retry_after=said), 0, 60) for said in ("0", "2.5", past, "soon", "-1", "1e999")]
    assert told == [0, 2.5, 0, 0.5, 0.5, None]
    assert sdk_calls.wait_s(busy(503, retry_after=soon), 0, 60) == pytest.approx(10, abs=2)
    assert [sdk_calls.wait_s(busy(503), attempt, 60) for attempt in range(6)] == [0.5, 1, 2, 4, 8, 8]


def test_answers_that_are_none_of_ours():
    for reply, status in (
        (httpx.Response(200, text="<html>"), 200),
        (httpx.Response(404, text="no"), 404),
        (httpx.Response(200, json=[]), 200),
    ):
        with pytest.raises(IdemError) as told:
            answering(reply)[0].delete("a")
        assert (told.value.status, told.value.code) == (status, "unexpected_answer")
    with pytest.raises(IdemError) as told:
        Client("http://127.0.0.1:9", timeout_s=1).delete("a")
    assert (told.value.status, told.value.code) == (0, "unreachable")


def test_a_picture_that_is_not_there_is_the_callers_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        answering(busy(503))[0].search(image=tmp_path / "none.png")


def test_it_needs_nothing_of_the_service():
    said = "import sys, serve.sdk; sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'faiss', 'lance', 'fastapi', 'pyarrow')))"
    assert subprocess.run([sys.executable, "-c", said], cwd=ROOT, check=False).returncode == 0
