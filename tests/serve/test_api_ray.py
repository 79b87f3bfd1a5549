"""What the interface asks of the service on Ray beyond a plain search: filters, embeddings, rerankings, and what is refused."""

import base64
import socket
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
import ray.serve

from idem.types import Document, Query
from serve import app
from serve.engine import Engine, embed
from serve.sdk import Client, IdemError

pytestmark = pytest.mark.ray


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


@pytest.fixture(scope="module")
def idem(ray_session, releases) -> Iterator[Client]:
    port = free_port()
    ray.serve.start(http_options={"host": "127.0.0.1", "port": port})
    ray.serve.run(app.build(app.ServiceConfig(release=releases, depth=6, timeout_ms=30_000, shard_timeout_ms=10_000)), name=app.NAME)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
        yield Client(http=http)
    ray.serve.shutdown()


def test_a_filter_goes_to_every_shard(idem, colour_shop):
    picture = colour_shop.pictures["red/0"]
    found = idem.search(image=picture, filter={"product_id": ["blue", "plum"]}).results
    assert {each.product_id for each in found} == {"blue", "plum"}
    assert idem.search(image=picture, filter={"category": {"ne": "things"}}).results == []
    assert len(idem.search(image=picture, filter={"item_id": {"in": ["red/0", "plum/1"]}}).results) == 2
    for wrong in ({"brand": "x"}, {"category": {"gt": 1}}):
        with pytest.raises(IdemError) as told:
            idem.search(image=picture, filter=wrong)
        assert (told.value.status, told.value.code) == (422, "invalid_filter")


def test_the_least_relevance_is_held(idem, colour_shop):
    picture = colour_shop.pictures["red/0"]
    whole = idem.search(image=picture, top_k=5).results
    assert idem.search(image=picture, top_k=5, min_score=0).results == [each for each in whole if each.relevance is not None]
    held = idem.search(image=picture, top_k=5, min_score=1).results  # of random weights that are sure of nearly everything
    assert len(held) < len(whole)
    assert all(each.relevance == 1 for each in held)


def test_vectors_are_those_of_the_engine(idem, releases, colour_shop):
    engine = Engine.open(releases)
    queries = [Query(text="red"), Query(image=colour_shop.pictures["blue/0"]), Query(image=colour_shop.pictures["blue/0"], text="blue")]
    asked = [{"text": query.text, "image": query.image} for query in queries]
    made = idem.embed(asked * 8)  # pyright: ignore[reportArgumentType]
    np.testing.assert_allclose(made.vectors, np.tile(embed(engine.encoder, queries), (8, 1)), atol=1e-5)
    assert made.model == "tiny"


def test_rankings_are_those_of_the_engine(idem, releases, colour_shop):
    engine = Engine.open(releases)
    assert engine.reranker
    query = Query(image=colour_shop.pictures["red/0"])
    shown = [{"text": "a red thing", "image": colour_shop.pictures["red/1"]}, {"image": colour_shop.pictures["blue/0"]}, {"text": "plum"}]
    vectors = embed(engine.encoder, [query, *(Query(text=each.get("text", ""), image=each.get("image")) for each in shown)])
    documents = [
        Document(item_id=str(i), text=each.get("text", ""), image=each.get("image"), score=float(vectors[0] @ vectors[i + 1]))
        for i, each in enumerate(shown)
    ]
    expected = engine.reranker.rerank(query, documents)
    made = idem.rerank({"image": colour_shop.pictures["red/0"]}, shown)  # pyright: ignore[reportArgumentType]
    assert [each.index for each in made.results] == list(expected.order)
    assert [each.relevance_score for each in made.results] == pytest.approx([expected.relevance[i] for i in expected.order], abs=1e-4)


def test_what_this_service_does_not_do(idem, colour_shop):
    refusals = [
        (lambda: idem.put("a", product_id="a", title="b"), 501, "not_supported"),
        (lambda: idem.delete("a"), 501, "not_supported"),
        (lambda: idem.feedback([{"query_id": "q", "item_id": "a", "kind": "click"}]), 501, "not_supported"),
        (lambda: idem.search(text="red", release="other"), 404, "release_not_served"),
    ]
    for ask, status, code in refusals:
        with pytest.raises(IdemError) as told:
            ask()
        assert (told.value.status, told.value.code) == (status, code)
    body = {"image": base64.b64encode(colour_shop.pictures["red/0"]).decode()}
    late = idem.http.post("/v1/search", json=body, headers={"X-Timeout-Ms": "1"})
    assert late.status_code == 504
    assert late.json()["error"]["code"] == "deadline_exceeded"
