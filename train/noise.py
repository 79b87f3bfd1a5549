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


def judged(
    h: Tensor,
    given: Tensor,
    labels: Tensor,
    live: Tensor,
    total_UD: Tensor,
    count_U: Tensor,
    aside_UD: Tensor,
    *,
    nearest: int,
    gap: float = 0.0,
    block: int = 0,
) -> Tensor:
    """(n,) the ID that each member is taken for: the given one where its centroid, made without the member, is among the `nearest`
    to it; else another, where the nearest centroid's cosine exceeds that of every other by `gap`, the given one's among them; else
    -1, as always where `gap` is 0.

    h (n, D) L2-normalised; labels (n,) of the moment, where live (n,), made up `total_UD` and `count_U` (of all workers' members:
    `sums`). No member is judged by itself: the only live one of an ID is by those that it was given and that do not count now, whose
    sums are `aside_UD`; where there are none either, nothing speaks for it.
    """
    centroids, ids = F.normalize(total_UD, dim=1), torch.arange(len(h), device=h.device)
    block = block or max(1, 2**25 // len(total_UD))  # 128 MiB of cosines at a time
    taken = []
    for at in ids.split(block):
        x, y, now, counts = h[at], given[at], labels[at], live[at]
        cosine = (x @ centroids.T).masked_fill(count_U == 0, float("-inf"))
        alone = count_U[now] - counts.to(count_U.dtype) < 0.5
        without = torch.where(alone[:, None], aside_UD[now], total_UD[now] - x * counts[:, None])
        itself = (F.normalize(without, dim=1) * x).sum(1).masked_fill(~without.any(1), float("-inf"))
        cosine.scatter_(1, now[:, None], itself[:, None])
        to_own = cosine.gather(1, y[:, None])[:, 0]
        cosine.scatter_(1, y[:, None], float("-inf"))
        known = ((cosine > to_own[:, None]).sum(1) < nearest) & to_own.isfinite()
        best, where = cosine.topk(min(2, cosine.shape[1]), dim=1)
        moves = (best[:, 0] - torch.maximum(best[:, -1], to_own) >= gap) & best[:, 0].isfinite() & (gap > 0)
        taken.append(torch.where(known, y, torch.where(moves, where[:, 0], -1)))
    return torch.cat(taken) if taken else given.clone()


def spared(taken: Tensor, given: Tensor, ids: int) -> Tensor:
    """`taken`, but an ID that would lose all its members, since none is credible, keeps all that it was given.

    Of (n,) rows that count, of all workers. Taking one back may empty the ID it had moved to, which then has its own again.
    """
    while (back := (taken != given) & (torch.bincount(taken[taken >= 0], minlength=ids)[given] == 0)).any():
        taken = torch.where(back, given, taken)
    return taken


def bound(share: float, rows: int, most: int = 300) -> int:
    """How many nearest centroids count as near: a share of all of them, at most `most`, at least one."""
    return max(1, min(most, round(share * rows)))


def purged(encoder: Encoder, labelling: Labelling, share: float, gap: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """(n,) labels and weights: those given to the members that are credible now, 0 for the others, unless another ID is surely
    theirs (`judged`). The same on every worker.

    share: of all prototypes, those that count as near (`bound`). Each worker encodes its part and holds its vectors, 4 n D / world
    bytes, and compares them with all centroids, so this suits prototypes that fit into memory.
    """
    parts = [(b.rows[b.counted], h[torch.from_numpy(b.counted)]) for b, h in encoder.blocks(encoder.members())]
    rows, h = np.concatenate([r for r, _ in parts]), torch.cat([v for _, v in parts])
    given, labels, live = (
        torch.from_numpy(x).to(encoder.device) for x in (labelling.given_labels, labelling.labels, labelling.weights > 0)
    )
    mine = torch.from_numpy(rows).to(encoder.device)
    aside = torch.from_numpy(labelling.given > 0).to(encoder.device) & ~(live & (labels == given))
    (total, count), (spare, _) = (
        [parallel.add_up(x) for x in sums(h, by[mine], among[mine], labelling.ids)] for by, among in ((labels, live), (given, aside))
    )
    taken = torch.zeros_like(labels)
    found = judged(h, given[mine], labels[mine], live[mine], total, count, spare, nearest=bound(share, labelling.ids), gap=gap)
    taken[mine] = found + 1  # so that the workers' parts add up
    taken = parallel.add_up(taken) - 1
    counting = torch.from_numpy(np.flatnonzero(labelling.given > 0)).to(encoder.device)
    kept = spared(taken[counting], given[counting], labelling.ids)
    taken = torch.full_like(labels, -1).index_copy(0, counting, kept).cpu().numpy()
    return np.where(taken >= 0, taken, labelling.given_labels), np.where(taken >= 0, labelling.given, 0).astype(np.float32)
