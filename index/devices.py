"""Search on a GPU: by faiss-gpu where it is installed and has the kind, else by comparing with every stored vector in torch.

Imported only where a device is asked for: searching on the CPU does without torch.
"""

import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import torch

from index import kinds

log = logging.getLogger("index.devices")
GIVES_NONE = ("RaBitQ", "LSH")  # of the classes of FAISS, those whose scores are not of what `reconstruct` gives
TILE, QUERIES = 65_536, 1024  # vectors and queries that are compared at a time: 256 MiB of scores


@dataclass(frozen=True, slots=True)
class Exact:
    """The `vectors` (n, dim) of an index on a torch device, in half precision on a GPU. Nothing is approximated but by how they were
    stored: the twin of IndexFlat, or of an index whose refine step sees every vector."""

    vectors: torch.Tensor

    @classmethod
    def of(cls, index: faiss.Index, device: str) -> "Exact":
        """ValueError for an index that cannot give its vectors back."""
        kept = torch.float32 if torch.device(device).type == "cpu" else torch.float16
        made = torch.empty((index.ntotal, index.d), dtype=kept, device=device)
        for start, block in blocks(index):
            made[start : start + len(block)] = torch.from_numpy(block).to(device, kept)
        return cls(made)

    def search(self, vectors: np.ndarray, k: int, bits: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Scores (q, k) and rows (q, k) of the k best for each of `vectors` (q, dim), k at most n; of the rows whose bit is set in `bits`,
        packed as FAISS reads them. Where there are fewer, the score is -inf and the row -1."""
        allowed = None
        if bits is not None:
            mask = np.unpackbits(bits, count=len(self.vectors), bitorder="little").astype(bool)
            allowed = torch.from_numpy(mask).to(self.vectors.device)
        asked = torch.from_numpy(np.ascontiguousarray(vectors, np.float32)).to(self.vectors.device)
        found = [self._best(part, k, allowed) for part in asked.split(QUERIES)]
        scores, rows = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
        return scores, np.where(np.isneginf(scores), -1, rows)

    def _best(self, queries: torch.Tensor, k: int, allowed: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        scores = queries.new_full((len(queries), k), -torch.inf)
        rows = torch.full((len(queries), k), -1, dtype=torch.int64, device=queries.device)
        for start in range(0, len(self.vectors), TILE):
            cosines = queries @ self.vectors[start : start + TILE].float().T
            if allowed is not None:
                cosines = cosines.masked_fill(~allowed[start : start + TILE], -torch.inf)
            near, at = cosines.topk(min(k, cosines.shape[1]), dim=1)
            scores, best = torch.cat([scores, near], 1).topk(k, dim=1)
            rows = torch.cat([rows, at + start], 1).gather(1, best)
        return scores, rows


def blocks(index: faiss.Index) -> Iterator[tuple[int, np.ndarray]]:
    """The vectors of an index as it stores them, at their first row, (up to TILE, dim) float32 at a time: those of its refine step, if it
    has one. ValueError for an index that does not store any."""
    source: Any = next(kinds.layers(index))
    if isinstance(source, faiss.IndexRefine):
        source = faiss.downcast_index(source.refine_index)
    for layer in kinds.layers(source):
        kind = type(layer).__name__
        if any(name in kind for name in GIVES_NONE):
            raise ValueError(f"{kind} does not give its vectors back, so no GPU can search them; add ,Refine(SQfp16)")
        if isinstance(layer, faiss.IndexIVF):
            layer.make_direct_map()
    for start in range(0, source.ntotal, TILE):
        yield start, source.reconstruct_n(start, min(TILE, source.ntotal - start))


@functools.lru_cache(maxsize=16)
def _resources(number: int) -> Any:
    """Scratch memory of faiss-gpu on GPU `number`, shared by all indexes on it."""
    return faiss.StandardGpuResources()


def on(index: faiss.Index, device: str) -> Any:
    """What searches in place of `index` on a torch `device`, such as "cuda:1": an index of faiss-gpu, or `Exact`."""
    if hasattr(faiss, "StandardGpuResources") and torch.device(device).type == "cuda":
        number = torch.device(device).index or 0
        try:
            return faiss.index_cpu_to_gpu(_resources(number), number, index)
        except RuntimeError as error:
            log.info("faiss-gpu has no %s, every stored vector is compared: %s", type(faiss.downcast_index(index)).__name__, error)
    return Exact.of(index, device)
