"""The reader of a finished embedder: pictures and texts in, one L2-normalised vector an item out. No head, no Ray."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from idem import images as pictures
from idem import manifest, storage
from train.backbones.base import Backbone
from train.backbones.compact import VOCABULARY, Compact, CompactConfig, tokenize

WEIGHTS = ("model", "untrained")


def rows_with(values: Sequence[Any]) -> list[int]:
    return [i for i, value in enumerate(values) if value]


class Embedder:
    """`id` names the weights; `dim` and `side` are the sizes of output and input; `fractions` the folds it was trained with."""

    def __init__(self, model: Backbone, *, id: str = "", fractions: tuple[float, float, float] = (1.0, 0.0, 0.0)) -> None:
        assert isinstance(model, Compact)
        self.model = model.eval()
        self.id, self.fractions = id, fractions
        self.dim, self.side = model.config.dim, model.config.side
        self.device = model.text_weight.device
        self.vocabulary = VOCABULARY
        self.token_shape = model.token_shape

    @classmethod
    def load(cls, path: str, *, weights: str = "model", device: str = "cpu") -> "Embedder":
        """Open the artifact folder at `path`; weights "untrained" are those it started from. ValueError if it is damaged."""
        if weights not in WEIGHTS:
            raise ValueError(f"unknown weights {weights!r}; allowed are {', '.join(WEIGHTS)}")
        made = manifest.read(path, kind="embedder")
        manifest.verify(path, made)
        config = json.loads(storage.read_bytes(storage.join(path, "config.json")))
        model = Compact(CompactConfig(**config["model"]))
        model.load_state_dict(load_file(storage.local_path(storage.join(path, f"{weights}.safetensors"))))
        suffix = "" if weights == "model" else f"-{weights}"
        return cls(model.to(device), id=made.id + suffix, fractions=tuple(config["fractions"]))

    def tokenize(self, texts: Sequence[str], length: int | None = None) -> Tensor:
        """UTF-8 byte tokens (n, longest) int64 with padding 0; `length` bounds them (default: the model's own)."""
        return tokenize(texts, length or self.model.config.text_length)

    @torch.inference_mode()
    def image_tokens(self, pixels: Tensor) -> Tensor:
        """(n, side, side, 3) uint8 -> (n, T, C) float32: what the tower sees, place by place."""
        return self.model.image_tokens(self.model.normalise(pixels.to(self.device)))

    @torch.inference_mode()
    def encode(
        self,
        images: Sequence[bytes | None] | None,
        texts: Sequence[str] | None,
        *,
        dim: int | None = None,
        batch_size: int = 64,
        progress: str = "",
    ) -> np.ndarray:
        """(n, dim) float32, L2-normalised, for n items given by encoded pictures, texts, or both.

        `dim` takes a Matryoshka prefix. ValueError for an item with neither, ImageError for a picture that does not decode.
        """
        count = len(images) if images is not None else len(texts or ())
        images = images if images is not None else [None] * count
        texts = texts if texts is not None else [""] * count
        if len(images) != len(texts):
            raise ValueError(f"as many images as texts are needed, found {len(images)} and {len(texts)}")
        if not 1 <= (dim or self.dim) <= self.dim:
            raise ValueError(f"dim {dim} is not in 1..{self.dim}")
        if empty := [i for i in range(count) if not images[i] and not texts[i].strip()]:
            raise ValueError(f"item {empty[0]} has neither a picture nor a text (one of {len(empty)} such items)")
        parts = [np.zeros((0, dim or self.dim), np.float32)]
        starts = range(0, count, batch_size)
        for start in tqdm(starts, desc=progress, disable=not progress, unit="batch"):
            block = slice(start, start + batch_size)
            parts.append(self._encode(images[block], [text.strip() for text in texts[block]], dim or self.dim))
        return np.concatenate(parts)

    def _encode(self, images: Sequence[bytes | None], texts: Sequence[str], dim: int) -> np.ndarray:
        image_rows, text_rows = rows_with(images), rows_with(texts)
        pixels = torch.from_numpy(pictures.batch([images[i] for i in image_rows], self.side)) if image_rows else None
        made = self.model.collate(pixels, np.array(image_rows), [texts[i] for i in text_rows], np.array(text_rows), len(images))
        h = self.model({name: value.to(self.device) for name, value in made.items()}, len(images))
        return torch.nn.functional.normalize(h[:, :dim], dim=1).cpu().numpy()


class HistogramEmbedder:
    """The trivial twin: square roots of a joint 8 x 8 x 8 RGB histogram (Hellinger's affinity as a cosine); texts are not read."""

    id, dim, side = "histogram", 512, 64

    def encode(
        self, images: Sequence[bytes | None] | None, texts: Sequence[str] | None = None, *, batch_size: int = 64, progress: str = ""
    ) -> np.ndarray:
        """(n, 512) float32, L2-normalised; an item without a picture is the zero vector, which is near nothing."""
        images = images if images is not None else [None] * len(texts or ())
        out = np.zeros((len(images), self.dim), np.float32)
        for i, data in enumerate(tqdm(images, desc=progress, disable=not progress, unit="picture")):
            if data:
                bins = pictures.pixels(data, self.side).reshape(-1, 3) // 32
                flat = bins[:, 0].astype(np.int64) * 64 + bins[:, 1] * 8 + bins[:, 2]
                out[i] = np.sqrt(np.bincount(flat, minlength=self.dim) / len(flat))
        return out
