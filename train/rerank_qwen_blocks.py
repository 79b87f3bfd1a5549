"""What the rerankers of the qwen3-vl backbone share: a query as a prefix, a block a document behind it, and who sees whom.

As in train.rerank_blocks (METHOD.md sections 3 and 6): the prefix is causal; every block starts at the position behind it, whatever its
place in the list, and sees the prefix and itself causally. So keys and values of a prefix are made once a request and serve all blocks,
and those of a block, made once, serve any number of comparisons. Shapes as in train.rerank_qwen_inputs; in addition h key heads of d
numbers, S keys in all.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from train.backbones.qwen3vl import Qwen3VL
from train.rerank_blocks import COSINES
from train.rerank_qwen_inputs import Layout, QwenBatch, Rows, Tokens, joined

SLICE = 128  # documents at a time, which bounds memory for long lists
INDIFFERENT = 0.5  # the cosine at which a document is as good as none, before training
Keys = tuple[Tensor, Tensor]


def scaled(norm: Any, x: Tensor) -> Tensor:
    """A Qwen3VLTextRMSNorm by torch's own kernel, one pass over memory in place of six, which takes weights of the type of x alone."""
    if x.dtype != norm.weight.dtype:
        return norm(x)
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def decode(layer: Any, x: Tensor, rotary: Keys, mask: Tensor | None, before: Keys | None) -> tuple[Tensor, Tensor, Tensor]:
    """Qwen3VLTextDecoderLayer by its own modules: x (R, L, D) sees `before` (R or 1, h, S - L, d) and itself where the mask
    (R or 1, 1, L, S) is True, causally without one. The new x, and its own keys and values."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb

    at, normal = layer.self_attn, scaled(layer.input_layernorm, x)
    shape = (*x.shape[:-1], -1, at.head_dim)
    q = scaled(at.q_norm, at.q_proj(normal).view(shape)).transpose(1, 2)
    k = scaled(at.k_norm, at.k_proj(normal).view(shape)).transpose(1, 2)
    q, k = apply_rotary_pos_emb(q, k, *rotary)
    v = at.v_proj(normal).view(shape).transpose(1, 2)
    earlier = ([], []) if before is None else ([each.expand(len(x), -1, -1, -1)] for each in before)
    keys, values = (torch.cat([*past, own], 2) for past, own in zip(earlier, (k, v), strict=True))
    seen, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](at, q, keys, values, mask, scaling=at.scaling)
    x = x + at.o_proj(seen.flatten(2))
    return x + layer.mlp(scaled(layer.post_attention_layernorm, x)), k, v


def causal(valid: Tensor, length: int) -> Tensor:
    """(R, S) -> (R, length, S): the last `length` positions see the valid ones that are not behind themselves."""
    size = valid.shape[1]
    return valid[:, None] & torch.ones(length, size, dtype=torch.bool, device=valid.device).tril(size - length)


def even(states: Tensor) -> Tensor:
    """(..., D) float32 of one size: a few numbers of a language model's states outweigh all others."""
    return F.layer_norm(states.float(), states.shape[-1:])


def last(states: Tensor, rows: Rows, part: slice = slice(None)) -> Tensor:
    """(r, L, D) -> (r, D): the state of each row's last token; states are of some `part` of the rows."""
    return states[torch.arange(len(states), device=states.device), rows.last[part]]


def parts(batch: QwenBatch, size: int, until: float) -> Iterator[slice]:
    """Slices of the documents: blocks do not see one another, so nothing changes. TimeoutError where time.perf_counter passes `until`."""
    for start in range(0, len(batch.owner), size):
        if time.perf_counter() > until:
            raise TimeoutError("the time for reranking is over")
        yield slice(start, start + size)


def precise(states: Tensor) -> torch.autocast:
    """Heads compute in float32, whatever the model computes in."""
    return torch.autocast(states.device.type, enabled=False)


