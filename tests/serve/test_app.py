"""The service on Ray: a whole tiny release over HTTP against the engine in this process, and what happens when parts fail."""

import asyncio
import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import ray
import ray.serve
from ray import cloudpickle

from idem.types import Query, Ranking
from index.release import Release
from serve import app, run
from serve.engine import Engine

ROOT = Path(__file__).resolve().parents[2]
DEPTH = 6


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


@pytest.fixture(scope="module")
def address(ray_session) -> Iterator[str]:
    port = free_port()
    ray.serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    ray.serve.shutdown()


@pytest.fixture(scope="module")
def service(address, releases) -> httpx.Client:
    ray.serve.run(app.build(app.ServiceConfig(release=releases, depth=DEPTH)), name=app.NAME)
    return httpx.Client(base_url=address, timeout=30)


def test_neither_gateway_nor_searcher_needs_torch():
    said = "import sys, serve.app, serve.api; serve.api.create_gateway(None); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", said], cwd=ROOT, check=False).returncode == 0


def test_every_part_has_its_own_scaling_and_bounds(releases):
    seen = {}

    def visit(bound):
        deployment = bound._bound_deployment
        seen[deployment.name] = deployment
        for value in deployment.init_args:
            for inner in value if isinstance(value, list) else [value]:
                if isinstance(inner, ray.serve.Application):
                    visit(inner)

    visit(app.build(app.ServiceConfig(release=releases, reranker=app.Scale(max_replicas=3, max_queued_requests=7))))
    assert set(seen) == {"Gateway", "Embedder", "ShardSearcher-0", "ShardSearcher-1", "Reranker"}
    for deployment in seen.values():
        assert deployment._deployment_config.autoscaling_config.min_replicas == 1
        assert deployment.max_queued_requests > 0
    assert seen["Reranker"]._deployment_config.autoscaling_config.max_replicas == 3
    assert seen["Reranker"].max_queued_requests == 7
    assert sum(deployment.ray_actor_options["num_cpus"] for deployment in seen.values()) <= 1


def test_the_port_is_checked_first():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port {port} .*--set serve\.port="):
            run.require_port("127.0.0.1", port)
    run.require_port("127.0.0.1", port)
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listening, pytest.raises(ValueError, match="of ::1"):
        run.require_port("::1", listening.getsockname()[1])
    with pytest.raises(ValueError, match="no-such-host"):
        run.require_port("no-such-host.invalid", port)
    with pytest.raises(ValueError, match="65535"):
        run.ServeConfig(root="out", port=99999)


def test_the_run_file_settings_reach_the_service():
    config = run.ServeConfig(root="out", depth=7, embedder=app.Scale(max_replicas=5))
    assert config.service() == app.ServiceConfig(release="out/releases", depth=7, embedder=app.Scale(max_replicas=5))
    assert run.ServeConfig(root="out", release="out/releases/a").service().release == "out/releases/a"


def test_the_hash_of_the_settings_changes_with_those_that_answers_depend_on():
    plain = app.ServiceConfig(release="r")
    changes = [{"depth": 7}, {"mode": "pointwise"}, {"rows_per_product": 1}, {"timeout_ms": 9}, {"shard_timeout_ms": 9}]
    assert len({plain.answering(), *(plain.model_copy(update=change).answering() for change in changes)}) == 6
    assert plain.model_copy(update={"release": "elsewhere", "max_batch": 1}).answering() == plain.answering()


def test_an_identity_reranker_is_not_deployed(identity_releases, releases):
    parts = [app.build(app.ServiceConfig(release=path))._bound_deployment.init_args[-1] for path in (identity_releases, releases)]
    assert parts[0] is None
    assert parts[1] is not None


def test_a_missing_release_is_an_error_of_the_user(tmp_path):
    with pytest.raises(ValueError, match="no finished release"):
        app.build(app.ServiceConfig(release=str(tmp_path)))


