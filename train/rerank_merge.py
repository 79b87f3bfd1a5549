"""From the local scores of chunks and one absolute r a document to one global order: pure numpy.

Documents are numbered 0..N-1 in canonical order (best retrieval score first), so a stable sort falls back to retrieval.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

Merge = Literal["kway", "isotonic", "relevance", "rrf"]
MERGES: tuple[Merge, ...] = ("kway", "isotonic", "relevance", "rrf")
RRF = 60  # of reciprocal-rank fusion (Cormack, Clarke and Buettcher 2009)


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What the model says of N documents: local (N,) scores s of their chunk, null (N,) the score of NULL in that chunk,
    logit (N,) of level 0, finalists the numbers of the documents best by r, final their scores in one last comparison.
    prior (N,): the part of s that needs no comparison, where the model has one; r weighs it beside the logit (train.rerank_calibrate)."""

    chunk: int
    local: np.ndarray
    null: np.ndarray
    logit: np.ndarray
    finalists: np.ndarray
    final: np.ndarray
    prior: np.ndarray | None = None


def apart(logit: np.ndarray, chunk: int) -> Scored:
    """What was judged pair by pair, as if it had been compared: the order of any chunk is that of all."""
    finalists = np.sort(np.argsort(-logit, kind="stable")[:chunk])
    return Scored(chunk=chunk, local=logit, null=np.zeros_like(logit), logit=logit, finalists=finalists, final=logit[finalists])


class Choice(BaseModel):
    """How an order is made. blend is the share of the reranked order; 0 keeps retrieval's."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    merge: Merge = "kway"
    last: bool = True
    blend: Annotated[float, Field(ge=0, le=1)] = 1.0


def probability(logit: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(np.asarray(logit, np.float64), -60, 60)))


def local_orders(local: np.ndarray, chunk: int) -> list[list[int]]:
    """Each chunk of consecutive documents, sorted by local score; ties keep the order of retrieval."""
    starts = range(0, len(local), chunk)
    return [(start + np.argsort(-local[start : start + chunk], kind="stable")).tolist() for start in starts]


def kway(orders: Sequence[Sequence[int]], r: np.ndarray) -> list[int]:
    """The published merge: emit again and again the chunk head with the largest r. Keeps each chunk's own order,
    and so inherits a bad head: whatever stands behind it waits."""
    heads = [(-r[order[0]], k, 0) for k, order in enumerate(orders) if order]
    heapq.heapify(heads)
    merged = []
    while heads:
        _, k, at = heapq.heappop(heads)
        merged.append(orders[k][at])
        if at + 1 < len(orders[k]):
            heapq.heappush(heads, (-r[orders[k][at + 1]], k, at + 1))
    return merged


def pool_adjacent_violators(values: np.ndarray) -> np.ndarray:
    """The non-increasing sequence nearest to `values` in squared error."""
    means: list[float] = []
    sizes: list[int] = []
    for value in np.asarray(values, np.float64):
        means.append(float(value))
        sizes.append(1)
        while len(means) > 1 and means[-2] < means[-1]:
            size = sizes[-2] + sizes[-1]
            means[-2:] = [(means[-2] * sizes[-2] + means[-1] * sizes[-1]) / size]
            sizes[-2:] = [size]
    return np.repeat(means, sizes)


def isotonic(orders: Sequence[Sequence[int]], r: np.ndarray) -> list[int]:
    """Regress r along each local order (pool adjacent violators), then sort all by the fitted values: every chunk keeps its
    order, and a document behind a bad head lifts that head instead of waiting for it."""
    fitted = [(-value, k, at) for k, order in enumerate(orders) for at, value in enumerate(pool_adjacent_violators(r[list(order)]))]
    return [orders[k][at] for _, k, at in sorted(fitted)]


def fused(rankings: Sequence[Sequence[int]], count: int) -> list[int]:
    """Reciprocal-rank fusion of rankings of some of `count` documents: by the sum of 1 / (RRF + rank), ties in the order of retrieval."""
    key = np.zeros(count)
    for ranking in rankings:
        key[list(ranking)] += 1 / (RRF + 1 + np.arange(len(ranking)))
    return np.argsort(-key.round(12), kind="stable").tolist()


def blended(reranked: Sequence[int], weight: float) -> list[int]:
    """Weighted sum of reciprocal ranks in the reranked order and in retrieval's; ties go to retrieval."""
    key = np.zeros(len(reranked))
    key[list(reranked)] = weight / (1 + np.arange(len(reranked)))
    key += (1 - weight) / (1 + np.arange(len(reranked)))
    return np.argsort(-key.round(12), kind="stable").tolist()


def arrange(scored: Scored, choice: Choice) -> list[int]:
    """The order of all documents, best first, as `choice` says."""
    if choice.blend == 0:
        return list(range(len(scored.local)))
    r = probability(scored.logit)
    orders = local_orders(scored.local, scored.chunk)
    if choice.merge == "kway":
        merged = kway(orders, r)
    elif choice.merge == "isotonic":
        merged = isotonic(orders, r)
    elif choice.merge == "rrf":
        by_r = np.argsort(-scored.logit, kind="stable").tolist()
        merged = fused([range(len(r)), by_r, *orders], len(r))
    else:
        merged = np.argsort(-scored.logit, kind="stable").tolist()
    if choice.last:
        first = scored.finalists[np.argsort(-scored.final, kind="stable")].tolist()
        merged = first + [i for i in merged if i not in set(first)]
    return blended(merged, choice.blend) if choice.blend < 1 else merged
