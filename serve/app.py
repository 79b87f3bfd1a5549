"""Ray Serve wiring: `build(args) -> Application`, one deployment for each part of a release.

Gateway (HTTP) -> Embedder (dynamic batches) -> ShardSearcher-0, ShardSearcher-1, ... at once -> Reranker. Each has its own
autoscaling, its own bound on requests in work and in wait, and its own health check. Also by hand:

    serve run serve.app:build release=out/demo/releases
"""

import asyncio
import hashlib
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray.serve
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from idem import manifest
from idem.types import Document, Hit, Query, Ranking
from index.release import Release
from index.searcher import Searcher, Shard
from pipelines.items import open_items
from serve import engine, several
from serve.access import TENANT
from serve.api import Picture, Search, create_gateway
from serve.backend import held, wanted
from serve.engine import Answer
from serve.errors import NotSupported, ReleaseNotServed, TenantUnknown, Unusable
from serve.flow import RERANK, DeadlineExceeded, Flow, Overloaded, PartError, Unanswerable
from serve.intake import Limits

NAME = "idem"
PROBE_S = 2.0
ABOUT_ITEM = ("item_id", "product_id", "family_id", "category", "title", "lang", "role", "style", "width", "height")


class Scale(BaseModel):
    """Of one deployment. max_ongoing_requests: in work in one replica; max_queued_requests: in wait at each caller, more are refused.

    num_cpus are shares that Ray reserves, not a bound; so small that every part fits on two cores.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=2, ge=1)
    target_ongoing_requests: float = Field(default=4, gt=0)
    max_ongoing_requests: int = Field(default=8, ge=1)
    max_queued_requests: int = Field(default=64, ge=0)
    num_cpus: float = Field(default=0.1, ge=0)
    upscale_delay_s: float = Field(default=10, ge=0)
    downscale_delay_s: float = Field(default=120, ge=0)

    def options(self) -> dict[str, Any]:
        scaling = ("min_replicas", "max_replicas", "target_ongoing_requests", "upscale_delay_s", "downscale_delay_s")
        return {
            "autoscaling_config": {name: getattr(self, name) for name in scaling},
            "max_ongoing_requests": self.max_ongoing_requests,
            "max_queued_requests": self.max_queued_requests,
            "backpressure_config": {"status_code": 503, "retry_after_s": 1},
            "ray_actor_options": {"num_cpus": self.num_cpus},
            "health_check_period_s": 5,
            "health_check_timeout_s": 30,
            "graceful_shutdown_timeout_s": 5,
            "graceful_shutdown_wait_loop_s": 0.2,
            "max_constructor_retry_count": 3,
        }


class ServiceConfig(BaseModel):
    """release: its folder, or root/releases for the current one. depth: products that the reranker sees.

    timeout_ms bounds a request: a reranker that is late is done without. shard_timeout_ms bounds one shard.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    release: str
    depth: int = Field(default=engine.DEPTH, ge=1)
    mode: Literal["listwise", "pointwise"] = "listwise"
    rows_per_product: int = Field(default=engine.ROWS_PER_PRODUCT, ge=1)
    timeout_ms: int = Field(default=5000, ge=1)
    shard_timeout_ms: int = Field(default=1000, ge=1)
    max_batch: int = Field(default=16, ge=1)
    batch_wait_ms: float = Field(default=4, ge=0)
    limits: Limits = Limits()
    gateway: Scale = Scale(max_replicas=1, target_ongoing_requests=32, max_ongoing_requests=64, max_queued_requests=256)
    embedder: Scale = Scale(target_ongoing_requests=16, max_ongoing_requests=32, num_cpus=0.2)
    searcher: Scale = Scale(target_ongoing_requests=8, max_ongoing_requests=16)
    reranker: Scale = Scale(target_ongoing_requests=2, max_ongoing_requests=2, max_queued_requests=16, num_cpus=0.2)

    def answering(self) -> str:
        """8 hexadecimal digits that change with the settings on which answers depend, beside the release."""
        said = self.model_dump_json(include={"depth", "mode", "rows_per_product", "timeout_ms", "shard_timeout_ms"})
        return hashlib.sha256(said.encode()).hexdigest()[:8]


