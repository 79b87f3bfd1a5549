"""Prototypes known to be one thing: neither may count against the other (METHOD.md section 2: masked to minus infinity)."""

import numpy as np
import torch
from torch import Tensor


class Duplicates:
    """Pairs (p, 2) of global prototype ids, in both directions, sorted by the first. ValueError for a pair that cannot be."""

    def __init__(self, pairs: np.ndarray | None, rows: int, device: torch.device) -> None:
        pairs = np.empty((0, 2), np.int64) if pairs is None else np.asarray(pairs, np.int64)
        if pairs.ndim != 2 or pairs.shape[1] != 2:
            raise ValueError(f"duplicates are pairs (p, 2) of prototypes, found shape {pairs.shape}")
        bad = pairs[((pairs < 0) | (pairs >= rows)).any(1) | (pairs[:, 0] == pairs[:, 1])]
        if len(bad):
            raise ValueError(f"duplicates are two different prototypes of 0..{rows - 1}; found {bad[:3].tolist()}")
        both = np.unique(np.concatenate([pairs, pairs[:, ::-1]]), axis=0)
        self.one, self.other = torch.from_numpy(both.T.copy()).to(device)

    def __len__(self) -> int:
        return len(self.one)

    def mark(self, out: Tensor, labels: Tensor, columns: Tensor) -> None:
        """Set out[b, c] where columns[c] (global ids, ascending) is a duplicate of labels[b]."""
        if not len(columns):
            return
        first, last = torch.searchsorted(self.one, labels), torch.searchsorted(self.one, labels, right=True)
        count = last - first
        sample = torch.arange(len(labels), device=labels.device).repeat_interleave(count)
        before = (count.cumsum(0) - count).repeat_interleave(count)
        twin = self.other[first.repeat_interleave(count) + torch.arange(len(sample), device=labels.device) - before]
        column = torch.searchsorted(columns, twin).clamp(max=len(columns) - 1)
        there = columns[column] == twin
        out[sample[there], column[there]] = True
