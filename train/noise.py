"""Which members of an ID to learn from when some labels are wrong: those that their own ID would be found for.

Cleaning and learning help one another (METHOD.md section 8), so this is asked again and again, of the embedder of the moment.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sums(h: Tensor, labels: Tensor, live: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Sums (U, D) and counts (U,) of the live members' embeddings h (n, D), by label."""
    total = h.new_zeros(rows, h.shape[1]).index_add_(0, labels[live], h[live])
    return total, h.new_zeros(rows).index_add_(0, labels[live], h.new_ones(int(live.sum())))


def credible(h: Tensor, labels: Tensor, live: Tensor, total_UD: Tensor, count_U: Tensor, *, nearest: int, block: int = 1024) -> Tensor:
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


def purge(h: Tensor, labels: Tensor, live: Tensor, total_UD: Tensor, count_U: Tensor, *, nearest: int) -> Tensor:
    """(n,) bool: the members to learn from now. Of an ID that would lose all of them, those that are live stay.

    Every member is judged anew, those set aside before as well: what a young embedder mistook may come back. Only IDs with all
    their members at hand may be given (members of one ID on one worker), or the last rule would be applied to a part of them.
    """
    keep = credible(h, labels, live, total_UD, count_U, nearest=nearest)
    left = torch.zeros_like(count_U).index_add_(0, labels, keep.to(count_U.dtype))
    return keep | (live & (left[labels] == 0))


def bound(share: float, rows: int, most: int = 300) -> int:
    """How many nearest centroids count as near: a share of all of them, at most `most`, at least one."""
    return max(1, min(most, round(share * rows)))
