"""The endpoints that other vendors' clients know, asked by those clients themselves over a loopback port."""

import base64

import cohere
import numpy as np
import openai
import pytest
from fastapi.testclient import TestClient

from idem.types import Document, Query, Ranking
from serve.api import create_gateway
from serve.compatible import ranked, shortened, usage, vectors_of
from serve.engine import embed
from serve.errors import ApiError, NotSupported
from serve.flow import Overloaded, PartError
from serve.intake import Limits

LIMITS = Limits(max_image_bytes=200_000, max_text=100, max_document_text=300, max_inputs=4, max_documents=4)


@pytest.fixture
def client(backend) -> TestClient:
    return TestClient(create_gateway(backend, limits=LIMITS), raise_server_exceptions=False)


@pytest.fixture
def address(backend, listening) -> str:
    return listening(create_gateway(backend, limits=LIMITS))


@pytest.fixture
def asker(address) -> openai.OpenAI:
    return openai.OpenAI(api_key="none", base_url=f"{address}/v1", max_retries=0)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def error_of(reply, status: int, code: str) -> str:
    assert reply.status_code == status, reply.text
    assert reply.json()["error"]["code"] == code
    return reply.json()["error"]["message"]


def test_openais_client_embeds(asker, colour_shop):
    expected = embed(colour_shop.encoder, [Query(text="red"), Query(text="blue")])
    for options in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}, {"user": "someone"}):
        made = asker.embeddings.create(model="idem", input=["red", "blue"], **options)
        vectors = [np.frombuffer(base64.b64decode(e.embedding), "<f4") if isinstance(e.embedding, str) else e.embedding for e in made.data]
        np.testing.assert_allclose(vectors, expected, atol=1e-6)
        assert [each.index for each in made.data] == [0, 1]
        assert (made.model, made.object, made.usage.prompt_tokens, made.usage.total_tokens) == ("test-release", "list", 2, 2)
    np.testing.assert_allclose(asker.embeddings.create(model="any", input="red").data[0].embedding, expected[0], atol=1e-6)


def test_openais_client_asks_for_fewer_dimensions(asker):
    whole = np.array(asker.embeddings.create(model="m", input="plum").data[0].embedding)
    part = np.array(asker.embeddings.create(model="m", input="plum", dimensions=2).data[0].embedding)
    np.testing.assert_allclose(part, whole[:2] / np.linalg.norm(whole[:2]), atol=1e-6)
    with pytest.raises(openai.UnprocessableEntityError, match="1 to 3"):
        asker.embeddings.create(model="m", input="plum", dimensions=4)


def test_openais_client_sends_pictures_too(asker, backend, colour_shop):
    picture = colour_shop.pictures["blue/0"]
    both = [{"image": b64(picture)}, {"image": f"data:image/png;base64,{b64(picture)}", "text": "x"}, "blue"]
    made = asker.embeddings.create(model="m", input=both)
    vectors = np.array([each.embedding for each in made.data])
    np.testing.assert_allclose(vectors @ vectors[2], 1, atol=1e-3)
    assert made.usage.total_tokens == 64 + 65 + 1


def test_openais_client_understands_refusals(asker, backend):
    with pytest.raises(openai.UnprocessableEntityError) as told:
        asker.embeddings.create(model="m", input=[[1, 2, 3]])
    assert told.value.code == "invalid_request"
    assert "input.0: Input should be a valid string" in told.value.message
    backend.fault = Overloaded("embedder", 3)
    with pytest.raises(openai.InternalServerError) as told:
        asker.embeddings.create(model="m", input="red")
    assert (told.value.status_code, told.value.code, told.value.response.headers["retry-after"]) == (503, "overloaded", "3")


@pytest.mark.parametrize(
    ("body", "status", "code", "said"),
    [
        ({"model": "m", "input": []}, 422, "invalid_request", "input"),
        ({"model": "m", "input": ""}, 422, "query_empty", "input.0"),
        ({"model": "m", "input": ["red", " "]}, 422, "query_empty", "input.1"),
        ({"model": "m", "input": ["red"] * 5}, 422, "invalid_request", "1 to 4"),
        ({"model": "m", "input": "r" * 101}, 422, "invalid_request", "at most 100"),
        ({"model": "m", "input": ["red", {"image": "no base64!"}]}, 422, "image_not_base64", "input.1"),
        ({"model": "m", "input": {"image_url": "https://a/b"}}, 422, "image_url_not_allowed", "input.0"),
        ({"model": "m", "input": ["red", "odd"]}, 422, "query_unusable", "input.1: nothing can be made of it"),
        ({"model": "m", "input": "red", "dimensions": 0}, 422, "invalid_request", "dimensions"),
        ({"model": "m", "input": "red", "encoding_format": "int8"}, 422, "invalid_request", "encoding_format"),
        ({"model": "", "input": "red"}, 422, "invalid_request", "model"),
        ({"model": "m"}, 422, "invalid_request", "input"),
    ],
)
def test_embeddings_that_are_refused(client, body, status, code, said):
    assert said in error_of(client.post("/v1/embeddings", json=body), status, code)


