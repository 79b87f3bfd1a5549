"""Losses of the rerankers (METHOD.md section 3): pure functions of scores and levels.

B queries, M documents of a chunk; s_BM local scores, null_B the score of [NULL], level_BM in 0..3 (0 best), -1 for a
place without a document. Each is a mean over queries first, so that N workers on equal shares agree with one.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

ABSENT = -1
Loss = Literal["pairwise", "null", "next_token", "absolute"]
LOSSES: tuple[Loss, ...] = get_args(Loss)


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean along the last dimension, 0 where all weights are, then the mean over queries."""
    return ((values * weights).sum(-1) / weights.sum(-1).clamp_min(1e-9)).mean()


def pairwise(s_BM: Tensor, level_BM: Tensor) -> Tensor:
    """Logistic loss over pairs where i is better than j: log(1 + exp(s_j - s_i)), weighted by max(level gap, 1)."""
    gap_BMM = level_BM.unsqueeze(1) - level_BM.unsqueeze(2)  # [b, i, j] = level_j - level_i
    there = level_BM >= 0
    pairs = (gap_BMM > 0) & there.unsqueeze(1) & there.unsqueeze(2)
    weights = gap_BMM.clamp_min(1).float() * pairs
    losses = F.softplus(s_BM.unsqueeze(1) - s_BM.unsqueeze(2))
    return _mean(losses.flatten(1), weights.flatten(1))


def null(s_BM: Tensor, null_B: Tensor, level_BM: Tensor) -> Tensor:
    """Level-0 documents belong above NULL, all others below it."""
    margin = s_BM - null_B.unsqueeze(1)
    losses = torch.where(level_BM == 0, F.softplus(-margin), F.softplus(margin))
    return _mean(losses, (level_BM >= 0).float())


def next_token(s_BM: Tensor, null_B: Tensor, level_BM: Tensor) -> Tensor:
    """Cross-entropy of the answer: any level-0 document, or NULL where there is none."""
    logits = torch.cat([s_BM.masked_fill(level_BM < 0, -torch.inf), null_B.unsqueeze(1)], 1)
    right = torch.cat([level_BM == 0, ~(level_BM == 0).any(1, keepdim=True)], 1)
    return (logits.logsumexp(1) - logits.masked_fill(~right, -torch.inf).logsumexp(1)).mean()


def absolute(logits_BML: Tensor, level_BM: Tensor) -> Tensor:
    """Cross-entropy of the absolute head over its 4 levels."""
    each = F.cross_entropy(logits_BML.transpose(1, 2), level_BM.clamp_min(0), reduction="none")
    return _mean(each, (level_BM >= 0).float())


def yes_no(logit_BM: Tensor, level_BM: Tensor) -> dict[str, Tensor]:
    """Of the pointwise model: binary cross-entropy of "is it of level 0", by name and as "loss"."""
    each = F.binary_cross_entropy_with_logits(logit_BM, (level_BM == 0).float(), reduction="none")
    loss = _mean(each, (level_BM >= 0).float())
    return {"loss": loss, "yes_no": loss}


def all_of(s_BM: Tensor, null_B: Tensor, logits_BML: Tensor, level_BM: Tensor, summed: Sequence[Loss] = LOSSES) -> dict[str, Tensor]:
    """The four by name, and as "loss" the sum of those `summed`; the others have gradients of zero, as workers wait for every weight's."""
    parts = {
        "pairwise": pairwise(s_BM, level_BM),
        "null": null(s_BM, null_B, level_BM),
        "next_token": next_token(s_BM, null_B, level_BM),
        "absolute": absolute(logits_BML, level_BM),
    }
    return {"loss": torch.stack([value * (name in summed) for name, value in parts.items()]).sum(), **parts}