@pytest.mark.ray
def test_a_joined_cluster_on_this_machine_has_its_port_checked_before_serve_starts(ray_session, releases, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "the one that is joined already")
    assert run.proxy_is_ours()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(ValueError, match=rf"cannot listen on port {port}"):
            run.start(run.ServeConfig(root=str(Path(releases).parent), port=port))
    assert not ray.serve.status().proxies


def asked(picture: bytes | None, text: str = "") -> dict:
    return {"image": base64.b64encode(picture).decode() if picture else "", "text": text, "top_k": 4}


@pytest.mark.ray
def test_what_is_served_is_what_is_measured(service, releases, colour_shop):
    engine = Engine.open(releases, depth=DEPTH)
    pictures = [colour_shop.pictures["red/0"], colour_shop.pictures["plum/1"], None]
    texts = ["", "blue", "a green thing"]
    for picture, text in zip(pictures, texts, strict=True):
        for rerank in (True, False):
            reply = service.post("/v1/search", json={**asked(picture, text), "rerank": rerank})
            assert reply.status_code == 200, reply.text
            answer = engine.search([Query(image=picture, text=text)], top_k=4, rerank="listwise" if rerank else "none")[0]
            results = reply.json()["results"]
            assert [r["item_id"] for r in results] == [hit.item_id for hit in answer.hits]
            assert [r["relevance"] for r in results] == pytest.approx(answer.relevance, abs=1e-4)
            assert [r["score"] for r in results] == pytest.approx([hit.score for hit in answer.hits], abs=1e-5)
            assert reply.json()["degraded"] == []


