"""The steps of an answer in plain Python: embed, search, shortlist, rerank; and the engine that runs them in this process.

What is measured is what is served: the deployments of serve.app call these very functions. Models are imported only where
they are loaded, because the gateway and the shard searchers import this module and live without torch.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from idem import metrics, storage
from idem.types import Document, Hit, Query, Ranking
from index.release import Release
from index.searcher import Searcher
from pipelines.items import open_items

DEPTH = 20  # products that the reranker sees
ROWS_PER_PRODUCT = 6  # rows fetched for each product wanted, because several rows may show one product

Mode = Literal["none", "listwise", "pointwise"]


class Encodes(Protocol):
    """Queries to vectors (n, dim) float32, L2-normalised: train.embedder.Embedder, or its twin."""

    def encode(self, images: Sequence[bytes | None], texts: Sequence[str]) -> np.ndarray: ...


class Searches(Protocol):
    """Vectors (n, dim) to the k best items each, best first: index.searcher.Searcher or one Shard."""

    def search(self, vectors: np.ndarray, k: int) -> list[list[Hit]]: ...


class Reranks(Protocol):
    """A query and its candidates to an order of them: train.reranker.Reranker, or its twin."""

    def rerank(self, query: Query, documents: Sequence[Document], *, mode: Literal["listwise", "pointwise"] = ...) -> Ranking: ...


class Pictures(Protocol):
    """Encoded pictures by item_id: pipelines.items.Items."""

    def images(self, item_ids: Sequence[str]) -> list[bytes | None]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What is found for one query; one hit a product.

    hits: best first, at most top_k. relevance: for each of them the probability that it is the very same product, None
    where the reranker did not see it. retrieved: everything considered, in the order of retrieval alone, at least as long
    as hits. degraded: the parts that failed or came too late (rerank, shard-1, ...). timings_ms: by stage, wall time.
    """

    hits: tuple[Hit, ...]
    relevance: tuple[float | None, ...]
    retrieved: tuple[Hit, ...]
    degraded: tuple[str, ...] = ()
    timings_ms: dict[str, float] = field(default_factory=dict)


def embed(encoder: Encodes, queries: Sequence[Query]) -> np.ndarray:
    """Vectors (n, dim) float32 of n queries, in one batch."""
    return encoder.encode([query.image for query in queries], [query.text for query in queries])


def embed_apart(encoder: Encodes, queries: Sequence[Query]) -> list[np.ndarray | str]:
    """A vector (dim,) each, or what is wrong with the query: a bad one must not fail those that happened to share its batch."""
    try:
        return list(embed(encoder, queries))
    except ValueError as error:
        if len(queries) == 1:
            return [str(error)]
        return [embed_apart(encoder, [query])[0] for query in queries]


def shortlist(hits: Sequence[Hit], count: int) -> list[Hit]:
    """The best row of each product, in order, at most `count`. `hits` come best first."""
    return [hits[i] for i in metrics.collapse([hit.product_id for hit in hits])[:count]]


def rerank(reranker: Reranks, pictures: Pictures, query: Query, hits: Sequence[Hit], mode: Literal["listwise", "pointwise"]) -> Ranking:
    """The reranker's verdict over `hits`, whose pictures are fetched here so that only ids travel between processes."""
    images = pictures.images([hit.item_id for hit in hits])
    documents = [
        Document(item_id=hit.item_id, text=hit.title, image=image, score=hit.score) for hit, image in zip(hits, images, strict=True)
    ]
    return reranker.rerank(query, documents, mode=mode)


def compose(
    retrieved: Sequence[Hit], ranking: Ranking | None, *, top_k: int, degraded: Sequence[str] = (), timings_ms: dict[str, float]
) -> Answer:
    """The answer: what the reranker saw in its order, then the rest in the order of retrieval; without a ranking, retrieval alone."""
    order = list(ranking.order) if ranking else []
    seen = len(order)
    assert sorted(order) == list(range(min(seen, len(retrieved)))), "a ranking is a permutation of the hits it was given"
    order += range(seen, len(retrieved))
    relevance = [ranking.relevance[i] if ranking and i < seen else None for i in order[:top_k]]
    return Answer(
        hits=tuple(retrieved[i] for i in order[:top_k]),
        relevance=tuple(relevance),
        retrieved=tuple(retrieved),
        degraded=tuple(degraded),
        timings_ms={stage: round(ms, 2) for stage, ms in timings_ms.items()},
    )


@dataclass(frozen=True, kw_only=True)
class Engine:
    """All of a release in one process. `reranker` is None where the release has none that was trained: the order of retrieval stands."""

    encoder: Encodes
    searcher: Searches
    pictures: Pictures
    reranker: Reranks | None = None
    depth: int = DEPTH
    rows_per_product: int = ROWS_PER_PRODUCT

    @classmethod
    def open(cls, release_path: str, *, depth: int = DEPTH, rows_per_product: int = ROWS_PER_PRODUCT) -> "Engine":
        """The release at `release_path` (its folder, or root/releases for the current one). ValueError where it is damaged."""
        release = Release.open(release_path)
        return cls(
            encoder=load_encoder(release.embedder),
            searcher=Searcher.open(release.index),
            pictures=open_items(release.items, release.items_version),
            reranker=load_reranker(path, release.embedder) if (path := trained_reranker(release)) else None,
            depth=depth,
            rows_per_product=rows_per_product,
        )

    def search(self, queries: Sequence[Query], *, top_k: int = 10, rerank: Mode = "listwise") -> list[Answer]:
        """One answer a query, in order. Embedding and search run as one batch, whose time is shared out equally."""
        if not queries:
            return []
        count = max(top_k, self.depth)
        start = time.perf_counter()
        vectors = embed(self.encoder, queries)
        embedded = time.perf_counter()
        found = self.searcher.search(vectors, count * self.rows_per_product)
        searched = time.perf_counter()
        shared = {"embed": (embedded - start) * 1e3 / len(queries), "search": (searched - embedded) * 1e3 / len(queries)}
        return [self._finish(query, shortlist(hits, count), top_k, rerank, shared) for query, hits in zip(queries, found, strict=True)]

    def _finish(self, query: Query, retrieved: list[Hit], top_k: int, mode: Mode, shared: dict[str, float]) -> Answer:
        start = time.perf_counter()
        ranking = None
        if self.reranker is not None and mode != "none" and retrieved:
            ranking = rerank(self.reranker, self.pictures, query, retrieved[: self.depth], mode)
        degraded = ("rerank",) if ranking and ranking.degraded else ()
        reranking = (time.perf_counter() - start) * 1e3
        timings = {**shared, "rerank": reranking, "total": sum(shared.values()) + reranking}
        return compose(retrieved, None if degraded else ranking, top_k=top_k, degraded=degraded, timings_ms=timings)


def load_encoder(path: str) -> Encodes:
    """The embedder at `path`, on one thread: two of them beside another busy process spin-wait."""
    import torch

    from train.embedder import Embedder

    torch.set_num_threads(1)
    return Embedder.load(path)


def trained_reranker(release: Release) -> str | None:
    """Where the release's reranker is, or None where it has none or the identity: that has a cosine to tell, and no probability."""
    if release.reranker is None or json.loads(storage.read_bytes(storage.join(release.reranker, "config.json")))["identity"]:
        return None
    return release.reranker


def load_reranker(path: str, embedder_path: str) -> Reranks:
    """The reranker at `path`, which reads with the tower of the embedder it was trained on; on one thread."""
    import torch

    from train.reranker import Reranker

    torch.set_num_threads(1)
    return Reranker.load(path, embedder_path=embedder_path)
