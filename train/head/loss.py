"""One worker's part of the prototype head's loss: its own columns of the logits, then the softmax over all workers' columns."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from train.head.masks import Duplicates
from train.head.sharding import sharded_cross_entropy
from train.losses import angular_margin, prefix


@dataclass(frozen=True, kw_only=True)
class Objective:
    """P(y|h) of METHOD.md section 2, stage 3, with tau = 1 / scale, over Matryoshka prefixes; `filter` is a cosine, 0 is off."""

    prefixes: Sequence[int]
    scale: float
    margin: float
    filter: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Columns:
    """ids (C,): this worker's prototypes in the softmax, global and ascending; rows (C * K, D): their K sub-centres, side by side."""

    ids: Tensor
    rows: Tensor
    subcentres: int

    def nearest_sub(self, cosine: Tensor) -> Tensor:
        """(B, C * K) -> (B, C)"""
        return cosine if self.subcentres == 1 else cosine.unflatten(1, (-1, self.subcentres)).amax(2)

    def of_targets(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The column of each label (B,), whether it is one of these (B,), and the samples (b,) of which it is."""
        if not len(self.ids):
            mine = torch.zeros_like(labels, dtype=torch.bool)
            return torch.zeros_like(labels), mine, mine.nonzero()[:, 0]
        column = torch.searchsorted(self.ids, labels.contiguous()).clamp(max=len(self.ids) - 1)
        mine = self.ids[column] == labels
        return column, mine, mine.nonzero()[:, 0]


@torch.no_grad()
def left_out(h: Tensor, labels: Tensor, columns: Columns, filter: float, duplicates: Duplicates) -> Tensor | None:
    """(B, C) where a column takes no part: too near the whole embedding, or a known duplicate. None where that cannot be."""
    out = None
    if filter:
        out = columns.nearest_sub(F.normalize(h, dim=1) @ F.normalize(columns.rows, dim=1).T) > filter
    if len(duplicates):
        out = torch.zeros(len(h), len(columns.ids), dtype=torch.bool, device=h.device) if out is None else out
        duplicates.mark(out, labels, columns.ids)
    return out


def cross_entropies(
    h: Tensor,
    labels: Tensor,
    columns: Columns,
    objective: Objective,
    duplicates: Duplicates,
    *,
    group: dist.ProcessGroup | None,
    world: int,
) -> tuple[Tensor, Tensor]:
    """(P, B) of the global batch h (B, D), and the rows of `columns` (b,) that were nearest to their own targets. Collective.

    The target's logit is made apart from the others', so that the margin costs B angles, not B * C, and keeps its exact gradient.
    """
    k = columns.subcentres
    column, mine, samples = columns.of_targets(labels)
    logits, targets, winner, widest = [], [], torch.zeros_like(samples), max(objective.prefixes)
    for dim in objective.prefixes:
        x, w = prefix(h, dim), F.normalize(columns.rows[:, :dim], dim=1)
        logits.append(columns.nearest_sub(objective.scale * x @ w.T))
        to_target = torch.einsum("bd,bkd->bk", x[samples], w.view(len(columns.ids), k, dim)[column[samples]])
        with_margin = objective.scale * angular_margin(to_target.amax(1), objective.margin)
        targets.append(torch.zeros(len(h), device=h.device).index_put((samples,), with_margin))
        winner = to_target.argmax(1) if dim == widest else winner
    stacked = torch.stack(logits)
    if (out := left_out(h, labels, columns, objective.filter, duplicates)) is not None:
        stacked = stacked.masked_fill(out, float("-inf"))  # never a logit of 0, which would count
    each = sharded_cross_entropy(stacked, torch.stack(targets), column, mine, group=group, world=world)
    return each, column[samples] * k + winner
