"""What a query and a document say of one another place by place: late interaction over the embedder's own patch tokens.

B queries, M documents a query, T patches of C channels and COLOURS more, P projected channels, L text tokens, F features.
The tower learns not to trust colours, because light changes them; whether two near alike are the same is often told by colours
alone (skin tones, flavours), so a place brings its own.
A place that is missing or dropped out is False in its mask; a picture that is missing is a mask of False.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TRIGRAMS = 256  # buckets of the hashed byte trigrams
COLOURS = 3  # the last channels of a place: its mean red, green and blue
FAR = 100.0  # the square of more than any two colours are apart
FEATURES = (
    *("cosine", "own_cosine", "query_in_document", "document_in_query", "worst_places", "mean_patch", "same_place"),
    *("palette_of_query", "palette_of_document", "matched_colours", "same_place_colours", "trigrams", "both_pictures"),
    "cosine_without_pictures",
)


def whitening(patches_NC: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Mean (C,) and projection (P, C) on the principal axes, each divided by the square root of its deviation: places of one
    tower share a large mean and a few loud directions, which would drown what tells two products apart."""
    patches_NC = patches_NC.double()
    center = patches_NC.mean(0)
    covariance = (patches_NC - center).T @ (patches_NC - center) / max(len(patches_NC) - 1, 1)
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0)[:size].clamp_min(0), vectors.flip(1)[:, :size]
    floor = 1e-3 * values[:1].clamp_min(1e-9)
    return center.float(), (vectors / (values + floor) ** 0.25).T.float()


def trigram_profile(tokens: Tensor) -> Tensor:
    """(..., L) byte tokens, 0 is padding -> (..., TRIGRAMS) L2-normalised counts; zero for fewer than three tokens."""
    if tokens.shape[-1] < 3:
        return torch.zeros(*tokens.shape[:-1], TRIGRAMS, device=tokens.device)
    a, b, c = tokens[..., :-2], tokens[..., 1:-1], tokens[..., 2:]
    bucket = (a * 961 + b * 31 + c) % TRIGRAMS
    counts = torch.zeros(*tokens.shape[:-1], TRIGRAMS, device=tokens.device).scatter_add(-1, bucket, (c > 0).float())
    return F.normalize(counts, dim=-1)


class Pictures(NamedTuple):
    """What is read of pictures (..., T, C + COLOURS), however they are stacked. No query has a part in that of documents: it is made once.

    patches (..., T, P) of unit length and colours (..., T, COLOURS) are zero where the mask (..., T) is False; weights (..., T) are the
    shares of the places; mean (..., P) is the direction of all; own (..., D') the reader's vector; tokens (..., T', D or 2 D) what the
    pictures bring to their positions (train.rerank_blocks)."""

    patches: Tensor
    colours: Tensor
    mask: Tensor
    weights: Tensor
    mean: Tensor
    own: Tensor
    tokens: Tensor


class Matched(NamedTuple):
    """Of each place of a document (B, M, T): whether it is there and the query has any, the number of the query's place that is most like
    it, and their similarity; the last two mean nothing where the first is False."""

    seen: Tensor
    where: Tensor
    best: Tensor


