"""The two objectives of METHOD.md section 2: InfoNCE for the warm-up, the additive angular margin for ID recognition."""

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
    """cos(theta + margin), with a finite gradient at theta = 0 and pi, and monotonous beyond pi - margin.

    cos(theta + m) = c cos m - sin(theta) sin m, with sin(theta) = sqrt(max(1 - c^2, 1e-6)); past pi - m, where the cosine
    would rise again, the line c - m sin m goes on instead (ArcFace's rule).
    """
    m = torch.tensor(margin, dtype=cosine.dtype, device=cosine.device)
    sine = (1 - cosine * cosine).clamp(min=1e-6).sqrt()
    return torch.where(cosine > -torch.cos(m), cosine * torch.cos(m) - sine * torch.sin(m), cosine - m * torch.sin(m))
