"""What a query and a document say of one another place by place: late interaction over the embedder's own patch tokens.

B queries, M documents a query, T patches of C channels and COLOURS more, P projected channels, L text tokens, F features.
The tower learns not to trust colours, because light changes them; whether two near alike are the same is often told by colours
alone (skin tones, flavours), so a place brings its own.
A place that is missing or dropped out is False in its mask; a picture that is missing is a mask of False.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TRIGRAMS = 256  # buckets of the hashed byte trigrams
COLOURS = 3  # the last channels of a place: its mean red, green and blue
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

    def _weights(self, patches: Tensor, mask: Tensor) -> Tensor:
        """(..., T) shares of the places that are there; they sum to 1."""
        return (self.salience(patches * patches.shape[-1] ** 0.5).squeeze(-1)).masked_fill(~mask, -1e4).softmax(-1)

    def forward(
        self,
        q: tuple[Tensor, Tensor, Tensor],
        d: tuple[Tensor, Tensor, Tensor],
        cosine_BM: Tensor,
        own_BM: Tensor,
        trigrams_BM: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Of queries and documents patches, colours and masks, (B, ...) and (B, M, ...): features (B, M, F), and of each document
        patch what its best match is: (B, M, T, P + COLOURS + 1), the differences and the similarity."""
        (q_BTP, q_colours, q_mask_BT), (d_BMTP, d_colours, d_mask_BMT) = q, d
        sim = torch.einsum("btp,bmsp->bmts", q_BTP, d_BMTP)
        there = q_mask_BT[:, None, :, None] & d_mask_BMT[:, :, None, :]
        best_q = sim.masked_fill(~there, -1.0).amax(3)
        best_d, where = sim.masked_fill(~there, -1.0).max(2)
        both = (q_mask_BT.any(1)[:, None] & d_mask_BMT.any(2)).float()
        few = max(q_BTP.shape[1] // 4, 1)
        worst = best_d.masked_fill(~d_mask_BMT, 1.0).topk(few, dim=2, largest=False).values.mean(2)
        shared = q_mask_BT[:, None] & d_mask_BMT
        same = _mean(torch.diagonal(sim, dim1=2, dim2=3), shared)
        mean = F.cosine_similarity(q_BTP.sum(1)[:, None], d_BMTP.sum(2), dim=2)
        weights_q, weights_d = self._weights(q_BTP, q_mask_BT)[:, None], self._weights(d_BMTP, d_mask_BMT)
        rows = torch.arange(len(q_BTP), device=q_BTP.device)[:, None, None]
        shift = (d_colours - q_colours[rows, where]) * there.any(2)[..., None]
        apart = torch.cdist(q_colours[:, None].expand(-1, d_colours.shape[1], -1, -1), d_colours).masked_fill(~there, 4.0)
        colours = [
            (apart.amin(3) * weights_q).sum(2),
            (apart.amin(2) * weights_d).sum(2),
            (shift.norm(dim=3) * weights_d).sum(2),
            _mean((q_colours[:, None] - d_colours).norm(dim=3), shared),
        ]
        pictured = torch.stack([(best_q * weights_q).sum(2), (best_d * weights_d).sum(2), worst, mean, same, *colours], 2)
        pictured = torch.cat([own_BM.unsqueeze(2), pictured], 2) * both.unsqueeze(2)
        rest = torch.stack([trigrams_BM, both, cosine_BM * (1 - both)], 2)
        features = torch.cat([cosine_BM.unsqueeze(2), pictured, rest], 2)
        seen = (both[..., None] * d_mask_BMT)[..., None]
        return features, torch.cat([(d_BMTP - q_BTP[rows, where]) * seen, shift * seen, best_d[..., None] * seen], 3)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Over the last dimension, where the mask is True; 0 where it nowhere is."""
    return (values * mask).sum(-1) / mask.sum(-1).clamp_min(1)
