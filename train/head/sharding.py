"""Rows dealt over workers, and the softmax over the columns of all of them: plain torch, the process group is a parameter."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the older name, for torch before 2.13


def shard_range(rows: int, rank: int, world: int) -> tuple[int, int]:
    """The rows [start, stop) of one worker; sizes differ by at most one."""
    return rows * rank // world, rows * (rank + 1) // world


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup | None, scale: float) -> Tensor:
        ctx.group, ctx.scale, ctx.rows = group, scale, len(x)
        out = x.new_empty(len(x) * dist.get_world_size(group), *x.shape[1:])
        _gather_into(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        start = ctx.rows * dist.get_rank(ctx.group)
        return total[start : start + ctx.rows] * ctx.scale, None, None


def gather(x: Tensor, *, scale: float = 1.0, group: dist.ProcessGroup | None = None) -> Tensor:
    """(b, ...) of every worker -> (B, ...), differentiable: gradients are summed over workers, times `scale`.

    scale 1 suits losses that are a mean over the worker's own rows; a loss that every worker computes over all rows (the
    prototype head) needs scale = world, because DDP and FSDP divide by it afterwards.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return x
    return _Gather.apply(x, group, scale)


class _ShardedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor, column: Tensor, mine: Tensor, group: dist.ProcessGroup | None, world: int) -> Tensor:
        rows = mine.nonzero()[:, 0]
        column = column[rows]
        shifted = logits.clone()
        shifted[:, rows, column] = target[:, rows]
        top = shifted.amax(2) if logits.shape[2] else torch.full_like(target, float("-inf"))
        if world > 1:
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
        own = torch.where(mine, target - top, 0.0)
        both = torch.stack([shifted.sub_(top[..., None]).exp_().sum(2), own])
        if world > 1:
            dist.all_reduce(both, group=group)
        ctx.save_for_backward(shifted.div_(both[0][..., None]), rows, column)
        return both[0].log() - both[1]

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        probabilities, rows, column = ctx.saved_tensors
        grad = probabilities * grads[0][..., None]
        of_target = torch.zeros_like(grads[0])
        of_target[:, rows] = grad[:, rows, column] - grads[0][:, rows]
        grad[:, rows, column] = 0
        return grad, of_target, None, None, None, None


def sharded_cross_entropy(
    logits_PBC: Tensor, target_PB: Tensor, column_B: Tensor, mine_B: Tensor, *, group: dist.ProcessGroup | None = None, world: int = 1
) -> Tensor:
    """(P, B): logsumexp over all workers' columns minus the target's logit, on every worker; the gradient is of its own columns.

    C columns are this worker's. Where mine_B[b], sample b's target is its column column_B[b], whose logit is target_PB[p, b]
    in place of what stands in logits_PBC; elsewhere it is another worker's. Minus infinity takes no part, but a target must be finite.
    """
    return _ShardedCrossEntropy.apply(logits_PBC, target_PB, column_B, mine_B, group, world)


def all_reduce(x: Tensor, *, group: dist.ProcessGroup | None, world: int) -> Tensor:
    """Sum over workers, in place."""
    if world > 1:
        dist.all_reduce(x, group=group)
    return x


def gathered_rows(x: Tensor, counts: Sequence[int], *, group: dist.ProcessGroup | None) -> Tensor:
    """(counts[r], ...) of worker r -> (sum of counts, ...) on every worker, without gradient."""
    if len(counts) == 1:
        return x
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: len(x)] = x
    out = x.new_empty(max(counts) * len(counts), *x.shape[1:])
    _gather_into(out, padded, group=group)
    return torch.cat([part[:n] for part, n in zip(out.chunk(len(counts)), counts, strict=True)])
