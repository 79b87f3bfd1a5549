"""What the reranker learns from: pictures as tokens of the frozen tower, kept in memory once, and lists of candidates.

A batch is drawn by (seed, step, slot) alone: N workers on equal shares of the slots see what one would.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from idem import images, metrics
from idem.types import Query
from train.rerank_blocks import Batch
from train.rerank_match import COLOURS

Kind = Literal["image", "both", "text"]
KINDS: tuple[Kind, ...] = ("image", "both", "text")
BLOCK = 64  # pictures through the tower at a time
MIDDLE = 0.7  # of each side, what a second view shows
HEAD = 20  # documents from which a comparison is mostly drawn: what a last comparison is chosen from


class Reader(Protocol):
    """What is needed of train.embedder.Embedder."""

    side: int

    @property
    def vocabulary(self) -> int: ...
    @property
    def token_shape(self) -> tuple[int, int]: ...
    def image_tokens(self, pixels: torch.Tensor) -> torch.Tensor: ...
    def image_head(self) -> tuple[torch.Tensor, torch.Tensor]: ...
    def tokenize(self, texts: Sequence[str], length: int | None = None) -> torch.Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Pool:
    """n items: places (n, T, C) float16 of their pictures, pictured (n,) bool, texts (n, L) int16 with 0 as padding."""

    places: np.ndarray
    pictured: np.ndarray
    texts: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Lists:
    """Q queries of one fold and at most N documents each: rows of a Pool, -1 where there is none.

    cosines (3, Q, N): by kind of query (KINDS); levels (Q, N), -1 for none; products (Q, N) and families (Q,) are codes.
    told (Q,) bool: the query may be asked with its title, which is then none that a document of its own product has.
    """

    queries: np.ndarray
    documents: np.ndarray
    cosines: np.ndarray
    levels: np.ndarray
    products: np.ndarray
    families: np.ndarray
    told: np.ndarray

    def __len__(self) -> int:
        return len(self.queries)


def kind_of(query: Query) -> Kind:
    return "text" if not query.image else "both" if query.text.strip() else "image"


def text_tokens(reader: Reader, texts: Sequence[str], length: int) -> torch.Tensor:
    """(n, at most `length`) int64 byte tokens; all padding for an empty text."""
    clean = [text.strip().encode("utf-8", "replace").decode() for text in texts]
    tokens = reader.tokenize(clean, length)[:, :length].clone()
    tokens[[not text for text in clean]] = 0
    return tokens


def in_time(until: float) -> None:
    if time.perf_counter() > until:
        raise TimeoutError


def seen(data: bytes, side: int, views: int) -> np.ndarray:
    """(views, side, side, 3) uint8: the picture as a whole and, with two views, its middle. ImageError as images.pixels."""
    whole = images.pixels(data, side)
    if views == 1:
        return whole[None]
    large, start = images.pixels(data, round(side / MIDDLE)), (round(side / MIDDLE) - side) // 2
    return np.stack([whole, large[start : start + side, start : start + side]])


def places_shape(reader: Reader, views: int) -> tuple[int, int]:
    """(T, C) of a picture, the colours of each place among its channels."""
    tokens, channels = reader.token_shape
    return views * tokens, channels + COLOURS


def colours(pixels: np.ndarray, tokens: int) -> np.ndarray:
    """(n, tokens, COLOURS) float32 in -1..1: the mean colour of each cell of (n, side, side, 3) uint8; of the whole picture where the
    tokens are no square that divides the side."""
    grid = round(tokens**0.5)
    if grid * grid != tokens or pixels.shape[1] % grid:
        return np.repeat(pixels.mean((1, 2), dtype=np.float32)[:, None] / 127.5 - 1, tokens, axis=1)
    cell = pixels.shape[1] // grid
    means = pixels.reshape(-1, grid, cell, grid, cell, 3).mean((2, 4), dtype=np.float32)
    return means.reshape(-1, tokens, COLOURS) / 127.5 - 1


def picture_tokens(
    reader: Reader, pictures: Sequence[bytes | None], *, views: int = 1, progress: str = "", until: float = math.inf
) -> tuple[np.ndarray, np.ndarray]:
    """(n, views * T, C) float16 and (n,) bool: which pictures are there and decode; the tokens of the others are zero.
    TimeoutError where time.perf_counter passes `until`."""
    places = np.zeros((len(pictures), *places_shape(reader, views)), np.float16)
    pictured = np.zeros(len(pictures), bool)
    for start in tqdm(range(0, len(pictures), BLOCK), desc=progress, disable=not progress, unit="batch"):
        in_time(until)
        rows, pixels = [], []
        for row in range(start, min(start + BLOCK, len(pictures))):
            data = pictures[row]
            try:
                if data:
                    pixels.append(seen(data, reader.side, views))
                    rows.append(row)
            except images.ImageError:
                continue  # as if it had none: `pictured` tells the caller
        if rows:
            with torch.inference_mode():
                seen_pixels = np.concatenate(pixels)
                tokens = reader.image_tokens(torch.from_numpy(seen_pixels)).numpy()
            made = np.concatenate([tokens, colours(seen_pixels, tokens.shape[1])], axis=2)
            places[rows] = made.reshape(len(rows), *places.shape[1:])
            pictured[rows] = np.isfinite(places[rows]).all((1, 2))
    places[~pictured] = 0
    return places, pictured


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known of the n items of a Pool: products, families and titles (n,) are codes, -1 for no title. A query that is a text and
    no item has no product and no family: -1.

    both, text (n, D): vectors of the items with all they have, and with their title alone, zero for none: what queries are
    asked with. indexed (n, D): their vectors as the index has them.
    """

    products: np.ndarray
    families: np.ndarray
    titles: np.ndarray
    both: np.ndarray
    text: np.ndarray
    indexed: np.ndarray


