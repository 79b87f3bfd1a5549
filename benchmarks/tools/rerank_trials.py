"""Rerankers trained on the candidates of a root, and what each order finds for the queries of fold `test`.

A root has its items, embedder, index and candidates, as their jobs leave them. Both models train on the same lists for the same time.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from idem import manifest, metrics, storage
from index.candidates import NAME, TEST
from pipelines.items import Items, open_items
from train import rerank_loop, rerank_select
from train.embedder import Embedder
from train.rerank_data import Kind, Lists, Pool, places_shape
from train.rerank_loop import RerankConfig
from train.rerank_merge import Choice, Scored, arrange, probability
from train.rerank_model import Model
from train.rerank_run import gather

ALL_QUERIES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Root:
    """What is there to train on; fields: what of an item was indexed."""

    items: Items
    embedder: Embedder
    reader: Embedder
    table: pa.Table
    fields: str

    @classmethod
    def open(cls, path: str, reader: str = "") -> "Root":
        """reader: folder of the embedder that rerankers read pictures with; the retrieval's own where it is empty."""
        layout = storage.Layout(path)
        folder = manifest.current(layout.candidates, kind="candidates")
        found = manifest.read(folder, kind="candidates")
        embedder = Embedder.load(manifest.current(layout.embedder, kind="embedder"))
        return cls(
            items=open_items(layout.items),
            embedder=embedder,
            reader=Embedder.load(reader) if reader else embedder,
            table=pq.read_table(f"{folder}/{NAME}"),
            fields=found.config["fields"],
        )


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A reranker, the tokens it reads, and what it was trained on."""

    config: RerankConfig
    model: Model
    pool: Pool
    lists: dict[str, Lists]
    figures: dict[str, Any]


def train(root: Root, config: RerankConfig) -> Trained:
    """As the job trains it, on one worker."""
    pool, lists = gather(root.table, root.items, root.embedder, root.reader, config, fields=root.fields)
    began = time.perf_counter()
    state = rerank_loop.start(config, config.shape(root.reader), pool, lists["rerank"], root.reader.image_head())
    state = rerank_loop.train(state, config, pool, lists["rerank"], lists["calibrate"])
    if state.failed:
        raise ValueError(f"training failed: {state.failed}")
    state.model.load_state_dict(state.best)
    figures = {
        "seconds": round(time.perf_counter() - began, 1),
        "steps": state.step,
        "best_step": state.best_step,
        "best_loss": round(state.best_loss, 4),
        "lists": {fold: len(each) for fold, each in lists.items()},
    }
    return Trained(config=config, model=state.model.eval(), pool=pool, lists=lists, figures=figures)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Q lists, scored: `levels` of their documents in canonical order, `families` (Q,) of the queries."""

    scored: list[Scored]
    levels: list[np.ndarray]
    families: np.ndarray

    @classmethod
    def of(cls, trained: Trained, fold: str, kind: Kind, depth: int, queries: int = ALL_QUERIES) -> "Answers":
        config = trained.config
        with torch.inference_mode():
            found = rerank_select.measure(
                trained.model, trained.pool, trained.lists[fold], kind=kind, depth=depth, chunk=config.chunk, queries=queries
            )
        return cls(scored=found.scored, levels=found.levels, families=found.families)

    def ordered(self, choice: Choice) -> list[np.ndarray]:
        """Levels in the order of `choice`."""
        return [levels[arrange(scored, choice)] for scored, levels in zip(self.scored, self.levels, strict=True)]


def judged(ordered: list[np.ndarray]) -> Mapping[str, np.ndarray]:
    """(Q,) I-HR@1, C-HR@10 and nDCG@10 over the candidates (METHOD.md section 4)."""
    rows = [
        (float(levels[0] == 0), _coarse(levels), metrics.ndcg_at(levels, 10, np.bincount(levels, minlength=metrics.LEVELS))) for levels in ordered
    ]
    return dict(zip(("I-HR@1", "C-HR@10", "nDCG@10"), np.array(rows).T, strict=True))


def _coarse(levels: np.ndarray) -> float:
    right = int((levels <= 1).sum())
    return float((levels[: min(10, right)] <= 1).mean()) if right else 0.0
