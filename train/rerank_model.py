"""The two rerankers of the compact backbone: listwise, which compares documents, and the pointwise baseline, which judges pairs.

Shapes as in train.rerank_blocks.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from train.rerank_blocks import Batch, Blocks, Encoded, Shape
from train.rerank_layers import full_mask

LEVELS = 4
ANSWERS = 2  # yes and no


class ListwiseReranker(Blocks):
    """Compares documents within a list and judges each on an absolute scale of LEVELS (METHOD.md section 3)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape, LEVELS)
        d = shape.width
        self.ask, self.key = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        self.null_key, self.null_bias = nn.Parameter(0.02 * torch.randn(d)), nn.Parameter(torch.tensor(10.0))
        nn.init.zeros_(self.ask.weight)

    def compare(self, encoded: Encoded, picks: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """Local scores (B, K, m) and scores of NULL (B, K) of K comparisons; picks (B, K, m) number documents, those
        where there (B, K, m) is False are not seen and score -1e4."""
        b, k = picks.shape[:2]
        count = encoded.index.shape[1]
        numbers = picks + count * torch.arange(b, device=picks.device)[:, None, None]
        b_seen = (_picked(encoded.b_valid, numbers) & there.unsqueeze(-1)).flatten(2)
        q_seen = encoded.q_valid.unsqueeze(1).expand(-1, k, -1)
        mask = torch.cat([q_seen, b_seen, torch.ones_like(q_seen[..., :1])], 2).flatten(0, 1).unsqueeze(1)
        x = self.role[3].expand(b * k, 1, -1)
        for layer, of_query, of_blocks in zip(self._layers(), encoded.query, encoded.blocks, strict=True):
            of_picks = _picked(of_blocks, numbers).flatten(2, 3).flatten(0, 1)
            x = layer(x, torch.cat([of_query.repeat_interleave(k, 0), of_picks, layer.keys(x)], 1), mask)
        answer = self.norm(x).unflatten(0, (b, k)).squeeze(2)
        return self._answer(answer, _picked(encoded.index, numbers), _picked(encoded.prior, numbers), there)

    def _answer(self, answer: Tensor, index: Tensor, prior: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """The pointer: the answer position's (B, K, D) product with each index token (B, K, m, D), and with that of NULL."""
        ask = self.ask(answer) / self.shape.width**0.5
        s = prior + torch.einsum("bkd,bkmd->bkm", ask, self.key(index))
        return s.masked_fill(~there, -1e4), self.null_bias + ask @ self.null_key

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """One comparison of all M documents: s (B, M), null (B,), levels (B, M, S)."""
        encoded = self.encode(batch)
        there = (batch.level >= 0).unsqueeze(1)
        picks = torch.arange(there.shape[2], device=there.device).expand(there.shape)
        s, null = self.compare(encoded, picks, there)
        return s.squeeze(1), null.squeeze(1), encoded.levels

    def forward_full(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The slow twin of `forward`: one sequence under the whole mask. All places must hold a document."""
        (x, q_valid), (blocks, b_valid), features = self.sequences(batch)
        count, length = blocks.shape[1:3]
        mask = full_mask(q_valid, b_valid)
        whole = torch.cat([x, blocks.flatten(1, 2), self.role[3].expand(len(x), 1, -1)], 1)
        for layer in self._layers():
            whole = layer(whole, layer.keys(whole), mask)
        x, y, answer = self.norm(whole).split([x.shape[1], count * length, 1], 1)
        read = self._read(x, y.unflatten(1, (count, length)), q_valid, b_valid, features)
        there = torch.ones_like(batch.level, dtype=torch.bool).unsqueeze(1)
        s, null = self._answer(answer, read["index"][:, None], read["prior"][:, None], there)
        return s.squeeze(1), null.squeeze(1), read["levels"]


class PointwiseReranker(Blocks):
    """The baseline, and the judge: of each pair log P(yes) - log P(no), nothing compared; pictures as a whole and their middle
    (METHOD.md section 3)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape, ANSWERS)

    def forward(self, batch: Batch) -> Tensor:
        """(B, M): the logit of yes."""
        return self.answers(self.encode(batch))

    def answers(self, encoded: Encoded) -> Tensor:
        return encoded.levels[..., 0] - encoded.levels[..., 1]


def _picked(values: Tensor, numbers: Tensor) -> Tensor:
    """Of documents (B, M, ...) those that are numbered (B, K, m) through all B queries: (B, K, m, ...)."""
    return values.flatten(0, 1).index_select(0, numbers.flatten()).unflatten(0, numbers.shape)


Model = ListwiseReranker | PointwiseReranker
Kind = Literal["listwise", "pointwise"]
MODELS: dict[Kind, type[ListwiseReranker] | type[PointwiseReranker]] = {"listwise": ListwiseReranker, "pointwise": PointwiseReranker}