def title_codes(titles: Sequence[str], length: int) -> np.ndarray:
    """(n,) codes, -1 for an empty title: equal where the first `length` characters are, whatever their case and spaces."""
    plain = [" ".join(title.split()).casefold()[:length] for title in titles]
    return np.where([bool(title) for title in plain], np.unique(plain, return_inverse=True)[1], -1)


def tellable(queries: np.ndarray, documents: np.ndarray, known: Known) -> np.ndarray:
    """(Q,) bool: the query is a text and no item, or it has a title, its product is among the fold's `documents` (any shape, -1 for none),
    and none of these has that title. Else the title would be the answer: a catalogue with one title a product asks by picture alone."""
    shown = np.unique(documents[documents >= 0])
    pairs = set(zip(known.products[shown].tolist(), known.titles[shown].tolist(), strict=True))
    products = {product for product, _ in pairs}
    asked = zip(known.products[queries].tolist(), known.titles[queries].tolist(), strict=True)
    return np.array(
        [product < 0 or (title >= 0 and product in products and (product, title) not in pairs) for product, title in asked], bool
    )


def lists(table: pa.Table, rows: dict[str, int], known: Known) -> Lists:
    """One fold's CANDIDATES to Lists. `rows`: to pool row, of item_ids and of the query_ids of texts."""
    ids, scores, levels = (table[name].to_pylist() for name in ("item_ids", "scores", "levels"))
    queries = np.array([rows[q] for q in table["query_id"].to_pylist()], np.int64)
    shape = (len(ids), max(map(len, ids), default=0))
    documents, cosine, level = np.full(shape, -1), np.zeros(shape, np.float32), np.full(shape, -1, np.int8)
    for i, (names, values, found) in enumerate(zip(ids, scores, levels, strict=True)):
        kept = [j for j, name in enumerate(names) if rows[name] != queries[i]]  # a picture is no answer to itself
        documents[i, : len(kept)] = [rows[names[j]] for j in kept]
        cosine[i, : len(kept)], level[i, : len(kept)] = np.array(values)[kept], np.array(found)[kept]
    other = [np.einsum("qd,qnd->qn", vectors[queries], known.indexed[documents]) for vectors in (known.both, known.text)]
    return Lists(
        queries=queries,
        documents=documents,
        cosines=np.stack([cosine, *other]).astype(np.float32),
        levels=level,
        products=np.where(documents >= 0, known.products[documents], -1),
        families=_families(queries, documents, level, known),
        told=tellable(queries, documents, known),
    )


def _families(queries: np.ndarray, documents: np.ndarray, level: np.ndarray, known: Known) -> np.ndarray:
    """(Q,): a text has that of the document that is best for it, and one of its own where none is anything to it."""
    families, relevant = known.families[queries], (level >= 0) & (level < metrics.LEVELS - 1)
    if not level.size:
        return families
    best = documents[np.arange(len(queries)), np.where(relevant, level, metrics.LEVELS).argmin(1)]
    own = known.families.max() + 1 + np.arange(len(queries))
    return np.where(families >= 0, families, np.where(relevant.any(1), known.families[best], own))


def askable(pool: Pool, source: Lists, kind: Kind) -> np.ndarray:
    """Numbers of the lists whose query can be asked so."""
    return np.flatnonzero((source.told | (kind == "image")) & (pool.pictured[source.queries] | (kind == "text")))


def assemble(pool: Pool, queries: np.ndarray, kinds: Sequence[Kind], documents: np.ndarray, cosine: np.ndarray, level: np.ndarray) -> Batch:
    """Tensors of queries (B,) asked as `kinds` and their documents (B, M), -1 for none."""
    q_pictured = pool.pictured[queries] & np.array([kind != "text" for kind in kinds])
    q_texts = pool.texts[queries] * np.array([[kind != "image"] for kind in kinds])
    d_there = documents >= 0
    d_texts = pool.texts[documents] * d_there[..., None]
    places = pool.places.shape[1]
    return Batch(
        q_image=torch.from_numpy(pool.places[queries].astype(np.float32)),
        q_mask=torch.from_numpy(q_pictured)[:, None].repeat(1, places),
        q_text=torch.from_numpy(_trimmed(q_texts)),
        d_image=torch.from_numpy(pool.places[documents].astype(np.float32)),
        d_mask=torch.from_numpy(pool.pictured[documents] & d_there)[..., None].repeat(1, 1, places),
        d_text=torch.from_numpy(_trimmed(d_texts)),
        cosine=torch.from_numpy(cosine),
        level=torch.from_numpy(level.astype(np.int64)),
    )


