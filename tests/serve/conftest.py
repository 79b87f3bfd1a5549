"""A shop small enough to check by hand: one colour a product, two pictures each, two shards, and trivial models over it."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from PIL import Image

from idem import images
from idem.types import Document, Hit, Query, Ranking
from index.merge import best_first, merge
from serve.api import Picture
from serve.engine import Answer, Engine

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
    pictures: dict[str, bytes] = field(default_factory=dict)
    hits: list[Hit] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, colour in COLOURS.items():
            for number in range(2):
                item_id = f"{name}/{number}"
                self.pictures[item_id] = picture(colour, shade=12 * number)
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


class ShopBackend:
    """What the gateway talks to, over the shop in this process; `fault` is raised by the next searches."""

    release = "test-release"

    def __init__(self, shop: Shop) -> None:
        self.shop, self.fault, self.up = shop, None, {"embedder": True, "shard-0": True}
        self.asked: list[tuple[Query, dict]] = []

    async def search(self, query: Query, *, top_k: int, rerank: bool, depth: int) -> Answer:
        self.asked.append((query, {"top_k": top_k, "rerank": rerank, "depth": depth}))
        if self.fault:
            raise self.fault
        made = Engine(encoder=self.shop.encoder, searcher=self.shop.searcher, pictures=self.shop, reranker=self.shop.reranker, depth=depth)
        return made.search([query], top_k=top_k, rerank="listwise" if rerank else "none")[0]

    async def item(self, item_id: str) -> dict | None:
        return {"item_id": item_id, "title": "a thing"} if item_id in self.shop.pictures else None

    async def picture(self, item_id: str) -> Picture | None:
        data = self.shop.pictures.get(item_id)
        return Picture(data=data, mime="image/png") if data else None

    async def ready(self) -> dict[str, bool]:
        return self.up


@pytest.fixture
def backend(colour_shop: Shop) -> ShopBackend:
    return ShopBackend(colour_shop)
