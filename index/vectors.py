"""Bulk encoding (Ray Data): items at given offsets -> vectors.lance, in the order of the offsets.

Workers write fragments, the driver commits them once, in order. What a killed worker leaves behind is not committed. A run that was
killed goes on behind the last fragment that was finished, and items that were encoded before, by the same embedder, are not again.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from lance.fragment import write_fragments
from tqdm import tqdm

from idem import manifest, schema, storage
from index.shard import as_matrix
from pipelines.items import open_items
from train.embedder import Embedder

log = logging.getLogger("index.vectors")
NAME = "vectors.lance"
PARTS = ".parts"  # what finished chunks tell, until all of them are committed
FRAGMENT_ROWS = 8192  # with the pictures of so many items a worker stays below a few hundred MB


def texts_for(fields: str, images: Sequence[bytes | None], titles: Sequence[str]) -> list[str]:
    """What is encoded beside the pictures: with `both` every title, with `image` only those of items without a picture."""
    return list(titles) if fields == "both" else ["" if image else title for image, title in zip(images, titles, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What is encoded and by what: folder of the embedder, items at a version; fields: `both`, or `image`, which takes the
    title only where there is no picture; batch_size: items a forward pass; earlier: folder of earlier vectors by that embedder, of
    which those of unchanged items are taken, or an empty string.
    """

    embedder: str
    items: str
    version: int
    fields: str
    batch_size: int
    earlier: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """files of the vectors, as paths below their folder; reused: how many vectors were taken from earlier ones."""

    files: list[str]
    reused: int


class Encoder:
    """The actor: holds one embedder, encodes one chunk of items a call, writes it as one Lance fragment and tells so in PARTS."""

    def __init__(self, source: Source, folder: str, device: str = "cpu") -> None:
        self.embedder = Embedder.load(source.embedder, device=device)
        self.items = open_items(source.items, version=source.version)
        self.source, self.folder = source, folder

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """One chunk of `pieces` in; one row {chunk, rows, reused, dim, fragments (JSON), error} out; errors come back as values."""
        (chunk,), (offsets,), (known,) = batch["chunk"].tolist(), batch["offsets"], batch["known"]
        offsets, known = np.asarray(offsets), np.asarray(known)
        told = {"chunk": chunk, "rows": len(offsets), "reused": int((known >= 0).sum()), "dim": self.embedder.dim, "fragments": "[]"}
        error = ""
        try:
            told["fragments"] = json.dumps([fragment.to_json() for fragment in self._write(offsets, known)])
            storage.write_bytes(part_of(self.folder, offsets), json.dumps(told).encode())
        except (ValueError, OSError, RuntimeError) as caught:
            error = f"items at offsets {offsets[0]}..{offsets[-1]}: {type(caught).__name__}: {caught}"
        return {name: [value] for name, value in {**told, "error": error}.items()}

    def _write(self, offsets: np.ndarray, known: np.ndarray) -> list[Any]:
        names = self.items.take_rows(offsets, ["item_id", "content_hash"])
        vectors = np.empty((len(offsets), self.embedder.dim), np.float32)
        if (again := known >= 0).any():
            earlier = lance.dataset(storage.join(self.source.earlier, NAME)).take(known[again].tolist(), columns=["vector"])
            vectors[again] = as_matrix(earlier["vector"])
        if not again.all():
            table = self.items.take_rows(offsets[~again], ["image", "title"])
            images = table["image"].to_pylist()
            texts = texts_for(self.source.fields, images, table["title"].to_pylist())
            vectors[~again] = self.embedder.encode(images, texts, batch_size=self.source.batch_size)
        columns = {
            "item_id": names["item_id"],
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), self.embedder.dim),
            "embedder": pa.array([self.embedder.id] * len(vectors)),
            "content_hash": names["content_hash"],
        }
        return write_fragments(pa.table(columns, schema=schema.vectors(self.embedder.dim)), storage.join(self.folder, NAME), mode="create")


