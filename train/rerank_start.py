"""Where the learning of a reranker starts: the linear part of its scores, fitted exactly on whole lists before the rest is trained.

What is left for small steps on drawn comparisons is noisy, and a few weights of FEATURES found so end below the cosines that they
started from; as convex problems they are found in seconds. Q lists, N documents a list, F features, S outcomes.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from train.rerank_data import KINDS, Kind, Lists, Pool, askable, assemble
from train.rerank_losses import ABSENT
from train.rerank_model import ListwiseReranker, Model, PointwiseReranker

RIDGE = 1e-2, 1e-3  # on weights of features of unit deviation: of the order in a list, and of outcomes, of which most documents tell little
BLOCK = 32  # lists at a time


@torch.inference_mode()
def features(model: Model, pool: Pool, source: Lists, kind: Kind, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
    """(Q, N, F) and levels (Q, N), ABSENT where there is no document."""
    found: list[Tensor] = [torch.zeros(0, source.documents.shape[1], model.linear.in_features)]
    for part in np.split(chosen, range(BLOCK, len(chosen), BLOCK)):
        cosines = source.cosines[KINDS.index(kind)][part]
        if len(part):
            kinds: list[Kind] = [kind] * len(part)
            batch = assemble(pool, source.queries[part], kinds, source.documents[part], cosines, source.levels[part])
            found.append(model.sequences(batch)[2])
    return torch.cat(found), torch.from_numpy(source.levels[chosen].astype(np.int64))


def minimised(loss: Callable[[Tensor], Tensor], start: Tensor, ridge: float, steps: int = 100) -> Tensor:
    """The weights at which a convex loss and `ridge` times their square are least."""
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(weights) + ridge * weights.square().sum()
        value.backward()
        return value

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    return weights.detach()


def order(x: Tensor, level: Tensor, shares: Tensor) -> Tensor:
    """(F,): weights whose scores make the right document likely among all of its list (conditional logit, McFadden 1974)."""
    right = level == 0
    asked = right.any(1)

    def loss(weights: Tensor) -> Tensor:
        s = (x[asked] @ weights).masked_fill(level[asked] == ABSENT, -torch.inf)
        each = s.logsumexp(1) - s.masked_fill(~right[asked], -torch.inf).logsumexp(1)
        return (each * shares[asked]).sum() / shares[asked].sum()

    return minimised(loss, torch.zeros(x.shape[2]), RIDGE[0])


def outcomes(x: Tensor, outcome: Tensor, shares: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Weights (S, F) and bias (S,) of the outcome (Q, N) of each document by itself, ABSENT for none (multinomial logit)."""
    there = outcome != ABSENT
    each_share = (shares[:, None] / there.sum(1, keepdim=True).clamp_min(1)).expand_as(there)[there]
    flat, wanted = x[there], outcome[there]

    def loss(weights: Tensor) -> Tensor:
        logits = flat @ weights[:, :-1].T + 10 * weights[:, -1]  # so that the ridge hardly touches the bias
        return (F.cross_entropy(logits, wanted, reduction="none") * each_share).sum() / each_share.sum()

    found = minimised(loss, torch.zeros(count, x.shape[2] + 1), RIDGE[1])
    return found[:, :-1], 10 * found[:, -1]


def fit(model: Model, pool: Pool, source: Lists, kinds: Sequence[float]) -> None:
    """Set the linear part of `model` from the lists of a fold, asked as `kinds` (shares of KINDS) says."""
    chosen: list[tuple[Kind, np.ndarray, float]] = [
        (kind, askable(pool, source, kind), share) for kind, share in zip(KINDS, kinds, strict=True)
    ]
    parts = [(features(model, pool, source, kind, rows), share) for kind, rows, share in chosen if share and len(rows)]
    if not parts:
        return
    x, level = torch.cat([part[0] for part, _ in parts]), torch.cat([part[1] for part, _ in parts])
    shares = torch.cat([torch.full((len(part[1]),), share / len(part[1])) for part, share in parts])
    center, spread = x[level >= 0].mean(0), x[level >= 0].std(0).clamp_min(1e-2)
    plain = ((x - center) / spread) * (level >= 0).unsqueeze(2)
    if isinstance(model, PointwiseReranker):
        weights, bias = outcomes(plain, torch.where(level > 0, 1, level), shares, 2)
        rows, biases = torch.stack([torch.zeros_like(weights[0]), *weights]), torch.cat([torch.zeros(1), bias])
    else:
        weights, bias = outcomes(plain, level, shares, model.linear.out_features - 1)
        rows, biases = torch.stack([order(plain, level, shares), *weights]), torch.cat([torch.zeros(1), bias])
    with torch.no_grad():
        model.linear.weight.copy_(rows / spread)
        model.linear.bias.copy_(biases - rows @ (center / spread))
        model.linear.bias[0] = 0.0
        if isinstance(model, ListwiseReranker):
            model.null_bias.copy_(_threshold(x @ model.linear.weight[0], level))


def _threshold(s: Tensor, level: Tensor) -> Tensor:
    """The score of NULL, above which right documents are and others below, each side counted alike."""
    right, wrong = s[level == 0], s[level > 0]

    def loss(at: Tensor) -> Tensor:
        return F.softplus(at - right).mean() + F.softplus(wrong - at).mean()

    return minimised(loss, right.mean()[None], 0.0)[0] if len(right) and len(wrong) else s.new_zeros(())
