"""The reader of a finished reranker: a query and its candidates in, one order and one calibrated r a candidate out. No Ray."""

import json
import math
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from idem import manifest, storage
from idem.types import Document, Query, Ranking
from train.embedder import Embedder
from train.rerank_blocks import Shape
from train.rerank_data import KINDS, Kind, Pool, Reader, assemble, kind_of, padded, picture_tokens, text_tokens
from train.rerank_match import Pictures
from train.rerank_merge import Scored, arrange
from train.rerank_model import MODELS, Model
from train.rerank_score import score
from train.rerank_select import RETRIEVAL, Served
from train.rerank_twins import IdentityReranker, Mode, OverlapReranker, canonical, check, retrieved

__all__ = ["IdentityReranker", "Mode", "OverlapReranker", "Reranker", "canonical"]
CACHE_BYTES = 256 << 20


class TokenCache:
    """What was made of pictures. The least recently used go first when `most` bytes are full. A changed picture under the same item_id
    is another entry."""

    def __init__(self, most: int) -> None:
        self.most, self.bytes = most, 0
        self._entries: OrderedDict[tuple[str, int, int], Pictures | None] = OrderedDict()
        self._lock = threading.Lock()

    @staticmethod
    def key(document: Document) -> tuple[str, int, int]:
        data = document.image or b""
        return document.item_id, len(data), zlib.crc32(data)

    def get(self, key: tuple[str, int, int]) -> tuple[bool, Pictures | None]:
        """Whether it is known, and what was made of it, which is None for a picture that does not decode."""
        with self._lock:
            if key not in self._entries:
                return False, None
            self._entries.move_to_end(key)
            return True, self._entries[key]

    def put(self, key: tuple[str, int, int], tokens: Pictures | None) -> None:
        with self._lock:
            old = self._entries.pop(key, None)
            self._entries[key] = tokens
            self.bytes += _size(tokens) - _size(old)
            while self.bytes > self.most and self._entries:
                self.bytes -= _size(self._entries.popitem(last=False)[1])

    def __len__(self) -> int:
        return len(self._entries)


def _size(tokens: Any) -> int:
    if tokens is None:
        return 0
    return sum(part.nbytes for part in tokens) if isinstance(tokens, Pictures) else tokens.nbytes


def _first_alike(documents: Sequence[Document], order: Sequence[int]) -> list[int]:
    """Places in `order`, in which documents that are the same stand together."""
    first: list[int] = []
    for place, position in enumerate(order):
        same = place > 0 and documents[position] == documents[order[place - 1]]
        first.append(first[-1] if same else place)
    return first


