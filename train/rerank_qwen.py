"""The two rerankers on the qwen3-vl backbone: listwise, which compares documents, and the pointwise baseline, which judges pairs.

Shapes as in train.rerank_qwen_inputs; in addition C comparisons of m documents each, h key heads of d numbers.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.backbones.qwen3vl import Qwen3VL
from train.rerank_layers import pooled
from train.rerank_merge import Scored, apart
from train.rerank_model import LEVELS
from train.rerank_qwen_blocks import Keys, QwenBlocks, causal, even, last, parts, precise
from train.rerank_qwen_inputs import ANSWER, CLOSING, COMPARE, INDEX, JUDGE, QwenBatch, Tokens, joined

POINTER, HIDDEN = 256, 512  # widths of what is learned beside the model


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """All that does not depend on which documents are compared: a layer's keys and values of the queries (B, h, Lq, d) and of the blocks
    (R, h, L, d), and which tokens of either are there; the place of the answer (B,); the index tokens' final states (R, D); the part of s
    that needs no comparison (R,); the logits of the absolute head (R, LEVELS)."""

    query: list[Keys]
    blocks: list[Keys]
    q_valid: Tensor
    b_valid: Tensor
    answer_at: Tensor
    index: Tensor
    prior: Tensor
    levels: Tensor


def answers(places: Tensor) -> Tokens:
    """One answer token at each position of `places` (R,)."""
    ids = torch.full_like(places, ANSWER)[:, None]
    return Tokens(ids=ids, positions=places[:, None].expand(3, -1, 1), image=torch.full_like(ids, -1))


def full_mask(q_valid: Tensor, b_valid: Tensor) -> Tensor:
    """The whole mask (B, S, S) of prefix, blocks and answer by q_valid (B, Lq) and b_valid (B, M, L), S = Lq + M L + 1: the definition of
    who sees whom. Padding sees what stands before it, which nobody uses."""
    prefix, (count, length) = q_valid.shape[1], b_valid.shape[1:]
    size = prefix + count * length + 1
    mask = torch.zeros(len(q_valid), size, size, dtype=torch.bool, device=q_valid.device)
    mask[:, :prefix, :prefix] = causal(q_valid, prefix)
    for m in range(count):
        own = slice(prefix + m * length, prefix + (m + 1) * length)
        mask[:, own, :prefix] = q_valid[:, None]
        mask[:, own, own] = causal(b_valid[:, m], length)
    mask[:, -1] = torch.cat([q_valid, b_valid.flatten(1), torch.ones_like(q_valid[:, :1])], 1)
    return mask


def _cat(slices: tuple[Keys, ...]) -> Keys:
    """A layer's keys and values of all slices of the documents."""
    return slices[0] if len(slices) == 1 else (torch.cat([k for k, _ in slices]), torch.cat([v for _, v in slices]))


def _behind(query: Tensor, blocks: Tensor) -> Tensor:
    """Keys of C comparisons: the query's (C, h, Lq, d), then those of its m blocks (C, m, h, L, d)."""
    return torch.cat([query, blocks.transpose(1, 2).flatten(2, 3)], 2)


