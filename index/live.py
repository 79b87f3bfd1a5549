"""A release as it is now: its index, the changes since, and the next release as soon as it is current.

What was put since the release is encoded and searched exactly, as one more shard; what was deleted or replaced is hidden. Each
look at the change log gives a new `State`, and a request that has taken one is answered from it alone, whatever comes meanwhile.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from idem import manifest, schema, storage
from idem.types import Hit
from index.changes import Change, Tail
from index.filters import Where
from index.release import Release
from index.searcher import Searcher, Shard
from pipelines.items import Items, open_items

log = logging.getLogger("index.live")
EVERY_S = 0.2


class Encodes(Protocol):
    """Pictures and texts to vectors (n, dim) float32, L2-normalised: train.embedder.Embedder."""

    def encode(self, images: Sequence[bytes | None], texts: Sequence[str]) -> np.ndarray: ...


def net(changes: Sequence[Change]) -> tuple[pa.Table | None, list[str]]:
    """What remains of the changes, in their order: the items put last, once each, and the ids deleted last."""
    puts = [change.rows for change in changes if change.operation == "put"]
    last: dict[str, int] = {}  # item_id -> its row among all puts, -1 where it was deleted after them
    row = 0
    for change in changes:
        for item_id in change.rows["item_id"].to_pylist():
            last[item_id] = row if change.operation == "put" else -1
            row += change.operation == "put"
    kept = sorted(place for place in last.values() if place >= 0)
    table = pa.concat_tables(puts, promote_options="permissive").take(pa.array(kept, pa.int64())) if kept else None
    return table, [item_id for item_id, place in last.items() if place < 0]


@dataclass(frozen=True, kw_only=True)
class Delta:
    """Whole items put since a release (rows of ITEMS) with their vectors (n, dim), and the ids that the release must not return."""

    items: pa.Table
    vectors: np.ndarray
    gone: frozenset[str]

    @classmethod
    def empty(cls, dim: int) -> "Delta":
        return cls(items=schema.ITEMS.empty_table(), vectors=np.zeros((0, dim), np.float32), gone=frozenset())

    def after(self, put: pa.Table | None, vectors: np.ndarray, deleted: Sequence[str]) -> "Delta":
        """With these items put (vectors in their order) and those deleted."""
        touched = [*(put["item_id"].to_pylist() if put is not None else []), *deleted]
        kept = ~np.asarray(pc.is_in(self.items["item_id"], value_set=pa.array(touched, pa.string())).to_numpy())
        parts = [self.items.filter(pa.array(kept)), *([put] if put is not None else [])]
        return Delta(
            items=pa.concat_tables(parts, promote_options="permissive"),
            vectors=np.concatenate([self.vectors[kept], vectors]),
            gone=self.gone.union(touched),
        )


@dataclass(frozen=True, kw_only=True)
class State:
    """One release with the changes up to `seen`: all that an answer is made of. released: its own index; searcher: that and the changes."""

    release: Release
    encoder: Encodes
    items: Items
    released: Searcher
    searcher: Searcher
    delta: Delta
    seen: int

    def images(self, item_ids: Sequence[str]) -> list[bytes | None]:
        """The encoded pictures of items by id, as they were put last; None for an item without one."""
        put = self.delta.items.select(["item_id", "image"])
        of = dict(zip(put["item_id"].to_pylist(), put["image"].to_pylist(), strict=True)) if put.num_rows else {}
        released = [item_id for item_id in item_ids if item_id not in of]
        of |= zip(released, self.items.images(released), strict=True)
        return [of[item_id] for item_id in item_ids]

    def search(self, vectors: np.ndarray, k: int, *, where: Where | None = None) -> list[list[Hit]]:
        return self.searcher.search(vectors, k, where=where)


def overlaid(released: Searcher, position_of: dict[str, int], delta: Delta) -> Searcher:
    """The released index with a delta: its items as one more shard, searched exactly, and the positions that are gone hidden."""
    flat = faiss.IndexFlatIP(released.dim)
    flat.add(np.ascontiguousarray(delta.vectors))
    first = released.shards[0]
    known = delta.items.flatten()  # attributes by name, as shards have them
    columns = {field.name: _as(field.type, known, field.name) for field in first.meta.schema}
    hidden = np.zeros(int(released.starts[-1]) + flat.ntotal, bool)
    hidden[[position_of[item_id] for item_id in delta.gone if item_id in position_of]] = True
    return Searcher([*released.shards, Shard(flat, pa.table(columns), first.threads)], hidden)


def _as(kind: pa.DataType, table: pa.Table, name: str) -> pa.ChunkedArray | pa.Array:
    """A column as the released index has it; nulls where the items that were put lack it."""
    if name not in table.column_names:
        return pa.nulls(table.num_rows, kind)
    return table[name].dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else table[name].cast(kind)


class Live:
    """Follows `root/releases` (its CURRENT) and the change log of the same root.

    encoder_of: the folder of an embedder -> what encodes with it; asked by the thread that refreshes and by those that search, each for
    itself. device: what the released index is searched on (Shard.on). ValueError where there is no release, or it is damaged; later, a
    release that cannot be opened is logged, and the one that is served stays.
    """

    def __init__(self, root: str, encoder_of: Callable[[str], Encodes], *, threads: int = 1, device: str = "cpu") -> None:
        self.layout = storage.Layout(root)
        self.encoder_of, self.threads, self.device = encoder_of, threads, device
        self.refused: dict[str, str] = {}  # item_id -> why it could not be encoded; it stays as it was
        self.lock = threading.Lock()
        self._open(manifest.current(self.layout.releases, kind="release"))
        self.refresh()

    @property
    def changes(self) -> str:
        return str(storage.local_path(self.layout.changes))

    def _open(self, folder: str) -> None:
        release = Release.open(folder)
        same = hasattr(self, "state") and self.state.release.embedder == release.embedder
        released = Searcher.open(release.index, threads=self.threads, device=self.device)
        state = State(
            release=release,
            encoder=self.state.encoder if same else self.encoder_of(release.embedder),
            items=open_items(release.items, release.items_version),
            released=released,
            searcher=released,
            delta=Delta.empty(released.dim),
            seen=release.folded,
        )
        position_of = {item_id: i for i, item_id in enumerate(released.item_ids)}
        tail = Tail(self.changes, release.folded)
        fields = manifest.read(release.index, kind="index").config.get("fields", "both")
        ready = self._caught_up(state, tail, position_of, fields)
        self.state, self.tail, self.position_of, self.fields, self.folder = ready, tail, position_of, fields, folder

    def refresh(self) -> State:
        """Look at CURRENT and at the log once; the state that new requests are answered from. ValueError where the log is damaged."""
        with self.lock:
            if (folder := manifest.current(self.layout.releases, kind="release")) != self.folder:
                try:
                    self._open(folder)
                except (ValueError, OSError) as error:
                    log.error("the release at %s cannot be served, %s is kept: %s", folder, self.state.release.name, error)
            self.state = self._caught_up(self.state, self.tail, self.position_of, self.fields)
            return self.state

    def _caught_up(self, state: State, tail: Tail, position_of: dict[str, int], fields: str) -> State:
        news = tail.news()
        if not news:
            return state
        put, deleted = net(news)
        put, vectors = self._encoded(state.encoder, put, fields, state.released.dim)
        delta = state.delta.after(put, vectors, deleted)
        return replace(state, delta=delta, searcher=overlaid(state.released, position_of, delta), seen=tail.seen)

    def _encoded(self, encoder: Encodes, put: pa.Table | None, fields: str, dim: int) -> tuple[pa.Table | None, np.ndarray]:
        """The items that can be encoded and their vectors; the others are told in `refused`."""
        if put is None:
            return None, np.zeros((0, dim), np.float32)
        images, titles = put["image"].to_pylist(), put["title"].to_pylist()
        texts = titles if fields == "both" else ["" if image else title for image, title in zip(images, titles, strict=True)]
        try:
            return put, encoder.encode(images, texts)
        except ValueError as error:
            if put.num_rows == 1:
                self.refused[put["item_id"][0].as_py()] = str(error)
                log.warning("item %s cannot be encoded and stays as it was: %s", put["item_id"][0].as_py(), error)
                return None, np.zeros((0, dim), np.float32)
        halves = [put.slice(0, put.num_rows // 2), put.slice(put.num_rows // 2)]
        parts = [self._encoded(encoder, half, fields, dim) for half in halves]
        tables = [table for table, _ in parts if table is not None]
        return (pa.concat_tables(tables) if tables else None), np.concatenate([vectors for _, vectors in parts])

    @contextmanager
    def following(self, every: float = EVERY_S) -> Iterator["Live"]:
        """Refresh in a thread until the block ends."""
        stop = threading.Event()

        def follow() -> None:
            while not stop.wait(every):
                try:
                    self.refresh()
                except (ValueError, OSError):
                    log.exception("changes cannot be followed; answers are of change %d", self.state.seen)

        thread = threading.Thread(target=follow, name="index.live", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            stop.set()
            thread.join()

    def search(self, vectors: np.ndarray, k: int, *, where: Where | None = None) -> list[list[Hit]]:
        """As Searcher.search, over the release and the changes that have been seen."""
        return self.state.search(vectors, k, where=where)
