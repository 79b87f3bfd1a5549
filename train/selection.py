"""Which rows of the items are trained on: their places, titles and labels, and the names of the labels."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from idem import folds
from pipelines.items import open_items
from train.corpus import Corpus, Held
from train.labelling import PART
from train.texts import TextSource, read_texts

COLUMNS = ["item_id", "product_id", "family_id", "title", "id_split", "width"]


class Selection:
    """Rows of the embedder's fold among the training families, labelled by product, or by a table of assignments where one is given.

    `offsets`, `item_ids`, `titles`, `texts`, `has_image`, `labels`, `weights`, `layers` are by row; `names` (U,) by label, unique.
    `assignments` is a parquet file of ASSIGNMENTS (idem.schema); items it does not name are left out, and confidence weighs.
    ValueError where there are not two products to tell apart.
    """

    def __init__(
        self,
        uri: str,
        version: int,
        *,
        fractions: tuple[float, float, float],
        held_back: int,
        assignments: str = "",
        texts: Sequence[TextSource] = (),
    ) -> None:
        self.items = open_items(uri, version)
        table = self.items.table(COLUMNS)
        column = {name: np.array(table[name].to_pylist(), dtype=object) for name in COLUMNS}
        products, pictured = column["product_id"], column["width"].astype(np.int64) > 0
        train = column["id_split"] == "train"
        fold = np.where(train, folds.folds(column["family_id"], fractions), "")
        self.offsets = np.flatnonzero(fold == "embedder")
        if assignments:
            self._label_by(assignments, column["item_id"], products)
        else:
            self.names, self.labels = np.unique(products[self.offsets].astype(str), return_inverse=True)
            self.weights, self.layers = np.ones(len(self.offsets), np.float32), np.full(len(self.offsets), "metadata")
        if len(self.names) < 2:
            raise ValueError(
                f"training needs at least 2 products to tell apart, found {len(self.names)}: the items hold {len(set(products))} "
                f"products in {len(set(column['family_id']))} families, {len(set(products[train]))} of them with id_split 'train', of "
                f"whose families a share of {fractions[0]} is dealt to the embedder (train.fractions)"
                + (f"; of these, only items that {assignments} names count" if assignments else "")
            )
        self.item_ids = column["item_id"][self.offsets].astype(str)
        self.titles: list[str] = column["title"][self.offsets].tolist()
        self.has_image = pictured[self.offsets]
        said = read_texts(texts)
        self.texts = [said.get(product, ()) for product in products[self.offsets].astype(str)] if said else []
        held = np.flatnonzero((fold == "calibrate") & pictured)
        order = np.argsort(products[held].astype(str), kind="stable")[:held_back]  # whole products
        self.held_offsets, self.held_products = held[order], products[held][order].astype(str)

    def _label_by(self, path: str, item_ids: np.ndarray, products: np.ndarray) -> None:
        """Rows and labels of the assignments; of several to one item, the one with most confidence counts."""
        table = read_assignments(path)
        first = np.argsort(-table["confidence"], kind="stable")
        of = dict(reversed([(table["item_id"][i], i) for i in first.tolist()]))
        kept = [(offset, of[item_ids[offset]]) for offset in self.offsets.tolist() if item_ids[offset] in of]
        self.offsets, entries = (np.array(part, np.int64) for part in (zip(*kept, strict=True) if kept else ((), ())))
        self.names, self.labels = name_prototypes(table["prototype_id"][entries], products[self.offsets].astype(str))
        self.weights, self.layers = table["confidence"][entries].astype(np.float32), table["layer"][entries]

    def images(self, offsets: np.ndarray) -> list[bytes | None]:
        return self.items.take_rows(offsets, ["image"])["image"].to_pylist()

    def corpus(self, cache_mb: int) -> Corpus:
        held = Held(lambda rows: self.images(self.held_offsets[rows]), self.held_products) if len(self.held_offsets) else None
        return Corpus(
            fetch=lambda rows: self.images(self.offsets[rows]),
            titles=self.titles,
            has_image=self.has_image,
            labels=self.labels,
            texts=self.texts,
            weights=self.weights,
            names=self.names.tolist(),
            item_ids=self.item_ids,
            held=held,
            cache_bytes=cache_mb << 20,
        )


def read_assignments(path: str) -> dict[str, np.ndarray]:
    """Columns of an ASSIGNMENTS table. ValueError where it cannot be read or lacks one."""
    wanted = ["item_id", "prototype_id", "confidence", "layer"]
    try:
        table = pq.read_table(Path(path))
    except OSError as error:
        raise ValueError(f"cannot read the assignments {path} (train.assignments): {error}") from error
    if missing := [name for name in wanted if name not in table.column_names]:
        raise ValueError(f"the assignments {path} have no column {', '.join(missing)}; they have {', '.join(table.column_names)}")
    return {name: np.array(table[name].to_pylist(), dtype=None if name == "confidence" else object) for name in wanted}


def name_prototypes(prototype_ids: np.ndarray, products: Sequence[str] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Names (U,) and labels (n,) of prototypes given by row: each is named by the product that most of its members have.

    Where several prototypes have one product, the largest of them keeps the plain name (ties: the smaller id), the others are
    parts of it. Labels follow the order of the prototype ids.
    """
    ids, labels = np.unique(np.asarray(prototype_ids, np.int64), return_inverse=True)
    known, product = np.unique(np.asarray(products, str), return_inverse=True)
    pairs, counts = np.unique(np.stack([labels, product]), axis=1, return_counts=True)
    best = {int(pairs[0, i]): i for i in np.argsort(counts, kind="stable").tolist()}
    names, taken = np.empty(len(ids), object), set()
    for label in sorted(best, key=lambda u: (-counts[best[u]], u)):
        name = str(known[pairs[1, best[label]]])
        names[label] = f"{name}{PART}{ids[label]}" if name in taken else name
        taken.add(name)
    return names.astype(str), labels
