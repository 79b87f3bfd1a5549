"""What the rerankers of the compact backbone share: a query and a block a document, and an absolute judgement of each block.

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

from train.rerank_match import COLOURS, FEATURES, Match, trigram_profile

STRIDE = 4  # bytes a text token
COSINES = 20.0


class Shape(BaseModel):
    """What decides the shapes of the weights. tokens: of a picture, of all its `views` together (1: the whole; 2: the whole, then its
    middle). channels: of a place, its colours among them; `pooled` before the colours are those that the reader makes a picture's vector
    of, of `own` dimensions (0: none). merge is the side of the square of patches that becomes one token."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    tokens: int
    channels: int
    vocabulary: int
    width: int = 96
    layers: int = 2
    heads: int = 4
    match: int = 64
    text_length: int = 48
    views: int = 1
    pooled: int = 0
    own: int = 0

    @property
    def grid(self) -> int:
        """Side of the patch grid of a view; 0 where the tokens are no square."""
        side = round((self.tokens // self.views) ** 0.5)
        return side if side * side * self.views == self.tokens else 0

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


class Blocks(nn.Module):
    """Scores start as the retrieval's cosine and the reader's own: all that is learned on top starts at zero. outcomes: S, what the
    absolute head tells apart."""

    def __init__(self, shape: Shape, outcomes: int) -> None:
        super().__init__()
        self.shape = shape
        d, square = shape.width, shape.merge**2
        self.match = Match(shape.channels - COLOURS, shape.match)
        self.q_in = nn.Linear(square * (shape.match + COLOURS), d)
        self.d_in = nn.Linear(square * (2 * (shape.match + COLOURS) + 1), d)
        self.embed = nn.Embedding(shape.vocabulary, d // 4, padding_idx=0)
        self.text_in = nn.Linear(STRIDE * (d // 4), d)
        self.place = nn.Parameter(0.02 * torch.randn(shape.tokens // square, d))
        self.text_place = nn.Parameter(0.02 * torch.randn(-(-shape.text_length // STRIDE), d))
        self.role = nn.Parameter(0.02 * torch.randn(4, d))  # query, document, index token, answer position
        self.layers = nn.ModuleList(Layer(d, shape.heads) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(d)
        self.own = nn.Linear(2 * shape.pooled, shape.own) if shape.pooled else None
        self.prior = nn.Sequential(nn.Linear(len(FEATURES), 32), nn.GELU(), nn.Linear(32, 1 + outcomes))
        self.linear = nn.Linear(len(FEATURES), 1 + outcomes)
        self.level = nn.Sequential(nn.Linear(4 * d, d), nn.GELU(), nn.Linear(d, outcomes))
        for module in (self.prior[2], self.linear, self.level[2]):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
        with torch.no_grad():
            self.linear.weight[:2, :2] = COSINES  # of the order and of the first outcome, until train.rerank_start has fitted them

    def _layers(self) -> list[Layer]:
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def _merged(self, patches: Tensor) -> Tensor:
        """(..., T, P) -> (..., T / merge^2, merge^2 * P): neighbouring patches become one token."""
        if (m := self.shape.merge) == 1:
            return patches
        side = self.shape.grid // m
        squares = patches.unflatten(-2, (self.shape.views * side, m, side, m)).transpose(-4, -3)
        return squares.flatten(-3).flatten(-3, -2)

    def _text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(..., L) -> states (..., L / STRIDE, D) and which of them hold a byte."""
        tokens = F.pad(tokens, (0, -tokens.shape[-1] % STRIDE))
        states = self.text_in(self.embed(tokens).unflatten(-2, (-1, STRIDE)).flatten(-2))
        return states + self.text_place[: states.shape[-2]], tokens.unflatten(-1, (-1, STRIDE)).any(-1)

    def _places(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Patches (..., T, P) and colours (..., T, COLOURS), zero where the mask is False."""
        return self.match.patches(image, mask), image[..., -COLOURS:] * mask.unsqueeze(-1)

    def _image(self, inputs: Tensor, mask: Tensor, into: nn.Linear) -> tuple[Tensor, Tensor]:
        valid = self._merged(mask.unsqueeze(-1).float()).any(-1)
        return into(self._merged(inputs)) + self.place, valid

    def _own_vector(self, image: Tensor, mask: Tensor) -> Tensor:
        """(..., T, C) -> (..., D'), unit length: the reader's vector of the first view, by the places that are there."""
        first = self.shape.tokens // self.shape.views
        seen = image[..., :first, -COLOURS - self.shape.pooled : -COLOURS] * mask[..., :first, None]
        assert self.own is not None
        mean = seen.sum(-2) / mask[..., :first].sum(-1, keepdim=True).clamp_min(1)
        return F.normalize(self.own(torch.cat([mean, seen.amax(-2)], -1)), dim=-1)

    def _own_cosine(self, batch: Batch) -> Tensor:
        """(B, M); zero without a reader's head."""
        if self.own is None:
            return torch.zeros_like(batch.cosine)
        query, documents = self._own_vector(batch.q_image, batch.q_mask), self._own_vector(batch.d_image, batch.d_mask)
        return (query[:, None] * documents).sum(-1)  # row by row: as a matrix product the last bits would tell a document's place

    def sequences(self, batch: Batch) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
        """Inputs and validity of the queries (B, Lq, D) and of the blocks (B, M, Lb, D), and the features (B, M, F)."""
        q, d = self._places(batch.q_image, batch.q_mask), self._places(batch.d_image, batch.d_mask)
        trigrams = (trigram_profile(batch.q_text)[:, None] * trigram_profile(batch.d_text)).sum(-1)
        features, matched = self.match((*q, batch.q_mask), (*d, batch.d_mask), batch.cosine, self._own_cosine(batch), trigrams)
        q_text, q_text_valid = self._text(batch.q_text)
        d_text, d_text_valid = self._text(batch.d_text)
        q_image, q_image_valid = self._image(torch.cat(q, -1), batch.q_mask, self.q_in)
        d_image, d_image_valid = self._image(torch.cat([*d, matched], -1), batch.d_mask, self.d_in)
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
            prior=learned[..., 0],
            levels=levels,
        )

    def _span(self, states: Tensor, valid: Tensor) -> Tensor:
        """Mean over the picture's positions, over the text's where there is no picture."""
        places = self.place.shape[0]
        image, text = valid.clone(), valid.clone()
        image[..., :-places] = False
        text[..., -places:] = False
        return pooled(states, torch.where(image.any(-1, keepdim=True), image, text))