class QwenBlocks(nn.Module):
    """The vision tower stands still, so that a picture's features can be kept; the language model or its adapters are trained. Heads are
    float32. Both rerankers start from the order of retrieval, so that only what they see is compared.

    `decode` may be replaced by what torch.compile makes of it; `slice` is how many documents are encoded at a time."""

    def __init__(self, backbone: Qwen3VL, instruction: str, closing: Sequence[int], *, views: int, scores: int, others: int) -> None:
        super().__init__()
        backbone.train_only(images=False, texts=True)
        backbone.emb.requires_grad_(False)
        self.backbone, self.decode, self.slice = backbone, decode, SLICE
        self.layout = Layout(backbone.turns, instruction, closing, views=views)
        self.marks: nn.Parameter | None = None  # the rows of INDEX and ANSWER
        self.prior = nn.Linear(1, scores + others)
        with torch.no_grad():
            for parameter, value in ((self.prior.weight, COSINES), (self.prior.bias, -COSINES * INDIFFERENT)):
                parameter.zero_()[:scores] = value

    def embed(self, tokens: Tokens) -> Tensor:
        """(R, L, D), without pictures."""
        x = self.backbone.model.language_model.embed_tokens(tokens.ids.clamp_min(0))
        if self.marks is None:
            return x
        own = self.marks[(-1 - tokens.ids).clamp_min(0)].to(x.dtype)
        return torch.where((tokens.ids < 0)[..., None], own, x)

    def inputs(self, tokens: Tokens, features: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Inputs (R, L, D), and what is added behind each of the first layers, zero where there is no picture."""
        x = self.embed(tokens)
        if features is None or not len(features):
            return x, []
        there, rows = (tokens.image >= 0)[..., None], tokens.image.clamp_min(0)
        first, *deep = (part.flatten(0, 1).to(x.dtype)[rows] for part in features.unbind(1))
        return torch.where(there, first, x), [part * there for part in deep]

    def run(
        self, tokens: Tokens, features: Tensor | None, mask: Tensor | None, before: Iterable[Keys | None] | None = None
    ) -> tuple[Tensor, list[Keys]]:
        """Final states (R, L, D) and each layer's keys and values, of tokens that see those `before` them, a pair a layer."""
        language = self.backbone.model.language_model
        x, deep = self.inputs(tokens, features)
        rotary, own = language.rotary_emb(x, tokens.positions), []
        frugal = self.training and self.backbone.config.gradient_checkpointing
        for n, (layer, earlier) in enumerate(zip(language.layers, before or [None] * len(language.layers), strict=True)):
            told = (layer, x, rotary, mask, earlier)
            x, k, v = checkpoint(self.decode, *told, use_reentrant=False) if frugal else self.decode(*told)
            own.append((k, v))
            x = x + deep[n] if n < len(deep) else x
        return language.norm(x), own

    def whole(self, tokens: Tokens, features: Tensor, mask: Tensor) -> Tensor:
        """The slow twin of `run`: transformers' own forward under the whole mask (R, S, S)."""
        x, deep = self.inputs(tokens, features)
        image = tokens.image >= 0
        told = {"visual_pos_masks": image, "deepstack_visual_embeds": [part[image] for part in deep]} if deep else {}
        made = self.backbone.model.language_model(
            inputs_embeds=x, position_ids=tokens.positions, attention_mask=mask[:, None], use_cache=False, **told
        )
        return made.last_hidden_state

    def blocks(self, batch: QwenBatch, part: slice, query: list[Keys] | None) -> tuple[Tensor, list[Keys]]:
        """Final states and keys and values of some of the blocks, behind the prefix `query`; without one, each computes it for itself."""
        owner, rows, length = batch.owner[part], batch.blocks.tokens.take(part), batch.blocks.span.shape[1]
        rows, alone = rows.later(batch.query.extent[owner]), len(batch.query.last) == 1
        valid = F.pad(batch.query.valid if alone else batch.query.valid[owner], (0, length), value=True)
        if query is not None:
            before = ((k, v) if alone else (k[owner], v[owner]) for k, v in query)
            return self.run(rows, batch.features, causal(valid, length)[:, None], before)
        mask = None if alone else causal(valid, valid.shape[1])[:, None]
        states, keys = self.run(joined([batch.query.tokens.take(owner), rows]), batch.features, mask)
        return states[:, -length:], [(k[:, :, -length:], v[:, :, -length:]) for k, v in keys]
