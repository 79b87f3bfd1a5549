"""From tensors to what a reranker says of one list: used by the service and by the choice that is made for it."""

import dataclasses

import numpy as np
import torch

from train.rerank_merge import Scored
from train.rerank_model import Batch, Encoded, ListwiseReranker

SLICE = 128  # documents encoded at a time, which bounds memory for long lists


def _encode(model: ListwiseReranker, batch: Batch) -> Encoded:
    """`model.encode` of one query in slices of its documents; blocks do not see one another, so nothing changes."""
    parts = []
    for start in range(0, batch.cosine.shape[1], SLICE):
        names = ("d_image", "d_mask", "d_text", "cosine", "level")
        parts.append(model.encode(dataclasses.replace(batch, **{n: getattr(batch, n)[:, start : start + SLICE] for n in names})))
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
def score(model: ListwiseReranker, batch: Batch, *, chunk: int) -> Scored:
    """Score one query (B = 1) against N >= 1 documents in canonical order: chunks of `chunk`, then one comparison of the
    `chunk` best by r."""
    encoded = _encode(model, batch)
    count = batch.cosine.shape[1]
    picks = torch.arange(-(-count // chunk) * chunk).reshape(1, -1, chunk)
    there = picks < count
    s, null = model.compare(encoded, picks.clamp_max(count - 1), there)
    levels = encoded.levels[0].double()
    logit = (levels[:, 0] - levels[:, 1:].logsumexp(1)).numpy()
    finalists = np.sort(np.argsort(-logit, kind="stable")[:chunk])
    if count > chunk:
        final = model.compare(encoded, torch.from_numpy(finalists)[None, None], torch.ones(1, 1, len(finalists), dtype=torch.bool))[0][0, 0]
    else:
        final = s[0, 0, :count]
    local = s.flatten()[:count].double().numpy()
    return Scored(
        chunk=chunk,
        local=local,
        null=null[0].repeat_interleave(chunk)[:count].double().numpy(),
        logit=logit,
        finalists=finalists,
        final=final.double().numpy(),
    )
