"""Which members of an ID to learn from when some labels are wrong: those that their own ID would be found for.

Cleaning and learning help one another (METHOD.md section 8), so this is asked again and again, of the embedder of the moment,
and of every member each time: what a young embedder mistook may come back. n members, D dimensions, U prototypes.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from train import parallel
from train.encoder import Encoder
from train.labelling import Labelling


def sums(h: Tensor, labels: Tensor, live: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Sums (U, D) and counts (U,) of the live members' embeddings h (n, D), by label."""
    total = h.new_zeros(rows, h.shape[1]).index_add_(0, labels[live], h[live])
    return total, h.new_zeros(rows).index_add_(0, labels[live], h.new_ones(int(live.sum())))


def credible(h: Tensor, labels: Tensor, live: Tensor, total_UD: Tensor, count_U: Tensor, *, nearest: int, block: int = 0) -> Tensor:
    """(n,) bool: whether a member's own centroid, made without it, is among the `nearest` centroids to it.

    h (n, D) L2-normalised; labels (n,); live (n,) tells who made up `total_UD` and `count_U` (of all workers' members: `sums`).
    A member that nobody else of its ID stands beside is never credible by this measure, nor is one of an ID without members.
    """
    centroids = F.normalize(total_UD, dim=1)
    empty = count_U == 0
    block = block or max(1, 2**25 // len(total_UD))  # 128 MiB of cosines at a time
    kept = []
    for start in range(0, len(h), block):
        x, y, own = (t[start : start + block] for t in (h, labels, live))
        others = total_UD[y] - x * own[:, None]
        alone = count_U[y] - own.to(count_U.dtype) < 0.5
        to_own = (F.normalize(others, dim=1) * x).sum(1)
        cosine = (x @ centroids.T).masked_fill(empty, float("-inf")).scatter(1, y[:, None], float("-inf"))
        kept.append(((cosine > to_own[:, None]).sum(1) < nearest) & ~alone)
    return torch.cat(kept) if kept else live.clone()


def spared(keep: Tensor, live: Tensor, labels: Tensor, ids: int) -> Tensor:
    """(n,) bool: `keep`, and of an ID that would lose all its members those that are live. Takes the members of all workers."""
    left = torch.zeros(ids, device=keep.device).index_add_(0, labels, keep.float())
    return keep | (live & (left[labels] == 0))


def bound(share: float, rows: int, most: int = 300) -> int:
    """How many nearest centroids count as near: a share of all of them, at most `most`, at least one."""
    return max(1, min(most, round(share * rows)))


def purged(encoder: Encoder, labelling: Labelling, share: float) -> np.ndarray:
    """(n,) weights: those given to the members that are credible now, 0 for the others. The same on every worker.

    share: of all prototypes, those that count as near (`bound`). Each worker encodes its part and holds its vectors, 4 n D / world
    bytes, and compares them with all centroids, so this suits prototypes that fit into memory.
    """
    parts = [(b.rows[b.counted], h[torch.from_numpy(b.counted)]) for b, h in encoder.blocks(encoder.members())]
    rows, h = np.concatenate([r for r, _ in parts]), torch.cat([v for _, v in parts])
    labels, live = (torch.from_numpy(x).to(encoder.device) for x in (labelling.labels, labelling.weights > 0))
    mine = torch.from_numpy(rows).to(encoder.device)
    total, count = (parallel.add_up(x) for x in sums(h, labels[mine], live[mine], labelling.ids))
    keep = torch.zeros(len(labels), device=encoder.device)
    keep[mine] = credible(h, labels[mine], live[mine], total, count, nearest=bound(share, labelling.ids)).float()
    counted = torch.from_numpy(labelling.given > 0).to(encoder.device)
    left = spared((parallel.add_up(keep) > 0) & counted, live, labels, labelling.ids)
    return np.where(left.cpu().numpy(), labelling.given, 0).astype(np.float32)
