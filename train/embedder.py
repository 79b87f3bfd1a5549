"""The reader of a finished embedder: pictures and texts in, one L2-normalised vector an item out. No head, no Ray."""

import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from idem import images as pictures
from idem import manifest, storage
from train import backbones
from train.backbones.base import Backbone, computes_bf16
from train.backbones.compact import VOCABULARY, Compact, tokenize

WEIGHTS = ("model", "untrained")
Precision = Literal["fp32", "bf16", "int8"]
PRECISIONS = ("fp32", "bf16", "int8")
AHEAD = 2  # batches whose pictures are decoded while the model computes


class Embedder:
    """`id` names the weights; `dim` and `side` are the sizes of output and input; `fractions` the folds it was trained with.

    precision: "bf16" where the hardware computes in it, else as "fp32"; "int8" makes the linear layers of a qwen3-vl on the
    CPU integers (1.7 to 1.9 times as fast at the 2B's widths, cosine .98 with fp32; the compact backbone has too few and refuses).
    """

    def __init__(
        self,
        model: Backbone,
        *,
        id: str = "",
        fractions: tuple[float, float, float] = (1.0, 0.0, 0.0),
        precision: Precision = "fp32",
        threads: int | None = None,
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"unknown precision {precision!r}; allowed are {', '.join(PRECISIONS)}")
        self.device = next(model.parameters()).device
        self.model = quantised(model.eval()) if precision == "int8" else model.eval()
        self.id, self.fractions = id, fractions
        self.dim, self.side = model.dim, model.side
        self.bf16 = precision == "bf16" and computes_bf16(self.device)
        self.threads = threads or torch.get_num_threads()

    @classmethod
    def load(cls, path: str, *, weights: str = "model", device: str = "auto", precision: Precision = "fp32") -> "Embedder":
        """Open the artifact folder at `path`; weights "untrained" are those it started from; device "auto" is CUDA where there is one.

        ValueError if it is damaged, or if the weights it started from are no longer there.
        """
        if weights not in WEIGHTS:
            raise ValueError(f"unknown weights {weights!r}; allowed are {', '.join(WEIGHTS)}")
        made = manifest.read(path, kind="embedder")
        manifest.verify(path, made)
        if "fractions" not in made.config:
            raise ValueError(f"the manifest of the embedder at {path} does not say the fractions it was trained with")
        folder = storage.local_path(path)
        model = backbones.load(folder) if weights == "model" else backbones.untrained(folder)
        place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        suffix = "" if weights == "model" else f"-{weights}"
        return cls(model.to(place), id=made.id + suffix, fractions=tuple(made.config["fractions"]), precision=precision)

    @property
    def vocabulary(self) -> int:
        """Of `tokenize`."""
        self._compact("a byte vocabulary")
        return VOCABULARY

    @property
    def token_shape(self) -> tuple[int, int]:
        """(T, C) of `image_tokens`."""
        return self._compact("image tokens for a reranker").token_shape

    def tokenize(self, texts: Sequence[str], length: int | None = None) -> Tensor:
        """UTF-8 byte tokens (n, longest) int64 with padding 0; `length` bounds them (default: the model's own)."""
        return tokenize(texts, length or self._compact("byte tokens for a reranker").config.text_length)

    @torch.inference_mode()
    def image_tokens(self, pixels: Tensor) -> Tensor:
        """(n, side, side, 3) uint8 -> (n, T, C) float32 on the CPU: what the tower sees, place by place."""
        model = self._compact("image tokens for a reranker")
        return model.image_tokens(model.normalise(pixels.to(self.device))).cpu()

    def image_head(self) -> tuple[Tensor, Tensor]:
        """As train.backbones.compact.Compact.image_head, on the CPU."""
        weight, bias = self._compact("the head of image tokens").image_head()
        return weight.cpu(), bias.cpu()

    def _compact(self, what: str) -> Compact:
        if not isinstance(self.model, Compact):
            raise ValueError(f"{what} cannot be had of a {type(self.model).__name__} embedder yet; the compact backbone has them")
        return self.model

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

        `dim` takes a Matryoshka prefix. A vector does not depend on what is encoded with it, to 1e-5 in fp32 and 2e-2 in bf16.
        ValueError for an item with neither, ImageError for a picture that does not decode.
        """
        count = len(images) if images is not None else len(texts or ())
        images = images if images is not None else [None] * count
        texts = [text.strip() for text in texts] if texts is not None else [""] * count
        if len(images) != len(texts):
            raise ValueError(f"as many images as texts are needed, found {len(images)} and {len(texts)}")
        if not 1 <= (dim or self.dim) <= self.dim:
            raise ValueError(f"dim {dim} is not in 1..{self.dim}")
        if empty := [i for i in range(count) if not images[i] and not texts[i]]:
            raise ValueError(f"item {empty[0]} has neither a picture nor a text (one of {len(empty)} such items)")
        made = np.zeros((count, dim or self.dim), np.float32)
        blocks = by_length(images, texts, batch_size)
        with tqdm(total=len(blocks), desc=progress, disable=not progress, unit="batch") as bar, ThreadPoolExecutor(self.threads) as pool:
            for rows, decoded in self._decoded(images, blocks, pool):
                made[rows] = self._encode(decoded, [texts[i] for i in rows], dim or self.dim)
                bar.update()
        return made

    def _decoded(
        self, images: Sequence[bytes | None], blocks: Sequence[list[int]], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[list[int], list[np.ndarray | None]]]:
        """Blocks of rows with their decoded pictures, AHEAD of them in the making."""
        waiting: deque[tuple[list[int], list[Future[np.ndarray] | None]]] = deque()
        try:
            for rows in [*blocks, *[[]] * AHEAD]:
                encoded = [images[i] for i in rows]
                waiting.append((rows, [pool.submit(pictures.pixels, data, self.side) if data else None for data in encoded]))
                if len(waiting) > AHEAD:
                    done, futures = waiting.popleft()
                    yield done, [future.result() if future else None for future in futures]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    @torch.inference_mode()
    def _encode(self, decoded: Sequence[np.ndarray | None], texts: Sequence[str], dim: int) -> np.ndarray:
        image_rows = [i for i, pixels in enumerate(decoded) if pixels is not None]
        text_rows = [i for i, text in enumerate(texts) if text]
        pixels = torch.from_numpy(np.stack([p for p in decoded if p is not None])) if image_rows else None
        made = self.model.collate(pixels, np.array(image_rows), [texts[i] for i in text_rows], np.array(text_rows), len(texts))
        inputs = {name: value.to(self.device) for name, value in made.items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            vectors = self.model(inputs, len(texts))
        return nn.functional.normalize(vectors.float()[:, :dim], dim=1).cpu().numpy()


def by_length(images: Sequence[bytes | None], texts: Sequence[str], batch_size: int) -> list[list[int]]:
    """Rows in batches of items alike in what they have and in the length of their text, so that little is padding."""
    order = sorted(range(len(texts)), key=lambda i: (not images[i], len(texts[i].encode("utf-8", "replace"))))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def quantised(model: Backbone) -> Backbone:
    """`model` with its linear layers in 8-bit integers, activations scaled as they come (dynamic quantisation), for the CPU alone.

    ValueError for the compact backbone or another device.
    """
    if isinstance(model, Compact) or next(model.parameters()).device.type != "cpu":
        raise ValueError("int8 is for a qwen3-vl embedder on the CPU; allowed elsewhere are fp32 and bf16")
    from torch.ao.quantization import quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torchao, which it points to, is one more dependency for this one call
        return quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


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
