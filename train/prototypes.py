"""The prototype head: one row an instance ID, rows sharded over the workers, exact softmax over all of them.

Each worker holds U/world rows and the whole global batch of B embeddings: it computes its own columns of the logits, and
three small all-reduces (row maximum, sum of exponentials, target logit) give every worker the exact loss. The slow twin is
`reference_loss`. At serving time the head is dropped (METHOD.md section 2, stage 3).
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from train.losses import angular_margin, prefix


def shard_range(rows: int, rank: int, world: int) -> tuple[int, int]:
    """The rows [start, stop) of one worker; sizes differ by at most one."""
    return rows * rank // world, rows * (rank + 1) // world


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup | None, scale: float) -> Tensor:
        ctx.group, ctx.scale, ctx.rows = group, scale, len(x)
        out = x.new_empty(len(x) * dist.get_world_size(group), *x.shape[1:])
        dist.all_gather_single(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        total = grads[0].contiguous()
        dist.all_reduce(total, group=ctx.group)
        start = ctx.rows * dist.get_rank(ctx.group)
        return total[start : start + ctx.rows] * ctx.scale, None, None


def gather(x: Tensor, *, scale: float = 1.0) -> Tensor:
    """(b, ...) of every worker -> (B, ...), differentiable: gradients are summed over workers, times `scale`.

    scale 1 suits losses that are a mean over the worker's own rows; a loss that every worker computes over all rows (the
    prototype head) needs scale = world, because DDP divides by it afterwards.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    return _Gather.apply(x, None, scale)


class _ShardedCrossEntropy(torch.autograd.Function):
    """Mean over B of logsumexp over all workers' columns minus the target's logit."""

    @staticmethod
    def forward(ctx, logits: Tensor, column: Tensor, mine: Tensor) -> Tensor:
        rows = torch.arange(len(logits), device=logits.device)
        top = logits.amax(1) if logits.shape[1] else logits.new_full((len(logits),), float("-inf"))
        dist.all_reduce(top, op=dist.ReduceOp.MAX)
        exponentials = (logits - top[:, None]).exp()
        both = torch.stack([exponentials.sum(1), torch.zeros_like(top)])
        both[1, mine] = (logits - top[:, None])[rows[mine], column[mine]]
        dist.all_reduce(both)
        probabilities = exponentials / both[0][:, None]
        ctx.save_for_backward(probabilities, column, mine)
        return (both[0].log() - both[1]).mean()

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        probabilities, column, mine = ctx.saved_tensors
        grad = probabilities.clone()
        rows = torch.arange(len(grad), device=grad.device)
        grad[rows[mine], column[mine]] -= 1
        return grad * (grads[0] / len(grad)), None, None


def reference_loss(h: Tensor, labels: Tensor, weight: Tensor, *, prefixes: Sequence[int], scale: float, margin: float) -> Tensor:
    """The slow, obvious twin: all rows in one place, torch's own cross-entropy. h (B, D) and weight (U, D) need not be sharded."""
    total = h.new_zeros(())
    for dim in prefixes:
        cosine = prefix(h, dim) @ F.normalize(weight[:, :dim], dim=1).T
        target = F.one_hot(labels, len(weight)).bool()
        total = total + F.cross_entropy(scale * torch.where(target, angular_margin(cosine, margin), cosine), labels)
    return total / len(prefixes)


class PrototypeHead(nn.Module):
    """`weight` (stop - start, D): this worker's rows of the U prototypes."""

    def __init__(self, rows: int, dim: int, *, rank: int = 0, world: int = 1) -> None:
        super().__init__()
        if rows < 2:
            raise ValueError(f"ID recognition needs at least 2 products to tell apart, found {rows}")
        self.rows, self.world = rows, world
        self.start, self.stop = shard_range(rows, rank, world)
        self.weight = nn.Parameter(F.normalize(torch.randn(self.stop - self.start, dim), dim=1))

    def start_from(self, centroids_UD: Tensor) -> None:
        """Take this worker's rows of the centroids; a random start is unstable at large label counts."""
        with torch.no_grad():
            self.weight.copy_(centroids_UD[self.start : self.stop])

    def loss(self, h: Tensor, labels: Tensor, *, prefixes: Sequence[int], scale: float, margin: float) -> Tensor:
        """Mean over the global batch and over prefixes; h (b, D) normalised and labels (b,) are this worker's rows.

        P(y|h) of METHOD.md section 2, stage 3, with tau = 1 / scale.
        """
        if self.world == 1:
            return reference_loss(h, labels, self.weight, prefixes=prefixes, scale=scale, margin=margin)
        h_BD, y_B = gather(h, scale=float(self.world)), gather(labels)
        mine = (y_B >= self.start) & (y_B < self.stop)
        column = (y_B - self.start).clamp(0, max(self.stop - self.start - 1, 0))
        total = h.new_zeros(())
        for dim in prefixes:
            cosine = prefix(h_BD, dim) @ F.normalize(self.weight[:, :dim], dim=1).T
            target = F.one_hot(column, cosine.shape[1]).bool() & mine[:, None]
            logits = scale * torch.where(target, angular_margin(cosine, margin), cosine)
            total = total + _ShardedCrossEntropy.apply(logits, column, mine)
        return total / len(prefixes)

    def whole(self) -> Tensor:
        """All rows (U, D), gathered from every worker, without gradient."""
        if self.world == 1:
            return self.weight.detach().clone()
        longest = max(b - a for a, b in (shard_range(self.rows, r, self.world) for r in range(self.world)))
        padded = F.pad(self.weight.detach(), (0, 0, 0, longest - len(self.weight)))
        stacked = gather(padded).reshape(self.world, longest, -1)
        sizes = [b - a for a, b in (shard_range(self.rows, r, self.world) for r in range(self.world))]
        return torch.cat([stacked[r, :n] for r, n in enumerate(sizes)])
