"""The reader of a reranker of the qwen3-vl backbone: as train.reranker.Reranker, from an artifact that holds its own backbone. No Ray."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from idem.types import Document, Query
from train.backbones.qwen3vl import Qwen3VL
from train.rerank_data import Kind, in_time, kind_of
from train.rerank_merge import Scored
from train.rerank_qwen import score
from train.rerank_qwen_inputs import QwenBatch, moved, picture_features
from train.rerank_qwen_train import QWEN_MODELS, QwenModel, first_view, numbered, read_picture
from train.rerank_select import Served
from train.reranker import Reranker, TokenCache

Key = tuple[str, int, int]
BACKBONE = "backbone"
WEIGHTS = "model.safetensors"
CACHE_BYTES = 2 << 30  # of the device; a picture of Qwen3-VL-2B takes 1 MiB
BLOCK = 64  # pictures through the tower at a time


def save(model: QwenModel, folder: Path) -> list[str]:
    """Write what `load` needs: the backbone as transformers and Qwen3VL.load open it, adapters merged, and what stands beside it; the
    names of the files, relative to `folder`."""
    names = model.backbone.save(folder / BACKBONE)
    beside = {name: value.contiguous() for name, value in model.state_dict().items() if not name.startswith(f"{BACKBONE}.")}
    save_file(beside, folder / WEIGHTS)
    return [WEIGHTS, *(f"{BACKBONE}/{name}" for name in names)]


def load(folder: Path, kind: str) -> QwenModel:
    """What `save` wrote of a reranker of `kind` (QWEN_MODELS), on the GPU where there is one. ValueError where it is of another version."""
    model = QWEN_MODELS[kind](Qwen3VL.load(folder / BACKBONE))
    beside = load_file(folder / WEIGHTS)
    own = {name: value for name, value in model.state_dict().items() if not name.startswith(f"{BACKBONE}.")}
    if wrong := sorted(set(own) ^ set(beside)) or sorted(name for name in own if own[name].shape != beside[name].shape):
        raise ValueError(f"the reranker in {folder} is of another version of this program: train it again ({wrong[0]})")
    model.load_state_dict(beside, strict=False)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


class QwenReranker(Reranker):
    """As Reranker; features of pictures stay on the model's device, by item, of documents that have an item_id."""

    def __init__(self, model: QwenModel, *, served: dict[Kind, Served], chunk: int, id: str = "", cache_bytes: int = CACHE_BYTES) -> None:
        told: Any = model
        super().__init__(told, told.backbone, served=served, chunk=chunk, id=id, cache_bytes=cache_bytes)
        self.qwen, self.device = model, next(model.parameters()).device
        self.features: Any = self.cache

    def _score(self, batch: QwenBatch, until: float) -> list[Scored]:
        return score(self.qwen, batch, chunk=self.chunk, until=until)

    @torch.inference_mode()
    def _read(
        self, queries: Sequence[Query], documents: Sequence[Sequence[Document]], until: float
    ) -> tuple[QwenBatch, list[Kind], list[bool]]:
        every = [document for each in documents for document in each]
        views, count = self.qwen.layout.document.views, len(queries)
        keys = [*[None] * count, *(TokenCache.key(d) if d.item_id else None for d in every)]
        images = [*(query.image for query in queries), *(d.image for d in every)]
        found = self._pictured(images, keys, until)
        self.faults += sum(bool(data) and features is None for data, features in zip(images, found, strict=True))
        shown = [features is not None for features in found]
        items = numbered([*(query.text for query in queries), *(d.text for d in every)], shown, views)
        there = [features for features in found if features is not None]
        ends = np.cumsum([len(each) for each in documents])[:-1]
        batch = self.qwen.layout.batch(
            [first_view(item) for item in items[:count]],
            [items[count:][part[0] : part[-1] + 1] for part in np.split(np.arange(len(every)), ends)],
            torch.cat(there) if there else torch.zeros(0),
            [part.tolist() for part in np.split(self._cosines(every), ends)],
        )
        kinds: list[Kind] = [kind_of(query) if there else "text" for query, there in zip(queries, shown[:count], strict=True)]
        readable = [there or bool(query.text.strip()) for query, there in zip(queries, shown[:count], strict=True)]
        return moved(batch, self.device), kinds, readable

    def _pictured(self, images: Sequence[bytes | None], keys: Sequence[Key | None], until: float) -> list[Tensor | None]:
        """Features (V, 1 + K, T, D) of each picture, None for one that is not there or does not decode; by their keys from the cache."""
        backbone, views = self.qwen.backbone, self.qwen.layout.document.views
        found: list[Tensor | None] = [None] * len(images)
        new = []
        for i, (data, key) in enumerate(zip(images, keys, strict=True)):
            known, found[i] = self.features.get(key) if data and key else (not data, None)
            new += [] if known else [i]
        for part in (new[at : at + BLOCK] for at in range(0, len(new), BLOCK)):
            in_time(until)
            pixels = {i: read for i in part if (read := read_picture(images[i], backbone.side, views)) is not None}
            if pixels:
                made = picture_features(backbone, torch.from_numpy(np.concatenate(list(pixels.values()))).to(self.device))
                for i, features in zip(pixels, made.unflatten(0, (-1, views)), strict=True):
                    found[i] = features
            for i in part:
                if keys[i]:
                    self.features.put(keys[i], None if found[i] is None else found[i].clone())  # a part of a block would keep all of it
        return found
