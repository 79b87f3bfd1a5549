"""What a search may ask for beyond a picture and a text."""

import base64
import io
import json
import time

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from idem import images
from idem.types import Hit
from serve.api import create_gateway
from serve.backend import UNHELD, Search, held
from serve.engine import Answer
from serve.errors import ApiError, NotSupported
from serve.flow import Overloaded
from serve.intake import Limits
from serve.pictures import cropped

LIMITS = Limits(max_image_bytes=200_000, max_pixels=1_000_000, max_text=100, max_searches=4, max_many_pixels=1_500_000)


@pytest.fixture
def client(backend) -> TestClient:
    return TestClient(create_gateway(backend, limits=LIMITS, depth=3), raise_server_exceptions=False)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def halves() -> Image.Image:
    """Red on the left, blue on the right."""
    picture = Image.new("RGB", (40, 20), (200, 30, 30))
    picture.paste((30, 60, 210), (20, 0, 40, 20))
    return picture


def error_of(reply, status: int, code: str) -> str:
    assert reply.status_code == status, reply.text
    assert reply.json()["error"]["code"] == code
    return reply.json()["error"]["message"]


def test_a_crop_is_searched_with(client, backend):
    picture, box = png(halves()), [0.5, 0, 1, 1]
    for reply in (
        client.post("/v1/search", json={"image": b64(picture), "crop": box}),
        client.post("/v1/search", files={"image": ("a.png", picture)}, data={"crop": json.dumps(box)}),
    ):
        assert reply.status_code == 200, reply.text
        assert reply.json()["results"][2]["product_id"] == "blue"  # the first before the reranker of the shop turns three round
        seen = images.decode(backend.asked[-1][0].image)
        assert seen.size == (20, 20)
        assert np.abs(np.asarray(seen, int) - (30, 60, 210)).max() <= 3
    client.post("/v1/search", json={"image": b64(picture), "crop": [0, 0, 1, 1]})
    assert backend.asked[-1][0].image == picture


def test_a_crop_is_of_the_upright_picture(client, backend):
    stream, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown, the left half is above
    halves().save(stream, "JPEG", quality=95, exif=exif)
    client.post("/v1/search", json={"image": b64(stream.getvalue()), "crop": [0, 0, 1, 0.5]})
    seen = images.decode(backend.asked[-1][0].image)
    assert seen.size == (20, 20)
    assert np.asarray(seen).mean((0, 1))[0] > 150


@pytest.mark.parametrize(
    "box", [[0, 0, 1], [0.5, 0, 0.5, 1], [0.6, 0, 0.5, 1], [0, 0, 1.1, 1], [-0.1, 0, 1, 1], [0, 0, 40, 20], "0,0,1,1", {}]
)
def test_a_box_that_is_none(client, backend, box):
    assert "crop" in error_of(client.post("/v1/search", json={"image": b64(png(halves())), "crop": box}), 422, "invalid_request")
    error_of(client.post("/v1/search", json={"text": "red", "crop": [0, 0, 1, 1]}), 422, "invalid_request")
    reply = client.post("/v1/search", files={"image": ("a.png", png(halves()))}, data={"crop": "[0, 0, NaN, 1]"})
    error_of(reply, 400, "invalid_json")
    assert backend.asked == []


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (70_000, 2)])
@pytest.mark.parametrize("box", [(0.3, 0.3, 0.30000000000000004, 0.9), (0, 0, 1e-12, 1), (1 - 1e-16, 0, 1, 1), (0, 0, 1, 0.999)])
def test_a_crop_has_at_least_a_pixel(size, box):
    found = images.decode(cropped(Image.new("RGB", size, "red"), box))
    assert 1 <= found.width <= size[0]
    assert 1 <= found.height <= size[1]


def test_a_filter_reaches_the_backend_as_it_is_read(client, backend):
    asked = {"category": "things", "price": {"gte": 10, "lt": 20.5}, "seller": ["a", "b"], "new": True, "style": {"in": ["x"], "ne": "y"}}
    client.post("/v1/search", json={"text": "red", "filter": asked})
    client.post("/v1/search", data={"filter": json.dumps(asked)}, files={"image": ("a.png", png(halves()))})
    assert [search.where for search in backend.searches] == [asked, asked]
    client.post("/v1/search", json={"text": "red", "filter": {}})
    client.post("/v1/search", json={"text": "red"})
    assert [search.where for search in backend.searches[2:]] == [None, None]


def test_a_filter_holds(client):
    found = client.post("/v1/search", json={"text": "red", "filter": {"product_id": ["blue", "sand"]}}).json()["results"]
    assert {each["product_id"] for each in found} == {"blue", "sand"}
    assert client.post("/v1/search", json={"text": "red", "filter": {"category": "none"}}).json()["results"] == []
    message = error_of(client.post("/v1/search", json={"text": "red", "filter": {"brand": "x"}}), 422, "invalid_filter")
    assert "'brand'" in message


