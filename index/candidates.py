"""Candidate lists for reranker training and evaluation: what the embedder finds for products that it was not trained on.

Families of id_split `train` are dealt into folds (idem.folds), and no list of any fold holds a product that the embedder has learnt
(METHOD.md section 7): it would be told by that. Of what the index holds, the gallery of fold `rerank`, which is learnt from, is the
fold itself; that of `calibrate`, on which is chosen what is served, both of these; that of `test` all that is not of split train.
Queries are a fold's pictures outside the index, without their titles, and texts with graded judgements where such are given
(index.text_queries). A list holds products, each by its best row, as the reranker is served them.
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

from idem import folds, job, manifest, schema, storage
from idem.config import Table
from index import candidate_lists, vectors
from index.candidate_lists import of_pictures, of_texts
from index.text_queries import CHOSEN_ON, LEARNT, TEST, TextQueries, dealt, read
from index.text_queries import inputs as text_inputs
from pipelines.items import Items, open_items
from train.embedder import Embedder

NAME = "candidates.parquet"
FEWEST_PRODUCTS = 4  # with fewer there is next to nothing wrong to choose, and nothing is learnt
COLUMNS = [*candidate_lists.COLUMNS, "id_split", "width"]
BLOCK = 512  # pictures held at a time
SPLIT_RULE = "rows of split train"  # of index.plan: then photos of that split share the scene with the gallery
OTHER_SPLITS = "split != 'train'"


class CandidatesConfig(Table):
    """k: products a query; queries: SQL filter on items, of which the pictures outside the gallery are asked with, empty for all
    of them, or for those of splits other than train where the gallery is made of split train; test: SQL filter of the pictures
    of other splits than train that fold `test` asks with, empty for no such fold; calibrate_products: most products in the gallery
    of fold `calibrate`, of which its own are never left out, 0 for all: r of a first answer falls with the number it was chosen from, so
    a service of fewer products sets it to theirs; texts and qrels: parquet files of text queries (query_id, query) and of their judgements
    (query_id, product_id, grade 1 to 3), both or neither; batch_size: pictures a forward pass.
    """

    k: int = Field(20, ge=1)
    queries: str = ""
    test: str = ""
    calibrate_products: int = Field(0, ge=0)
    texts: str = ""
    qrels: str = ""
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


def too_small(gallery: pa.Table, side: Side, texts: int) -> str:
    """Why a fold gives no candidates, or an empty string."""
    products = len(gallery["product_id"].unique())
    if products < FEWEST_PRODUCTS:
        return f"{products} products in the gallery, at least {FEWEST_PRODUCTS} are needed"
    return "" if len(side.queries) or texts else "no picture beside those in the gallery may ask"


def encode_pictures(items: Items, embedder: Embedder, offsets: np.ndarray, *, batch_size: int, desc: str) -> np.ndarray:
    """(n, dim) vectors of the pictures at `offsets`, titles unread; a block of pictures in memory at a time."""
    parts = [np.zeros((0, embedder.dim), np.float32)]
    with tqdm(total=len(offsets), desc=desc, unit="query") as bar:
        for start in range(0, len(offsets), BLOCK):
            images = items.take_rows(offsets[start : start + BLOCK], ["image"])["image"].to_pylist()
            parts.append(embedder.encode(images, None, batch_size=batch_size))
            bar.update(len(images))
    return np.concatenate(parts)


def _figures(made: pa.Table, side: Side) -> dict[str, Any]:
    told = {"queries": len(side.queries), "gallery": len(side.gallery)}
    if not len(side.queries):
        return told
    levels = made["levels"].to_pylist()
    right, found = np.mean([row[0] == 0 for row in levels]), np.mean([0 in row for row in levels])
    return {**told, "R@1": round(float(right), 4), "found": round(float(found), 4)}


def make(
    config: CandidatesConfig, items: Items, embedder: Embedder, vectors_uri: str, asked: str = "", said: TextQueries | None = None
) -> tuple[pa.Table, dict[str, Any]]:
    """CANDIDATES of the folds, and figures of each: `R@1`, and `found`, the share of lists that hold the product asked for; `texts`, and
    `texts_left_out`, those of which no product is in the gallery.

    asked: SQL filter on items that queries pass, empty for any. said: text queries. ValueError where the filter cannot be applied.
    """
    gallery_ids, matrix = vectors.read(vectors_uri)
    table = items.table(COLUMNS)
    able, tested = (items.table(["item_id"], rule)["item_id"] if rule else None for rule in (asked, config.test))
    texts = dealt(said or TextQueries(), table, embedder.fractions)
    parts, figures = [schema.CANDIDATES.empty_table()], {}
    for fold, side in divide(table, gallery_ids, embedder.fractions, able, tested, config.calibrate_products).items():
        gallery = table.take(pa.array(side.gallery))
        of_fold = texts[fold].answered_by(set(gallery["product_id"].to_pylist()))
        if why := too_small(gallery, side, len(of_fold.ids)):
            figures[fold] = {"queries": 0, "gallery": len(side.gallery), "empty": why}
            continue
        pictures = encode_pictures(items, embedder, side.queries, batch_size=config.batch_size, desc=fold)
        shown, vectors_of = table.take(pa.array(side.queries)), matrix[side.vector_rows]
        parts += [of_pictures(fold, shown, gallery, pictures, vectors_of, config.k)] if len(side.queries) else []
        figures[fold] = _figures(parts[-1], side)
        if texts[fold].ids:
            figures[fold] |= {"texts": len(of_fold.ids), "texts_left_out": len(texts[fold].ids) - len(of_fold.ids)}
        if of_fold.ids:
            parts.append(of_texts(fold, of_fold, gallery, embedder.encode(None, of_fold.texts), vectors_of, config.k))
    return pa.concat_tables(parts), figures


def run(config: CandidatesConfig) -> dict[str, Any]:
    """Write the candidates of the current index, with the embedder and the items it was made of; or find them written."""
    layout = storage.Layout(config.root)
    index = manifest.read(manifest.current(layout.index, kind="index"), kind="index")
    asked, said = asking(config, index), read(config.texts, config.qrels)
    inputs = {"index": index.id, **index.inputs, **text_inputs(config.texts, config.qrels)}
    settings = {"k": config.k, "queries": asked, "test": config.test, "calibrate_products": config.calibrate_products}
    settings["fields"] = index.config["fields"]  # what of the documents was searched
    made = manifest.Plan(parent=layout.candidates, kind="candidates", config=settings, inputs=inputs)
    if there := made.finished():
        return {"candidates": made.id, **there.figures, "skipped": True}
    items = open_items(layout.items, version=int(index.inputs["items_version"]))
    embedder = Embedder.load(storage.join(layout.embedder, index.inputs["embedder"]))
    table, figures = make(config, items, embedder, storage.join(layout.vectors, index.inputs["vectors"], vectors.NAME), asked, said)
    storage.local_path(made.folder).mkdir(parents=True, exist_ok=True)
    pq.write_table(table, storage.local_path(storage.join(made.folder, NAME)))
    made.write(figures=figures, files=[NAME])
    return {"candidates": made.id, **figures}


if __name__ == "__main__":
    sys.exit(job.main("index.candidates", "candidates", CandidatesConfig, run))
