"""The service on Ray: a whole tiny release over HTTP against the engine in this process, and what happens when parts fail."""

import asyncio
import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import lance
import numpy as np
import pyarrow as pa
import pytest
import ray
import ray.serve
import torch
from ray import cloudpickle
from safetensors.torch import save_file

from idem import manifest, schema, storage
from idem.types import Query, Ranking
from index import release, shard
from index.release import Release
from pipelines.items import DATASET, ID_KEY, open_items
from serve import app, run
from serve.engine import Engine
from train.backbones import Compact, CompactConfig
from train.embedder import Embedder
from train.rerank_data import KINDS
from train.rerank_merge import Choice
from train.rerank_model import ListwiseReranker, Shape
from train.rerank_select import Served

ROOT = Path(__file__).resolve().parents[2]
SMALL = CompactConfig(side=32, widths=(4, 4, 8, 8), dim=16, text_dim=8, text_layers=1, text_length=16)
DEPTH = 6


def write_items(root: str, shop) -> int:
    rows = [
        {
            **{name: "" for name in ("lang", "style", "split")},
            **{name: getattr(hit, name) for name in ("item_id", "product_id", "family_id", "category", "title")},
            **{"image": shop.pictures[hit.item_id], "mime": "image/png", "width": 24, "height": 24, "role": "photo"},
            **{"id_split": "train", "content_hash": hit.item_id, "source_file": "memory", "source_row": row},
        }
        for row, hit in enumerate(shop.hits)
    ]
    folder = storage.Layout(root).items
    table = pa.Table.from_pylist(rows, schema=schema.ITEMS)
    known = {ID_KEY: manifest.fingerprint("items", {}, {})}
    dataset = lance.write_dataset(table.replace_schema_metadata(known), storage.join(folder, DATASET))
    manifest.write(folder, kind="items", config={}, inputs={}, figures={"version": dataset.version})
    return dataset.version


def write_model(plan: manifest.Plan, config: dict, names: dict[str, torch.nn.Module]) -> str:
    folder = storage.local_path(plan.folder)
    folder.mkdir(parents=True)
    for name, model in names.items():
        save_file({key: value.clone() for key, value in model.state_dict().items()}, folder / f"{name}.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    plan.write(figures={}, files=["config.json", *(f"{name}.safetensors" for name in names)])
    return plan.folder


def write_index(root: str, embedder: Embedder, version: int) -> None:
    items = open_items(storage.Layout(root).items)
    table = items.table([*shard.META_COLUMNS, "image"])
    vectors = embedder.encode(table["image"].to_pylist(), table["title"].to_pylist())
    inputs = {"items": items.id, "items_version": str(version), "embedder": embedder.id}
    plan = manifest.Plan(parent=storage.Layout(root).index, kind="index", config={}, inputs=inputs)
    files = []
    for number in range(2):
        rows = np.arange(number, table.num_rows, 2)
        files += shard.build(plan.folder, number, vectors=vectors[rows], meta=table.take(pa.array(rows)), factory="Flat")
    plan.write(figures={}, files=files)


@pytest.fixture(scope="module")
def releases(colour_shop, tmp_path_factory) -> str:
    """root/releases of a run whose models have random weights; its reranker always takes its own order."""
    root = str(tmp_path_factory.mktemp("run"))
    layout = storage.Layout(root)
    torch.manual_seed(0)
    version = write_items(root, colour_shop)
    plan = manifest.Plan(parent=layout.embedder, kind="embedder", config={}, inputs={})
    compact = {"model": SMALL.model_dump(), "fractions": (0.4, 0.4, 0.2)}
    embedder = Embedder.load(write_model(plan, compact, {"model": Compact(SMALL), "untrained": Compact(SMALL)}))
    write_index(root, embedder, version)
    shape = Shape(tokens=embedder.token_shape[0], channels=embedder.token_shape[1], vocabulary=embedder.vocabulary, width=16, heads=2)
    served = {kind: Served(choice=Choice(blend=1.0)).model_dump() for kind in KINDS}
    said = {"identity": False, "embedder": embedder.id, "chunk": 4, "shape": shape.model_dump(), "served": served}
    plan = manifest.Plan(parent=layout.reranker, kind="reranker", config={}, inputs={"embedder": embedder.id})
    write_model(plan, said, {"model": ListwiseReranker(shape)})
    release.run(release.ReleaseConfig(root=root, name="tiny"))
    return layout.releases


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
    with pytest.raises(ValueError, match="no-such-host"):
        run.require_port("no-such-host.invalid", port)
    with pytest.raises(ValueError, match="65535"):
        run.ServeConfig(root="out", port=99999)


def test_the_run_file_settings_reach_the_service():
    config = run.ServeConfig(root="out", depth=7, embedder=app.Scale(max_replicas=5))
    assert config.service() == app.ServiceConfig(release="out/releases", depth=7, embedder=app.Scale(max_replicas=5))
    assert run.ServeConfig(root="out", release="out/releases/a").service().release == "out/releases/a"


def test_a_missing_release_is_an_error_of_the_user(tmp_path):
    with pytest.raises(ValueError, match="no finished release"):
        app.build(app.ServiceConfig(release=str(tmp_path)))


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
    with subprocess.Popen([sys.executable, "-m", "serve.run", str(file)], cwd=ROOT, env=environment, stdout=subprocess.PIPE) as child:
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
    run.require_port("127.0.0.1", port)
