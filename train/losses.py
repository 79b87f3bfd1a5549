"""The two objectives of METHOD.md section 2: InfoNCE for the warm-up, the additive angular margin for ID recognition."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def prefix(x: Tensor, dim: int) -> Tensor:
    """The Matryoshka prefix of L2-normalised rows (B, D), renormalised: (B, dim)."""
    return F.normalize(x[:, :dim], dim=1) if dim < x.shape[1] else x


def info_nce(
    anchors: Tensor, others: Tensor, anchor_ids: Tensor, other_ids: Tensor, own: Tensor, *, prefixes: Sequence[int], tau: float
) -> Tensor:
    """Mean over prefixes and over anchors of -log softmax at the positives (METHOD.md section 2, stage 1).

    anchors (b, D) against others (B, D), both normalised. Positives share the anchor's id; `own` (b,) is the anchor's
    place among the others, masked out. Anchors without a positive do not count. Rows of the same id are never negatives.
    """
    same = anchor_ids[:, None] == other_ids[None, :]
    itself = torch.zeros_like(same)
    itself[torch.arange(len(own), device=own.device), own] = True
    positive = same & ~itself
    has_positive = positive.any(1)
    total = anchors.new_zeros(())
    for dim in prefixes:
        logits = prefix(anchors, dim) @ prefix(others, dim).T / tau
        negatives = logits.masked_fill(same, float("-inf")).logsumexp(1, keepdim=True)
        each = torch.logaddexp(logits, negatives) - logits  # one positive against all negatives, other positives left out
        mean = (each * positive).sum(1) / positive.sum(1).clamp(min=1)
        total = total + (mean * has_positive).sum() / has_positive.sum().clamp(min=1)
    return total / len(prefixes)


def angular_margin(cosine: Tensor, margin: float) -> Tensor:
    """cos(theta + margin) in float32 or better, with a finite gradient at theta = 0 and pi, and rising beyond pi - margin.

    cos(theta + m) = c cos m - sin(theta) sin m, with sin(theta) = sqrt(max(1 - c^2, 1e-6)); past pi - m, where the cosine
    would rise again, the line c - m sin m goes on instead (ArcFace's rule). In bf16 1 - c^2 has
    hardly a correct digit where it matters, near theta = 0.
    """
    c = cosine.to(torch.promote_types(cosine.dtype, torch.float32))
    sine = ((1 - c) * (1 + c)).clamp(min=1e-6).sqrt()
    bent = c * math.cos(margin) - sine * math.sin(margin)
    return torch.where(c > -math.cos(margin), bent, c - margin * math.sin(margin))


def weighted_mean(each_B: Tensor, weights_B: Tensor | None) -> Tensor:
    """0, with a gradient of 0, where all weights are: in a small batch every sample may have been set aside."""
    return each_B.mean() if weights_B is None else (each_B * weights_B).sum() / weights_B.sum().clamp(min=1e-12)


def reference_loss(
    h: Tensor,
    labels: Tensor,
    weight: Tensor,
    *,
    prefixes: Sequence[int],
    scale: float,
    margin: float,
    weights: Tensor | None = None,
    masked: Tensor | None = None,
    subcentres: int = 1,
    filter: float = 0.0,
) -> Tensor:
    """The slow, obvious twin of the prototype head: all rows in one place, torch's own cross-entropy; mean over B and prefixes.

    h (B, D), labels (B,), weight (U * K, D) with the K sub-centres of a prototype side by side. `masked` (B, U) names
    prototypes that take no part for a sample (known duplicates; those that a sparse form leaves out); `filter` leaves out
    others whose cosine with the whole of h is above it. The target always takes part. Formula: METHOD.md section 2, stage 3,
    with tau = 1 / scale.
    """
    target = F.one_hot(labels, len(weight) // subcentres).bool()
    out = torch.zeros_like(target) if masked is None else masked & ~target

    def cosines(dim: int) -> Tensor:
        every = prefix(h, dim) @ F.normalize(weight[:, :dim], dim=1).T
        return every.unflatten(1, (-1, subcentres)).amax(2)

    if filter:
        out = out | ((cosines(h.shape[1]) > filter) & ~target)
    total = h.new_zeros(())
    for dim in prefixes:
        cosine = cosines(dim)
        logits = scale * torch.where(target, angular_margin(cosine, margin), cosine)
        each = F.cross_entropy(logits.masked_fill(out, float("-inf")), labels, reduction="none")
        total = total + weighted_mean(each, weights)
    return total / len(prefixes)
