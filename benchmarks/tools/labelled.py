"""Labelled pictures for training trials: the public sets, packed into one file of arrays that needs no parquet to read, and decoded once.

`python -m benchmarks.tools.labelled ../shared/data emoji.npz grocery.npz` packs sets for a machine that has torch and little else;
pictures there are at most LONGEST pixels, since trials look at 64.
"""

import io
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np

from idem import images

FIELDS = ("product", "family", "style", "id_split", "split", "title")
SETS = ("emoji", "grocery")
LONGEST = 96


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """n pictures: `stored` (n, A, A, 3) and `served` (n, S, S, 3) uint8, A = 4/3 S as training crops from; fields (n,) str.

    `texts` gives further texts of a product, `queries` (text, {product: grade}) and `titles` those of all products.
    """

    stored: np.ndarray
    served: np.ndarray
    fields: Mapping[str, np.ndarray]
    texts: Mapping[str, Sequence[str]]
    titles: Mapping[str, str]
    queries: Sequence[tuple[str, Mapping[str, int]]]

    def where(self, **wanted: str) -> np.ndarray:
        """Rows whose fields have these values."""
        return np.flatnonzero(np.all([self.fields[name] == value for name, value in wanted.items()], axis=0))


def _emoji(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    import pyarrow.parquet as pq

    products = {row["product_id"]: row for row in pq.read_table(folder / "products.parquet").to_pylist()}
    texts: dict[str, list[str]] = {}
    for row in pq.read_table(folder / "texts.parquet").to_pylist():
        words = row["keywords"] or []
        said = [row["title"], *words] if row["lang"] == "en" else [row["title"]]
        texts.setdefault(row["product_id"], []).extend(said)
    grades: dict[str, dict[str, int]] = {}
    for row in pq.read_table(folder / "qrels.parquet").to_pylist():
        grades.setdefault(row["query_id"], {})[row["product_id"]] = row["grade"]
    queries = [(row["query"], grades.get(row["query_id"], {})) for row in pq.read_table(folder / "queries.parquet").to_pylist()]
    rows = pq.read_table(folder / "images.parquet").to_pylist()
    for row in rows:
        row |= {"family": products[row["product_id"]]["family_id"], "split": ""}
    return rows, {"texts": texts, "titles": {name: row["title"] for name, row in products.items()}, "queries": queries}


def _grocery(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    import pyarrow.parquet as pq

    products = {row["product_id"]: row for row in pq.read_table(folder / "products.parquet").to_pylist()}
    rows = [row for name in ("photos", "catalog_images") for row in pq.read_table(folder / f"{name}.parquet").to_pylist()]
    for row in rows:
        row |= {"family": products[row["product_id"]]["coarse"], "style": row["role"]}
    texts = {name: [row[c] for c in ("description_en", "description_sv", "retail_title") if row.get(c)] for name, row in products.items()}
    return rows, {"texts": texts, "titles": {name: row["title"] for name, row in products.items()}, "queries": []}


def pack(data: Path, name: str, target: Path) -> None:
    """Write the set `name` below `data` as arrays. ValueError where it is not there."""
    if not (data / name).is_dir():
        raise ValueError(f"the set {name} is not at {data / name}; sets are {', '.join(SETS)}, looked for at ../shared/data or --data")
    rows, told = {"emoji": _emoji, "grocery": _grocery}[name](data / name)
    rows.sort(key=lambda row: row["image_id"])
    bytes_ = [_small(row["image"]) for row in rows]
    fields = {f: np.array([str(row["product_id" if f == "product" else f] or "") for row in rows]) for f in FIELDS}
    np.savez_compressed(
        target, data=np.frombuffer(b"".join(bytes_), np.uint8), offsets=np.cumsum([0, *map(len, bytes_)]), told=json.dumps(told), **fields
    )


def _small(data: bytes) -> bytes:
    """The picture with at most LONGEST pixels a side, as it is where it has no more."""
    image = images.decode(data)
    if max(image.size) <= LONGEST:
        return data
    image.thumbnail((LONGEST, LONGEST))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90)
    return out.getvalue()


def _decode(job: tuple[bytes, int]) -> tuple[np.ndarray, np.ndarray]:
    data, side = job
    return images.pixels(data, side * 4 // 3), images.pixels(data, side)


def decode(packed: Path, folder: Path, side: int, processes: int) -> None:
    """Decode a packed set once, for `load`: both sizes, as arrays that processes share."""
    with np.load(packed) as z:
        data, offsets = z["data"].tobytes(), z["offsets"]
        np.savez(folder / "told.npz", **{name: z[name] for name in ("told", *FIELDS)})
    jobs = ((data[a:b], side) for a, b in itertools.pairwise(offsets))
    with Pool(processes) as pool:
        stored, served = zip(*pool.imap(_decode, jobs, chunksize=256), strict=True)
    np.save(folder / "stored.npy", np.stack(stored))
    np.save(folder / "served.npy", np.stack(served))


def load(folder: Path) -> Labelled:
    """What `decode` left; pictures stay on disk until they are touched."""
    with np.load(folder / "told.npz") as z:
        fields, told = {name: z[name] for name in FIELDS}, json.loads(str(z["told"]))
    stored, served = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("stored", "served"))
    return Labelled(stored=stored, served=served, fields=fields, **told)


if __name__ == "__main__":
    for path in map(Path, sys.argv[2:]):
        pack(Path(sys.argv[1]), path.stem, path)
