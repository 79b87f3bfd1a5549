"""The reranker's network: the fast path is the masked sequence; r is a document's own; untrained it is the retrieval."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from train.rerank_blocks import Batch, Blocks, Shape
from train.rerank_match import COLOURS
from train.rerank_model import MODELS, Kind, ListwiseReranker, PointwiseReranker

SHAPE = Shape(tokens=36, channels=24, vocabulary=260, width=32, layers=2, heads=4, match=16, text_length=16)


def batch(queries: int = 3, documents: int = 7, *, seed: int = 0) -> Batch:
    """Random pictures and texts; some places dropped, some pictures and texts missing, one document with neither."""
    g = torch.Generator().manual_seed(seed)
    d_mask = torch.rand(queries, documents, 36, generator=g) > 0.2
    d_text = torch.randint(4, 260, (queries, documents, 13), generator=g)
    d_mask[:, 1], d_mask[:, 2] = False, False
    d_text[:, 2], d_text[:, 3, 5:] = 0, 0
    q_mask = torch.rand(queries, 36, generator=g) > 0.1
    q_text = torch.randint(4, 260, (queries, 9), generator=g)
    q_mask[1], q_text[0] = False, 0
    return Batch(
        q_image=torch.randn(queries, 36, 24, generator=g),
        q_mask=q_mask,
        q_text=q_text,
        d_image=torch.randn(queries, documents, 36, 24, generator=g),
        d_mask=d_mask,
        d_text=d_text,
        cosine=torch.rand(queries, documents, generator=g),
        level=torch.randint(0, 4, (queries, documents), generator=g),
    )


def of_documents(b: Batch, picks: list[int]) -> Batch:
    names = ("d_image", "d_mask", "d_text", "cosine", "level")
    return dataclasses.replace(b, **{name: getattr(b, name)[:, picks] for name in names})


@pytest.fixture
def model() -> ListwiseReranker:
    """With every weight random: at the start what is learned is zero and would hide all differences."""
    torch.manual_seed(0)
    made = ListwiseReranker(SHAPE).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return made


@torch.inference_mode()
def test_blocks_and_full_mask_agree(model: ListwiseReranker) -> None:
    for one, other in zip(model(batch()), model.forward_full(batch()), strict=True):
        difference = float((one - other).abs().max())
        assert difference < 2e-4, difference
        assert torch.isfinite(one).all()


def all_pictured(b: Batch) -> Batch:
    return dataclasses.replace(b, d_mask=b.d_mask | torch.eye(36, dtype=torch.bool)[0])


@torch.inference_mode()
def test_blocks_and_full_mask_agree_where_texts_are_not_read_last(model: ListwiseReranker) -> None:
    b = all_pictured(batch())
    assert model._first_read(model.sequences(b)[1][1]) > 0
    for one, other in zip(model(b), model.forward_full(b), strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=0)


def share(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum(-1) / mask.sum(-1).clamp_min(1)


def matched_plainly(made: Blocks, b: Batch) -> tuple[Tensor, Tensor]:
    """The definition: features (B, M, F) without the first, the second and the trigrams, and what documents' places go into `d_in` as,
    each with its difference from its best match and their similarity: (B, M, T, C)."""
    assert isinstance(b.d_image, Tensor)
    q, d = made.match.patches(b.q_image, b.q_mask), made.match.patches(b.d_image, b.d_mask)
    q_colours, d_colours = (image[..., -COLOURS:] * mask[..., None] for image, mask in ((b.q_image, b.q_mask), (b.d_image, b.d_mask)))
    there = b.q_mask[:, None, :, None] & b.d_mask[:, :, None]
    sim = torch.einsum("btp,bmsp->bmts", q, d)
    best_q, (best_d, where) = sim.masked_fill(~there, -1).amax(3), sim.masked_fill(~there, -1).max(2)
    apart = (q_colours[:, None, :, None] - d_colours[:, :, None]).norm(dim=-1).masked_fill(~there, 99)
    both, shared = there.any(3).any(2), b.q_mask[:, None] & b.d_mask
    seen, rows = there.any(2), torch.arange(len(q))[:, None, None]
    q_weights, d_weights = made.match.weights(q, b.q_mask)[:, None], made.match.weights(d, b.d_mask)
    shift = (d_colours - q_colours[rows, where]) * seen[..., None]
    worst = best_d.masked_fill(~b.d_mask, 1).sort(2).values[..., : q.shape[1] // 4].mean(2)
    features = [
        *((best_q * q_weights).sum(2), (best_d * d_weights).sum(2), worst),
        *(F.cosine_similarity(q.sum(1)[:, None], d.sum(2), dim=2), share(sim.diagonal(dim1=2, dim2=3), shared)),
        *((apart.amin(3) * q_weights).sum(2), (apart.amin(2) * d_weights).sum(2), (shift.norm(dim=3) * d_weights).sum(2)),
        share((q_colours[:, None] - d_colours).norm(dim=3), shared),
    ]
    rest = [both.float(), b.cosine * ~both]
    places = [d, d_colours, (d - q[rows, where]) * seen[..., None], shift, (best_d * seen)[..., None]]
    return torch.stack([*(value * both for value in features), *rest], 2), torch.cat(places, 3)


@torch.inference_mode()
@pytest.mark.parametrize("changed", [{}, {"tokens": 9, "views": 1}, {"tokens": 72, "views": 2}, {"tokens": 7}])
def test_matches_are_what_their_definition_says(changed: dict[str, int]) -> None:
    torch.manual_seed(0)
    made, b = PointwiseReranker(SHAPE.model_copy(update=changed)).double(), batch()
    assert isinstance(b.d_image, Tensor)
    b = dataclasses.replace(b, q_image=b.q_image.double(), d_image=b.d_image.double())
    torch.nn.init.normal_(made.match.salience.weight)
    number = torch.arange(made.shape.tokens) % 36
    b = dataclasses.replace(b, q_image=b.q_image[:, number], q_mask=b.q_mask[:, number], d_image=b.d_image[:, :, number])
    b = dataclasses.replace(b, d_mask=b.d_mask[:, :, number])
    features, places = matched_plainly(made, b)
    found = made.sequences(b)[2]
    torch.testing.assert_close(torch.cat([found[..., 2:11], found[..., 12:]], 2), features, atol=1e-6, rtol=0)
    inputs = made.d_in(made._merged(places)) + made.place + made.role[1]
    blocks = made.sequences(b)[1][0][:, :, -1 - len(made.place) : -1]
    torch.testing.assert_close(blocks, inputs, atol=1e-9, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("kind", MODELS)
def test_documents_made_before_a_request_are_those_made_in_it(kind: Kind) -> None:
    torch.manual_seed(0)
    made, b = MODELS[kind](SHAPE.model_copy(update={"pooled": 8, "own": 6})).eval(), batch()
    for p in made.parameters():
        p.add_(0.1 * torch.randn_like(p))
    early = dataclasses.replace(b, d_image=made.documents(b.d_image, b.d_mask))
    for begin, end in ((0, 7), (2, 5)):
        one, other = made.encode(b.part(begin, end)), made.encode(early.part(begin, end))
        torch.testing.assert_close(one.levels, other.levels, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.prior, other.prior, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_r_depends_on_neither_chunk_mates_nor_order(model: ListwiseReranker) -> None:
    b = batch()
    alone = torch.cat([model(of_documents(b, [i]))[2] for i in range(7)], 1)
    shuffled = model(of_documents(b, [4, 2, 6, 0, 1, 5, 3]))[2][:, [3, 4, 1, 6, 0, 5, 2]]
    assert float((model(b)[2].softmax(-1) - alone.softmax(-1)).abs().max()) < 1e-4
    assert float((model(b)[2].softmax(-1) - shuffled.softmax(-1)).abs().max()) < 1e-4


@torch.inference_mode()
def test_local_scores_follow_the_documents_and_do_depend_on_the_others(model: ListwiseReranker) -> None:
    b = batch()
    s, null, _ = model(b)
    order = [4, 2, 6, 0, 1, 5, 3]
    shuffled, null_shuffled, _ = model(of_documents(b, order))
    torch.testing.assert_close(shuffled, s[:, order], atol=1e-4, rtol=0)
    torch.testing.assert_close(null_shuffled, null, atol=1e-4, rtol=0)
    assert float((model(of_documents(b, [0, 1, 2]))[0] - s[:, :3]).abs().max()) > 1e-3, "a comparison sees the other documents"


@torch.inference_mode()
def test_places_without_a_document_change_nothing(model: ListwiseReranker) -> None:
    b = batch()
    level = b.level.clone()
    level[:, 5:] = -1
    padded, fewer = model(dataclasses.replace(b, level=level)), model(of_documents(b, [0, 1, 2, 3, 4]))
    torch.testing.assert_close(padded[0][:, :5], fewer[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(padded[1], fewer[1], atol=1e-4, rtol=0)


@torch.inference_mode()
def test_padding_of_texts_changes_nothing(model: ListwiseReranker) -> None:
    b = batch()
    longer = dataclasses.replace(b, d_text=torch.nn.functional.pad(b.d_text, (0, 3)), q_text=torch.nn.functional.pad(b.q_text, (0, 7)))
    for one, other in zip(model(b), model(longer), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_untrained_order_is_the_retrievals() -> None:
    b = batch()
    s, _, _ = ListwiseReranker(SHAPE).eval()(b)
    torch.testing.assert_close(s, 20 * b.cosine)


def test_index_tokens_are_not_seen_by_what_r_pools() -> None:
    torch.manual_seed(0)
    made = ListwiseReranker(SHAPE)
    with torch.no_grad():
        made.level[2].weight.normal_()
    made(batch())[2].sum().backward()
    assert made.role.grad is not None
    assert float(made.role.grad[2].abs().max()) == 0
    assert float(made.role.grad[1].abs().max()) > 0


@pytest.mark.parametrize("kind", MODELS)
def test_every_weight_takes_part_in_the_losses(kind: Kind) -> None:
    """DistributedDataParallel waits for a gradient of every parameter, also where no query has a text."""
    made = MODELS[kind](SHAPE)
    b = batch()
    for one in (b, dataclasses.replace(b, q_text=torch.zeros_like(b.q_text), d_text=torch.zeros_like(b.d_text))):
        made.zero_grad()
        said = made(one)
        torch.stack([part.sum() for part in (said if isinstance(said, tuple) else [said])]).sum().backward()
        assert [name for name, p in made.named_parameters() if p.grad is None] == []


@torch.inference_mode()
def test_a_pair_is_judged_by_itself_and_untrained_by_its_cosine() -> None:
    made, b = PointwiseReranker(SHAPE).eval(), batch()
    torch.testing.assert_close(made(b), 20 * b.cosine)
    torch.manual_seed(1)
    for p in made.parameters():
        p.add_(0.3 * torch.randn_like(p))
    torch.testing.assert_close(made(of_documents(b, [4, 2])), made(b)[:, [4, 2]], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_two_views_are_read_place_by_place() -> None:
    """Neighbours are merged within a view, never across two."""
    made = PointwiseReranker(SHAPE.model_copy(update={"tokens": 72, "views": 2}))
    patches = torch.randn(2, 72, 5)
    one = PointwiseReranker(SHAPE)
    torch.testing.assert_close(made._merged(patches), torch.cat([one._merged(patches[:, :36]), one._merged(patches[:, 36:])], 1))
