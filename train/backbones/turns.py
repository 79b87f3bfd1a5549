"""Items as conversations for Qwen3-VL: token ids with room for the image tokens, their positions, and where `<|EMB|>` stands.

The words are in chat_template.jinja, which the saved model keeps (METHOD.md section 2). Here the fixed parts are tokenised once
and put around each text. Shapes: B items, L tokens, T = cells^2 image tokens a picture.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from train.backbones.base import Inputs

EMB = "<|EMB|>"
IMAGE = "<|image_pad|>"
TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
TEXT = "TEXT"  # stands for the item's text while the fixed parts are cut


def conversation(*, image: bool) -> list[dict[str, Any]]:
    """One user turn as transformers' chat templates take it, with TEXT for its text."""
    return [{"role": "user", "content": [{"type": "text", "text": TEXT}, *([{"type": "image"}] if image else [])]}]


class Turns:
    """Lays out items by a transformers tokenizer that knows EMB, with `cells`^2 image tokens and at most `length` text tokens."""

    def __init__(self, tokenizer: Any, *, cells: int, length: int) -> None:
        self.tokenizer, self.cells, self.length = tokenizer, cells, length
        self.emb, self.image = (tokenizer.convert_tokens_to_ids(token) for token in (EMB, IMAGE))
        self.pad = tokenizer.pad_token_id
        self.before, self.after = self._parts(image=False)
        before, with_image = self._parts(image=True)
        at = with_image.index(self.image)
        assert before == self.before
        self.lead = at  # tokens between the text and the first image token
        self.after_with_image = [*with_image[:at], *[self.image] * cells**2, *with_image[at + 1 :]]

    def _parts(self, *, image: bool) -> tuple[list[int], list[int]]:
        said = self.tokenizer.apply_chat_template(conversation(image=image), chat_template=TEMPLATE, tokenize=False)
        before, after = (self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in said.split(TEXT))
        return before, after

    def words(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, at most `length`; special tokens that a seller writes are plain characters."""
        clean = [text.strip().encode("utf-8", "replace").decode() for text in texts]
        if not clean:
            return []
        made = self.tokenizer(clean, add_special_tokens=False, split_special_tokens=True, truncation=True, max_length=self.length)
        return made["input_ids"]

    def positions(self, starts: np.ndarray, pictured: np.ndarray, longest: int) -> np.ndarray:
        """(3, B, longest): time, row and column of each token; starts (B,) are the places of the first image tokens.

        Text counts on; an image's tokens share one time and count rows and columns from it; what follows counts on from the
        largest (interleaved M-RoPE, as transformers' get_rope_index, which is the slow twin).
        """
        place = np.tile(np.arange(longest), (len(starts), 1))
        nth = place - starts[:, None]  # of the image's tokens
        inside = pictured[:, None] & (nth >= 0) & (nth < self.cells**2)
        behind = pictured[:, None] & (nth >= self.cells**2)
        text = place + behind * (self.cells - self.cells**2)
        grid = np.stack([np.zeros_like(nth), nth // self.cells, nth % self.cells])
        return np.where(inside, starts[:, None] + grid, text)

    def lay_out(self, texts: Sequence[str], text_rows: np.ndarray, image_rows: np.ndarray, count: int) -> Inputs:
        """ids (B, L) padded on the right, positions (3, B, L), at (B,): where EMB is. Causal attention never sees the padding."""
        said: list[list[int]] = [[] for _ in range(count)]
        for row, ids in zip(text_rows, self.words(texts), strict=True):
            said[row] = ids
        pictured = np.zeros(count, bool)
        pictured[image_rows] = True
        rows = [[*self.before, *ids, *(self.after_with_image if image else self.after)] for ids, image in zip(said, pictured, strict=True)]
        lengths = np.array([len(row) for row in rows], np.int64)
        longest = int(lengths.max(initial=1))
        tokens = np.array([row + [self.pad] * (longest - len(row)) for row in rows], np.int64).reshape(count, longest)
        starts = len(self.before) + self.lead + np.array([len(ids) for ids in said], np.int64)
        places = self.positions(starts, pictured, longest)
        return {"ids": torch.from_numpy(tokens), "positions": torch.from_numpy(places), "at": torch.from_numpy(lengths - 1)}


def row_order(image_rows: np.ndarray, pixels: Tensor) -> Tensor:
    """The pictures in the order of their items: image tokens are filled in as they come along the batch."""
    order = np.argsort(image_rows, kind="stable")
    return pixels if np.array_equal(order, np.arange(len(order))) else pixels[torch.from_numpy(order)]