def test_coheres_clients_rerank(address):
    documents = ["a", "blue", "red"]
    for client in (cohere.ClientV2(api_key="none", base_url=address), cohere.Client(api_key="none", base_url=address)):
        made = client.rerank(model="any", query="red", documents=documents, top_n=2)
        assert [each.index for each in made.results] == [2, 0]
        assert made.results[0].relevance_score == pytest.approx(1, abs=1e-5)
        assert made.results[0].relevance_score > made.results[1].relevance_score
        assert made.id
    made = cohere.Client(api_key="none", base_url=address).rerank(
        query="red", documents=[{"text": "red"}, "blue"], return_documents=True, max_chunks_per_doc=1, rank_fields=["text"]
    )
    assert [(each.index, each.document and each.document.text) for each in made.results] == [(0, "red"), (1, "blue")]
    made = cohere.ClientV2(api_key="none", base_url=address).rerank(
        model="any", query="red", documents=["red"], max_tokens_per_doc=10, priority=1
    )
    assert len(made.results) == 1


def test_coheres_client_understands_refusals(address):
    client = cohere.ClientV2(api_key="none", base_url=address)
    with pytest.raises(cohere.UnprocessableEntityError) as told:
        client.rerank(model="any", query="red", documents=["x"] * 5)
    assert told.value.body["error"]["code"] == "invalid_request"


def test_pictures_are_ranked_as_jinas_users_send_them(client, backend, colour_shop):
    red, blue = (b64(colour_shop.pictures[name]) for name in ("red/0", "blue/0"))
    body = {"model": "m", "query": {"image": red}, "documents": [{"image": blue}, {"text": "red"}, {"image": red, "text": "a"}]}
    said = client.post("/v1/rerank", json={**body, "return_documents": True}).json()
    assert {said["results"][0]["index"], said["results"][1]["index"]} == {1, 2}
    assert said["results"][2] == {"index": 0, "relevance_score": said["results"][2]["relevance_score"], "document": {"text": ""}}
    assert said["usage"] == {"prompt_tokens": 3 * 64 + 2, "total_tokens": 3 * 64 + 2}
    assert "document" not in client.post("/v1/rerank", json=body).json()["results"][0]
    assert client.post("/v2/rerank", json=body).json()["results"] == client.post("/v1/rerank", json=body).json()["results"]


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ({"query": "red", "documents": []}, "invalid_request", "documents"),
        ({"query": "red", "documents": ["x"] * 5}, "invalid_request", "1 to 4"),
        ({"query": "", "documents": ["x"]}, "query_empty", "query: "),
        ({"query": "red", "documents": ["x", ""]}, "query_empty", "documents.1"),
        ({"query": "r" * 101, "documents": ["x"]}, "invalid_request", "query: text has 101"),
        ({"query": "red", "documents": ["x" * 301]}, "invalid_request", "documents.0: text has 301"),
        ({"query": "red", "documents": ["x"], "top_n": 0}, "invalid_request", "top_n"),
        ({"query": "red", "documents": [{"title": "x"}]}, "invalid_request", "documents.0.title"),
        ({"query": "red", "documents": ["x"], "rank_fields": ["title"]}, "invalid_request", "rank_fields"),
        ({"query": "red", "documents": ["x"], "relevant_spans": {"mode": "enabled"}}, "invalid_request", "relevant_spans"),
    ],
)
def test_rerankings_that_are_refused(client, body, code, said):
    assert said in error_of(client.post("/v1/rerank", json=body), 422, code)


def test_what_a_backend_cannot_rerank(client, backend):
    backend.fault = NotSupported("the release has no trained reranker")
    error_of(client.post("/v1/rerank", json={"query": "red", "documents": ["x"]}), 501, "not_supported")


def test_a_ranking_without_judgement_is_an_error_and_no_number():
    documents = [Document(item_id="0", text="", image=None, score=0.0)]
    with pytest.raises(PartError):
        ranked(Ranking(order=(0,), relevance=(float("nan"),), null=(0.0,), degraded=True), documents, top_n=1, returned=False)


def test_vectors_that_are_no_numbers_and_prefixes_of_nothing():
    with pytest.raises(PartError):
        vectors_of([np.array([1, np.nan], np.float32)], None)
    with pytest.raises(ApiError, match="all zero"):
        shortened(np.array([0, 0, 1], np.float32), 2)
    assert shortened(np.array([3, 4, 0], np.float32) / 5, 2) == pytest.approx([0.6, 0.8])


def test_tokens_are_estimated():
    assert usage(["", "abcd", "ä" * 3], 2).total_tokens == 0 + 1 + 2 + 128
