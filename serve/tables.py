"""Parquet with the columns of the public sets (image_id or query_id, product_id, title or query, image), as galleries and queries.

Pictures stay on disk until they are asked for, a batch at a time; everything else is small and is held in memory.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from idem import qrels

IDS = ("image_id", "query_id")
TEXTS = ("query", "title")
FAMILIES = ("family_id", "coarse")
CATEGORIES = ("category", "group")
PRODUCTS = "products.parquet"
BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Rows:
    """n rows of one parquet file or folder. Arrays are (n,) of str; what is not known is "".

    `position` is the row's place in the file(s), by which its picture is fetched; `attributes` says where families and
    categories come from.
    """

    path: str
    position: np.ndarray
    ids: np.ndarray
    products: np.ndarray
    texts: np.ndarray
    families: np.ndarray
    categories: np.ndarray
    styles: np.ndarray
    has_image: bool
    attributes: str

    def __len__(self) -> int:
        return len(self.ids)

    def keep(self, which: np.ndarray) -> "Rows":
        """The rows at `which`: a mask (n,) of bool or positions."""
        arrays = ("position", "ids", "products", "texts", "families", "categories", "styles")
        return Rows(
            path=self.path, has_image=self.has_image, attributes=self.attributes, **{name: getattr(self, name)[which] for name in arrays}
        )

    def images(self, which: Sequence[int] | np.ndarray) -> list[bytes | None]:
        """Encoded pictures of the rows at `which`, in that order; one scan of the file a call, so ask for many at once."""
        if not len(which) or not self.has_image:
            return [None] * len(which)
        wanted, back = np.unique(self.position[np.asarray(which)], return_inverse=True)
        column = _encoded(qrels.dataset(self.path).take(pa.array(wanted), columns=["image"])["image"])
        return [column[i] for i in back]

    def batches(self, *, pictures: bool = True) -> Iterator[tuple[np.ndarray, list[bytes | None]]]:
        """All rows in order of the file, at most BATCH at a time: (their places in self, their pictures or None)."""
        place = np.argsort(self.position)
        sorted_positions = self.position[place]
        if not (pictures and self.has_image):
            for part in np.split(place, range(BATCH, len(place), BATCH)):
                yield part, list(itertools.repeat(None, len(part)))
            return
        seen = 0
        # one fragment and few batches ahead: a gallery of pictures may be larger than memory
        scanner = qrels.dataset(self.path).scanner(
            columns=["image"], batch_size=BATCH, batch_readahead=1, fragment_readahead=1, use_threads=False
        )
        for batch in scanner.to_batches():
            first, last = np.searchsorted(sorted_positions, [seen, seen + len(batch)])
            if last > first:
                inside = pa.array(sorted_positions[first:last] - seen)
                yield place[first:last], _encoded(batch["image"].take(inside))
            seen += len(batch)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _is_wrapped(kind: pa.DataType) -> bool:
    """{bytes, path}, as Hugging Face writes pictures."""
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type)


def _encoded(column: pa.Array | pa.ChunkedArray) -> list[bytes | None]:
    return (pc.struct_field(column, "bytes") if _is_wrapped(column.type) else column).to_pylist()


def _require_pictures(path: str, schema: pa.Schema) -> None:
    kind = schema.field("image").type if "image" in schema.names else pa.null()
    if not (_is_binary(kind) or _is_wrapped(kind) or pa.types.is_null(kind)):
        raise ValueError(f"{path}: column image must hold encoded pictures (binary, or a struct with bytes), its type is {kind}")


def _first(columns: Sequence[str], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in columns), None)


def _strings(table: pa.Table, name: str | None) -> np.ndarray:
    if name is None:
        return np.full(len(table), "", object)
    return np.array(["" if value is None else str(value) for value in table[name].to_pylist()], object)


def select(table: pa.Table, condition: str) -> pa.Table:
    """The rows of `table` that meet a SQL condition on its columns, as everywhere in Idem; ValueError says what is wrong with it."""
    places = table.append_column("_place", pa.array(np.arange(len(table))))
    try:
        kept = lance.write_dataset(places, f"memory://{uuid4().hex}").to_table(columns=["_place"], filter=condition)
    except ValueError as error:
        said = str(error).split(", /")[0]  # the rest is a place in Lance's source
        raise ValueError(f"the filter {condition!r} cannot be used: {said}. Columns: {', '.join(table.column_names)}") from error
    return table.take(np.sort(kept["_place"].to_numpy()))


def _lookup(path: str) -> tuple[str, dict[str, tuple[str, str]]]:
    """What a products file says: product_id -> (family, category), and the columns that it came from."""
    found = qrels.dataset(path)
    if "product_id" not in found.schema.names:
        raise ValueError(f"{path} has no column product_id; found {', '.join(found.schema.names)}")
    family, category = _first(found.schema.names, FAMILIES), _first(found.schema.names, CATEGORIES)
    table = found.to_table(columns=["product_id", *filter(None, (family, category))])
    values = zip(_strings(table, family), _strings(table, category), strict=True)
    said = f"{path} ({', '.join(filter(None, (family, category))) or 'neither family nor category'})"
    return said, dict(zip(_strings(table, "product_id"), values, strict=True))


def _attributes(path: str, table: pa.Table, products: np.ndarray, products_path: str | None) -> tuple[np.ndarray, np.ndarray, str]:
    own = [_first(table.column_names, names) for names in (FAMILIES, CATEGORIES)]
    beside = (Path(path) if Path(path).is_dir() else Path(path).parent) / PRODUCTS
    if products_path is None and any(own):
        return _strings(table, own[0]), _strings(table, own[1]), f"{path} ({', '.join(filter(None, own))})"
    if products_path is None and (not beside.exists() or beside == Path(path)):
        return _strings(table, None), _strings(table, None), "none: levels are 0 (same product) and 3"
    said, known = _lookup(products_path or str(beside))
    pairs = [known.get(product, ("", "")) for product in products]
    return np.array([p[0] for p in pairs], object), np.array([p[1] for p in pairs], object), said


def read(path: str, *, condition: str = "", products: str | None = None, need_product: bool = True) -> Rows:
    """The rows of a gallery or of queries that meet `condition` (SQL on the columns; "" for all).

    Families and categories come from `products` (a parquet with product_id), else from columns of the file itself, else
    from a products.parquet beside it. ValueError for a missing file or column, pictures of another type, and where no row is left.
    """
    dataset = qrels.dataset(path)
    names = dataset.schema.names
    id_column = _first(names, IDS)
    missing = [] if id_column else [" or ".join(IDS)]
    if need_product and "product_id" not in names:
        missing.append("product_id")
    if missing:
        raise ValueError(f"{path} lacks {' and '.join(missing)}; its columns are {', '.join(names)}")
    _require_pictures(path, dataset.schema)
    held = [f.name for f in dataset.schema if not (_is_binary(f.type) or pa.types.is_nested(f.type))]
    table = dataset.to_table(columns=held)
    table = table.append_column("_position", pa.array(np.arange(len(table))))
    if condition:
        table = select(table, condition)
    if not len(table):
        raise ValueError(f"{path} holds no rows" + (f" that meet {condition!r} (of {dataset.count_rows():,})" if condition else ""))
    product = _strings(table, "product_id" if "product_id" in names else None)
    families, categories, attributes = _attributes(path, table, product, products)
    return Rows(
        path=path,
        position=table["_position"].to_numpy(),
        ids=_strings(table, id_column),
        products=product,
        texts=_strings(table, _first(names, TEXTS)),
        families=families,
        categories=categories,
        styles=_strings(table, "style" if "style" in names else None),
        has_image="image" in names,
        attributes=attributes,
    )


def per_product(rows: Rows, count: int, seed: int = 0) -> Rows:
    """At most `count` rows of each product, drawn by `seed`, in the order of the file."""
    order = np.random.default_rng(seed).permutation(len(rows))
    taken: dict[str, int] = {}
    kept = []
    for place in order.tolist():
        product = str(rows.products[place])
        taken[product] = taken.get(product, 0) + 1
        if taken[product] <= count:
            kept.append(place)
    return rows.keep(np.sort(np.array(kept, np.int64)))