class Embedder:
    """Queries that arrive together are encoded together."""

    def __init__(self, path: str, max_batch: int, batch_wait_ms: float) -> None:
        self.encoder = engine.load_encoder(path)
        self.worker = ThreadPoolExecutor(1)
        self.batch.set_max_batch_size(max_batch)  # pyright: ignore[reportAttributeAccessIssue]
        self.batch.set_batch_wait_timeout_s(batch_wait_ms / 1e3)  # pyright: ignore[reportAttributeAccessIssue]

    async def embed(self, query: Query) -> np.ndarray | str:
        return await self.batch(query)

    @ray.serve.batch
    async def batch(self, queries: list[Query]) -> list[np.ndarray | str]:
        return await asyncio.get_running_loop().run_in_executor(self.worker, engine.embed_apart, self.encoder, queries)

    async def ping(self) -> bool:
        return True

    async def check_health(self) -> None:
        vector = await asyncio.get_running_loop().run_in_executor(self.worker, engine.embed, self.encoder, [Query(text="health")])
        if not np.isfinite(vector).all():
            raise RuntimeError("the embedder gives vectors that are not finite")


class ShardSearcher:
    """One FAISS shard, on one thread."""

    def __init__(self, folder: str, number: int) -> None:
        self.shard = Shard.open(folder, number)
        self.searcher = Searcher([self.shard])  # which keeps the filters that were asked for last

    async def search(self, vector: np.ndarray, k: int, where: Mapping[str, Any] | None = None) -> list[Hit] | str:
        """The k best, or what is wrong with the filter."""
        try:
            return (await asyncio.to_thread(self.searcher.search, vector, k, where=where))[0]
        except ValueError as error:
            if where:
                return str(error)
            raise

    async def ping(self) -> bool:
        return True

    async def check_health(self) -> None:
        await self.search(np.eye(1, self.shard.dim, dtype=np.float32), 1)


class Reranker:
    """One comparison at a time; the pictures of the candidates are fetched here. What is cancelled while it waits is never begun."""

    def __init__(self, release: Release, mode: Literal["listwise", "pointwise"]) -> None:
        path = engine.trained_reranker(release)
        assert path
        self.reranker = engine.load_reranker(path, release.embedder)
        self.items = open_items(release.items, release.items_version)
        self.mode: Literal["listwise", "pointwise"] = mode
        self.worker = ThreadPoolExecutor(1)

    async def rerank(self, query: Query, hits: Sequence[Hit]) -> Ranking:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.worker, engine.rerank, self.reranker, self.items, query, hits, self.mode)

    async def compare(self, query: Query, documents: Sequence[Document]) -> Ranking:
        """As `rerank`, of documents that come with the request."""
        judge = partial(self.reranker.rerank, query, documents, mode=self.mode)
        return await asyncio.get_running_loop().run_in_executor(self.worker, judge)

    async def ping(self) -> bool:
        return True

    async def check_health(self) -> None:
        documents = [Document(item_id=str(i), text="health", image=None, score=0.0) for i in range(2)]
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self.worker, self.reranker.rerank, Query(text="health"), documents)


async def call(part: str, handle: Any, *arguments: Any) -> Any:
    """Await one method of a deployment. Serve's refusals and faults become those of serve.flow; giving up cancels it there."""
    response = handle.remote(*arguments)
    try:
        return await response
    except asyncio.CancelledError as error:
        response.cancel()
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise PartError(f"{part}: its work was cancelled") from error
    except BackPressureError as error:
        raise Overloaded(part) from error
    except RayTaskError as error:
        raise PartError(f"{part}: {error.cause}") from error
    except (RayError, RayServeException) as error:
        raise PartError(f"{part}: {type(error).__name__}") from error


