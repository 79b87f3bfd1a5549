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
    parts = []
    step = max(1, SLICE // len(batch.cosine))
    for start in range(0, batch.cosine.shape[1], step):
        in_time(until)
        names = ("d_image", "d_mask", "d_text", "cosine", "level")
        parts.append(model.encode(dataclasses.replace(batch, **{n: getattr(batch, n)[:, start : start + step] for n in names})))
    in_time(until)
    if len(parts) == 1:
        return parts[0]
    return dataclasses.replace(
        parts[0],
        blocks=[
            (torch.cat([p.blocks[i][0] for p in parts], 1), torch.cat([p.blocks[i][1] for p in parts], 1)) for i in range(len(model.layers))
        ],
        **{name: torch.cat([getattr(p, name) for p in parts], 1) for name in ("b_valid", "index", "prior", "levels")},
    )


@torch.inference_mode()
def score(model: Model, batch: Batch, *, chunk: int, until: float = math.inf) -> list[Scored]:
    """Score B queries, each against its own documents (N >= 1 of them have a level, and come first) in canonical order: chunks of
    `chunk`, and one comparison of the `chunk` best by r. All comparisons of all queries are one batch. TimeoutError where
    time.perf_counter passes `until`."""
    encoded = _encode(model, batch, until)
    counts = (batch.level >= 0).sum(1)
    if isinstance(model, PointwiseReranker):
        logits = model.answers(encoded).double().numpy()
        return [apart(logit[:n], chunk) for logit, n in zip(logits, counts.tolist(), strict=True)]
    queries, width = batch.level.shape
    levels, prior = encoded.levels.double(), encoded.prior.double().numpy()
    logits = (levels[..., 0] - levels[..., 1:].logsumexp(-1)).numpy()
    best = [np.sort(np.argsort(-logit[:n], kind="stable")[:chunk]) for logit, n in zip(logits, counts.tolist(), strict=True)]
    last = torch.from_numpy(np.stack([np.pad(row, (0, chunk - len(row)), constant_values=width) for row in best]))[:, None]
    picks = torch.arange(-(-width // chunk) * chunk).reshape(1, -1, chunk).expand(queries, -1, -1)
    every = torch.cat([picks, last], 1)
    every_s, every_null = model.compare(encoded, every.clamp_max(width - 1), every < counts[:, None, None])
    s, null, final = every_s[:, :-1], every_null[:, :-1], every_s[:, -1:]
    local, nulls = s.flatten(1).double().numpy(), null.repeat_interleave(chunk, 1).double().numpy()
    return [
        Scored(
            chunk=chunk,
            local=local[b, :n],
            null=nulls[b, :n],
            logit=logits[b, :n],
            prior=prior[b, :n],
            finalists=best[b],
            final=final[b, 0, : len(best[b])].double().numpy(),
        )
        for b, n in enumerate(counts.tolist())
    ]