class Match(nn.Module):
    """Projected patches, the best match of each, and FEATURES of each pair of query and document."""

    center: Tensor

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(channels))
        self.project = nn.Linear(channels, size, bias=False)
        self.salience = nn.Linear(size, 1)  # how much a place counts: clutter behind a product should not
        nn.init.zeros_(self.salience.weight)
        nn.init.zeros_(self.salience.bias)

    def start_from(self, patches_NC: Tensor) -> None:
        """Centre and projection from a sample of patches (N, C + COLOURS); see `whitening`."""
        center, projection = whitening(patches_NC[:, :-COLOURS], self.project.out_features)
        with torch.no_grad():
            self.center.copy_(center)
            self.project.weight.zero_()
            self.project.weight[: len(projection)] = projection

    def patches(self, image: Tensor, mask: Tensor) -> Tensor:
        """(..., T, C + COLOURS) -> (..., T, P), unit length; zero where the mask is False."""
        return F.normalize(self.project(image[..., :-COLOURS] - self.center), dim=-1) * mask.unsqueeze(-1)

    def weights(self, patches: Tensor, mask: Tensor) -> Tensor:
        """(..., T) shares of the places that are there; they sum to 1."""
        return (self.salience(patches * patches.shape[-1] ** 0.5).squeeze(-1)).masked_fill(~mask, -1e4).softmax(-1)

    def forward(self, q: Pictures, d: Pictures, cosine_BM: Tensor, own_BM: Tensor, trigrams_BM: Tensor) -> tuple[Tensor, Matched]:
        """Of queries (B, ...) and documents (B, M, ...): features (B, M, F), and the best match of each place of a document."""
        q_pictured = q.mask.any(1)[:, None]
        both, seen, shared = (q_pictured & d.mask.any(2)).float(), q_pictured.unsqueeze(2) & d.mask, q.mask[:, None] & d.mask
        hidden = (~q.mask).to(q.patches.dtype)[:, :, None] + (~d.mask).to(q.patches.dtype).flatten(1)[:, None]
        sim = _products(q.patches, d.patches, -2 * hidden)  # where a place is hidden, less than any similarity
        best_q, best_d = sim.amax(3), sim.amax(1)
        where = _first_best(sim, best_d)
        few = max(q.mask.shape[1] // 4, 1)
        worst = best_d.masked_fill(~d.mask, 1.0).topk(few, dim=2, largest=False, sorted=False).values.mean(2)
        rows = torch.arange(len(where), device=where.device)[:, None, None]
        shift = (d.colours - q.colours[rows, where]).norm(dim=3)
        q_least, d_least = _apart(q.colours, d.colours, hidden)
        q_weights = q.weights.unsqueeze(2)
        pictured = [
            *(own_BM, (best_q * q_weights).sum(1), (best_d * d.weights).sum(2), worst, (q.mean[:, None] * d.mean).sum(2)),
            _mean(torch.diagonal(sim, dim1=1, dim2=3), shared),
            *((q_least * q_weights).sum(1), (d_least * d.weights).sum(2), (shift * seen * d.weights).sum(2)),
            _mean((q.colours[:, None] - d.colours).norm(dim=3), shared),
        ]
        features = [cosine_BM, *(value * both for value in pictured), trigrams_BM, both, cosine_BM * (1 - both)]
        return torch.stack(features, 2), Matched(seen, where, best_d)


def _products(q: Tensor, d: Tensor, added: Tensor, alpha: float = 1.0) -> Tensor:
    """(B, T, M, S): alpha times the products of places (B, T, P) and (B, M, S, P), on top of what is added, (B, T, M * S)."""
    return torch.baddbmm(added, q, d.flatten(1, 2).transpose(1, 2), alpha=alpha).unflatten(2, d.shape[1:3])


def _first_best(sim: Tensor, best: Tensor) -> Tensor:
    """(B, M, S): sim.argmax(1), which finds the first of several alike, of (B, T, M, S) and its best (B, M, S); a reduction of numbers
    alone takes a fraction of its time."""
    last = sim.shape[1] - 1
    numbers = torch.arange(last + 1, dtype=sim.dtype, device=sim.device)[:, None, None]
    return torch.where(sim < best.unsqueeze(1), last, numbers).amin(1).long()


def _apart(q: Tensor, d: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Of each colour (B, T, COLOURS) and (B, M, S, COLOURS) the least distance to one of the other side, (B, T, M) and (B, M, S); hidden
    (B, T, M * S) is 0 where both are there. Roots are taken last."""
    squares = q.square().sum(2)[:, :, None] + d.square().sum(3).flatten(1)[:, None]
    apart = _products(q, d, squares + FAR * hidden, alpha=-2)
    return apart.amin(3).clamp_min(0).sqrt(), apart.amin(1).clamp_min(0).sqrt()


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Over the last dimension, where the mask is True; 0 where it nowhere is."""
    return (values * mask).sum(-1) / mask.sum(-1).clamp_min(1)
