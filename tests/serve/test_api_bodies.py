"""Bodies from strangers, on every route that takes one: refused with the one error body, and never a fault of ours."""

import json
import time

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve import strict
from serve.api import create_gateway
from serve.bodies import PIXEL
from serve.errors import ApiError
from serve.intake import Limits

LIMITS = Limits(max_image_bytes=90_000, max_many_bytes=90_000, max_text=100, max_top_k=20, max_depth=30, max_events=40)
ROUTES = [
    ("POST", "/v1/search", {"text": "red"}),
    ("POST", "/v1/search:batch", [{"text": "red"}]),
    ("POST", "/v1/embeddings", {"input": "red"}),
    ("POST", "/v1/rerank", {"query": "red", "documents": ["blue"]}),
    ("POST", "/v2/rerank", {"query": "red", "documents": ["blue"]}),
    ("PUT", "/v1/items/a/b", {"product_id": "a", "title": "b"}),
    ("POST", "/v1/feedback", {"events": [{"query_id": "q", "item_id": "a", "kind": "click"}]}),
]
every_route = pytest.mark.parametrize(("method", "path", "good"), ROUTES, ids=[path for _, path, _ in ROUTES])


@pytest.fixture
def client(backend) -> TestClient:
    return TestClient(create_gateway(backend, limits=LIMITS, depth=3))  # which raises faults of ours


def send(client: TestClient, method: str, path: str, content: bytes | str, kind: str = "application/json"):
    return client.request(method, path, content=content, headers={"Content-Type": kind})


def refusal(reply) -> tuple[int, str]:
    error = reply.json()["error"]
    assert set(error) == {"code", "message", "request_id"}
    assert error["request_id"] == reply.headers["x-request-id"]
    assert len(error["message"]) < 2_000
    return reply.status_code, error["code"]


@every_route
def test_a_good_body_is_taken(client, method, path, good):
    assert send(client, method, path, json.dumps(good)).status_code in (200, 202)


@every_route
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[" * 10_000 + b"]" * 10_000,
        b'{"text":' * 10_000 + b"1" + b"}" * 10_000,
        b"[" * 17 + b"]" * 17,
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": 9223372036854775808}',
        b'{"a": ' + b"9" * 5_000 + b"}",
        b'{"text": "a", "text": "b"}',
        b'[{"a": {"b": 1, "b": 1}}]',
        b'{"text": "\xff"}',
        '{"text": "red"}'.encode("utf-16"),
        b'\xef\xbb\xbf{"text": "red"}',
        b'{"text": "red"} {}',
        b"{'text': 'red'}",
        b'{"text": "\xed\xa0\x80"}',
    ],
    ids=lambda content: repr(content[:24]),
)
def test_what_is_no_json(client, method, path, good, content):
    assert refusal(send(client, method, path, content)) == (400, "invalid_json")


@every_route
@pytest.mark.parametrize("content", [rb'{"text": "\ud800"}', rb'{"\udfff": 1}', rb'[{"a": ["\ud83d x"]}]', rb'"\ude00\ud83d"'])
def test_half_of_a_surrogate_pair(client, method, path, good, content):
    assert refusal(send(client, method, path, content)) == (400, "invalid_text")


@every_route
def test_many_small_parts_are_refused_before_they_are_built(client, method, path, good, monkeypatch):
    monkeypatch.setattr(strict, "MAX_PARTS", 1_000)
    start = time.perf_counter()
    assert refusal(send(client, method, path, b"[" + b"[]," * 1_000 + b"0]")) == (400, "invalid_json")
    assert time.perf_counter() - start < 5


@every_route
@pytest.mark.parametrize("content", ["null", "1", '"text"', "true", "{}", "[]", "[[]]", "[null]", '{"input": {}}', '{"x": 1}'])
def test_wrong_shapes(client, method, path, good, content):
    reply = send(client, method, path, content)
    if path != "/v1/search:batch" or reply.status_code != 200:
        assert refusal(reply)[0] == 422
    else:
        assert all(entry["status"] == 422 for entry in reply.json()["answers"])


