"""What a step sees of its rows: the picture, the text, or both (modality dropout), with the words that a seller leaves out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from train.corpus import Corpus


@dataclass(frozen=True)
class Part:
    """A micro-batch of `count` items, of which the first `asked` are meant; `pictures` are its rows of Views.stored, for `image_rows`."""

    pictures: slice
    image_rows: np.ndarray
    texts: list[str]
    text_rows: np.ndarray
    count: int
    asked: int


@dataclass(frozen=True)
class Views:
    """One worker's batch: its rows of the corpus, decoded pictures (m, A, A, 3) uint8 or None, micro-batches, a seed for augmentation."""

    rows: np.ndarray
    stored: Tensor | None
    parts: list[Part]
    seed: int


class Viewer:
    """Draws views of a corpus. ValueError where it has neither pictures nor texts to use.

    `images_used` and `texts_used` say which models of the backbone will ever be called.
    """

    def __init__(self, corpus: Corpus, *, side: int, text_share: float, parts: int) -> None:
        self.corpus, self.side, self.text_share, self.parts = corpus, side, text_share, parts
        self.has_text = np.array([bool(corpus.titles[r] or self._more(r)) for r in range(len(corpus.labels))])
        self.pictured, self.titled = np.flatnonzero(corpus.has_image), np.flatnonzero(self.has_text)
        self.images_used = len(self.pictured) > 0
        self.texts_used = text_share > 0 and len(self.titled) > 0
        if not self.images_used and not self.texts_used:
            raise ValueError("the training items have neither pictures nor texts")

    def draw(self, rows: np.ndarray, random: np.random.Generator) -> Views:
        """The views of a worker's rows; everything random comes from `random`, whatever the number of parts."""
        with_text = self._with_text(rows, random)
        with_image = self.corpus.has_image[rows] & ~(with_text & (random.random(len(rows)) < 0.5))
        texts = [self._said(int(r), random) if told else "" for r, told in zip(rows, with_text, strict=True)]
        seed = int(random.integers(2**62))
        parts: list[Part] = []
        shown: list[np.ndarray] = []
        for at in np.array_split(np.arange(len(rows)), self.parts):
            part, images = self._part(rows[at], with_image[at], [texts[i] for i in at], sum(map(len, shown)))
            parts.append(part)
            shown.append(images)
        pictures = np.concatenate(shown)
        stored = torch.from_numpy(self.corpus.pixels(pictures, self.side)) if len(pictures) else None
        return Views(rows, stored, parts, seed)

    def _more(self, row: int) -> Sequence[str]:
        return self.corpus.texts[row] if len(self.corpus.texts) else ()

    def _said(self, row: int, random: np.random.Generator) -> str:
        """The title, or as often what else is said of the product."""
        title, more = self.corpus.titles[row], self._more(row)
        if more and (not title or random.random() < 0.5):
            title = more[int(random.integers(len(more)))]
        return noisy(title, random)

    def _with_text(self, rows: np.ndarray, random: np.random.Generator) -> np.ndarray:
        if not self.texts_used:
            return np.zeros(len(rows), bool)
        return self.has_text[rows] & ((random.random(len(rows)) < self.text_share) | ~self.corpus.has_image[rows])

    def _part(self, rows: np.ndarray, with_image: np.ndarray, texts: Sequence[str], before: int) -> tuple[Part, np.ndarray]:
        """The micro-batch and the rows of its pictures, of which `before` precede it.

        Batch norm needs two pictures, and data-parallel training every parameter: where a part lacks them, items are added whose
        vectors nobody asks for.
        """
        asked = count = len(rows)
        images, image_rows = rows[with_image], np.flatnonzero(with_image)
        if self.images_used and len(images) < 2:
            images = np.concatenate([images, np.resize(self.pictured, 2)])
            image_rows, count = np.concatenate([image_rows, [count, count + 1]]), count + 2
        text_rows = np.flatnonzero([bool(text) for text in texts])
        said: list[str] = [text for text in texts if text]
        if self.texts_used and not said:
            said, text_rows, count = [self._said(int(self.titled[0]), np.random.default_rng(0))], np.array([count]), count + 1
        return Part(slice(before, before + len(images)), image_rows, said, text_rows, count, asked), images


def noisy(title: str, random: np.random.Generator) -> str:
    """Sellers leave out words and change their order; a title of one word stays."""
    words = title.split()
    kept = [w for w in words if random.random() > 0.2] or words
    return " ".join(random.permutation(kept)) if random.random() < 0.3 else " ".join(kept)
