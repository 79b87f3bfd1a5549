"""From tensors to what a reranker says of each list: used by the service and by the choice that is made for it."""

import dataclasses
import math

import numpy as np
import torch

from train.rerank_blocks import Batch, Encoded
from train.rerank_data import in_time
from train.rerank_merge import Scored, apart
from train.rerank_model import Model, PointwiseReranker

SLICE = 128  # documents encoded at a time, which bounds memory for long lists


def _encode(model: Model, batch: Batch, until: float) -> Encoded:
    """`model.encode` in slices of the documents; blocks do not see one another, so nothing changes."""
    parts, width = [], batch.cosine.shape[1]
    step = max(1, SLICE // len(batch.cosine))
    for start in range(0, width, step):
        in_time(until)
        parts.append(model.encode(batch.part(start, start + step) if step < width else batch))
    in_time(until)
    if len(parts) == 1:
        return parts[0]
    return dataclasses.replace(
        parts[0],
        blocks=[torch.cat(blocks, 1) for blocks in zip(*(p.blocks for p in parts), strict=True)],
        **{name: torch.cat([getattr(p, name) for p in parts], 1) for name in ("b_valid", "index", "prior", "levels")},
    )


@torch.inference_mode()
def score(model: Model, batch: Batch, *, chunk: int, until: float = math.inf) -> list[Scored]:
    """Score B queries, each against its own documents (N >= 1 of them have a level, and come first) in canonical order: chunks of
    `chunk`, and one comparison of the `chunk` best by r. All comparisons of all queries are one batch. TimeoutError where
    time.perf_counter passes `until`."""
    encoded = _encode(model, batch, until)
    counts = (batch.level >= 0).sum(1).tolist()
    if isinstance(model, PointwiseReranker):
        logits = model.answers(encoded).double().numpy()
        return [apart(logit[:n], chunk) for logit, n in zip(logits, counts, strict=True)]
    queries, width = batch.level.shape
    levels, prior = encoded.levels.double().numpy(), encoded.prior.double().numpy()
    with np.errstate(invalid="ignore"):  # the caller looks for what is no number
        logits = levels[..., 0] - np.logaddexp.reduce(levels[..., 1:], axis=-1)
    best = [np.sort(np.argsort(-logit[:n], kind="stable")[:chunk]) for logit, n in zip(logits, counts, strict=True)]
    every = np.full((queries, -(-width // chunk) + 1, chunk), width)
    every[:, :-1] = np.arange((every.shape[1] - 1) * chunk).reshape(-1, chunk)
    for row, found in zip(every, best, strict=True):
        row[-1, : len(found)] = found
    there = torch.from_numpy(every < np.array(counts)[:, None, None])
    every_s, every_null = model.compare(encoded, torch.from_numpy(every.clip(max=width - 1)), there)
    s, nulls = every_s.double().numpy(), every_null.double().numpy().repeat(chunk, 1)
    local = s.reshape(queries, -1)
    return [
        Scored(
            chunk=chunk,
            local=local[b, :n],
            null=nulls[b, :n],
            logit=logits[b, :n],
            prior=prior[b, :n],
            finalists=best[b],
            final=s[b, -1, : len(best[b])],
        )
        for b, n in enumerate(counts)
    ]
