"""Text queries with graded judgements, and which fold each belongs to.

A text may be right for products of several folds. What touches a product that is kept from training is asked in fold `test` alone, and
of the others what touches a family of fold `calibrate` is never learnt from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from idem import folds, manifest
from idem.qrels import read_qrels, read_texts

LEARNT, CHOSEN_ON = folds.RERANKER_FOLDS
TEST = "test"


@dataclass(frozen=True, kw_only=True)
class TextQueries:
    """Of each query its id, what it says, and the level (0 best .. 2) of every product that was judged for it."""

    ids: Sequence[str] = ()
    texts: Sequence[str] = ()
    levels: Sequence[Mapping[str, int]] = ()

    def keep(self, kept: Sequence[int]) -> "TextQueries":
        return TextQueries(**{name: [getattr(self, name)[i] for i in kept] for name in ("ids", "texts", "levels")})

    def answered_by(self, products: set[str]) -> "TextQueries":
        """Those with a judged product among these."""
        return self.keep([i for i, of in enumerate(self.levels) if not products.isdisjoint(of)])


def read(texts: str, qrels: str) -> TextQueries:
    """The queries of file `texts` that file `qrels` judges; none where both are empty. ValueError where one is missing or malformed."""
    if not texts and not qrels:
        return TextQueries()
    if not texts or not qrels:
        raise ValueError(f"candidates.texts is {texts!r} and candidates.qrels is {qrels!r}: text queries need both, or neither is given")
    said, judged = read_texts(texts), read_qrels(qrels)
    ids = [query for query in said if any(level < 3 for level in judged.get(query, {}).values())]
    if not ids:
        raise ValueError(f"{qrels} finds nothing relevant to any query of {texts}")
    levels = [{product: level for product, level in judged[query].items() if level < 3} for query in ids]
    return TextQueries(ids=ids, texts=[said[query] for query in ids], levels=levels)


def inputs(texts: str, qrels: str) -> dict[str, str]:
    """What of the files an artifact depends on."""
    return {name: manifest.checksum(path).sha256[:16] for name, path in (("texts", texts), ("qrels", qrels)) if path}


def dealt(queries: TextQueries, table: pa.Table, fractions: tuple[float, float, float]) -> dict[str, TextQueries]:
    """By fold. table: product_id, family_id and id_split of all items. A query of none of these folds' products is left out."""
    fold_of = np.where(np.array(table["id_split"].to_pylist()) == "train", folds.folds(table["family_id"].to_pylist(), fractions), TEST)
    of_product = dict(zip(table["product_id"].to_pylist(), fold_of.tolist(), strict=True))
    asked = [{of_product[product] for product in of if product in of_product} for of in queries.levels]
    first = [next((fold for fold in (TEST, CHOSEN_ON, LEARNT) if fold in touched), "") for touched in asked]
    return {fold: queries.keep([i for i, own in enumerate(first) if own == fold]) for fold in (LEARNT, CHOSEN_ON, TEST)}
