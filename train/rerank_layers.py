"""Attention over a query, its documents' blocks and the answer position, and who sees whom.

B queries, M documents a query, L positions that look and S that are seen, D width, H heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(nn.Module):
    """Pre-norm attention and feed-forward; keys are made apart so that they can be made once and seen by many."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def keys(self, x: Tensor) -> Tensor:
        """Keys and values (..., 2 D)."""
        return self.kv(self.norm(x))

    def forward(self, x: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        """x (B, L, D) attends to keys (B, S, 2 D) where mask (B, L, S) is True."""
        k, v = keys.chunk(2, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.q(self.norm(x)), k, v))
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.unsqueeze(1))
        return self.rest(x, seen.transpose(1, 2).flatten(2))

    def rest(self, x: Tensor, seen: Tensor) -> Tensor:
        """What follows when it is known what was seen."""
        x = self.out(seen).add_(x)
        return self.down(F.gelu(self.up(self.norm2(x)))).add_(x)

    def by_heads(self, keys: Tensor) -> Tensor:
        """(..., S, 2 D) -> keys and values (2, ..., H, S, D / H)."""
        return keys.unflatten(-1, (2, self.heads, -1)).movedim(-3, 0).transpose(-3, -2)

    def attended(self, q: Tensor, keys: Tensor, hidden: Tensor) -> Tensor:
        """q (..., L, D) of its keys `by_heads` (2, ..., H, S, D / H): (..., L, D). hidden (N, L, S), N in all of ... and H, is 0 or -inf.
        For many short sequences two batched products take half the time of scaled_dot_product_attention."""
        q = q.unflatten(-1, (self.heads, -1)).transpose(-3, -2)
        k, v = (t.flatten(0, -3) for t in keys)
        weights = torch.baddbmm(hidden, q.flatten(0, -3), k.transpose(1, 2), alpha=k.shape[-1] ** -0.5).softmax(-1)
        return (weights @ v).view(q.shape).transpose(-3, -2).flatten(-2)


def self_mask(valid: Tensor, *, index_last: bool = False) -> Tensor:
    """(..., L) -> (..., L, L): each position sees the valid ones and itself; with `index_last` the last is seen by itself alone."""
    size = valid.shape[-1]
    own = torch.eye(size, dtype=torch.bool, device=valid.device)
    seen = valid.unsqueeze(-2).expand(*valid.shape, size).clone()
    if index_last:
        seen[..., :-1, -1] = False
    return seen | own


def full_mask(q_valid: Tensor, b_valid: Tensor) -> Tensor:
    """The whole mask (B, S, S) of query, blocks and answer position, S = Lq + M * Lb + 1: the definition of who sees whom."""
    queries, (count, length) = q_valid.shape[1], b_valid.shape[1:]
    size = queries + count * length + 1
    mask = torch.zeros(len(q_valid), size, size, dtype=torch.bool, device=q_valid.device)
    mask[:, :queries, :queries] = self_mask(q_valid)
    for m in range(count):
        rows = slice(queries + m * length, queries + (m + 1) * length)
        mask[:, rows, :queries] = q_valid[:, None]
        mask[:, rows, rows] = self_mask(b_valid[:, m], index_last=True)
    mask[:, -1] = torch.cat([q_valid, b_valid.flatten(1), torch.ones_like(q_valid[:, :1])], 1)
    return mask


def pooled(states: Tensor, mask: Tensor) -> Tensor:
    """Mean of (..., L, D) over the positions that are there; zero where none is."""
    return (states * mask.unsqueeze(-1)).sum(-2) / mask.sum(-1, keepdim=True).clamp_min(1)