@pytest.mark.parametrize(
    "asked",
    [
        {"a": None},
        {"a": {}},
        {"a": {"eq": None}},
        {"a": {"like": "x"}},
        {"a": [None]},
        {"a": [[1]]},
        {"a": {"gt": [1]}},
        {"": 1},
        {"a": "x" * 513},
        {"a": list(range(1_001))},
        {f"a{i}": 1 for i in range(33)},
        [],
        "a = 1",
    ],
    ids=str,
)
def test_a_filter_that_cannot_be_read(client, backend, asked):
    assert "filter" in error_of(client.post("/v1/search", json={"text": "red", "filter": asked}), 422, "invalid_request")
    assert backend.asked == []


def test_no_such_product_is_an_empty_list(client):
    def found(**asked) -> list[float | None]:
        return [each["relevance"] for each in client.post("/v1/search", json={"text": "red", **asked}).json()["results"]]

    assert found() == [0.75, 0.5, 0.25, None, None]
    assert found(min_score=0) == [0.75, 0.5, 0.25]
    assert found(min_score=0.5) == [0.75, 0.5]
    assert found(min_score=0.5, top_k=1) == [0.75]
    assert found(min_score=0.76) == []
    error_of(client.post("/v1/search", json={"text": "red", "min_score": 0.5, "rerank": False}), 422, "invalid_request")
    error_of(client.post("/v1/search", json={"text": "red", "min_score": 1.01}), 422, "invalid_request")


def test_the_least_relevance_is_held_before_the_list_is_cut():
    hits = tuple(Hit(item_id=str(i), product_id=str(i), family_id="", category="", title="", score=0.0) for i in range(4))
    asked = Search(query=None, top_k=2, rerank=True, depth=4, min_score=0.5, tenant="t")  # pyright: ignore[reportArgumentType]
    found = held(Answer(hits=hits, relevance=(0.4, 0.9, 0.6, 0.7), retrieved=hits), asked)
    assert [hit.item_id for hit in found.hits] == ["1", "2"]
    assert found.relevance == (0.9, 0.6)
    unjudged = held(Answer(hits=hits, relevance=(None,) * 4, retrieved=hits, degraded=("rerank",)), asked)
    assert [hit.item_id for hit in unjudged.hits] == ["0", "1"]
    assert unjudged.degraded == ("rerank", UNHELD)
    assert held(Answer(hits=(), relevance=(), retrieved=()), asked).degraded == ()


def test_a_release_by_name(client):
    assert client.post("/v1/search", json={"text": "red", "release": "test-release"}).json()["release"] == "test-release"
    message = error_of(client.post("/v1/search", json={"text": "red", "release": "other"}), 404, "release_not_served")
    assert "'other'" in message
    assert "'test-release'" in message


def test_the_time_of_a_request_reaches_the_backend(client, backend):
    before = time.monotonic()
    client.post("/v1/search", json={"text": "red"}, headers={"X-Timeout-Ms": "2000"})
    client.post("/v1/search", json={"text": "red"})
    assert 2 <= backend.searches[0].deadline - before < 30
    assert backend.searches[1].deadline is None
    for wrong in ("0", "-1", "1.5", "600001", "soon", "1" * 400, "²"):
        error_of(client.post("/v1/search", json={"text": "red"}, headers={"X-Timeout-Ms": wrong.encode()}), 422, "invalid_request")


def test_a_url_is_refused_where_nothing_fetches(client):
    error_of(client.post("/v1/search", json={"image_url": "https://shop.example/a.png"}), 422, "image_url_not_allowed")
    error_of(client.post("/v1/search", json={"image": "HTTPS://shop.example/a.png"}), 422, "image_url_not_allowed")


def test_a_url_is_fetched_and_checked_like_any_picture(backend, colour_shop):
    served = {"https://a/red": colour_shop.pictures["red/0"], "https://a/text": b"%PDF-1.7", "https://a/large": b"x" * 200_001}

    async def fetch(url: str) -> bytes:
        if url not in served:
            raise ApiError(422, "image_url_unreachable", f"image_url {url}: nothing there")
        return served[url]

    client = TestClient(create_gateway(backend, limits=LIMITS, fetch=fetch))
    for body in ({"image_url": "https://a/red"}, {"image": "https://a/red", "text": "x"}):
        assert client.post("/v1/search", json=body).status_code == 200
        assert backend.asked[-1][0].image == served["https://a/red"]
    assert client.post("/v1/search", data={"image_url": "https://a/red"}, files={"image": ("", b"")}).status_code == 200
    error_of(client.post("/v1/search", json={"image_url": "https://a/text"}), 422, "image_unreadable")
    error_of(client.post("/v1/search", json={"image_url": "https://a/large"}), 413, "image_too_many_bytes")
    error_of(client.post("/v1/search", json={"image_url": "https://a/gone"}), 422, "image_url_unreachable")
    for both in ({"image": b64(served["https://a/red"])}, {"image": "https://a/red"}):
        error_of(client.post("/v1/search", json={"image_url": "https://a/red", **both}), 422, "invalid_request")
    reply = client.post("/v1/search", data={"image_url": "https://a/red"}, files={"image": ("a.png", served["https://a/red"])})
    error_of(reply, 422, "invalid_request")