def chunks_of(count: int, encoders: int) -> list[np.ndarray]:
    """range(count) in equal parts of at most FRAGMENT_ROWS, four or more an encoder where there are as many, so that none waits long."""
    return np.array_split(np.arange(count), max(-(-count // FRAGMENT_ROWS), min(4 * encoders, count)))


def part_of(folder: str, offsets: np.ndarray) -> str:
    """Where it is told that the items at `offsets` are encoded. The folder stands for all else that the vectors were made from."""
    return storage.join(folder, PARTS, hashlib.sha256(np.ascontiguousarray(offsets, np.int64).tobytes()).hexdigest()[:24] + ".json")


def finished(folder: str, offsets: np.ndarray) -> dict[str, Any]:
    """What was told of the chunk at `offsets`, if its fragments are whole; else nothing. After a power cut they may not be."""
    if not storage.exists(part := part_of(folder, offsets)):
        return {}
    told = json.loads(storage.read_bytes(part))
    for file in (file for fragment in json.loads(told["fragments"]) for file in fragment["files"]):
        path = storage.local_path(storage.join(folder, NAME, "data", file["path"]))
        if not path.exists() or path.stat().st_size != file["file_size_bytes"]:
            return {}
    return told


def same(item_ids: pa.ChunkedArray, hashes: pa.ChunkedArray, earlier: pa.Table) -> np.ndarray:
    """For each item (n,) the row of `earlier` (item_id, content_hash) that is of the same item with the same content, -1 for none; pure."""
    asked, there = (_keys(names, contents) for names, contents in ((item_ids, hashes), (earlier["item_id"], earlier["content_hash"])))
    found = pc.index_in(asked, value_set=there, skip_nulls=True)
    return pc.fill_null(found, -1).to_numpy().astype(np.int64)


def _keys(item_ids: pa.ChunkedArray, hashes: pa.ChunkedArray) -> pa.ChunkedArray:
    """Null where no content is known. In chunks, because one array of strings ends at 2 GiB, which is 23 million of these."""
    compute: Any = pc  # whose type hints know one argument of this function
    return compute.binary_join_element_wise(item_ids, hashes, "\n")


def earlier_vectors(parent: str, source: Source, embedder_id: str) -> str:
    """The folder of the newest finished vectors below `parent` by this embedder of these fields, or an empty string."""
    if not storage.is_local(parent):
        return ""
    found: list[tuple[str, str]] = []
    for path in storage.local_path(parent).glob(f"*/{manifest.NAME}"):
        try:
            made = manifest.read(str(path.parent), kind="vectors")
        except ValueError as error:
            log.warning("earlier vectors are not used: %s", error)
            continue
        alike = made.inputs.get("embedder") == embedder_id and made.config.get("fields") == source.fields
        whole = alike and not manifest.damaged(str(path.parent), made, deep=False)
        if whole and "content_hash" in lance.dataset(str(path.parent / NAME)).schema.names:
            found.append((made.created, str(path.parent)))
    return max(found, default=("", ""))[1]


def pieces(offsets: np.ndarray, source: Source, *, folder: str, encoders: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What an interrupted run has told of finished chunks, and the chunks that are left: {chunk, offsets, known}, where known is the row of
    the earlier vectors that is as good as encoding the item again, or -1."""
    known = np.full(len(offsets), -1, np.int64)
    if source.earlier:
        names = open_items(source.items, version=source.version).table(["item_id", "content_hash"]).take(pa.array(offsets))
        known = same(
            names["item_id"], names["content_hash"], lance.dataset(storage.join(source.earlier, NAME)).to_table(["item_id", "content_hash"])
        )
    told, left = [], []
    for chunk, rows in enumerate(chunks_of(len(offsets), encoders)):
        if part := finished(folder, offsets[rows]):
            told.append({**part, "chunk": chunk, "error": ""})
        else:
            left.append({"chunk": chunk, "offsets": offsets[rows].tolist(), "known": known[rows].tolist()})
    return told, left


def encode(offsets: np.ndarray, source: Source, *, folder: str, encoders: int) -> Made:
    """Encode the items at `offsets` (positions in scan order) into <folder>/vectors.lance.

    ValueError lists what the workers could not encode; nothing is committed then, and what is encoded is kept for the next try.
    """
    told, left = pieces(offsets, source, folder=folder, encoders=encoders)
    if left:
        gpus = ray.cluster_resources().get("GPU", 0)
        done = ray.data.from_items(left, override_num_blocks=len(left)).map_batches(
            Encoder,
            fn_constructor_args=(source, folder, "cuda" if gpus else "cpu"),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(encoders, len(left))),
            num_cpus=1,
            num_gpus=min(1.0, gpus / encoders),
        )
        told = told + _collect(done, total=len(offsets), before=sum(row["rows"] for row in told))
    return commit(folder, told)


def commit(folder: str, rows: list[dict[str, Any]]) -> Made:
    """Make one dataset of what the encoders wrote, in the order of the chunks, and clear away what else is there.

    PARTS stays, for a run that is killed before the manifest is written: it commits once more.
    """
    rows = sorted(rows, key=lambda row: row["chunk"])
    if errors := [row["error"] for row in rows if row["error"]]:
        raise ValueError(f"{len(errors)} of {len(rows)} chunks could not be encoded: " + "; ".join(errors[:5]))
    fragments = [lance.FragmentMetadata.from_json(json.dumps(f)) for row in rows for f in json.loads(row["fragments"])]
    root = storage.local_path(folder)
    named = {file.path for fragment in fragments for file in fragment.files}
    for path in (root / NAME / "data").iterdir():  # of a worker that was killed before it could tell
        if path.name not in named:
            path.unlink()
    for name in ("_versions", "_transactions"):  # of a commit that was not told of
        storage.remove_tree(storage.join(folder, NAME, name))
    lance.LanceDataset.commit(storage.join(folder, NAME), lance.LanceOperation.Overwrite(schema.vectors(rows[0]["dim"]), fragments))
    files = sorted(str(path.relative_to(root)) for path in (root / NAME).rglob("*") if path.is_file())
    return Made(files=files, reused=sum(row["reused"] for row in rows))


def _collect(done: ray.data.Dataset, *, total: int, before: int) -> list[dict[str, Any]]:
    """The workers' answers as they come, with a progress bar over items."""
    ray.data.DataContext.get_current().enable_progress_bars = False  # ours counts items
    rows = []
    with tqdm(total=total, initial=before, desc="encode", unit="item") as bar:
        for row in done.iter_rows():
            rows.append(row)
            bar.update(row["rows"])
    return rows


def read(uri: str) -> tuple[list[str], np.ndarray]:
    """item_ids and vectors (n, dim) float32 of a finished vectors.lance, in its order."""
    table = lance.dataset(uri).to_table(["item_id", "vector"])
    return table["item_id"].to_pylist(), as_matrix(table["vector"])
