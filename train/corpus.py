"""The rows that a training run learns from: pictures fetched when they are first needed, decoded once as long as they fit."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from idem import images as pictures
from train.feed import Feed

Fetch = Callable[[np.ndarray], Sequence[bytes | None]]


@dataclass(frozen=True)
class Block:
    """Rows of a stream: `counted` is false for those that only fill up a worker's share; (m, S, S, 3) uint8 for those with a picture."""

    rows: np.ndarray
    counted: np.ndarray
    pixels: np.ndarray


@dataclass(frozen=True)
class Held:
    """Pictures that are never trained on, with the product of each; the first of a product is its gallery."""

    fetch: Fetch
    products: np.ndarray


@dataclass
class Corpus:
    """Training rows: encoded pictures fetched by position, titles, and a label 0..U-1 each; and a held-back slice.

    `texts` (n,) of several each are what else is said of a row's product: names in other languages, keywords, descriptions.
    `weights` (n,) say how much each row counts, 1 where None; 0 leaves it out.
    `names` (U,) are the prototypes' names, by which a checkpoint knows them again; `item_ids` (n,) are named in errors. `streams` of
    "members" (all rows) and "held", where given, yield this worker's share at a side in pixels, in any order, in place of the
    plain reading below.
    """

    fetch: Fetch
    titles: Sequence[str]
    has_image: np.ndarray
    labels: np.ndarray
    texts: Sequence[Sequence[str]] = ()
    weights: np.ndarray | None = None
    names: Sequence[str] = ()
    item_ids: Sequence[str] | np.ndarray = ()
    held: Held | None = None
    streams: Mapping[str, Callable[[int], Iterator[Block]]] = field(default_factory=dict)
    cache_bytes: int = 2 << 30
    _cache: dict[int, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not len(self.labels):
            raise ValueError("there is not one item to train on")
        self.names = self.names or [str(u) for u in range(int(self.labels.max()) + 1)]

    def load(self, rows: np.ndarray, side: int) -> np.ndarray:
        """(n, side, side, 3) uint8, decoded anew. ValueError names the item whose picture does not decode any more."""
        return decode(self.fetch(rows) if len(rows) else [], [self.name_of(int(r)) for r in rows], side)

    def pixels(self, rows: np.ndarray, side: int) -> np.ndarray:
        """(n, side, side, 3) uint8, decoded once as long as the cache holds; one side a corpus. From any thread."""
        fresh: dict[int, np.ndarray] = {}
        if missing := [int(r) for r in dict.fromkeys(rows.tolist()) if r not in self._cache]:
            fresh = dict(zip(missing, self.load(np.array(missing), side), strict=True))
            room = self.cache_bytes // (side * side * 3) - len(self._cache)
            self._cache.update(list(fresh.items())[: max(room, 0)])
        return np.stack([fresh[r] if r in fresh else self._cache[r] for r in rows.tolist()])

    def said(self, most: int = 100_000) -> list[str]:
        """Different texts of the rows, in their order."""
        every = itertools.chain(self.titles, itertools.chain.from_iterable(self.texts))
        return list(itertools.islice(dict.fromkeys(text for text in every if text), most))

    def name_of(self, row: int) -> str:
        return f"row {row} (item {self.item_ids[row]})" if len(self.item_ids) else f"row {row}"

    def members(self, rank: int, world: int, side: int) -> Iterator[Block]:
        """This worker's share of all rows; every worker gets as many blocks of as many rows."""
        if "members" in self.streams:
            return self.streams["members"](side)
        rows, counted = share_out(len(self.labels), rank, world)
        return read(lambda part: self.load(part, side), rows, counted, self.has_image)

    def held_blocks(self, rank: int, world: int, side: int) -> Iterator[Block]:
        """This worker's share of the held-back slice, in the same way."""
        assert self.held
        if "held" in self.streams:
            return self.streams["held"](side)
        held = self.held
        rows, counted = share_out(len(held.products), rank, world)
        return read(
            lambda part: decode(held.fetch(part), [f"held-back picture {r}" for r in part], side),
            rows,
            counted,
            np.ones(len(held.products), bool),
        )


def decode(data: Sequence[bytes | None], names: Sequence[str], side: int) -> np.ndarray:
    """(n, side, side, 3) uint8, squeezed as in service. ValueError names what does not decode."""
    out = np.zeros((len(data), side, side, 3), np.uint8)
    for i, (encoded, name) in enumerate(zip(data, names, strict=True)):
        if not encoded:
            raise ValueError(f"the picture of {name} is not there any more; ingest the catalogue again")
        try:
            out[i] = pictures.pixels(encoded, side)
        except pictures.ImageError as error:
            raise ValueError(f"the picture of {name} does not decode any more: {error}; ingest the catalogue again") from error
    return out


def share_out(count: int, rank: int, world: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one worker, as many for each, and which of them count: the last ones may be there only to fill up."""
    padded = np.arange(-(-count // world) * world)
    mine = padded[rank::world]
    return mine % count, mine < count


def read(
    load: Callable[[np.ndarray], np.ndarray], rows: np.ndarray, counted: np.ndarray, has_image: np.ndarray, size: int = 128
) -> Iterator[Block]:
    """The plain stream: blocks of `size` rows in order, the next one decoded by a thread meanwhile."""

    def make(number: int) -> Block:
        part = slice(number * size, (number + 1) * size)
        return Block(rows[part], counted[part], load(rows[part][has_image[rows[part]]]))

    blocks = -(-len(rows) // size)
    with Feed(make, depth=1, threads=1, end=blocks) as feed:
        yield from (feed.take(number) for number in range(blocks))
