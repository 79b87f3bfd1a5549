"""What a query and a document say of one another place by place: late interaction over the embedder's own patch tokens.

B queries, M documents a query, T patches of C channels, P projected channels, L text tokens, F features.
A place that is missing or dropped out is False in its mask; a picture that is missing is a mask of False.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TRIGRAMS = 256  # buckets of the hashed byte trigrams
FEATURES = ("cosine", "query_in_document", "document_in_query", "worst_places", "mean_patch", "same_place", "trigrams", "both_pictures")


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
        """Centre and projection from a sample of patches (see `whitening`)."""
        center, projection = whitening(patches_NC, self.project.out_features)
        with torch.no_grad():
            self.center.copy_(center)
            self.project.weight.zero_()
            self.project.weight[: len(projection)] = projection

    def patches(self, image: Tensor, mask: Tensor) -> Tensor:
        """(..., T, C) -> (..., T, P), unit length; zero where the mask is False."""
        return F.normalize(self.project(image - self.center), dim=-1) * mask.unsqueeze(-1)

    def _weights(self, patches: Tensor, mask: Tensor) -> Tensor:
        """(..., T) shares of the places that are there; they sum to 1."""
        return (self.salience(patches * patches.shape[-1] ** 0.5).squeeze(-1)).masked_fill(~mask, -1e4).softmax(-1)

    def forward(
        self, q_BTP: Tensor, q_mask_BT: Tensor, d_BMTP: Tensor, d_mask_BMT: Tensor, cosine_BM: Tensor, trigrams_BM: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Features (B, M, F), and for each document patch its best match: (B, M, T, P + 1), the difference and the similarity."""
        sim = torch.einsum("btp,bmsp->bmts", q_BTP, d_BMTP)
        there = q_mask_BT[:, None, :, None] & d_mask_BMT[:, :, None, :]
        best_q = sim.masked_fill(~there, -1.0).amax(3)
        best_d, where = sim.masked_fill(~there, -1.0).max(2)
        both = (q_mask_BT.any(1)[:, None] & d_mask_BMT.any(2)).float()
        few = max(q_BTP.shape[1] // 4, 1)
        worst = best_d.masked_fill(~d_mask_BMT, 1.0).topk(few, dim=2, largest=False).values.mean(2)
        shared = q_mask_BT[:, None] & d_mask_BMT
        same = (torch.diagonal(sim, dim1=2, dim2=3) * shared).sum(2) / shared.sum(2).clamp_min(1)
        mean = F.cosine_similarity(q_BTP.sum(1)[:, None], d_BMTP.sum(2), dim=2)
        inside = (best_q * self._weights(q_BTP, q_mask_BT)[:, None]).sum(2)
        covered = (best_d * self._weights(d_BMTP, d_mask_BMT)).sum(2)
        pictured = torch.stack([inside, covered, worst, mean, same], 2) * both.unsqueeze(2)
        features = torch.cat([cosine_BM.unsqueeze(2), pictured, trigrams_BM.unsqueeze(2), both.unsqueeze(2)], 2)
        rows = torch.arange(len(q_BTP), device=q_BTP.device)[:, None, None]
        matched = (d_BMTP - q_BTP[rows, where]) * (both[..., None] * d_mask_BMT)[..., None]
        return features, torch.cat([matched, (best_d * both[..., None] * d_mask_BMT)[..., None]], 3)
