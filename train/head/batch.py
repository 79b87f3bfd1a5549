"""The global batch of the prototype head, checked: what does not fit is an error on every worker alike, before anything can hang."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from train.head.sharding import gather


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One worker's labels (b,) int64 and weights (b,), which are at least 0, or None."""

    labels: Tensor
    weights: Tensor | None


def everyones(batch: Batch, embeddings: int, rows: int, *, group: dist.ProcessGroup | None, world: int) -> tuple[Tensor, Tensor | None]:
    """Labels (B,) and weights (B,) of all workers, each of which has `embeddings` of them; labels are of 0..rows-1.

    ValueError names the worker and the label, or what differs between the workers. Collective.
    """
    labels, weights = batch.labels, batch.weights
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
    said = torch.tensor([[embeddings, len(labels), int(weights is not None), low, high]], device=labels.device)
    said = (gather(said, group=group) if world > 1 else said).tolist()
    if len({tuple(worker[:3]) for worker in said}) > 1 or embeddings != len(labels):
        each = [{"embeddings": n, "labels": y, "weighted": bool(w)} for n, y, w, *_ in said]
        raise ValueError(f"every worker needs as many embeddings as labels, and as the others; found {each}")
    if not embeddings:
        raise ValueError("the batch is empty; the head needs at least 1 embedding a worker")
    for worker, (*_, low, high) in enumerate(said):
        if low < 0 or high >= rows:
            bad = low if low < 0 else high
            raise ValueError(f"label {bad} of worker {worker} is not among the {rows} prototypes; allowed are 0..{rows - 1}")
    if world > 1:
        labels, weights = gather(labels, group=group), None if weights is None else gather(weights, group=group)
    if weights is not None and not (weights.min() >= 0 and weights.sum() < float("inf")):
        raise ValueError(f"weights are finite and at least 0; found {weights.min().item()} to {weights.max().item()}")
    return labels, weights
