"""The reader of a finished reranker: a query and its candidates in, one order and one calibrated r a candidate out. No Ray."""

import json
import math
import threading
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import numpy as np
from safetensors.torch import load_file

from idem import manifest, storage
from idem.types import Document, Query, Ranking
from train.embedder import Embedder
from train.rerank_data import KINDS, Kind, Pool, Reader, assemble, kind_of, picture_tokens, text_tokens
from train.rerank_merge import arrange, probability
from train.rerank_model import Batch, ListwiseReranker, Shape
from train.rerank_score import score
from train.rerank_select import RETRIEVAL, Served

Mode = Literal["listwise", "pointwise"]
MODES: tuple[Mode, ...] = ("listwise", "pointwise")
CACHE_BYTES = 256 << 20


def canonical(documents: Sequence[Document]) -> list[int]:
    """Positions, best retrieval score first, ties by what the documents are, so that the order they came in tells nothing.
    A score that is not finite counts as the worst."""
    keys = [(-d.score if math.isfinite(d.score) else math.inf, d.item_id, d.text, d.image or b"", i) for i, d in enumerate(documents)]
    return [key[-1] for key in sorted(keys)]


class TokenCache:
    """The least recently used go first when `most` bytes are full. A changed picture under the same item_id is another entry."""

    def __init__(self, most: int) -> None:
        self.most, self.bytes = most, 0
        self._entries: OrderedDict[tuple[str, int, int], np.ndarray | None] = OrderedDict()
        self._lock = threading.Lock()

    @staticmethod
    def key(document: Document) -> tuple[str, int, int]:
        data = document.image or b""
        return document.item_id, len(data), zlib.crc32(data)

    def get(self, key: tuple[str, int, int]) -> tuple[bool, np.ndarray | None]:
        """Whether it is known, and its tokens (T, C), which are None for a picture that does not decode."""
        with self._lock:
            if key not in self._entries:
                return False, None
            self._entries.move_to_end(key)
            return True, self._entries[key]

    def put(self, key: tuple[str, int, int], tokens: np.ndarray | None) -> None:
        with self._lock:
            old = self._entries.pop(key, None)
            self._entries[key] = tokens
            self.bytes += _size(tokens) - _size(old)
            while self.bytes > self.most and self._entries:
                self.bytes -= _size(self._entries.popitem(last=False)[1])

    def __len__(self) -> int:
        return len(self._entries)


def _size(tokens: np.ndarray | None) -> int:
    return tokens.nbytes if tokens is not None else 0


class IdentityReranker:
    """The trivial twin: retrieval's order stands. It knows no probability: what it gives as r is the cosine, cut to 0..1, good
    for comparisons alone. A service tells it by `identity` and serves retrieval, without an r. NULL is a cosine of zero."""

    identity = True

    def __init__(self) -> None:
        self.faults = 0

    def rerank(self, query: Query, documents: Sequence[Document], *, mode: Mode = "listwise") -> Ranking:
        _check(mode)
        scores = [d.score if math.isfinite(d.score) else -1.0 for d in documents]
        return Ranking(
            order=tuple(canonical(documents)), relevance=tuple(min(max(s, 0.0), 1.0) for s in scores), null=tuple(float(s) for s in scores)
        )


class Reranker:
    """`faults` counts documents and queries that could not be read whole: a picture that does not decode, a score that is
    not a number. They are ranked by what is left of them."""

    identity = False

    def __init__(
        self,
        model: ListwiseReranker,
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

        ValueError if it is damaged, or was trained on the tower of another embedder than the one at `embedder_path`.
        """
        made = manifest.read(path, kind="reranker")
        manifest.verify(path, made)
        config = json.loads(storage.read_bytes(storage.join(path, "config.json")))
        if config["identity"]:
            return IdentityReranker()
        embedder = Embedder.load(embedder_path)
        if config["embedder"] != embedder.id:
            raise ValueError(f"the reranker at {path} reads with embedder {config['embedder']}, found {embedder.id} at {embedder_path}")
        model = ListwiseReranker(Shape(**config["shape"]))
        model.load_state_dict(load_file(storage.local_path(storage.join(path, "model.safetensors"))))
        served: dict[Kind, Served] = {kind: Served(**config["served"][kind]) for kind in KINDS}
        return cls(model, embedder, served=served, chunk=config["chunk"], id=made.id)

    def rerank(self, query: Query, documents: Sequence[Document], *, mode: Mode = "listwise") -> Ranking:
        """Order `documents` for `query`: "listwise" as chosen on the calibrate fold for this kind of query, "pointwise" by r.

        Every document is in the answer, whatever is wrong with it; the answer does not depend on the order they come in.
        """
        _check(mode)
        if not documents:
            return Ranking(order=(), relevance=(), null=())
        positions = canonical(documents)
        batch, kind = self._read(query, [documents[i] for i in positions])
        scored = score(self.model, batch, chunk=self.chunk)
        served = self.served[kind]
        readable = bool(batch.q_mask.any() or batch.q_text.any())
        choice = served.choice if readable else RETRIEVAL
        order = arrange(scored, choice) if mode == "listwise" else np.argsort(-scored.logit, kind="stable").tolist()
        relevance, null = np.zeros(len(documents)), np.zeros(len(documents))
        relevance[positions] = probability(scored.logit, served.slope, served.bias)
        null[positions] = scored.local - scored.null
        return Ranking(order=tuple(positions[i] for i in order), relevance=tuple(relevance.tolist()), null=tuple(null.tolist()))

    def _read(self, query: Query, documents: Sequence[Document]) -> tuple[Batch, Kind]:
        """Tensors of one query and N documents, and the kind of query that is left when its picture does not decode."""
        places, pictured = picture_tokens(self.reader, [query.image])
        self.faults += int(bool(query.image) and not pictured[0])
        kind = kind_of(query) if pictured[0] else "text"
        d_places, d_pictured = self._pictures(documents)
        finite = np.array([math.isfinite(d.score) for d in documents])
        self.faults += int((~finite).sum())
        cosine = np.array([d.score if ok else -1.0 for d, ok in zip(documents, finite, strict=True)], np.float32).clip(-1, 1)
        tokens = text_tokens(self.reader, [query.text, *(d.text for d in documents)], self.model.shape.text_length)
        pool = Pool(places=np.concatenate([places, d_places]), pictured=np.concatenate([pictured, d_pictured]), texts=tokens.numpy())
        rows = np.arange(1, 1 + len(documents))[None]
        return assemble(pool, np.array([0]), [kind], rows, cosine[None], np.full(rows.shape, 3)), kind

    def _pictures(self, documents: Sequence[Document]) -> tuple[np.ndarray, np.ndarray]:
        """(N, T, C) tokens and (N,) whether there is a picture, from the cache where they are known."""
        keys = [TokenCache.key(d) for d in documents]
        tokens = {key: known[1] for key in dict.fromkeys(keys) if (known := self.cache.get(key))[0]}
        new = {key: d.image for key, d in zip(keys, documents, strict=True) if key not in tokens}
        if new:
            places, pictured = picture_tokens(self.reader, list(new.values()))
            for key, place, there in zip(new, places, pictured, strict=True):
                tokens[key] = place.copy() if there else None
                self.cache.put(key, tokens[key])
        pictured = np.array([tokens[key] is not None for key in keys])
        self.faults += sum(bool(d.image) and not there for d, there in zip(documents, pictured, strict=True))
        blank = np.zeros(self.reader.token_shape, np.float16)
        return np.stack([blank if (t := tokens[key]) is None else t for key in keys]), pictured


def _check(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; allowed are {', '.join(MODES)}")
