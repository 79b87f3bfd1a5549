"""Candidate lists for reranker training and evaluation: what the embedder finds for products that it was not trained on.

Families of id_split `train` are dealt into folds (idem.folds), and no list of any fold holds a product that the embedder has learnt
(METHOD.md section 7): it would be told by that. Of what the index holds, the gallery of fold `rerank`, which is learnt from, is the
fold itself; that of `calibrate`, on which is chosen what is served, both of these; that of `test` all that is not of split train.
Queries are a fold's pictures outside the index, without their titles. A list holds products, each by its best row, as the reranker
is served them.
"""

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field
from tqdm import tqdm

from idem import folds, job, manifest, metrics, schema, storage
from idem.config import Table
from index import vectors
from index.searcher import exact
from pipelines.items import Items, open_items
from train.embedder import Embedder

NAME = "candidates.parquet"
LEARNT, CHOSEN_ON = folds.RERANKER_FOLDS
TEST = "test"
FEWEST_PRODUCTS = 4  # with fewer there is next to nothing wrong to choose, and nothing is learnt
COLUMNS = ["item_id", "product_id", "family_id", "category", "id_split", "width"]
BLOCK = 512  # pictures held at a time
SPLIT_RULE = "rows of split train"  # of index.plan: then photos of that split share the scene with the gallery
OTHER_SPLITS = "split != 'train'"


class CandidatesConfig(Table):
    """k: products a query; queries: SQL filter on items, of which the pictures outside the gallery are asked with, empty for all
    of them, or for those of splits other than train where the gallery is made of split train; test: SQL filter of the pictures
    of other splits than train that fold `test` asks with, empty for no such fold; calibrate_products: most products in the gallery
    of fold `calibrate`, of which its own are never left out, 0 for all: r of a first answer falls with the number it was chosen from, so
    a service of fewer products sets it to theirs; batch_size: pictures a forward pass.
    """

    k: int = Field(20, ge=1)
    queries: str = ""
    test: str = ""
    calibrate_products: int = Field(0, ge=0)
    batch_size: int = Field(64, ge=1)


@dataclass(frozen=True, slots=True)
class Side:
    """The rows of one fold: gallery (positions in the table of items, in the order of `vector_rows`) and queries."""

    gallery: np.ndarray
    vector_rows: np.ndarray
    queries: np.ndarray


def asking(config: CandidatesConfig, index: manifest.Manifest) -> str:
    """The SQL filter that queries pass, or an empty string: the caller's, else what the rule of the gallery asks for."""
    return config.queries or (OTHER_SPLITS if index.figures.get("rule") == SPLIT_RULE else "")


def divide(
    table: pa.Table,
    gallery_ids: list[str],
    fractions: tuple[float, float, float],
    asked: pa.ChunkedArray | None = None,
    test: pa.ChunkedArray | None = None,
    most: int = 0,
) -> dict[str, Side]:
    """Gallery and queries of each fold. `table` has COLUMNS of all items in scan order; `gallery_ids` are those indexed.

    asked: item_ids of which queries are taken, None for any; test: item_ids that fold `test` asks with, None for no such fold;
    most: CandidatesConfig.calibrate_products.
    """
    vector_row = pc.fill_null(pc.index_in(table["item_id"], value_set=pa.array(gallery_ids)), -1).to_numpy()
    fold = folds.folds(table["family_id"].to_pylist(), fractions)
    fold[pc.not_equal(table["id_split"], "train").to_numpy()] = ""
    outside = pc.greater(table["width"], 0).to_numpy() & (vector_row < 0)
    may_ask = outside if asked is None else outside & _among(table, asked)
    queries = {name: (fold == name) & may_ask for name in folds.RERANKER_FOLDS}
    if test is not None:
        queries[TEST] = outside & _among(table, test)
    apart = pc.not_equal(table["id_split"], "train").to_numpy()
    of_gallery = {LEARNT: fold == LEARNT, CHOSEN_ON: _of_calibrate(table, fold, vector_row >= 0, most), TEST: apart}
    sides = {}
    for name, asks in queries.items():
        gallery = np.flatnonzero((vector_row >= 0) & of_gallery[name])
        sides[name] = Side(gallery, vector_row[gallery], np.flatnonzero(asks & (~apart if name != TEST else apart)))
    return sides


def _of_calibrate(table: pa.Table, fold: np.ndarray, indexed: np.ndarray, most: int) -> np.ndarray:
    """Which rows make the gallery of fold `calibrate`: whole families, as it is within them that products are hard to tell apart."""
    kept = np.isin(fold, folds.RERANKER_FOLDS) & indexed
    if not most:
        return kept
    rows = np.flatnonzero(kept)
    names, family = np.unique(table["family_id"].take(pa.array(rows)).to_pylist(), return_inverse=True)
    _, firsts = np.unique(table["product_id"].take(pa.array(rows)).to_pylist(), return_index=True)
    products = np.bincount(family[firsts], minlength=len(names))
    taken = np.zeros(len(names), bool)
    taken[family[fold[rows] == CHOSEN_ON]] = True
    left = most - products[taken].sum()
    for other in np.random.default_rng(0).permutation(np.flatnonzero(~taken)):
        if products[other] <= left:
            taken[other] = True
            left -= products[other]
    kept[rows] = taken[family]
    return kept


def _among(table: pa.Table, item_ids: pa.ChunkedArray) -> np.ndarray:
    return pc.is_in(table["item_id"], value_set=item_ids.combine_chunks()).to_numpy()