@ray.serve.ingress()
class Gateway:
    """The HTTP interface over the other deployments: the Backend of serve.api. It lives without torch."""

    def __init__(
        self, config: ServiceConfig, release: Release, embedder: DeploymentHandle, shards: list[DeploymentHandle], reranker: Any = None
    ) -> None:
        self.config, self.release = config, release.name
        self.items = open_items(release.items, release.items_version)
        self.parts = {"embedder": embedder, **{f"shard-{i}": shard for i, shard in enumerate(shards)}}
        if reranker is not None:
            self.parts[RERANK] = reranker
        self.flow = Flow(
            embed=self._embed,
            shards={name: self._searching(name) for name in self.parts if name.startswith("shard-")},
            rerank=self._rerank if reranker is not None else None,
            timeout_s=config.timeout_ms / 1e3,
            shard_timeout_s=config.shard_timeout_ms / 1e3,
            rows_per_product=config.rows_per_product,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_gateway(self, limits=self.config.limits, depth=self.config.depth, settings=self.config.answering())

    async def _embed(self, query: Query) -> np.ndarray:
        vector = await call("embedder", self.parts["embedder"].embed, query)
        if isinstance(vector, str):
            raise Unanswerable(vector)
        return vector[None]

    def _searching(self, name: str, where: Mapping[str, Any] | None = None) -> Any:
        async def search(vector: np.ndarray, k: int) -> list[Hit]:
            found = await call(name, self.parts[name].search, vector, k, *([where] if where else []))
            if isinstance(found, str):
                raise Unusable("invalid_filter", found)
            return found

        return search

    async def _rerank(self, query: Query, hits: list[Hit]) -> Ranking:
        return await call(RERANK, self.parts[RERANK].rerank, query, hits)

    def _require(self, tenant: str, release: str | None = None) -> None:
        if tenant != TENANT:
            raise TenantUnknown(tenant)
        if release is not None and release != self.release:
            raise ReleaseNotServed(release, self.release)

    def _flow(self, asked: Search) -> Flow:
        """The parts, with the filter and the time of one request."""
        flow = self.flow
        if asked.where:
            flow = replace(flow, shards={name: self._searching(name, asked.where) for name in flow.shards})
        if asked.deadline is not None:
            if (left := asked.deadline - time.monotonic()) <= 0:
                raise DeadlineExceeded("the time of the request was over before the search began")
            flow = replace(flow, timeout_s=min(flow.timeout_s, left))
        return flow

    async def search(self, asked: Search) -> Answer:
        self._require(asked.tenant, asked.release)
        answer = await self._flow(asked).search(asked.query, top_k=wanted(asked), rerank=asked.rerank, depth=asked.depth)
        return held(answer, asked)

    async def embed(self, tenant: str, queries: Sequence[Query]) -> list[np.ndarray | str]:
        self._require(tenant)
        one = partial(call, "embedder", self.parts["embedder"].embed)
        return await several.embed_each(one, queries, at_once=self.config.max_batch, timeout_s=self.config.timeout_ms / 1e3)

    async def rerank(self, tenant: str, query: Query, documents: Sequence[Document]) -> Ranking:
        self._require(tenant)
        if RERANK not in self.parts:
            raise NotSupported(f"the release {self.release} has no trained reranker")
        compare = partial(call, RERANK, self.parts[RERANK].compare)
        embed = partial(self.embed, tenant)
        return await several.rank(query, documents, embed=embed, compare=compare, timeout_s=self.config.timeout_ms / 1e3)

    async def put(self, tenant: str, rows: pa.Table) -> int:
        raise NotSupported("this service does not take changes of items")

    async def delete(self, tenant: str, item_ids: Sequence[str]) -> int:
        raise NotSupported("this service does not take changes of items")

    async def feedback(self, tenant: str, events: pa.Table) -> None:
        raise NotSupported("this service keeps no feedback")

    async def item(self, tenant: str, item_id: str) -> dict[str, Any] | None:
        self._require(tenant)
        return await asyncio.to_thread(self._row, item_id, ABOUT_ITEM)

    async def picture(self, tenant: str, item_id: str) -> Picture | None:
        self._require(tenant)
        row = await asyncio.to_thread(self._row, item_id, ("image", "mime"))
        return Picture(data=row["image"], mime=row["mime"]) if row and row["image"] else None

    def _row(self, item_id: str, columns: Sequence[str]) -> dict[str, Any] | None:
        try:
            return self.items.take([item_id], columns).to_pylist()[0]
        except ValueError:  # how Items says that it is not there
            return None

    async def ready(self, tenant: str) -> dict[str, bool]:
        """Whether each part answers; one that is too busy to is there."""
        return dict(zip(self.parts, await asyncio.gather(*map(self._answers, self.parts)), strict=True))

    async def _answers(self, part: str) -> bool:
        try:
            return await asyncio.wait_for(call(part, self.parts[part].ping), PROBE_S)
        except Overloaded:
            return True
        except (PartError, TimeoutError):
            return False


def deployed(cls: Any, name: str, scale: Scale) -> Any:
    return ray.serve.deployment(cls, name=name, **scale.options())


def build(args: ServiceConfig) -> ray.serve.Application:
    """The service of one release. ValueError where the release is damaged or was not made."""
    release = Release.open(args.release)
    count = len(manifest.read(release.index, kind="index").files) // 2
    embedder = deployed(Embedder, "Embedder", args.embedder).bind(release.embedder, args.max_batch, args.batch_wait_ms)
    shards = [deployed(ShardSearcher, f"ShardSearcher-{i}", args.searcher).bind(release.index, i) for i in range(count)]
    reranker = deployed(Reranker, "Reranker", args.reranker).bind(release, args.mode) if engine.trained_reranker(release) else None
    return deployed(Gateway, "Gateway", args.gateway).bind(args, release, embedder, shards, reranker)
