"""What the rerankers of the compact backbone share: a query and a block a document, and an absolute judgement of each block.

B queries, M documents a query, K comparisons of m documents, T patches of C channels, L tokens, D width, S levels.
A sequence is the query, then a block a document (text, picture, index token), then the answer position. Every block
starts at the same position and sees the query and itself only; its index token comes after its content; only the answer
position sees everything. So what the absolute head pools cannot depend on chunk-mates or order, and the states of a
block serve any number of comparisons: `encode` runs once, `compare` costs one position a comparison.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from train.rerank_layers import Layer, pooled, self_mask
from train.rerank_match import COLOURS, FEATURES, Match, Matched, Pictures, trigram_profile

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
    (B, L) and (B, M, L), the retrieval's cosine (B, M), and level (B, M), which is -1 where there is no document. Pictures of
    documents may be what `Blocks.documents` has made of them."""

    q_image: Tensor
    q_mask: Tensor
    q_text: Tensor
    d_image: Tensor | Pictures
    d_mask: Tensor
    d_text: Tensor
    cosine: Tensor
    level: Tensor

    def part(self, start: int, stop: int) -> "Batch":
        """With the documents from `start` to `stop` alone."""
        image = self.d_image
        cut = Pictures(*(t[:, start:stop] for t in image)) if isinstance(image, Pictures) else image[:, start:stop]
        rest = {name: getattr(self, name)[:, start:stop] for name in ("d_mask", "d_text", "cosine", "level")}
        return replace(self, d_image=cut, **rest)


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """States of the queries and their blocks: a layer's keys and values (B, Lq, 2 D) and (B, M, Lb, 2 D); index the final states of
    the index tokens (B, M, D); prior the part of s that needs no comparison (B, M); levels the logits of the absolute head (B, M, S)."""

    query: list[Tensor]
    blocks: list[Tensor]
    q_valid: Tensor
    b_valid: Tensor
    index: Tensor
    prior: Tensor
    levels: Tensor


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

    def _image(self, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """What pictures bring to their positions, and which of these hold a place that is there."""
        return states + self.place, self._merged(mask.unsqueeze(-1).float()).any(-1)

    def _own_vector(self, image: Tensor, mask: Tensor) -> Tensor:
        """(..., T, C) -> (..., D'), unit length: the reader's vector of the first view, by the places that are there; D' may be 0."""
        if self.own is None:
            return image.new_zeros(*image.shape[:-2], 0)
        first = self.shape.tokens // self.shape.views
        seen = image[..., :first, -COLOURS - self.shape.pooled : -COLOURS] * mask[..., :first, None]
        mean = seen.sum(-2) / mask[..., :first].sum(-1, keepdim=True).clamp_min(1)
        return F.normalize(self.own(torch.cat([mean, seen.amax(-2)], -1)), dim=-1)

    def _pictures(self, image: Tensor, mask: Tensor, into: Callable[[Tensor], Tensor]) -> Pictures:
        patches, colours = self.match.patches(image, mask), image[..., -COLOURS:] * mask.unsqueeze(-1)
        return Pictures(
            patches=patches,
            colours=colours,
            mask=mask,
            weights=self.match.weights(patches, mask),
            mean=F.normalize(patches.sum(-2), dim=-1, eps=1e-8),
            own=self._own_vector(image, mask),
            tokens=into(self._merged(torch.cat([patches, colours], -1))),
        )

    def queries(self, image: Tensor, mask: Tensor) -> Pictures:
        return self._pictures(image, mask, self.q_in)

    def documents(self, image: Tensor | Pictures, mask: Tensor) -> Pictures:
        """All of documents' pictures (..., T, C) that no query has a part in. tokens are what `d_in` makes of their places, and of the
        same in the place of what they are minus their best match."""
        if isinstance(image, Pictures):
            return image
        own, apart, _ = self._d_in()
        return self._pictures(image, mask, lambda places: places @ torch.cat([own, apart]).flatten(1).T)

    def _d_in(self) -> tuple[Tensor, Tensor, Tensor]:
        """The weights of `d_in` (D, merge^2, ...): of a place itself, of what it is minus its best match, and of their similarity."""
        size = self.shape.match + COLOURS
        own, apart, best = self.d_in.weight.unflatten(1, (self.shape.merge**2, -1)).split([size, size, 1], 2)
        return own, apart, best

    def _d_inputs(self, q: Pictures, d: Pictures, matched: Matched) -> Tensor:
        """`d_in` of each place, of its difference from its best match, and of their similarity. As it is linear, each part goes in by
        itself, the query's places once and not once a match: (B, M, T', D)."""
        square, (_, apart, best) = self.shape.merge**2, self._d_in()
        places = q.mask.shape[1]
        of_query = torch.cat([q.patches, q.colours], -1) @ apart.transpose(0, 1).flatten(0, 1).T
        of_query = F.pad(of_query, (0, 0, 0, 1)).reshape(-1, self.shape.width)  # one more place, of zeros, for what is not seen
        start = torch.arange(len(q.mask), device=q.mask.device)[:, None, None, None] * (places + 1) * square
        where = self._merged(matched.where.masked_fill(~matched.seen, places).unsqueeze(-1))
        rows = where * square + torch.arange(square, device=where.device) + start
        taken = F.embedding_bag(rows.view(-1, square), of_query, mode="sum")
        own, same = d.tokens.chunk(2, -1)
        similar = self._merged((matched.best * matched.seen).unsqueeze(-1)) @ best.squeeze(2).T
        seen = matched.seen.any(2).to(own.dtype)[..., None, None]
        return torch.addcmul(own + self.d_in.bias, same, seen) - taken.view(own.shape) + similar

    def sequences(self, batch: Batch) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
        """Inputs and validity of the queries (B, Lq, D) and of the blocks (B, M, Lb, D), and the features (B, M, F)."""
        q, d = self.queries(batch.q_image, batch.q_mask), self.documents(batch.d_image, batch.d_mask)
        own = (q.own[:, None] * d.own).sum(-1)  # row by row: as a matrix product the last bits would tell a document's place
        trigrams = (trigram_profile(batch.q_text)[:, None] * trigram_profile(batch.d_text)).sum(-1)
        features, matched = self.match(q, d, batch.cosine, own, trigrams)
        q_text, q_text_valid = self._text(batch.q_text)
        d_text, d_text_valid = self._text(batch.d_text)
        q_image, q_image_valid = self._image(q.tokens, q.mask)
        d_image, d_image_valid = self._image(self._d_inputs(q, d, matched), d.mask)
        query = torch.cat([q_text, q_image], 1) + self.role[0]
        index = (self.role[2] - self.role[1]).expand(*d_image.shape[:2], 1, -1)
        blocks = torch.cat([d_text, d_image, index], 2) + self.role[1]
        always = torch.ones_like(d_image_valid[..., :1])
        q_valid = torch.cat([q_text_valid, q_image_valid], 1)
        return (query, q_valid), (blocks, torch.cat([d_text_valid, d_image_valid, always], 2)), features

    def encode(self, batch: Batch) -> Encoded:
        """All that does not depend on which documents are compared. A row holds the query and then its blocks; of the last layer are
        made only the positions that are read."""
        (x, q_valid), (blocks, b_valid), features = self.sequences(batch)
        (queries, count, length), layers = (x.shape[1], *blocks.shape[1:3]), self._layers()
        rows, q_hidden, b_hidden = torch.cat([x, blocks.flatten(1, 2)], 1), *self._hidden(q_valid, b_valid)
        of_query, of_blocks, first = [], [], 0
        for layer in layers:
            normed = layer.norm(rows)
            keys = layer.kv(normed)
            of_query.append(keys[:, :queries])
            of_blocks.append(keys[:, queries:].unflatten(1, (count, length)))
            if layer is layers[-1]:
                first = self._first_read(b_valid)
                rows, normed = (_without(t, queries, count, first) for t in (rows, normed))
            rows = layer.rest(rows, self._seen(layer, layer.q(normed), of_query[-1], of_blocks[-1], q_hidden, b_hidden[:, first:]))
        x, y = self.norm(rows).split([queries, count * (length - first)], 1)
        read = self._read(x, y.unflatten(1, (count, -1)), q_valid, b_valid[..., first:], features)
        return Encoded(query=of_query, blocks=of_blocks, q_valid=q_valid, b_valid=b_valid, **read)

    def _hidden(self, q_valid: Tensor, b_valid: Tensor) -> tuple[Tensor, Tensor]:
        """For `Layer.attended`, 0 where a position sees a key and -inf where not: (B * H, Lq, Lq) and (B * M * H, Lb, Lq + Lb)."""
        own = self_mask(b_valid, index_last=True)
        of_query = q_valid[:, None, None].expand(*own.shape[:-1], -1)
        masks = self_mask(q_valid), torch.cat([of_query, own], -1).flatten(0, 1)
        q_hidden, b_hidden = (torch.where(m, 0.0, -torch.inf).repeat_interleave(self.shape.heads, 0) for m in masks)
        return q_hidden, b_hidden

    def _seen(self, layer: Layer, q: Tensor, of_query: Tensor, of_blocks: Tensor, q_hidden: Tensor, b_hidden: Tensor) -> Tensor:
        """(B, Lq + M * L, D): the query sees itself, each block the query and itself."""
        queries, count = of_query.shape[1], of_blocks.shape[1]
        query, blocks = layer.by_heads(of_query), layer.by_heads(of_blocks)
        keys = torch.cat([query.unsqueeze(2).expand(-1, -1, count, -1, -1, -1), blocks], -2)
        seen = layer.attended(q[:, queries:].unflatten(1, (count, -1)), keys, b_hidden)
        return torch.cat([layer.attended(q[:, :queries], query, q_hidden), seen.flatten(1, 2)], 1)

    def _first_read(self, b_valid: Tensor) -> int:
        """The first position of blocks (B, M, Lb) whose last state is read: that of the picture, where each document has one."""
        first = b_valid.shape[2] - 1 - self.place.shape[0]
        return first if bool(b_valid[..., first:-1].any(-1).all()) else 0

    def _read(self, x: Tensor, y: Tensor, q_valid: Tensor, b_valid: Tensor, features: Tensor) -> dict[str, Tensor]:
        """What Encoded holds of the last states of queries and blocks."""
        z0, zi = self._span(x, q_valid)[:, None].expand(-1, y.shape[1], -1), self._span(y[:, :, :-1], b_valid[:, :, :-1])
        learned = self.linear(features) + self.prior(features)
        levels = learned[..., 1:] + self.level(torch.cat([z0, zi, z0 * zi, (z0 - zi).abs()], -1))
        return {"index": y[:, :, -1], "prior": learned[..., 0], "levels": levels}

    def _span(self, states: Tensor, valid: Tensor) -> Tensor:
        """Mean over the picture's positions, over the text's where there is no picture."""
        text, image = valid.split([valid.shape[-1] - self.place.shape[0], self.place.shape[0]], -1)
        return pooled(states, torch.cat([text & ~image.any(-1, keepdim=True), image], -1))


def _without(rows: Tensor, queries: int, count: int, first: int) -> Tensor:
    """(B, Lq + M * Lb, D) without the positions before `first` of each block."""
    blocks = rows[:, queries:].unflatten(1, (count, -1))[:, :, first:]
    return torch.cat([rows[:, :queries], blocks.flatten(1, 2)], 1)
