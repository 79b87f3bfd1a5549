"""A shop small enough to check by hand: one colour a product, two pictures each, two shards, and trivial models over it."""

import io
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
import torch
import uvicorn
from fastapi import FastAPI
from PIL import Image
from safetensors.torch import save_file

from idem import images, manifest, schema, storage
from idem.types import Document, Hit, Query, Ranking
from index import filters, release, shard
from index.merge import best_first, merge
from pipelines.items import open_items
from pipelines.table import ID_KEY
from pipelines.table import ITEMS as DATASET
from serve.api import Picture, Search
from serve.backend import held, wanted
from serve.engine import Answer, Engine, embed
from serve.errors import ReleaseNotServed, Unusable
from train.backbones.compact import Compact, CompactConfig
from train.embedder import Embedder
from train.rerank_blocks import Shape
from train.rerank_data import KINDS, places_shape
from train.rerank_merge import Choice
from train.rerank_model import ListwiseReranker
from train.rerank_select import Served

SMALL = CompactConfig(side=32, widths=(4, 4, 8, 8), dim=16, text_dim=8, text_layers=1, text_length=16)
COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (30, 60, 210), "sand": (210, 190, 140), "plum": (120, 30, 110)}


def picture(colour: tuple[int, int, int], shade: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (24, 24), tuple(max(c - shade, 0) for c in colour)).save(stream, "PNG")
    return stream.getvalue()


