"""How large an index will be, before it is built: bytes, memory, shards, machines. Pure; FAISS itself says what a vector takes.

An index file holds codes, ids or links, and the stored vectors of a refine step; a process that serves one shard leaves those in the
file (docs/decisions/0009). Beside the file, a process holds what is known of its items.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import faiss
import numpy as np

from index import kinds

EVEN = 1 << 20  # items up to which shards are cut within one of each other; beyond, chance is even enough
DEVIATIONS = 6.0  # a shard is that far from the mean once in 5e8
META_BYTES = 136  # of an item: its ids, category and title as Arrow holds them
LIST_BYTES = 96  # of a list in memory, beside what is in it
BLOCK_WASTE = 15.5  # codes that a fast-scan list leaves empty: its blocks are of 32
POINTS = 40  # training points a list; FAISS warns below 39
FLAT, GRAPH, FLAT_COARSE, HALF = 50_000, 500_000, 16_384, 10**9
OTHER_LISTS = 4.0  # so many times more or fewer lists than usual are worth a word


@dataclass(frozen=True, slots=True)
class Bytes:
    """each: of a vector in a file; stored: those of `each` that a refine step stores; a_list: of a list, its centroid and what its
    blocks leave empty; codebooks: of what a product quantizer learns."""

    each: float
    stored: float
    a_list: float
    codebooks: float


def _of_plain(layer: Any) -> float:
    """A vector in an index that keeps codes, or a graph over them."""
    if isinstance(layer, faiss.IndexHNSW):
        return faiss.downcast_index(layer.storage).code_size + 4 * layer.hnsw.nb_neighbors(0) + 16
    return float(getattr(layer, "code_size", 0))


@lru_cache(maxsize=64)
def bytes_of(dim: int, factory: str) -> Bytes:
    """What FAISS's own parts say, of an empty index with one list. ValueError for a factory that FAISS cannot read."""
    try:
        index = faiss.index_factory(dim, re.sub(r"IVF\d+", "IVF1", factory), faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(f"FAISS cannot build {factory!r} for vectors of {dim} dimensions: {error}") from error
    each = stored = a_list = codebooks = 0.0
    for layer in kinds.layers(index):
        if isinstance(layer, faiss.IndexRefine):
            stored = float(faiss.downcast_index(layer.refine_index).code_size)
            each += stored
        elif isinstance(layer, faiss.IndexIVF):
            invlists: Any = layer.invlists
            blocks = isinstance(faiss.downcast_InvertedLists(invlists), faiss.BlockInvertedLists)
            each += layer.code_size + 8
            codebooks = 4.0 * layer.pq.centroids.size() if hasattr(layer, "pq") else 0.0
            a_list = _of_plain(faiss.downcast_index(layer.quantizer)) + (BLOCK_WASTE * layer.code_size if blocks else 0)
        else:
            each += _of_plain(layer)
    return Bytes(each, stored, a_list, codebooks)


def _family(factory: str) -> str:
    return "lists" if kinds.lists_of(factory) else "graph" if "HNSW" in factory else "all"


def suggest(total: int, dim: int) -> str:
    """A sensible FAISS factory for `total` vectors: exact while that takes milliseconds; a graph; then lists of fast-scan codes of 4 bits
    for every second dimension, refined from stored vectors, of 16 bits a number while they fit a disk or two and of 8 beyond; about
    4 sqrt(total) lists, found by a graph where they are many."""
    if total <= FLAT:
        return "Flat"
    if total <= GRAPH:
        return "HNSW32_SQfp16"
    lists = 1 << round(np.log2(4 * total**0.5))
    coarse = f"IVF{lists}" if lists <= FLAT_COARSE else f"IVF{lists}_HNSW32"
    if dim % 2:
        return f"{coarse},SQ8"  # a product quantizer needs a divisor
    return f"{coarse},PQ{dim // 2}x4fs,Refine({'SQfp16' if total <= HALF else 'SQ8'})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """What an index of `total` vectors of `dim` dimensions in `shards` parts will be. lists: 0 where there are none."""

    total: int
    dim: int
    factory: str
    shards: int
    lists: int
    bytes: Bytes

    @property
    def deviation(self) -> float:
        """Standard deviation of the rows of a shard; 0 where they are cut evenly."""
        return 0.0 if self.total <= EVEN else (self.total / self.shards * (1 - 1 / self.shards)) ** 0.5

    @property
    def rows(self) -> tuple[int, int]:
        """The fewest and the most rows that a shard will have, but for a chance of 2e-9 each."""
        mean, off = self.total / self.shards, DEVIATIONS * self.deviation
        return max(0, int(mean - off)), min(self.total, int(-(-(mean + off) // 1)))

    @property
    def spread(self) -> float:
        """Rows of the largest shard over their mean, at most."""
        return self.rows[1] / (self.total / self.shards)

    @property
    def shard_bytes(self) -> float:
        """The largest file."""
        return self.bytes.each * self.rows[1] + self.bytes.a_list * self.lists + self.bytes.codebooks

    @property
    def resident_bytes(self) -> float:
        """Memory of a process that serves the largest shard, beside some 200 MB of Python; the stored vectors stay in the file."""
        return (self.bytes.each - self.bytes.stored + META_BYTES) * self.rows[1] + (self.bytes.a_list + LIST_BYTES) * self.lists

    @property
    def opening_bytes(self) -> float:
        """Memory at most, while what is known of the items is read: its columns are there twice when they are put together."""
        return self.resident_bytes + META_BYTES * self.rows[1]

    @property
    def training_rows(self) -> int:
        """Vectors that its lists want to be trained on: POINTS each."""
        return min(self.total, POINTS * self.lists)

    @property
    def poor(self) -> str:
        """Why this is a poor choice for so many vectors, "" where it is none."""
        usual = suggest(self.total, self.dim)
        if 0 < self.training_rows < POINTS * self.lists:
            return f"{self.lists:,} lists want {POINTS * self.lists:,} vectors to be trained on"
        if _family(self.factory) != _family(usual) and not (self.total <= GRAPH and _family(self.factory) == "all"):
            return f"{self.total:,} vectors are too {'few' if self.total <= GRAPH else 'many'} for it"
        if self.lists and not 1 / OTHER_LISTS < self.lists / kinds.lists_of(usual) < OTHER_LISTS:
            return f"{self.total / self.lists:,.0f} vectors a list are too {'few' if self.lists > kinds.lists_of(usual) else 'many'}"
        return ""

    def lines(self) -> list[str]:
        """For people, before the work."""
        fewest, most = self.rows
        told = [
            f"{self.total:,} vectors of {self.dim} dimensions as {self.factory}: {self.shards} shards of "
            + (f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"),
            f"{self.bytes.each:,.0f} bytes a vector, of which {self.bytes.stored:,.0f} stay in the file",
            f"a shard takes {self.shard_bytes / 1e6:,.1f} MB on disk and {self.resident_bytes / 1e6:,.1f} MB of memory with its items",
        ]
        if self.lists:
            told.append(f"{self.lists:,} lists of {self.total / self.lists:,.0f} vectors, to be trained on {self.training_rows:,}")
        if poor := self.poor:
            told.append(f"a poor choice: {poor}; usual is {suggest(self.total, self.dim)}")
        return told


def outline(*, total: int, dim: int, factory: str, shards: int) -> Outline:
    """What is known of an index before it is built. ValueError for a factory that FAISS cannot read."""
    return Outline(total=total, dim=dim, factory=factory, shards=shards, lists=kinds.lists_of(factory), bytes=bytes_of(dim, factory))


def fitting(total: int, dim: int, factory: str, *, memory: float) -> int:
    """The fewest shards of which the largest can be opened within `memory` bytes. ValueError where the lists alone do not fit."""
    told = outline(total=total, dim=dim, factory=factory, shards=1)
    each = told.bytes.each - told.bytes.stored + 2 * META_BYTES
    left = memory - (told.bytes.a_list + LIST_BYTES) * told.lists
    if left < each:
        raise ValueError(f"{told.lists:,} lists with centroids of {dim} dimensions take more than {memory / 1e9:.1f} GB")
    shards = max(1, int(-(-total // int(left // each))))
    while outline(total=total, dim=dim, factory=factory, shards=shards).opening_bytes > memory:
        shards += 1
    return shards


@dataclass(frozen=True, slots=True, kw_only=True)
class Sized:
    """A fleet for an index: `copies` of every shard, `together` shards on a machine of `machine_memory` bytes."""

    outline: Outline
    machine_memory: float
    together: int
    copies: int

    @property
    def machines(self) -> int:
        return max(self.copies, -(-self.outline.shards * self.copies // self.together))


def sized(
    total: int, dim: int, machine_memory: float, *, factory: str = "", together: int = 1, copies: int = 1, share: float = 0.8
) -> Sized:
    """As few shards as fit, `together` of them into `share` of a machine's memory; the rest of it is for pages of stored vectors and for
    work.

    ValueError for sizes that cannot be, or where not even one list fits.
    """
    if min(total, dim, together, copies) < 1 or not 0 < share <= 1:
        raise ValueError(f"numbers are at least 1 and a share within (0, 1]; found {total=}, {dim=}, {together=}, {copies=}, {share=}")
    factory = factory or suggest(total, dim)
    shards = fitting(total, dim, factory, memory=machine_memory * share / together)
    told = outline(total=total, dim=dim, factory=factory, shards=shards)
    return Sized(outline=told, machine_memory=machine_memory, together=together, copies=copies)