class QwenListwise(QwenBlocks):
    """Compares documents within a list and judges each on an absolute scale of LEVELS (METHOD.md section 3).

    The local score is a pointer, not the index rows of the language head (docs/decisions/0003): all blocks start at one position and
    share one index token, so "1", "2", ... could only name a place in the list, which order-independent blocks do not know, and shuffling
    them in training would teach the model to ignore them. The answer's state against a block's index state is equivariant as it is, and
    needs no vocabulary. s_i = scale * cosine_i + bias + <ask(answer), key(index_i)>, for NULL <ask(answer), null>; products start at zero.
    """

    def __init__(self, backbone: Qwen3VL) -> None:
        super().__init__(backbone, COMPARE, [INDEX], views=1, scores=2, others=LEVELS - 1)
        self.marks = nn.Parameter(backbone.emb.detach().float().repeat(2, 1))  # at first the token that the embedder reads at
        self.ask, self.key = (nn.Linear(backbone.dim, POINTER, bias=False) for _ in range(2))
        self.null = nn.Parameter(torch.randn(POINTER))
        self.level = nn.Sequential(nn.Linear(4 * backbone.dim, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, LEVELS))
        for parameter in (self.ask.weight, *self.level[2].parameters()):
            nn.init.zeros_(parameter)

    def encode(self, batch: QwenBatch, *, share_prefix: bool = True, until: float = math.inf) -> Encoded:
        """The prefixes, then every block once. With `share_prefix` off every block computes its prefix again: the slow way, to compare.
        TimeoutError where time.perf_counter passes `until`."""
        asked, query = self.run(batch.query.tokens, batch.features, None)
        made = [self.blocks(batch, part, query if share_prefix else None) for part in parts(batch, self.slice, until)]
        states = torch.cat([part for part, _ in made])
        index, prior, levels = self._read(batch, asked, states)
        return Encoded(
            query=query,
            blocks=[_cat(layer) for layer in zip(*(keys for _, keys in made), strict=True)],
            q_valid=batch.query.valid,
            b_valid=batch.blocks.valid,
            answer_at=batch.query.extent + self.layout.document.longest,
            index=index,
            prior=prior,
            levels=levels,
        )

    def _read(self, batch: QwenBatch, asked: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of final states of the queries (B, Lq, D) and the blocks (R, L, D): index, prior and levels of Encoded."""
        with precise(states):
            z0, zi = even(pooled(asked.float(), batch.query.span))[batch.owner], even(pooled(states.float(), batch.blocks.span))
            prior = self.prior(batch.cosine[:, None])
            levels = prior[:, 1:] + self.level(torch.cat([z0, zi, z0 * zi, (z0 - zi).abs()], 1))
        return last(states, batch.blocks), prior[:, 0], levels

    def compare(self, encoded: Encoded, picks: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """Local scores (B, C, m) and scores of NULL (B, C) of C comparisons; picks (B, C, m) number the R documents, those where there
        (B, C, m) is False are not seen and score -1e4."""
        count, rows = picks.shape[1], picks.flatten(0, 1)
        owner = torch.arange(len(picks), device=picks.device).repeat_interleave(count)
        of_blocks = (encoded.b_valid[rows] & there.flatten(0, 1)[..., None]).flatten(1)
        mask = F.pad(torch.cat([encoded.q_valid[owner], of_blocks], 1), (0, 1), value=True)[:, None, None]
        pairs = zip(encoded.query, encoded.blocks, strict=True)
        before = ((_behind(kq[owner], kb[rows]), _behind(vq[owner], vb[rows])) for (kq, vq), (kb, vb) in pairs)
        states, _ = self.run(answers(encoded.answer_at[owner]), None, mask, before)
        return self._scores(states.squeeze(1).unflatten(0, (-1, count)), encoded.index[picks], encoded.prior[picks], there)

    def _scores(self, answer: Tensor, index: Tensor, prior: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """The pointer: answer (B, C, D) and index (B, C, m, D) states, prior (B, C, m)."""
        with precise(answer):
            ask, key = self.ask(even(answer)) / POINTER**0.5, self.key(even(index))
            s = prior + torch.einsum("bcp,bcmp->bcm", ask, key)
            return s.masked_fill(~there, -1e4), ask @ self.null

    def forward(self, batch: QwenBatch) -> tuple[Tensor, Tensor, Tensor]:
        """One comparison of all documents of a query: s (B, M), null (B,), levels (B, M, LEVELS)."""
        encoded = self.encode(batch)
        s, null = self.compare(encoded, batch.rows[:, None], (batch.level >= 0)[:, None])
        return s[:, 0], null[:, 0], encoded.levels[batch.rows]

    def forward_full(self, batch: QwenBatch) -> tuple[Tensor, Tensor, Tensor]:
        """The slow twin of `forward`: one sequence of query, blocks and answer under the whole mask, through transformers' own forward. It
        is what a wrapper that shards layers (FSDP) must train with, as it hooks into their own forward."""
        blocks = batch.blocks.tokens.later(batch.query.extent[batch.owner])
        answer = answers(batch.query.extent + self.layout.document.longest)
        sequence = joined([batch.query.tokens, *(blocks.take(rows) for rows in batch.rows.T), answer])
        valid, there = batch.blocks.valid[batch.rows], batch.level >= 0
        states = self.whole(sequence, batch.features, full_mask(batch.query.valid, valid & there[..., None]))
        of_query, of_blocks = batch.query.span.shape[1], valid[0].numel()
        asked, read, answer = states.split([of_query, of_blocks, 1], 1)
        by_place = read.unflatten(1, valid.shape[1:])
        index, prior, levels = self._read(batch, asked, by_place[there])
        s, null = self._scores(answer, index[batch.rows][:, None], prior[batch.rows][:, None], there[:, None])
        return s[:, 0], null[:, 0], levels[batch.rows]


class QwenPointwise(QwenBlocks):
    """The baseline, and the judge: of each pair log P(yes) - log P(no), nothing compared; pictures as a whole and their middle (METHOD.md
    section 3). Of the language head, which is the matrix of embeddings, these two rows are needed alone, and of them the difference."""

    def __init__(self, backbone: Qwen3VL) -> None:
        closing = backbone.tokenizer(CLOSING, add_special_tokens=False)["input_ids"]
        super().__init__(backbone, JUDGE, closing, views=2, scores=1, others=0)
        words = [backbone.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("yes", "no")]
        yes, no = backbone.model.language_model.embed_tokens.weight.detach()[words].float()
        self.yes_over_no = nn.Parameter(yes - no)

    def encode(self, batch: QwenBatch, *, share_prefix: bool = True, until: float = math.inf) -> Tensor:
        """(R,): the logit of yes; as QwenListwise.encode."""
        query = self.run(batch.query.tokens, batch.features, None)[1] if share_prefix else None
        made = [last(self.blocks(batch, part, query)[0], batch.blocks, part) for part in parts(batch, self.slice, until)]
        return self._answers(torch.cat(made), batch)

    def _answers(self, states: Tensor, batch: QwenBatch) -> Tensor:
        with precise(states):
            return states.float() @ self.yes_over_no + self.prior(batch.cosine[:, None])[:, 0]

    def forward(self, batch: QwenBatch) -> Tensor:
        """(B, M): the logit of yes."""
        return self.encode(batch)[batch.rows]

    def forward_full(self, batch: QwenBatch) -> Tensor:
        """The slow twin of `forward`: each pair as one sequence through transformers' own forward."""
        blocks = batch.blocks.tokens.later(batch.query.extent[batch.owner])
        sequence = joined([batch.query.tokens.take(batch.owner), blocks])
        valid = torch.cat([batch.query.valid[batch.owner], batch.blocks.valid], 1)
        states = self.whole(sequence, batch.features, causal(valid, valid.shape[1]))
        return self._answers(last(states[:, -batch.blocks.span.shape[1] :], batch.blocks), batch)[batch.rows]


@torch.inference_mode()
def score(
    model: QwenListwise | QwenPointwise, batch: QwenBatch, *, chunk: int, share_prefix: bool = True, until: float = math.inf
) -> list[Scored]:
    """Score B queries, each against its own documents in canonical order, as train.rerank_score.score does for the compact backbone:
    chunks of `chunk` and one comparison of the `chunk` best by r, all as one batch. Nothing waits for the device before the end.
    TimeoutError where time.perf_counter passes `until`, which is looked at as documents are handed to the device."""
    there, width = batch.level >= 0, batch.level.shape[1]
    counts = there.sum(1)
    if isinstance(model, QwenPointwise):
        logits = model.encode(batch, share_prefix=share_prefix, until=until)[batch.rows].double().cpu().numpy()
        return [apart(logit[:n], chunk) for logit, n in zip(logits, counts.tolist(), strict=True)]
    encoded = model.encode(batch, share_prefix=share_prefix, until=until)
    levels = encoded.levels.double()
    logits = (levels[:, 0] - levels[:, 1:].logsumexp(1))[batch.rows].masked_fill(~there, -torch.inf)
    best = logits.sort(dim=1, descending=True, stable=True).indices[:, :chunk]
    best = F.pad(best.sort(1).values, (0, chunk - best.shape[1]), value=width)
    chunks = torch.arange(-(-width // chunk) * chunk, device=best.device).reshape(1, -1, chunk).expand(len(best), -1, -1)
    every = torch.cat([chunks, best[:, None]], 1)
    rows = batch.rows.gather(1, every.clamp_max(width - 1).flatten(1)).view_as(every)
    s, null = model.compare(encoded, rows, every < counts[:, None, None])
    told = zip(*(each.double().cpu().numpy() for each in (s, null, logits)), best.cpu().numpy(), counts.tolist(), strict=True)
    return [
        Scored(
            chunk=chunk,
            local=of_s[:-1].ravel()[:n],
            null=np.repeat(of_null[:-1], chunk)[:n],
            logit=logit[:n],
            finalists=finalists[: min(n, chunk)],
            final=of_s[-1, : min(n, chunk)],
        )
        for of_s, of_null, logit, finalists, n in told
    ]
