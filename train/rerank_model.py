"""The listwise reranker of the compact backbone: compare documents within a list, and judge each on an absolute scale.

B queries, M documents a query, K comparisons of m documents, T patches of C channels, L tokens, D width, S levels.
A sequence is the query, then a block a document (text, picture, index token), then the answer position. Every block
starts at the same position and sees the query and itself only; its index token comes after its content; only the answer
position sees everything. So what the absolute head pools cannot depend on chunk-mates or order, and the states of a
block serve any number of comparisons: `encode` runs once, `compare` costs one position a comparison.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from train.rerank_match import FEATURES, Match, trigram_profile

LEVELS = 4
STRIDE = 4  # bytes a text token


class Shape(BaseModel):
    """What decides the shapes of the weights. merge is the side of the square of patches that becomes one token."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    tokens: int
    channels: int
    vocabulary: int
    width: int = 96
    layers: int = 2
    heads: int = 4
    match: int = 64
    text_length: int = 48

    @property
    def grid(self) -> int:
        """Side of the patch grid; 0 where the tokens are no square."""
        side = round(self.tokens**0.5)
        return side if side * side == self.tokens else 0

    @property
    def merge(self) -> int:
        return next((m for m in (2, 3) if self.grid and self.grid % m == 0 and self.grid > m), 1)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Queries and their documents: pictures (B, T, C) and (B, M, T, C) with masks of the places that are there, texts
    (B, L) and (B, M, L), the retrieval's cosine (B, M), and level (B, M), which is -1 where there is no document."""

    q_image: Tensor
    q_mask: Tensor
    q_text: Tensor
    d_image: Tensor
    d_mask: Tensor
    d_text: Tensor
    cosine: Tensor
    level: Tensor


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """States of the queries and their blocks: a layer's keys and values for each; index the final states of the index
    tokens (B, M, D); prior the part of s that needs no comparison (B, M); levels the logits of the absolute head (B, M, S)."""

    query: list[tuple[Tensor, Tensor]]
    blocks: list[tuple[Tensor, Tensor]]
    q_valid: Tensor
    b_valid: Tensor
    index: Tensor
    prior: Tensor
    levels: Tensor


class Layer(nn.Module):
    """Pre-norm attention and feed-forward; keys are made apart so that they can be made once and seen by many."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.kv(self.norm(x)).chunk(2, -1)
        return k, v

    def forward(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """x (B, L, D) attends to k, v (B, S, D) where mask (B, L, S) is True."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.q(self.norm(x)), k, v))
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.unsqueeze(1))
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def self_mask(valid: Tensor, *, index_last: bool = False) -> Tensor:
    """(..., L) -> (..., L, L): each position sees the valid ones and itself; with `index_last` the last is seen by itself alone."""
    size = valid.shape[-1]
    own = torch.eye(size, dtype=torch.bool, device=valid.device)
    seen = valid.unsqueeze(-2).expand(*valid.shape, size).clone()
    if index_last:
        seen[..., :-1, -1] = False
    return seen | own


def full_mask(q_valid: Tensor, b_valid: Tensor) -> Tensor:
    """The whole mask (B, S, S) of query, blocks and answer position, S = Lq + M * Lb + 1: the definition of who sees whom."""
    queries, (count, length) = q_valid.shape[1], b_valid.shape[1:]
    size = queries + count * length + 1
    mask = torch.zeros(len(q_valid), size, size, dtype=torch.bool, device=q_valid.device)
    mask[:, :queries, :queries] = self_mask(q_valid)
    for m in range(count):
        rows = slice(queries + m * length, queries + (m + 1) * length)
        mask[:, rows, :queries] = q_valid[:, None]
        mask[:, rows, rows] = self_mask(b_valid[:, m], index_last=True)
    mask[:, -1] = torch.cat([q_valid, b_valid.flatten(1), torch.ones_like(q_valid[:, :1])], 1)
    return mask


def pooled(states: Tensor, mask: Tensor) -> Tensor:
    """Mean of (..., L, D) over the positions that are there; zero where none is."""
    return (states * mask.unsqueeze(-1)).sum(-2) / mask.sum(-1, keepdim=True).clamp_min(1)