def lists(fold: str, queries: pa.Table, gallery: pa.Table, query_vectors: np.ndarray, gallery_vectors: np.ndarray, k: int) -> pa.Table:
    """CANDIDATES of one fold: for each query the best rows of its k nearest products, best first, with cosines and levels.

    queries and gallery have COLUMNS; their vectors are (n, dim) in the same order. Ties go to the earlier gallery row.
    """
    item_ids, products, families, categories = (gallery[name].to_numpy() for name in COLUMNS[:4])
    rows_a_product = int(np.unique(products, return_counts=True)[1].max())  # so many rows hold k products, however they fall
    found = exact(gallery_vectors, query_vectors, k * rows_a_product)
    best = [metrics.collapse(products[near].tolist())[:k] for near in found[1]]
    scores, rows = ([row[kept] for row, kept in zip(part, best, strict=True)] for part in found)
    asked = zip(*(queries[name].to_pylist() for name in COLUMNS[1:4]), strict=True)
    levels = [metrics.levels_of(query, products[r], families[r], categories[r]) for query, r in zip(asked, rows, strict=True)]
    columns = {
        "query_id": queries["item_id"],
        "fold": pa.array([fold] * len(rows)),
        "item_ids": [item_ids[r] for r in rows],
        "scores": scores,
        "levels": levels,
    }
    return pa.table(columns, schema=schema.CANDIDATES)


def too_small(table: pa.Table, side: Side) -> str:
    """Why a fold gives no candidates, or an empty string."""
    products = len(table["product_id"].take(pa.array(side.gallery)).unique())
    if products < FEWEST_PRODUCTS:
        return f"{products} products in the gallery, at least {FEWEST_PRODUCTS} are needed"
    return "" if len(side.queries) else "no picture beside those in the gallery may ask"


def encode_pictures(items: Items, embedder: Embedder, offsets: np.ndarray, *, batch_size: int, desc: str) -> np.ndarray:
    """(n, dim) vectors of the pictures at `offsets`, titles unread; a block of pictures in memory at a time."""
    parts = []
    with tqdm(total=len(offsets), desc=desc, unit="query") as bar:
        for start in range(0, len(offsets), BLOCK):
            images = items.take_rows(offsets[start : start + BLOCK], ["image"])["image"].to_pylist()
            parts.append(embedder.encode(images, None, batch_size=batch_size))
            bar.update(len(images))
    return np.concatenate(parts)


def _figures(made: pa.Table, side: Side) -> dict[str, Any]:
    levels = [row for row in made["levels"].to_pylist()]
    return {
        "queries": len(levels),
        "gallery": len(side.gallery),
        "R@1": round(float(np.mean([row[0] == 0 for row in levels])), 4),
        "found": round(float(np.mean([0 in row for row in levels])), 4),
    }


def make(config: CandidatesConfig, items: Items, embedder: Embedder, vectors_uri: str, asked: str = "") -> tuple[pa.Table, dict[str, Any]]:
    """CANDIDATES of the folds, and figures of each: `R@1`, and `found`, the share of lists that hold the product asked for.

    asked: SQL filter on items that queries pass, empty for any. ValueError where it cannot be applied.
    """
    gallery_ids, matrix = vectors.read(vectors_uri)
    table = items.table(COLUMNS)
    able, tested = (items.table(["item_id"], rule)["item_id"] if rule else None for rule in (asked, config.test))
    parts, figures = [schema.CANDIDATES.empty_table()], {}
    for fold, side in divide(table, gallery_ids, embedder.fractions, able, tested, config.calibrate_products).items():
        if why := too_small(table, side):
            figures[fold] = {"queries": 0, "gallery": len(side.gallery), "empty": why}
            continue
        queries = encode_pictures(items, embedder, side.queries, batch_size=config.batch_size, desc=fold)
        asking_rows, gallery = (table.take(pa.array(rows)) for rows in (side.queries, side.gallery))
        parts.append(lists(fold, asking_rows, gallery, queries, matrix[side.vector_rows], config.k))
        figures[fold] = _figures(parts[-1], side)
    return pa.concat_tables(parts), figures


def run(config: CandidatesConfig) -> dict[str, Any]:
    """Write the candidates of the current index, with the embedder and the items it was made of; or find them written."""
    layout = storage.Layout(config.root)
    index = manifest.read(manifest.current(layout.index, kind="index"), kind="index")
    inputs, asked = {"index": index.id, **index.inputs}, asking(config, index)
    settings = {"k": config.k, "queries": asked, "test": config.test, "calibrate_products": config.calibrate_products}
    settings["fields"] = index.config["fields"]  # what of the documents was searched
    made = manifest.Plan(parent=layout.candidates, kind="candidates", config=settings, inputs=inputs)
    if there := made.finished():
        return {"candidates": made.id, **there.figures, "skipped": True}
    items = open_items(layout.items, version=int(index.inputs["items_version"]))
    embedder = Embedder.load(storage.join(layout.embedder, index.inputs["embedder"]))
    table, figures = make(config, items, embedder, storage.join(layout.vectors, index.inputs["vectors"], vectors.NAME), asked)
    storage.local_path(made.folder).mkdir(parents=True, exist_ok=True)
    pq.write_table(table, storage.local_path(storage.join(made.folder, NAME)))
    made.write(figures=figures, files=[NAME])
    return {"candidates": made.id, **figures}


if __name__ == "__main__":
    sys.exit(job.main("index.candidates", "candidates", CandidatesConfig, run))
