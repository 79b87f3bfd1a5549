"""One embedder, its candidates, and rerankers trained on them: what each order finds among products that neither has seen.

A root has its items and an embedder (`pipelines.ingest`, `train.run`). Lists of the folds `rerank` and `calibrate` are those that
index.candidates makes; those of `test` are asked by pictures of `dev_unseen` products, of the whole gallery, as a service would.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from idem import folds, metrics, storage
from index import candidates
from index.candidates import COLUMNS
from index.searcher import exact
from pipelines.items import Items, open_items
from train import rerank_loop, rerank_select
from train.embedder import Embedder
from train.rerank_blocks import Batch
from train.rerank_data import Lists, Pool, places_shape
from train.rerank_loop import RerankConfig
from train.rerank_merge import Choice, Scored, arrange, probability
from train.rerank_model import Model
from train.rerank_run import gather

TEST = "test"
DEPTH = 50  # candidates a query
GALLERY = {"emoji": "style = 'noto'", "grocery": "role = 'photo' AND split = 'train'"}
ASKS = {"emoji": "style != 'noto'", "grocery": "role = 'photo' AND split = 'test'"}
PER_PRODUCT = {"emoji": 0, "grocery": 5}


@dataclass(frozen=True, kw_only=True)
class Material:
    """What rerankers of one embedder are trained on and asked; pools by the number of views of a picture."""

    name: str
    embedder: Embedder
    pools: dict[int, Pool]
    lists: dict[str, Lists]


def tables(items: Items, embedder: Embedder, name: str) -> pa.Table:
    """CANDIDATES of the three folds."""
    from index import plan

    table = items.table(COLUMNS)
    of_gallery, may_ask = (items.table(["item_id"], rule)["item_id"] for rule in (GALLERY[name], ASKS[name]))
    chosen = plan.chosen_rows(table, of_gallery, PER_PRODUCT[name])
    vectors = candidates.encode_pictures(items, embedder, chosen, batch_size=64, desc="gallery")
    gallery_ids = table["item_id"].take(pa.array(chosen)).to_pylist()
    sides = candidates.divide(table, gallery_ids, embedder.fractions, may_ask)
    asking = candidates.asking_rows(table, may_ask) 
    raise NotImplementedError
