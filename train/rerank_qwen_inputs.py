"""Requests as rows of tokens for the rerankers of the qwen3-vl backbone, and pictures as what the language model takes of them.

A request is a query and its documents. B queries, R documents of all of them one after another, M the most of one query, L tokens a
row, T = cells^2 image tokens a picture, D width of the language model, K of its layers that DeepStack adds to, n pictures.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from train.backbones.qwen3vl import Qwen3VL
from train.backbones.squares import normalise
from train.backbones.turns import Turns

INDEX, ANSWER = -1, -2  # ids of tokens that no tokenizer knows: a reranker's own rows
OPENING = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\nQuery:"
COMPARE = "Which documents show the very same product as the query?"
JUDGE = "Is the document the very same product as the query? Answer yes or no."
DOCUMENT = "\nDocument:"
CLOSING = "<|im_end|>\n<|im_start|>assistant\n"
UNKNOWN = 3  # the level of a document that nobody judged
A = TypeVar("A", "Tokens", "Rows", "QwenBatch")


@dataclass(frozen=True, kw_only=True)
class Item:
    """A query or a document; pictures: the numbers of its pictures in the request's features, of a pair the whole and then the middle."""

    text: str = ""
    pictures: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """ids (R, L), positions (3, R, L) as Qwen3-VL counts them, image (R, L): the row of features (n * T) at an image token, else -1."""

    ids: Tensor
    positions: Tensor
    image: Tensor

    def take(self, rows: slice | Tensor) -> "Tokens":
        return Tokens(ids=self.ids[rows], positions=self.positions[:, rows], image=self.image[rows])

    def later(self, by: Tensor) -> "Tokens":
        """With positions moved by (R,)."""
        return dataclasses.replace(self, positions=self.positions + by[:, None])


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Tokens padded on the right; last (R,): the place of the last one; span (R, L): what is pooled, which is the image tokens, or the
    words where there is no picture; extent (R,): positions taken."""

    tokens: Tokens
    last: Tensor
    span: Tensor
    extent: Tensor

    @property
    def valid(self) -> Tensor:
        """(R, L): what is no padding."""
        return torch.arange(self.span.shape[1], device=self.span.device) <= self.last[:, None]


@dataclass(frozen=True, kw_only=True)
class QwenBatch:
    """features (n, 1 + K, T, D); owner (R,): the query of each document; cosine (R,) of the retrieval; rows (B, M): the documents of
    each query; level (B, M), -1 where there is no document."""

    query: Rows
    blocks: Rows
    features: Tensor
    owner: Tensor
    cosine: Tensor
    rows: Tensor
    level: Tensor


def moved(value: A, device: torch.device | str) -> A:
    def each(part: Any) -> Any:
        return part.to(device, non_blocking=True) if isinstance(part, Tensor) else moved(part, device)

    return dataclasses.replace(value, **{field.name: each(getattr(value, field.name)) for field in dataclasses.fields(value)})


def joined(parts: Sequence[Tokens]) -> Tokens:
    """One after another, as longer rows."""
    return Tokens(
        ids=torch.cat([p.ids for p in parts], 1),
        positions=torch.cat([p.positions for p in parts], 2),
        image=torch.cat([p.image for p in parts], 1),
    )


def positions(image: np.ndarray, cells: int) -> np.ndarray:
    """(3, R, L) of rows whose image tokens are where `image` (R, L) is True, any number of pictures: interleaved M-RoPE as
    train.backbones.turns tells it, of which transformers' get_rope_index is the slow twin."""
    nth = (image.cumsum(1) - 1) % cells**2
    step = np.where(image, np.where(nth == cells**2 - 1, cells, 0), 1)
    return step.cumsum(1) - step + image * np.stack([0 * nth, nth // cells, nth % cells])


@torch.no_grad()
def picture_features(backbone: Qwen3VL, pixels: Tensor) -> Tensor:
    """(n, S, S, 3) uint8 -> (n, 1 + K, T, D) in the dtype of the weights: a picture's image tokens, then what DeepStack adds to them
    behind each of the first K language layers. It depends on the picture and the frozen tower alone, so it can be kept.

    A picture takes (1 + K) T D numbers: of Qwen3-VL-2B (K = 3, D = 2048) with 64 image tokens in bf16 that is 1 MiB, 256 KiB without
    the DeepStack layers, so 100 documents are 100 MiB and a gallery is for a cache of what is asked for, not for memory.
    """
    told, count = backbone.image_processor, len(pixels)
    first, deep = backbone.squares(backbone.model.visual, normalise(pixels, told.image_mean, told.image_std))
    return torch.stack([part.unflatten(0, (count, -1)) for part in (first, *deep)], 1)


class Part:
    """Rows of one kind: fixed words, the item's text, its pictures (at most `views`), closing tokens."""

    def __init__(self, turns: Turns, before: str, after: Sequence[int], *, views: int) -> None:
        self.turns, self.after, self.views = turns, list(after), views
        self.before: list[int] = turns.tokenizer(before, add_special_tokens=False)["input_ids"]
        start, end = (turns.tokenizer.convert_tokens_to_ids(token) for token in ("<|vision_start|>", "<|vision_end|>"))
        self.picture = [start, *[turns.image] * turns.cells**2, end]

    @property
    def longest(self) -> int:
        """Positions that a row can take at most."""
        return len(self.before) + self.turns.length + self.views * (self.turns.cells + 2) + len(self.after)

    def rows(self, items: Sequence[Item]) -> Rows:
        """ValueError for more pictures than views."""
        if (most := max((len(item.pictures) for item in items), default=0)) > self.views:
            raise ValueError(f"an item has {most} pictures here; at most {self.views} are read")
        words = self.turns.words([item.text for item in items])
        said = [[*self.before, *w, *self.picture * len(item.pictures), *self.after] for w, item in zip(words, items, strict=True)]
        lengths = np.array([len(row) for row in said], np.int64)
        longest = int(lengths.max(initial=1))
        ids = np.array([row + [self.turns.pad] * (longest - len(row)) for row in said], np.int64).reshape(-1, longest)
        image, place = ids == self.turns.image, np.arange(longest) - len(self.before)
        word = (place >= 0) & (place < np.array([len(w) for w in words])[:, None])
        where = positions(image, self.turns.cells)
        made = Tokens(
            ids=torch.from_numpy(ids),
            positions=torch.from_numpy(where),
            image=torch.from_numpy(self._features(image, items)),
        )
        return Rows(
            tokens=made,
            last=torch.from_numpy(lengths - 1),
            span=torch.from_numpy(np.where(image.any(1, keepdims=True), image, word)),
            extent=torch.from_numpy(where[0, np.arange(len(items)), lengths - 1] + 1),
        )

    def _features(self, image: np.ndarray, items: Sequence[Item]) -> np.ndarray:
        """(R, L): `Tokens.image`."""
        numbers = np.array([[*item.pictures, *[0] * (self.views - len(item.pictures))] for item in items]).reshape(-1, self.views)
        which, nth = np.divmod(np.where(image, image.cumsum(1) - 1, 0), self.turns.cells**2)
        return np.where(image, np.take_along_axis(numbers, which, 1) * self.turns.cells**2 + nth, -1)


class Layout:
    """Lays out requests: the instruction and the query are one row, each document is one that `closing` ends."""

    def __init__(self, turns: Turns, instruction: str, closing: Sequence[int], *, views: int) -> None:
        self.query = Part(turns, OPENING.format(instruction), (), views=1)
        self.document = Part(turns, DOCUMENT, closing, views=views)

    def batch(
        self,
        queries: Sequence[Item],
        documents: Sequence[Sequence[Item]],
        features: Tensor,
        cosines: Sequence[Sequence[float]],
        levels: Sequence[Sequence[int]] | None = None,
    ) -> QwenBatch:
        """On the CPU, features wherever they are; documents in canonical order. ValueError where a query has none."""
        counts = np.array([len(each) for each in documents])
        if not counts.all():
            raise ValueError(f"query {int(np.argmin(counts))} has no documents")
        place = np.arange(counts.max())
        there = place < counts[:, None]
        level = np.full(there.shape, -1)
        level[there] = UNKNOWN if levels is None else np.concatenate([np.asarray(each) for each in levels])
        return QwenBatch(
            query=self.query.rows(queries),
            blocks=self.document.rows([item for each in documents for item in each]),
            features=features,
            owner=torch.from_numpy(np.repeat(np.arange(len(counts)), counts)),
            cosine=torch.from_numpy(np.concatenate([np.asarray(each, np.float32) for each in cosines])),
            rows=torch.from_numpy(np.where(there, (counts.cumsum() - counts)[:, None] + place, 0)),
            level=torch.from_numpy(level),
        )
