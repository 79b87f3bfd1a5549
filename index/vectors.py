"""Bulk encoding (Ray Data): items at given offsets -> vectors.lance, in the order of the offsets.

Workers write fragments, the driver commits them once, in order. What a killed worker leaves behind is not committed.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import ray
import ray.data
from lance.fragment import write_fragments
from tqdm import tqdm

from idem import schema, storage
from index.shard import as_matrix
from pipelines.items import open_items
from train.embedder import Embedder

NAME = "vectors.lance"
FRAGMENT_ROWS = 8192  # with the pictures of so many items a worker stays below a few hundred MB


def texts_for(fields: str, images: Sequence[bytes | None], titles: Sequence[str]) -> list[str]:
    """What is encoded beside the pictures: with `both` every title, with `image` only those of items without a picture."""
    return list(titles) if fields == "both" else ["" if image else title for image, title in zip(images, titles, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What is encoded and by what: folder of the embedder, items at a version; fields: `both`, or `image`, which takes the
    title only where there is no picture; batch_size: items a forward pass.
    """

    embedder: str
    items: str
    version: int
    fields: str
    batch_size: int


class Encoder:
    """The actor: holds one embedder, encodes one chunk of items a call, writes it as one Lance fragment."""

    def __init__(self, source: Source, uri: str, device: str = "cpu") -> None:
        self.embedder = Embedder.load(source.embedder, device=device)
        self.items = open_items(source.items, version=source.version)
        self.source, self.uri = source, uri

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """One row {chunk, offsets} in, one row {chunk, rows, dim, fragments (JSON), error} out; an error comes back as a value."""
        (chunk,), (offsets,) = batch["chunk"].tolist(), batch["offsets"]
        fragments, error = "[]", ""
        try:
            fragments = json.dumps([fragment.to_json() for fragment in self._write(np.asarray(offsets))])
        except (ValueError, OSError, RuntimeError) as caught:
            error = f"items at offsets {offsets[0]}..{offsets[-1]}: {type(caught).__name__}: {caught}"
        return {"chunk": [chunk], "rows": [len(offsets)], "dim": [self.embedder.dim], "fragments": [fragments], "error": [error]}

    def _write(self, offsets: np.ndarray) -> list[Any]:
        table = self.items.take_rows(offsets, ["item_id", "image", "title"])
        images = table["image"].to_pylist()
        texts = texts_for(self.source.fields, images, table["title"].to_pylist())
        vectors = self.embedder.encode(images, texts, batch_size=self.source.batch_size)
        columns = {
            "item_id": table["item_id"],
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), self.embedder.dim),
            "embedder": pa.array([self.embedder.id] * len(vectors)),
        }
        return write_fragments(pa.table(columns, schema=schema.vectors(self.embedder.dim)), self.uri, mode="create")


def chunks_of(offsets: np.ndarray, encoders: int) -> list[np.ndarray]:
    """Equal parts of at most FRAGMENT_ROWS, four or more an encoder where there are as many items, so that none waits long."""
    return np.array_split(offsets, max(-(-len(offsets) // FRAGMENT_ROWS), min(4 * encoders, len(offsets))))


def encode(offsets: np.ndarray, source: Source, *, folder: str, encoders: int) -> list[str]:
    """Encode the items at `offsets` (positions in scan order) into <folder>/vectors.lance; return its files, as paths below `folder`.

    ValueError lists what the workers could not encode; nothing is committed then.
    """
    uri = storage.join(folder, NAME)
    parts = chunks_of(offsets, encoders)
    chunks = ray.data.from_items([{"chunk": i, "offsets": part.tolist()} for i, part in enumerate(parts)], override_num_blocks=len(parts))
    gpus = ray.cluster_resources().get("GPU", 0)
    done = chunks.map_batches(
        Encoder,
        fn_constructor_args=(source, uri, "cuda" if gpus else "cpu"),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(encoders, len(parts))),
        num_cpus=1,
        num_gpus=min(1.0, gpus / encoders),
    )
    return commit(folder, _collect(done, total=len(offsets)))


def commit(folder: str, rows: list[dict[str, Any]]) -> list[str]:
    """Make one dataset of what the encoders wrote, in the order of the chunks; return its files, as paths below `folder`."""
    rows = sorted(rows, key=lambda row: row["chunk"])
    if errors := [row["error"] for row in rows if row["error"]]:
        raise ValueError(f"{len(errors)} of {len(rows)} chunks could not be encoded: " + "; ".join(errors[:5]))
    fragments = [lance.FragmentMetadata.from_json(json.dumps(f)) for row in rows for f in json.loads(row["fragments"])]
    lance.LanceDataset.commit(storage.join(folder, NAME), lance.LanceOperation.Overwrite(schema.vectors(rows[0]["dim"]), fragments))
    root = storage.local_path(folder)
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def _collect(done: ray.data.Dataset, *, total: int) -> list[dict[str, Any]]:
    """The workers' answers as they come, with a progress bar over items."""
    ray.data.DataContext.get_current().enable_progress_bars = False  # ours counts items
    rows = []
    with tqdm(total=total, desc="encode", unit="item") as bar:
        for row in done.iter_rows():
            rows.append(row)
            bar.update(row["rows"])
    return rows


def read(uri: str) -> tuple[list[str], np.ndarray]:
    """item_ids and vectors (n, dim) float32 of a finished vectors.lance, in its order."""
    table = lance.dataset(uri).to_table(["item_id", "vector"])
    return table["item_id"].to_pylist(), as_matrix(table["vector"])