@pytest.mark.ray
def test_queries_that_arrive_together_get_their_own_answers(service, colour_shop):
    bodies = [{**asked(picture), "rerank": False} for picture in colour_shop.pictures.values()] * 3
    alone = [service.post("/v1/search", json=body).json()["results"] for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        together = list(pool.map(lambda body: service.post("/v1/search", json=body).json()["results"], bodies))
    for one, other in zip(alone, together, strict=True):
        assert [r["item_id"] for r in one] == [r["item_id"] for r in other]
        assert [r["score"] for r in one] == pytest.approx([r["score"] for r in other], abs=1e-5)


@pytest.mark.ray
def test_items_pictures_and_state(service, colour_shop):
    assert service.get("/readyz").json() == {
        "ready": True,
        "parts": {"embedder": True, "shard-0": True, "shard-1": True, "rerank": True},
    }
    assert service.get("/version").json()["release"] == "tiny"
    assert service.get("/version").json()["settings"] == app.ServiceConfig(release="r", depth=DEPTH).answering()
    assert not run.proxy_is_ours()  # one is up already, and may be used
    assert service.get("/v1/items/red/0").json()["title"] == "a red thing <b>0</b>"
    assert service.get("/v1/items/red/0/image").content == colour_shop.pictures["red/0"]
    assert service.get("/v1/items/pink").status_code == 404
    assert "script" in service.get("/").text


@pytest.mark.ray
def test_a_shard_that_dies_is_missed_and_comes_back(service, colour_shop):
    body = asked(colour_shop.pictures["red/0"])
    replica = next(a for a in ray.util.list_named_actors(all_namespaces=True) if "ShardSearcher-1#" in a["name"])
    ray.kill(ray.get_actor(replica["name"], namespace=replica["namespace"]), no_restart=True)
    first = service.post("/v1/search", json=body).json()
    assert first["degraded"] in ([], ["shard-1"])  # Serve may have replaced it already
    deadline = time.monotonic() + 60
    while not service.get("/readyz").json()["ready"]:
        assert time.monotonic() < deadline, "the shard did not come back within 60 s"
        time.sleep(0.5)
    assert service.post("/v1/search", json=body).json()["degraded"] == []


class Fragile:
    """Embedder, shard and reranker in one, made to fail by the text of the query."""

    async def embed(self, query):
        if query.text == "slow":
            await asyncio.sleep(1)
        return np.ones(3, np.float32) if query.text != "odd" else "the query is odd"

    async def search(self, vector, k):
        from idem.types import Hit

        return [Hit(item_id=f"red/{i}", product_id=str(i), family_id="", category="", title="", score=1 - i / 10) for i in range(3)]

    async def rerank(self, query, hits):
        if query.text == "late":
            await asyncio.sleep(20)
        if query.text == "broken":
            raise ValueError("it broke")
        return Ranking(order=(2, 1, 0), relevance=(0.1, 0.2, 0.3), null=(0.0, 0.0, 0.0))

    async def ping(self):
        return True


class Broken:
    async def search(self, vector, k):
        raise RuntimeError("disk gone")

    async def ping(self):
        raise RuntimeError("disk gone")


@pytest.fixture(scope="module")
def fragile(address, releases) -> Iterator[httpx.Client]:
    """The real gateway over parts that fail: shard-1 always, the others on request; room for one query in work and one in wait."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    config = app.ServiceConfig(release=releases, timeout_ms=1500)
    narrow = app.Scale(max_replicas=1, max_ongoing_requests=1, max_queued_requests=1, num_cpus=0.05)
    wide = app.Scale(max_replicas=1, num_cpus=0.05)
    embedder, parts = app.deployed(Fragile, "Narrow", narrow).bind(), app.deployed(Fragile, "Wide", wide).bind()
    broken = app.deployed(Broken, "Broken", wide).bind()
    bound = app.deployed(app.Gateway, "Gateway", wide).bind(config, Release.open(releases), embedder, [parts, broken], parts)
    ray.serve.run(bound, name="fragile", route_prefix="/fragile")
    yield httpx.Client(base_url=f"{address}/fragile", timeout=30)
    ray.serve.delete("fragile")


@pytest.mark.ray
def test_failures_on_ray_give_partial_answers_that_say_so(fragile):
    for text, degraded, best in [("fine", ["shard-1"], "2"), ("late", ["shard-1", "rerank"], "0"), ("broken", ["shard-1", "rerank"], "0")]:
        reply = fragile.post("/v1/search", json={"text": text})
        assert reply.status_code == 200, reply.text
        answer = reply.json()
        assert answer["degraded"] == degraded
        assert answer["results"][0]["product_id"] == best
        assert answer["timings_ms"]["total"] < 3000
    assert fragile.post("/v1/search", json={"text": "odd"}).json()["error"]["code"] == "query_unusable"
    assert fragile.get("/readyz").json()["parts"] == {"embedder": True, "shard-0": True, "shard-1": False, "rerank": True}


@pytest.mark.ray
def test_more_than_the_embedder_has_room_for_is_refused_with_a_time(fragile):
    with ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(lambda _: fragile.post("/v1/search", json={"text": "slow"}), range(6)))
    refused = [reply for reply in replies if reply.status_code == 503]
    assert refused
    assert any(reply.status_code == 200 for reply in replies)
    assert all(reply.json()["error"]["code"] == "overloaded" and reply.headers["retry-after"] == "1" for reply in refused)


@pytest.mark.ray
def test_the_job_says_when_it_is_ready_and_ends_cleanly(releases, tmp_path):
    """`python -m serve.run` as its users start it: a process of its own, with a Ray of its own."""
    port = free_port()
    file = tmp_path / "run.toml"
    file.write_text(f'root = "{Path(releases).parent}"\n[serve]\nport = {port}\n')
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command, told = [sys.executable, "-m", "serve.run", str(file)], tmp_path / "told"
    with told.open("wb") as stderr, subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=stderr) as child:
        try:
            assert child.stdout is not None
            said = json.loads(child.stdout.readline())
            assert said["ok"], said
            assert set(said["deployments"].values()) == {"HEALTHY"}
            assert httpx.get(f"{said['url']}/readyz", timeout=30).json()["ready"]
            busy = subprocess.run(
                [sys.executable, "-m", "serve.run", str(file)], cwd=ROOT, env=environment, capture_output=True, check=False
            )
            assert busy.returncode == 2
            assert f"port {port}" in json.loads(busy.stdout)["error"]
        finally:
            child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 0
    lines = told.read_text()
    assert "serve.run: open http" in lines
    assert not re.search("__main__|Started Serve|existing Serve|is ready", lines), lines
    run.require_port("127.0.0.1", port)