class ListwiseReranker(nn.Module):
    """Scores start as the retrieval's cosine: all that is learned on top starts at zero."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        d, square = shape.width, shape.merge**2
        self.match = Match(shape.channels, shape.match)
        self.q_in = nn.Linear(square * shape.match, d)
        self.d_in = nn.Linear(square * (2 * shape.match + 1), d)
        self.embed = nn.Embedding(shape.vocabulary, d // 4, padding_idx=0)
        self.text_in = nn.Linear(STRIDE * (d // 4), d)
        self.place = nn.Parameter(0.02 * torch.randn(shape.tokens // square, d))
        self.text_place = nn.Parameter(0.02 * torch.randn(-(-shape.text_length // STRIDE), d))
        self.role = nn.Parameter(0.02 * torch.randn(4, d))  # query, document, index token, answer position
        self.layers = nn.ModuleList(Layer(d, shape.heads) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(d)
        self.scale = nn.Parameter(torch.tensor(20.0))
        self.prior = nn.Sequential(nn.Linear(len(FEATURES), 32), nn.GELU(), nn.Linear(32, 1 + LEVELS))
        self.linear = nn.Linear(len(FEATURES), 1 + LEVELS)
        self.level = nn.Sequential(nn.Linear(4 * d, d), nn.GELU(), nn.Linear(d, LEVELS))
        self.ask, self.key = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        self.null_key, self.null_bias = nn.Parameter(0.02 * torch.randn(d)), nn.Parameter(torch.tensor(10.0))
        for module in (self.prior[2], self.linear, self.level[2], self.ask):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)

    def _layers(self) -> list[Layer]:
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def _merged(self, patches: Tensor) -> Tensor:
        """(..., T, P) -> (..., T / merge^2, merge^2 * P): neighbouring patches become one token."""
        if (m := self.shape.merge) == 1:
            return patches
        side = self.shape.grid // m
        squares = patches.unflatten(-2, (side, m, side, m)).transpose(-4, -3)
        return squares.flatten(-3).flatten(-3, -2)

    def _text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(..., L) -> states (..., L / STRIDE, D) and which of them hold a byte."""
        tokens = F.pad(tokens, (0, -tokens.shape[-1] % STRIDE))
        states = self.text_in(self.embed(tokens).unflatten(-2, (-1, STRIDE)).flatten(-2))
        return states + self.text_place[: states.shape[-2]], tokens.unflatten(-1, (-1, STRIDE)).any(-1)

    def _image(self, inputs: Tensor, mask: Tensor, into: nn.Linear) -> tuple[Tensor, Tensor]:
        valid = self._merged(mask.unsqueeze(-1).float()).any(-1)
        return into(self._merged(inputs)) + self.place, valid

    def sequences(self, batch: Batch) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
        """Inputs and validity of the queries (B, Lq, D) and of the blocks (B, M, Lb, D), and the features (B, M, F)."""
        q, d = self.match.patches(batch.q_image, batch.q_mask), self.match.patches(batch.d_image, batch.d_mask)
        trigrams = (trigram_profile(batch.q_text)[:, None] * trigram_profile(batch.d_text)).sum(-1)
        features, matched = self.match(q, batch.q_mask, d, batch.d_mask, batch.cosine, trigrams)
        q_text, q_text_valid = self._text(batch.q_text)
        d_text, d_text_valid = self._text(batch.d_text)
        q_image, q_image_valid = self._image(q, batch.q_mask, self.q_in)
        d_image, d_image_valid = self._image(torch.cat([d, matched], -1), batch.d_mask, self.d_in)
        query = torch.cat([q_text, q_image], 1) + self.role[0]
        index = self.role[2].expand(*d_image.shape[:2], 1, -1)
        blocks = torch.cat([torch.cat([d_text, d_image], 2) + self.role[1], index], 2)
        always = torch.ones_like(d_image_valid[..., :1])
        q_valid = torch.cat([q_text_valid, q_image_valid], 1)
        return (query, q_valid), (blocks, torch.cat([d_text_valid, d_image_valid, always], 2)), features

    def encode(self, batch: Batch) -> Encoded:
        """All that does not depend on which documents are compared."""
        (x, q_valid), (blocks, b_valid), features = self.sequences(batch)
        count = blocks.shape[1]
        y, y_valid = blocks.flatten(0, 1), b_valid.flatten(0, 1)
        q_mask, own = self_mask(q_valid), self_mask(y_valid, index_last=True)
        seen = q_valid.repeat_interleave(count, 0).unsqueeze(1).expand(-1, y.shape[1], -1)
        b_mask = torch.cat([seen, own], 2)
        of_query, of_blocks = [], []
        for layer in self._layers():
            (kq, vq), (kb, vb) = layer.keys(x), layer.keys(y)
            of_query.append((kq, vq))
            of_blocks.append((kb.unflatten(0, (-1, count)), vb.unflatten(0, (-1, count))))
            x = layer(x, kq, vq, q_mask)
            k, v = torch.cat([kq.repeat_interleave(count, 0), kb], 1), torch.cat([vq.repeat_interleave(count, 0), vb], 1)
            y = layer(y, k, v, b_mask)
        return self._read(of_query, of_blocks, q_valid, b_valid, self.norm(x), self.norm(y).unflatten(0, (-1, count)), features)

    def _read(
        self,
        of_query: list[tuple[Tensor, Tensor]],
        of_blocks: list[tuple[Tensor, Tensor]],
        q_valid: Tensor,
        b_valid: Tensor,
        x: Tensor,
        y: Tensor,
        features: Tensor,
    ) -> Encoded:
        z0, zi = self._span(x, q_valid)[:, None].expand(-1, y.shape[1], -1), self._span(y[:, :, :-1], b_valid[:, :, :-1])
        learned = self.linear(features) + self.prior(features)
        levels = learned[..., 1:] + self.level(torch.cat([z0, zi, z0 * zi, (z0 - zi).abs()], -1))
        return Encoded(
            query=of_query,
            blocks=of_blocks,
            q_valid=q_valid,
            b_valid=b_valid,
            index=y[:, :, -1],
            prior=self.scale * features[..., 0] + learned[..., 0],
            levels=levels,
        )

    def _span(self, states: Tensor, valid: Tensor) -> Tensor:
        """Mean over the picture's positions, over the text's where there is no picture."""
        places = self.place.shape[0]
        image, text = valid.clone(), valid.clone()
        image[..., :-places] = False
        text[..., -places:] = False
        return pooled(states, torch.where(image.any(-1, keepdim=True), image, text))

    def compare(self, encoded: Encoded, picks: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """Local scores (B, K, m) and scores of NULL (B, K) of K comparisons; picks (B, K, m) number documents, those
        where there (B, K, m) is False are not seen and score -1e4."""
        b, k = picks.shape[:2]
        rows = torch.arange(b, device=picks.device)[:, None, None]
        own = torch.ones(b * k, 1, dtype=torch.bool, device=picks.device)
        q_seen = encoded.q_valid.repeat_interleave(k, 0)
        b_seen = (encoded.b_valid[rows, picks] & there.unsqueeze(-1)).flatten(2).flatten(0, 1)
        mask = torch.cat([q_seen, b_seen, own], 1).unsqueeze(1)
        x = self.role[3].expand(b * k, 1, -1)
        for layer, of_query, of_blocks in zip(self._layers(), encoded.query, encoded.blocks, strict=True):
            parts = [
                torch.cat([q.repeat_interleave(k, 0), blocks[rows, picks].flatten(2, 3).flatten(0, 1), o], 1)
                for q, blocks, o in zip(of_query, of_blocks, layer.keys(x), strict=True)
            ]
            x = layer(x, parts[0], parts[1], mask)
        return self._answer(self.norm(x).unflatten(0, (b, k)).squeeze(2), encoded.index[rows, picks], encoded.prior[rows, picks], there)

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
            whole = layer(whole, *layer.keys(whole), mask)
        x, y, answer = self.norm(whole).split([x.shape[1], count * length, 1], 1)
        read = self._read([], [], q_valid, b_valid, x, y.unflatten(1, (count, length)), features)
        there = torch.ones_like(batch.level, dtype=torch.bool).unsqueeze(1)
        s, null = self._answer(answer, read.index[:, None], read.prior[:, None], there)
        return s.squeeze(1), null.squeeze(1), read.levels