class Reranker:
    """`faults` counts documents and queries that could not be read whole: a picture that does not decode, a score that is
    not a number, which are ranked by what is left of them; and lists that the model gives no numbers for, as with broken weights."""

    identity = False

    def __init__(
        self,
        model: Model,
        reader: Reader,
        *,
        served: dict[Kind, Served],
        chunk: int,
        id: str = "",
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.model, self.reader, self.served = model.eval(), reader, served
        self.chunk, self.id, self.faults = chunk, id, 0
        self.cache = TokenCache(cache_bytes)

    @classmethod
    def load(cls, path: str, *, embedder_path: str) -> "Reranker | IdentityReranker":
        """Open the artifact at `path`; where training had too little to learn from it is the identity.

        ValueError if it is damaged, of another version, or was trained with another embedder than the one at `embedder_path`.
        """
        made = manifest.read(path, kind="reranker")
        manifest.verify(path, made)
        config = json.loads(storage.read_bytes(storage.join(path, "config.json")))
        if config["identity"]:
            return IdentityReranker()
        if config["embedder"] != (found := manifest.read(embedder_path, kind="embedder").id):
            raise ValueError(f"the reranker at {path} was trained with embedder {config['embedder']}, found {found} at {embedder_path}")
        try:
            served: dict[Kind, Served] = {kind: Served(**config["served"][kind]) for kind in KINDS}
        except ValidationError as error:
            raise ValueError(f"the reranker at {path} is of another version of this program: train it again ({error})") from error
        if config.get("backbone") == "qwen3-vl":
            from train import rerank_qwen_reader as qwen

            model = qwen.load(storage.local_path(path), config["model"])
            return qwen.QwenReranker(model, served=served, chunk=config["chunk"], id=made.id)
        embedder = Embedder.load(embedder_path)
        model = MODELS[config.get("model", "listwise")](Shape(**config["shape"]))
        try:
            model.load_state_dict(load_file(storage.local_path(storage.join(path, "model.safetensors"))))
        except RuntimeError as error:
            raise ValueError(f"the reranker at {path} is of another version of this program: train it again ({error})") from error
        reader = Embedder.load(storage.join(path, config["reader"])) if config.get("reader") else embedder
        return cls(model, reader, served=served, chunk=config["chunk"], id=made.id)

    def rerank(self, query: Query, documents: Sequence[Document], *, mode: Mode = "listwise", max_ms: float | None = None) -> Ranking:
        """Order `documents` for `query`: "listwise" as chosen on the calibrate fold for this kind of query, "pointwise" by r.

        Every document is in the answer, whatever is wrong with it; the answer does not depend on the order they come in. Where
        `max_ms` milliseconds are over before the end, or the model gives no numbers, retrieval's order, marked as degraded.
        """
        return self.rerank_many([query], [documents], mode=mode, max_ms=max_ms)[0]

    def rerank_many(
        self,
        queries: Sequence[Query],
        documents: Sequence[Sequence[Document]],
        *,
        mode: Mode = "listwise",
        max_ms: float | None = None,
    ) -> list[Ranking]:
        """As `rerank`, for the requests of several users as one batch; `max_ms` is for all of it."""
        check(mode)
        until = math.inf if max_ms is None else time.perf_counter() + max_ms / 1e3
        positions = [canonical(each) for each in documents]
        some = [i for i, each in enumerate(documents) if each]
        rankings = [retrieved(order) if order else Ranking(order=(), relevance=(), null=()) for order in positions]
        if not some:
            return rankings
        asked = [queries[i] for i in some]
        try:
            batch, kinds, readable = self._read(asked, [[documents[i][p] for p in positions[i]] for i in some], until)
            scored = self._score(batch, until)
        except TimeoutError:
            return rankings
        for at, (i, kind) in enumerate(zip(some, kinds, strict=True)):
            alike = _first_alike(documents[i], positions[i])
            rankings[i] = self._ranking(scored[at], positions[i], alike, kind, mode, readable=readable[at])
        return rankings

    def _score(self, batch: Any, until: float) -> list[Scored]:
        """Of what `_read` gives."""
        return score(self.model, batch, chunk=self.chunk, until=until)

    def _ranking(self, scored: Scored, positions: list[int], alike: list[int], kind: Kind, mode: Mode, *, readable: bool) -> Ranking:
        """alike: for each place in canonical order the first that holds the very same document, whose r it has, to the last bit."""
        if not all(
            np.isfinite(each).all() for each in (scored.local, scored.null, scored.logit, scored.final, scored.prior) if each is not None
        ):
            self.faults += 1
            return retrieved(positions)
        served = self.served[kind]
        choice = served.choice if readable else RETRIEVAL
        r = served.calibration.r(scored)
        order = arrange(scored, choice) if mode == "listwise" else np.argsort(-r, kind="stable").tolist()
        relevance, null = np.zeros(len(positions)), np.zeros(len(positions))
        relevance[positions] = r[alike]
        null[positions] = scored.local - scored.null
        return Ranking(order=tuple(positions[i] for i in order), relevance=tuple(relevance.tolist()), null=tuple(null.tolist()))

    def _read(self, queries: Sequence[Query], documents: Sequence[Sequence[Document]], until: float) -> tuple[Any, list[Kind], list[bool]]:
        """Tensors of B queries and their documents, and of each query the kind that is left when its picture does not decode, and whether
        anything is. TimeoutError where `until` (time.perf_counter) passes."""
        places, pictured = picture_tokens(self.reader, [query.image for query in queries], views=self.model.shape.views, until=until)
        self.faults += sum(bool(query.image) and not there for query, there in zip(queries, pictured, strict=True))
        kinds: list[Kind] = [kind_of(query) if there else "text" for query, there in zip(queries, pictured, strict=True)]
        every = [document for each in documents for document in each]
        d_pictures, d_pictured = self._pictures(every, until)
        tokens = text_tokens(self.reader, [*(query.text for query in queries), *(d.text for d in every)], self.model.shape.text_length)
        none = np.zeros((len(tokens), places.shape[1], 0), np.float16)  # their places are put in below
        pool = Pool(places=none, pictured=np.concatenate([pictured, d_pictured]), texts=tokens.numpy())
        ends = np.cumsum([len(each) for each in documents])[:-1]
        rows = padded(np.split(np.arange(len(queries), len(queries) + len(every)), ends))
        cosines = padded(np.split(self._cosines(every), ends), 0)
        batch = assemble(pool, np.arange(len(queries)), kinds, rows, cosines, np.where(rows >= 0, 3, -1))
        numbers = torch.from_numpy(np.where(rows >= 0, rows - len(queries), len(every)))
        d_image = Pictures(*(part[numbers] for part in d_pictures))
        batch = replace(batch, q_image=torch.from_numpy(places.astype(np.float32)), d_image=d_image)
        return batch, kinds, (batch.q_mask.any(1) | batch.q_text.any(1)).tolist()

    def _cosines(self, documents: Sequence[Document]) -> np.ndarray:
        """(N,) float32, the worst for a score that is not a number."""
        finite = np.array([math.isfinite(d.score) for d in documents])
        self.faults += int((~finite).sum())
        return np.array([d.score if ok else -1.0 for d, ok in zip(documents, finite, strict=True)], np.float32).clip(-1, 1)

    def _pictures(self, documents: Sequence[Document], until: float) -> tuple[Pictures, np.ndarray]:
        """Of N documents and of one without a picture, (N + 1, ...), from the cache where they are known; and (N,) whether there is one."""
        keys = [TokenCache.key(d) for d in documents]
        found = {key: known[1] for key in dict.fromkeys(keys) if (known := self.cache.get(key))[0]}
        new = {key: d.image for key, d in zip(keys, documents, strict=True) if key not in found}
        if new:
            places, pictured = picture_tokens(self.reader, list(new.values()), views=self.model.shape.views, until=until)
            made = self._made(places)
            for row, (key, there) in enumerate(zip(new, pictured, strict=True)):
                found[key] = Pictures(*(part[row].clone() for part in made)) if there else None  # a part of a block would keep all of it
                self.cache.put(key, found[key])
        pictured = np.array([found[key] is not None for key in keys])
        self.faults += sum(bool(d.image) and not there for d, there in zip(documents, pictured, strict=True))
        each = [self._none if (known := found[key]) is None else known for key in keys]
        return Pictures(*(torch.stack(parts) for parts in zip(*each, self._none, strict=True))), pictured

    @torch.inference_mode()
    def _made(self, places: np.ndarray, *, there: bool = True) -> Pictures:
        """What the model reads of documents' pictures (..., T, C)."""
        image = torch.from_numpy(places.astype(np.float32))
        return self.model.documents(image, torch.full(image.shape[:-1], there))

    @cached_property
    def _none(self) -> Pictures:
        """Of a document without a picture."""
        return self._made(np.zeros((self.model.shape.tokens, self.model.shape.channels)), there=False)