def padded(rows: Sequence[np.ndarray], fill: float = -1) -> np.ndarray:
    """(B, longest): each of `rows` from the left."""
    made = np.full((len(rows), max(map(len, rows))), fill, rows[0].dtype)
    for i, row in enumerate(rows):
        made[i, : len(row)] = row
    return made


def _trimmed(texts: np.ndarray) -> np.ndarray:
    """Without columns that are padding everywhere; at least 4 columns."""
    used = int((texts > 0).any(tuple(range(texts.ndim - 1))).sum())
    return texts[..., : max(used, 4)].astype(np.int64)


def draw(pool: Pool, source: Lists, *, slots: Sequence[int], seed: int, step: int, chunk: int, settings: Any) -> Batch:
    """A training batch, one comparison a slot; `settings` has kinds (shares), absent (share of lists whose level-0
    documents are taken out, so that NULL is right) and dropout (share of places and of texts hidden)."""
    drawn = [_comparison(pool, source, np.random.default_rng([seed, step, slot]), chunk, settings) for slot in slots]
    queries, kinds, picks = (list(column) for column in zip(*drawn, strict=True))
    numbers = np.array([np.pad(p, (0, chunk - len(p)), constant_values=-1) for p in picks])
    rows = np.array(queries)[:, None]
    there = numbers >= 0
    cosine = np.array([source.cosines[KINDS.index(kind), q, p] for q, kind, p in zip(queries, kinds, numbers, strict=True)])
    batch = assemble(
        pool,
        source.queries[queries],
        kinds,
        np.where(there, source.documents[rows, numbers], -1),
        np.where(there, cosine, 0).astype(np.float32),
        np.where(there, source.levels[rows, numbers], -1),
    )
    return _hidden(batch, [np.random.default_rng([seed, step, slot, 1]) for slot in slots], settings.dropout)


def _comparison(pool: Pool, source: Lists, random: np.random.Generator, chunk: int, settings: Any) -> tuple[int, Kind, np.ndarray]:
    """A query, how it is asked, and the numbers of at most `chunk` documents of its list, shuffled."""
    query = int(random.integers(len(source)))
    row = source.queries[query]
    kind = KINDS[random.choice(3, p=np.array(settings.kinds) / sum(settings.kinds))]
    kind = "image" if not source.told[query] else kind if pool.pictured[row] else "text"
    there = np.flatnonzero(source.documents[query] >= 0)
    if random.random() < settings.absent and (source.levels[query][there] > 0).any():
        there = there[source.levels[query][there] > 0]
    ranked = there[np.argsort(-source.cosines[KINDS.index(kind), query][there], kind="stable")]
    size = chunk if random.random() < 0.75 else int(random.integers(2, chunk + 1))
    if random.random() < 0.4:  # as chunks are cut in service, mostly near the top
        start = min(int(random.exponential(chunk / 2)), max(len(ranked) - size, 0))
        picked = ranked[start : start + size]
    else:  # as a last comparison finds them: some of the best, and a right one if there is any
        head = ranked[:HEAD] if random.random() < 0.7 else ranked
        picked = random.choice(head, min(size, len(head)), replace=False)
        right = ranked[source.levels[query][ranked] == 0]
        if len(right) and not np.isin(right, picked).any():
            picked[0] = random.choice(right)
    return query, kind, random.permutation(picked)


def _hidden(batch: Batch, randoms: Sequence[np.random.Generator], share: float) -> Batch:
    """Hide places of queries and documents, and whole texts of documents that have a picture: all in place."""
    if share:
        for i, random in enumerate(randoms):
            batch.q_mask[i] &= torch.from_numpy(random.random(batch.q_mask.shape[1]) >= share)
            batch.d_mask[i] &= torch.from_numpy(random.random(batch.d_mask.shape[1:]) >= share)
            untitled = torch.from_numpy(random.random(batch.d_text.shape[1]) < share) & batch.d_mask[i].any(1)
            batch.d_text[i, untitled] = 0
    return batch


def served(source: Lists, query: int, kind: Kind, depth: int) -> np.ndarray:
    """Numbers of the documents as a service would pass them on: the best row of each product, at most `depth`, best first."""
    there = np.flatnonzero(source.documents[query] >= 0)
    ranked = there[np.argsort(-source.cosines[KINDS.index(kind), query][there], kind="stable")]
    return ranked[metrics.collapse(source.products[query][ranked].tolist())[:depth]]
