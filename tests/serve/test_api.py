import base64
import io

import httpx
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from serve.api import create_gateway
from serve.flow import DeadlineExceeded, Overloaded, PartError, Unanswerable
from serve.intake import Limits

LIMITS = Limits(max_image_bytes=200_000, max_pixels=1_000_000, max_text=100, max_top_k=20, max_depth=30)


@pytest.fixture
def client(backend) -> TestClient:
    return TestClient(create_gateway(backend, limits=LIMITS, depth=3), raise_server_exceptions=False)


@pytest.fixture
def red(colour_shop) -> bytes:
    return colour_shop.pictures["red/0"]


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def refused(reply, status: int, code: str) -> str:
    """The message of an error with this status and code, in the one form that errors have."""
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"code", "message", "request_id"}
    assert error["code"] == code
    assert error["request_id"]
    return error["message"]


def test_json_and_form_give_the_same_answer(client, red):
    fields = {"text": "", "top_k": 4, "rerank": True, "depth": 3}
    replies = [
        client.post("/v1/search", json={"image": b64(red), **fields}),
        client.post("/v1/search", json={"image": "data:image/png;base64," + b64(red), **fields}),
        client.post("/v1/search", data={k: str(v) for k, v in fields.items()}, files={"image": ("a.png", red)}),
    ]
    assert [reply.status_code for reply in replies] == [200] * 3
    assert replies[0].json()["results"] == replies[1].json()["results"] == replies[2].json()["results"]


def test_the_answer_says_where_each_hit_was_before_reranking(client, red):
    answer = client.post("/v1/search", json={"image": b64(red), "top_k": 4}, headers={"X-Request-ID": "mine-1"}).json()
    assert answer["request_id"] == "mine-1"
    assert answer["release"] == "test-release"
    assert answer["degraded"] == []
    assert [r["rank"] for r in answer["results"]] == [1, 2, 3, 4]
    assert [r["retrieval_rank"] for r in answer["results"]] == [3, 2, 1, 4]
    assert [r["relevance"] for r in answer["results"]] == [0.75, 0.5, 0.25, None]
    assert answer["results"][2]["product_id"] == "red"
    assert {"read", "embed", "search", "rerank", "total"} <= set(answer["timings_ms"])
    assert client.get(answer["results"][0]["image_url"]).status_code == 200


def test_settings_reach_the_backend(client, backend, red):
    client.post("/v1/search", data={"text": " blue ", "rerank": "false"}, files={"image": ("a.png", red)})
    client.post("/v1/search", json={"text": "blue", "top_k": 20, "depth": 30})
    (first, asked), (second, most) = backend.asked
    assert first.image == red
    assert asked == {"top_k": 10, "rerank": False, "depth": 3}
    assert second.image is None
    assert most == {"top_k": 20, "rerank": True, "depth": 30}


def test_an_empty_file_field_of_a_browser_is_no_picture(client, backend):
    part = b'--x\r\nContent-Disposition: form-data; name="image"; filename=""\r\nContent-Type: application/octet-stream\r\n\r\n\r\n'
    text = b'--x\r\nContent-Disposition: form-data; name="text"\r\n\r\nred\r\n--x--\r\n'
    reply = client.post("/v1/search", content=part + text, headers={"Content-Type": "multipart/form-data; boundary=x"})
    assert reply.status_code == 200, reply.text
    assert backend.asked[0][0].image is None


@pytest.mark.parametrize(
    ("body", "status", "code", "said"),
    [
        ({}, 422, "query_empty", "image, a text, or both"),
        ({"text": "  "}, 422, "query_empty", "image, a text, or both"),
        ({"image": "no base64!"}, 422, "image_not_base64", "base64"),
        ({"image": "é"}, 422, "image_not_base64", "base64"),
        ({"image": b64(b"%PDF-1.7 no picture")}, 422, "image_unreadable", "25 50 44 46"),
        ({"image": b64(b"x" * 200_001)}, 413, "image_too_many_bytes", "200,000"),
        ({"image": "A" * 500_000}, 413, "request_too_large", "bytes are allowed"),
        ({"text": "red", "top_k": 0}, 422, "invalid_request", "top_k"),
        ({"text": "red", "top_k": 21}, 422, "invalid_request", "1 to 20"),
        ({"text": "red", "depth": 31}, 422, "invalid_request", "1 to 30"),
        ({"text": "r" * 101}, 422, "invalid_request", "at most 100"),
        ({"text": "red", "topk": 3}, 422, "invalid_request", "Allowed fields: image, text, top_k, rerank, depth"),
        ([1], 422, "invalid_request", "JSON object"),
    ],
)
def test_bad_requests_say_what_is_allowed(client, backend, body, status, code, said):
    assert said in refused(client.post("/v1/search", json=body), status, code)
    assert backend.asked == []