def test_a_form_has_each_field_once_and_texts_that_are_texts(client):
    error_of(client.post("/v1/search", data={"text": ["red", "blue"]}, files={"x": ("", b"")}), 422, "invalid_request")
    body = b'--x\r\nContent-Disposition: form-data; name="text"\r\n\r\n\\ud800\r\n--x--\r\n'
    kind = "multipart/form-data; boundary=x; charset=unicode_escape"
    assert client.post("/v1/search", content=body, headers={"Content-Type": kind}).status_code in (200, 400)


def test_every_search_names_its_tenant_and_its_scope(backend):
    seen = []

    async def admit(request, scope) -> str:
        seen.append(scope)
        if request.headers.get("authorization") != "Bearer mine":
            raise ApiError(401, "key_missing", "no key", {"WWW-Authenticate": "Bearer"})
        return "shop-1"

    client = TestClient(create_gateway(backend, admit=admit, limits=LIMITS))
    routes = [
        ("POST", "/v1/search", {"text": "red"}, "search"),
        ("POST", "/v1/search:batch", [{"text": "red"}], "search"),
        ("POST", "/v1/embeddings", {"input": "red"}, "search"),
        ("POST", "/v1/rerank", {"query": "red", "documents": ["x"]}, "search"),
        ("POST", "/v2/rerank", {"query": "red", "documents": ["x"]}, "search"),
        ("GET", "/v1/items/red/0", None, "search"),
        ("GET", "/v1/items/red/0/image", None, "search"),
        ("PUT", "/v1/items/a", {"product_id": "a", "title": "b"}, "write"),
        ("DELETE", "/v1/items/a", None, "write"),
        ("POST", "/v1/feedback", {"events": [{"query_id": "q", "item_id": "a", "kind": "click"}]}, "write"),
    ]
    for method, path, body, scope in routes:
        # Whoever has no key is told before anything of the body is looked at.
        refused = client.request(method, path, content=b"{", headers={"Content-Type": "application/json"})
        error_of(refused, 401, "key_missing")
        assert refused.headers["www-authenticate"] == "Bearer"
        assert backend.tenants == []
        reply = client.request(method, path, json=body, headers={"Authorization": "Bearer mine"})
        assert reply.status_code in (200, 202), reply.text
        assert backend.tenants == ["shop-1"]
        assert seen == [scope, scope]
        backend.tenants.clear()
        seen.clear()
    for path in ("/healthz", "/readyz", "/version", "/", "/openapi.json"):
        assert client.get(path).status_code == 200
    assert seen == []
    document = client.get("/openapi.json").json()
    assert {document["paths"]["/v1/feedback"]["post"]["x-scope"], document["paths"]["/v1/search"]["post"]["x-scope"]} == {"write", "search"}
    assert document["paths"]["/v1/search"]["post"]["security"]
    assert "private" in client.get("/v1/items/red/0/image", headers={"Authorization": "Bearer mine"}).headers["cache-control"]


def test_what_a_backend_cannot_do_is_said(client, backend):
    backend.fault = NotSupported("filters are not for this one")
    assert "filters" in error_of(client.post("/v1/search", json={"text": "red"}), 501, "not_supported")


def test_a_batch_is_answered_in_order_each_by_itself(client, backend, colour_shop):
    asked = [{"text": "red", "top_k": 1}, {"text": ""}, {"image": b64(colour_shop.pictures["blue/0"]), "rerank": False}, {"top_k": "x"}]
    reply = client.post("/v1/search:batch", json=asked, headers={"X-Request-ID": "mine"})
    assert reply.status_code == 200
    answers = reply.json()["answers"]
    assert [each["status"] for each in answers] == [200, 422, 200, 422]
    assert [each["error"] and each["error"]["code"] for each in answers] == [None, "query_empty", None, "invalid_request"]
    assert answers[0]["answer"]["request_id"] == "mine-0"
    assert answers[3]["error"]["request_id"] == "mine-3"
    assert answers[2]["answer"]["results"][0]["product_id"] == "blue"
    alone = client.post("/v1/search", json=asked[0]).json()
    assert answers[0]["answer"]["results"] == alone["results"]
    for wrong in ([], [{"text": "red"}] * 5, {"searches": []}):
        error_of(client.post("/v1/search:batch", json=wrong), 422, "invalid_request")


def test_faults_in_a_batch_are_values(client, backend):
    for fault, status, code in [(Overloaded("embedder"), 503, "overloaded"), (RuntimeError("secret"), 500, "internal")]:
        backend.fault = fault
        answers = client.post("/v1/search:batch", json=[{"text": "red"}] * 2).json()["answers"]
        assert [(each["status"], each["error"]["code"]) for each in answers] == [(status, code)] * 2
        assert "secret" not in str(answers)


def test_the_pictures_of_a_batch_share_a_bound(client):
    large = b64(png(Image.new("RGB", (1000, 900), "red")))
    answers = client.post("/v1/search:batch", json=[{"image": large}] * 2).json()["answers"]
    assert sorted(each["status"] for each in answers) == [200, 413]
    assert [each["error"]["code"] for each in answers if each["error"]] == ["images_too_many_pixels"]