class ColourEncoder:
    """The mean colour of the picture, or of the colour that the text names; L2-normalised (n, 3)."""

    def encode(self, pictures: Sequence[bytes | None], texts: Sequence[str]) -> np.ndarray:
        rows = [images.pixels(p, 4).mean((0, 1)) if p else COLOURS.get(t, (128, 128, 128)) for p, t in zip(pictures, texts, strict=True)]
        vectors = np.array(rows, np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@dataclass
class ExactShard:
    hits: list[Hit]
    vectors: np.ndarray

    def search(self, vectors: np.ndarray, k: int) -> list[list[Hit]]:
        scored = [[(float(s), h) for s, h in zip(row, self.hits, strict=True)] for row in vectors @ self.vectors.T]
        return [sorted((_scored(h, s) for s, h in row), key=best_first)[:k] for row in scored]


def _scored(hit: Hit, score: float) -> Hit:
    return Hit(item_id=hit.item_id, product_id=hit.product_id, family_id=hit.family_id, category=hit.category, title=hit.title, score=score)


@dataclass
class BothShards:
    shards: list[ExactShard]

    def search(self, vectors: np.ndarray, k: int) -> list[list[Hit]]:
        return [merge(found, k) for found in zip(*(shard.search(vectors, k) for shard in self.shards), strict=True)]


class Backwards:
    """A reranker that turns the order round, so that its work cannot be overlooked."""

    def rerank(self, query: Query, documents: Sequence[Document], *, mode: str = "listwise") -> Ranking:
        n = len(documents)
        assert all(document.image for document in documents)
        return Ranking(order=tuple(reversed(range(n))), relevance=tuple((i + 1) / (n + 1) for i in range(n)), null=(0.0,) * n)


@dataclass
class Shop:
    colours: dict[str, tuple[int, int, int]] = field(default_factory=lambda: COLOURS)
    pictures: dict[str, bytes] = field(default_factory=dict)
    hits: list[Hit] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, colour in self.colours.items():
            for number in range(2):
                item_id = f"{name}/{number}"
                self.pictures[item_id] = picture(colour, shade=60 * number)  # further apart than the last bits that a batch may turn
                title = f"a {name} thing <b>{number}</b>"
                self.hits.append(Hit(item_id=item_id, product_id=name, family_id=name, category="things", title=title, score=0.0))
        self.encoder, self.reranker = ColourEncoder(), Backwards()
        vectors = self.encoder.encode(list(self.pictures.values()), [""] * len(self.pictures))
        self.shards = [ExactShard(self.hits[i::2], vectors[i::2]) for i in range(2)]
        self.searcher = BothShards(self.shards)

    def images(self, item_ids: Sequence[str]) -> list[bytes | None]:
        return [self.pictures[item_id] for item_id in item_ids]


@pytest.fixture(scope="session")
def colour_shop() -> Shop:
    return Shop()


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
    said = {"fields": "both", "factory": "Flat", "parameters": ""}
    plan = manifest.Plan(parent=storage.Layout(root).index, kind="index", config=said, inputs=inputs)
    files = []
    for number in range(2):
        rows = np.arange(number, table.num_rows, 2)
        files += shard.write(plan.folder, number, index=shard.make_index(vectors[rows], factory="Flat"), meta=[table.take(pa.array(rows))])
    plan.write(figures={"rule": "rows that the filter `gallery` keeps"}, files=files)


@pytest.fixture(scope="session")
def releases(colour_shop, tmp_path_factory) -> str:
    """root/releases of a run whose models have random weights; its reranker always takes its own order."""
    root = str(tmp_path_factory.mktemp("run"))
    layout = storage.Layout(root)
    torch.manual_seed(0)
    version = write_items(root, colour_shop)
    plan = manifest.Plan(parent=layout.embedder, kind="embedder", config={"fractions": (0.4, 0.4, 0.2)}, inputs={})
    embedder = Embedder.load(write_model(plan, SMALL.model_dump(), {"model": Compact(SMALL), "untrained": Compact(SMALL)}))
    write_index(root, embedder, version)
    tokens, channels = places_shape(embedder, 1)
    shape = Shape(tokens=tokens, channels=channels, vocabulary=embedder.vocabulary, width=16, heads=2)
    served = {kind: Served(choice=Choice(blend=1.0)).model_dump() for kind in KINDS}
    said = {"identity": False, "model": "listwise", "embedder": embedder.id, "chunk": 4, "shape": shape.model_dump(), "served": served}
    plan = manifest.Plan(parent=layout.reranker, kind="reranker", config={}, inputs={"embedder": embedder.id})
    write_model(plan, said, {"model": ListwiseReranker(shape)})
    release.run(release.ReleaseConfig(root=root, name="tiny"))
    return layout.releases


@pytest.fixture(scope="session")
def identity_releases(releases, tmp_path_factory) -> str:
    """root/releases of the same run, whose current release has a reranker that found too little to learn from."""
    root = str(tmp_path_factory.mktemp("identity") / "run")
    shutil.copytree(Path(releases).parent, root)
    layout = storage.Layout(root)
    embedder = manifest.read(manifest.current(layout.embedder, kind="embedder"), kind="embedder").id
    plan = manifest.Plan(parent=layout.reranker, kind="reranker", config={"identity": True}, inputs={"embedder": embedder})
    write_model(plan, {"identity": True}, {})
    release.run(release.ReleaseConfig(root=root, name="identity"))
    return layout.releases


@dataclass
class Passing:
    """A searcher that finds only what passes a filter."""

    shop: Shop
    where: Mapping[str, Any] | None

    def search(self, vectors: np.ndarray, k: int) -> list[list[Hit]]:
        every = self.shop.searcher.search(vectors, len(self.shop.hits))
        table = pa.table({name: [getattr(hit, name) for hit in self.shop.hits] for name in ("item_id", "product_id", "category")})
        try:
            mask = filters.mask(table, self.where or {})
        except ValueError as error:
            raise Unusable("invalid_filter", str(error)) from error
        passed = {hit.item_id for hit, holds in zip(self.shop.hits, mask, strict=True) if holds}
        return [[hit for hit in hits if hit.item_id in passed][:k] for hits in every]


class ShopBackend:
    """What the gateway talks to, over the shop in this process; `fault` is raised by the next searches."""

    release = "test-release"

    def __init__(self, shop: Shop) -> None:
        self.shop, self.fault, self.up = shop, None, {"embedder": True, "shard-0": True}
        self.asked: list[tuple[Query, dict]] = []
        self.searches: list[Search] = []
        self.tenants: list[str] = []
        self.changes: list[pa.Table | list[str]] = []
        self.events: list[pa.Table] = []

    async def search(self, asked: Search) -> Answer:
        self.asked.append((asked.query, {"top_k": asked.top_k, "rerank": asked.rerank, "depth": asked.depth}))
        self.searches.append(asked)
        self.tenants.append(asked.tenant)
        if self.fault:
            raise self.fault
        if asked.release not in (None, self.release):
            raise ReleaseNotServed(asked.release, self.release)
        searcher = Passing(self.shop, asked.where)
        made = Engine(encoder=self.shop.encoder, searcher=searcher, pictures=self.shop, reranker=self.shop.reranker, depth=asked.depth)
        return held(made.search([asked.query], top_k=wanted(asked), rerank="listwise" if asked.rerank else "none")[0], asked)

    async def embed(self, tenant: str, queries: Sequence[Query]) -> list[np.ndarray | str]:
        self.tenants.append(tenant)
        if self.fault:
            raise self.fault
        return ["nothing can be made of it" if query.text == "odd" else embed(self.shop.encoder, [query])[0] for query in queries]

    async def rerank(self, tenant: str, query: Query, documents: Sequence[Document]) -> Ranking:
        self.tenants.append(tenant)
        if self.fault:
            raise self.fault
        asked, *others = embed(self.shop.encoder, [query, *(Query(image=d.image, text=d.text) for d in documents)])
        relevance = tuple(max(0.0, float(asked @ other)) for other in others)
        order = tuple(sorted(range(len(documents)), key=lambda i: -relevance[i]))
        return Ranking(order=order, relevance=relevance, null=(0.0,) * len(documents))

    async def put(self, tenant: str, rows: pa.Table) -> int:
        self.tenants.append(tenant)
        self.changes.append(rows)
        return len(self.changes)

    async def delete(self, tenant: str, item_ids: Sequence[str]) -> int:
        self.tenants.append(tenant)
        self.changes.append(list(item_ids))
        return len(self.changes)

    async def feedback(self, tenant: str, events: pa.Table) -> None:
        self.tenants.append(tenant)
        self.events.append(events)

    async def item(self, tenant: str, item_id: str) -> dict | None:
        self.tenants.append(tenant)
        return {"item_id": item_id, "title": "a thing"} if item_id in self.shop.pictures else None

    async def picture(self, tenant: str, item_id: str) -> Picture | None:
        self.tenants.append(tenant)
        data = self.shop.pictures.get(item_id)
        return Picture(data=data, mime="image/png") if data else None

    async def ready(self, tenant: str) -> dict[str, bool]:
        return self.up


@pytest.fixture
def backend(colour_shop: Shop) -> ShopBackend:
    return ShopBackend(colour_shop)


@pytest.fixture
def listening() -> Iterator[Callable[[FastAPI], str]]:
    """Serves an application on a loopback port until the test is over: its address."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def listen(app: FastAPI) -> str:
        port = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [port]}, daemon=True)
        thread.start()
        running.append((server, thread))
        while not server.started:
            time.sleep(0.02)
        return f"http://127.0.0.1:{port.getsockname()[1]}"

    yield listen
    for server, thread in running:
        server.should_exit = True
        thread.join(10)