def test_pictures_that_break_while_decoding_are_refused(client, red):
    whole = io.BytesIO()
    Image.effect_noise((200, 200), 90).save(whole, "PNG")
    cut = whole.getvalue()[:9000]
    assert "cannot be decoded" in refused(client.post("/v1/search", json={"image": b64(cut)}), 422, "image_undecodable")
    large = io.BytesIO()
    Image.new("1", (2000, 1000)).save(large, "PNG")
    reply = client.post("/v1/search", files={"image": ("large.png", large.getvalue())})
    assert "1,000,000" in refused(reply, 422, "image_too_many_pixels")


def test_broken_bodies_are_refused(client):
    refused(client.post("/v1/search", content=b"{", headers={"Content-Type": "application/json"}), 400, "invalid_json")
    refused(client.post("/v1/search", content=b"red"), 415, "unsupported_content_type")
    refused(client.post("/v1/search", content=b"x", headers={"Content-Type": "multipart/form-data"}), 400, "invalid_form")
    refused(client.post("/v1/search", data={"image": "text"}, files={"other": ("a", b"")}), 422, "invalid_request")


def test_a_body_without_a_length_is_cut_off_at_the_limit(client, backend):
    sent = 0

    def endless():
        nonlocal sent
        for _ in range(100):
            sent += 1
            yield b" " * 50_000

    refused(client.post("/v1/search", content=endless(), headers={"Content-Type": "application/json"}), 413, "request_too_large")
    assert backend.asked == []


@pytest.mark.parametrize("piece", [1, 64, 1000])
def test_a_body_that_arrives_in_pieces_is_read_whole(client, backend, red, piece):
    """As over a real network, where the headers come before the picture."""
    whole = httpx.Request("POST", "http://any", files={"image": ("query", red)}, data={"top_k": "3"})
    body = whole.read()
    pieces = (body[at : at + piece] for at in range(0, len(body), piece))
    answer = client.post("/v1/search", content=pieces, headers={"Content-Type": whole.headers["Content-Type"]})
    assert answer.status_code == 200, answer.text
    assert backend.asked[-1][0].image == red


def test_faults_behind_the_gateway(client, backend):
    for fault, status, code, retry in [
        (Overloaded("embedder", 3), 503, "overloaded", "3"),
        (PartError("no shard answered"), 503, "unavailable", "5"),
        (Unanswerable("not a picture"), 422, "query_unusable", None),
        (DeadlineExceeded("too late"), 504, "deadline_exceeded", None),
        (RuntimeError("secret detail"), 500, "internal", None),
    ]:
        backend.fault = fault
        reply = client.post("/v1/search", json={"text": "red"})
        assert "secret" not in refused(reply, status, code)
        assert reply.headers.get("retry-after") == retry


def test_items_and_their_pictures(client, red):
    assert client.get("/v1/items/red/0").json() == {"item_id": "red/0", "title": "a thing", "image_url": "/v1/items/red/0/image"}
    reply = client.get("/v1/items/red/0/image")
    assert reply.content == red
    assert reply.headers["content-type"] == "image/png"
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert "'pink'" in refused(client.get("/v1/items/pink"), 404, "item_not_found")
    refused(client.get("/v1/items/pink/image"), 404, "image_not_found")


def test_state_and_unknown_paths(client, backend):
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/version").json()["release"] == "test-release"
    assert TestClient(create_gateway(backend, settings="abc")).get("/version").json()["settings"] == "abc"
    assert client.get("/readyz").json() == {"ready": True, "parts": {"embedder": True, "shard-0": True}}
    backend.up = {"embedder": False, "shard-0": True}
    assert client.get("/readyz").status_code == 503
    refused(client.get("/v2/search"), 404, "not_found")
    refused(client.get("/v1/search"), 405, "method_not_allowed")


def test_the_schema_describes_both_forms(client):
    schema = client.get("/openapi.json").json()["paths"]["/v1/search"]["post"]["requestBody"]["content"]
    assert set(schema) == {"application/json", "multipart/form-data"}


def test_a_harmful_request_id_is_replaced(client):
    reply = client.post("/v1/search", json={}, headers={"X-Request-ID": "a\tb{}"})
    assert reply.json()["error"]["request_id"] != "a\tb{}"