@every_route
def test_unknown_fields_are_refused(client, method, path, good):
    there = good[0] if isinstance(good, list) else good
    body = {**there, "wished": 1}
    reply = send(client, method, path, json.dumps([body] if isinstance(good, list) else body))
    error = reply.json()["answers"][0]["error"] if isinstance(good, list) else reply.json()["error"]
    assert error["code"] == "invalid_request"


@every_route
def test_another_content_type(client, method, path, good):
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert refusal(send(client, method, path, json.dumps(good), kind)) == (415, "unsupported_content_type")


@every_route
def test_a_body_beyond_the_limit_of_its_route(client, method, path, good):
    content = json.dumps(good).encode()
    one, several = 90_000 * 4 // 3 + 400 + 65_536, 90_000 * 4 // 3 + 1_000_000
    for most in {"/v1/feedback": 229_376, "/v1/search": one, "/v1/items/a/b": one}.get(path, several), 10_000_000:
        padded = content + b" " * (most + 1 - len(content))
        assert refusal(send(client, method, path, padded)) == (413, "request_too_large")
        if most < 10_000_000:
            assert send(client, method, path, padded[:-1]).status_code in (200, 202)
    reply = client.request(method, path, content=content, headers={"Content-Type": "application/json", "Content-Length": "9" * 30})
    assert refusal(reply) == (413, "request_too_large")


@every_route
def test_long_names_are_not_repeated(client, method, path, good):
    body = {f"{'x' * 5_000}{i}": 1 for i in range(20)}
    assert refusal(send(client, method, path, json.dumps(body)))[0] == 422


@every_route
def test_strings_are_no_numbers_and_numbers_no_flags(client, method, path, good):
    wrong = {
        "/v1/search": {"text": "red", "top_k": "4"},
        "/v1/search:batch": {"text": "red", "rerank": 1},
        "/v1/embeddings": {"input": "red", "dimensions": 2.0},
        "/v1/rerank": {"query": 7, "documents": ["blue"]},
        "/v2/rerank": {"query": "red", "documents": "blue"},
        "/v1/items/a/b": {"product_id": 1, "title": "b"},
        "/v1/feedback": {"events": [{"query_id": "q", "item_id": "a", "kind": "look"}]},
    }[path]
    assert refusal(send(client, method, path, json.dumps(wrong)))[0] == 422


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8) | st.just(PIXEL),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
NAMES = ["text", "image", "image_url", "crop", "filter", "top_k", "min_score", "release", "depth", "rerank", "input", "dimensions"]
NAMES += ["query", "documents", "top_n", "product_id", "title", "attributes", "version", "lang", "events", "kind", "query_id", "time"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    route=st.sampled_from(ROUTES),
    body=json_values | st.dictionaries(st.sampled_from(NAMES), json_values, max_size=5),
    keep=st.booleans(),
)
def test_whatever_is_sent_has_an_answer_that_is_not_our_fault(client, route, body, keep):
    method, path, good = route
    if keep and isinstance(good, dict) and isinstance(body, dict):
        body = {**good, **body}
    elif path == "/v1/search:batch":
        body = [body]
    reply = send(client, method, path, json.dumps(body))
    if reply.status_code not in (200, 202):
        assert 400 <= refusal(reply)[0] < 500
    for entry in reply.json().get("answers", []):
        assert entry["status"] < 500


def test_the_reader_agrees_with_pythons_on_what_both_take():
    for text in (
        '{"a": [1, 2.5, -0, 1e3, true, null, "\\u00e9\\ud83d\\ude00"], "b": {}}',
        "[]",
        '"x"',
        "9223372036854775807",
        "-9223372036854775808",
    ):
        assert strict.loads(text.encode()) == json.loads(text)
    deep = "[" * strict.MAX_DEPTH + "]" * strict.MAX_DEPTH
    assert strict.loads(deep.encode()) == json.loads(deep)
    with pytest.raises(ApiError, match="nested too deep"):
        strict.loads(f"[{deep}]".encode())
    with pytest.raises(ApiError, match="'a' is there twice"):
        strict.loads(b'{"a": 1, "b": 2, "a": 3}')
