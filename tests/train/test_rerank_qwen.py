"""The rerankers of the qwen3-vl backbone on a tiny checkpoint: transformers' own forward under the whole mask is the slow twin."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import rerank_qwen as bench
from train import backbones, rerank_losses
from train.backbones import lora
from train.backbones.qwen3vl import Qwen3VL, Qwen3VLConfig
from train.rerank_merge import Choice, arrange
from train.rerank_qwen import QwenListwise, QwenPointwise, full_mask, score
from train.rerank_qwen_blocks import QwenBlocks, decode
from train.rerank_qwen_inputs import Item, QwenBatch, moved, picture_features, positions

MODELS = (QwenListwise, QwenPointwise)
TITLES = ("a red mug", "<|image_pad|> mug, 300 ml, as sellers write", "x")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def opened(folder: Path, **changed: object) -> Qwen3VL:
    small = {"path": str(folder), "dim": 32, "image_tokens": 5, "text_length": 24, "lora_rank": 4, "gradient_checkpointing": False}
    torch.manual_seed(0)
    made = backbones.build(Qwen3VLConfig.model_validate({**small, **changed}))
    assert isinstance(made, Qwen3VL)
    return made


def shaken(model: nn.Module) -> nn.Module:
    """With every weight random that is trained: at the start what is learned is zero and would hide all differences."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model.eval()


@pytest.fixture(scope="module")
def backbone(qwen_folder: Path) -> Qwen3VL:
    return opened(qwen_folder)


@pytest.fixture(scope="module")
def listwise(qwen_folder: Path) -> QwenListwise:
    return shaken(QwenListwise(opened(qwen_folder)))  # pyright: ignore[reportReturnType]


@pytest.fixture(scope="module")
def pointwise(qwen_folder: Path) -> QwenPointwise:
    return shaken(QwenPointwise(opened(qwen_folder)))  # pyright: ignore[reportReturnType]


def features(backbone: Qwen3VL, count: int = 8) -> Tensor:
    random = torch.Generator().manual_seed(1)
    return picture_features(backbone, torch.randint(0, 256, (count, backbone.side, backbone.side, 3), dtype=torch.uint8, generator=random))


QUERIES = (Item(text="red mug", pictures=(0,)), Item(text="a longer question about a mug"), Item(pictures=(1,)))
DOCUMENTS = (Item(text=TITLES[0], pictures=(2,)), Item(text=TITLES[1]), Item(pictures=(3,)), Item(), Item(text=TITLES[2], pictures=(4,)))
COSINES = (0.9, 0.7, 0.6, 0.55, 0.5)


def requests(model: QwenBlocks, queries: Sequence[Item] = QUERIES, picks: Sequence[Sequence[int]] | None = None) -> QwenBatch:
    """The documents of each query by their numbers in DOCUMENTS."""
    picks = picks or [[0, 1, 2, 3, 4], [4, 3], [2, 0, 1]]
    pair = isinstance(model, QwenPointwise)
    documents = [dataclasses.replace(d, pictures=(*d.pictures, *(5 for _ in d.pictures))) if pair else d for d in DOCUMENTS]
    return model.layout.batch(
        queries,
        [[documents[i] for i in each] for each in picks],
        features(model.backbone),
        [[COSINES[i] for i in each] for each in picks],
        [[i % 4 for i in each] for each in picks],
    )


def levels(model: QwenListwise, query: Item, picks: Sequence[int]) -> Tensor:
    return model(requests(model, [query], [picks]))[2][0].softmax(-1)


def difference(one: Tensor, other: Tensor) -> float:
    assert torch.isfinite(one).all()
    return float((one - other).abs().max())


def test_positions_are_those_of_transformers(listwise: QwenListwise) -> None:
    model = listwise.backbone.model
    start, image = 3, listwise.backbone.turns.image
    row = torch.tensor([[1, 2, start, *[image] * 4, 5, 6, start, *[image] * 4, 7, 8]])
    grid = torch.tensor([[1, 4, 4]] * 2)
    expected, _ = model.get_rope_index(row, (row == image).int(), image_grid_thw=grid, attention_mask=torch.ones_like(row))
    assert positions((row == image).numpy(), 2).tolist() == expected.tolist()


def test_a_request_reads_as_it_should(listwise: QwenListwise, pointwise: QwenPointwise) -> None:
    batch, tokenizer = requests(pointwise), pointwise.backbone.tokenizer
    query, block = (tokenizer.decode(rows.tokens.ids[0][: rows.last[0] + 1]) for rows in (batch.query, batch.blocks))
    image = "<|vision_start|>" + 4 * "<|image_pad|>" + "<|vision_end|>"
    asked = "Is the document the very same product as the query? Answer yes or no."
    assert query == f"<|im_start|>system\n{asked}<|im_end|>\n<|im_start|>user\nQuery:red mug{image}"
    assert block == f"\nDocument:a red mug{image}{image}<|im_end|>\n<|im_start|>assistant\n"
    assert batch.blocks.tokens.image[0].unique().tolist() == [-1, *range(8, 12), *range(20, 24)], "of pictures 2 and 5"
    assert batch.blocks.span.sum(1)[:5].tolist() == [8, 24, 8, 0, 8], "words are pooled where there is no picture"
    rows = requests(listwise).blocks
    assert (rows.tokens.ids[torch.arange(len(rows.last)), rows.last] == -1).all(), "the index token ends a block"
    with pytest.raises(ValueError, match="an item has 2 pictures here; at most 1 are read"):
        listwise.layout.document.rows([Item(pictures=(0, 1))])
    with pytest.raises(ValueError, match="query 1 has no documents"):
        requests(listwise, QUERIES[:2], [[0], []])


def test_the_mask_of_a_list_is_this_one() -> None:
    mask = full_mask(torch.tensor([[True, True, False]]), torch.tensor([[[True, True], [True, False]]]))[0]
    assert [[int(x) for x in row] for row in mask] == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],  # padding
        [1, 1, 0, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 0, 1, 0, 0],  # padding
        [1, 1, 0, 1, 1, 1, 0, 1],
    ]


@torch.inference_mode()
def test_blocks_and_transformers_under_the_whole_mask_agree(listwise: QwenListwise, pointwise: QwenPointwise) -> None:
    batch = requests(listwise)
    there = batch.level >= 0
    (s, null, judged), (s_twin, null_twin, judged_twin) = listwise(batch), listwise.forward_full(batch)
    assert max(difference(s, s_twin), difference(null, null_twin), difference(judged[there], judged_twin[there])) < 1e-4
    pairs = requests(pointwise)
    assert difference(pointwise(pairs)[there], pointwise.forward_full(pairs)[there]) < 1e-4


@torch.inference_mode()
@pytest.mark.parametrize("query", range(3))
def test_r_depends_on_neither_chunk_mates_nor_order_nor_padding(listwise: QwenListwise, query: int) -> None:
    asked, order = QUERIES[query], [4, 2, 0, 1, 3]
    together = levels(listwise, asked, range(5))
    alone = torch.cat([levels(listwise, asked, [i]) for i in range(5)])
    assert difference(together, alone) < 1e-4
    assert difference(levels(listwise, asked, order), together[order]) < 1e-4
    beside = listwise(requests(listwise, QUERIES, [range(5)] * 3))[2][query].softmax(-1)
    assert difference(beside, together) < 1e-4
    assert float((together[0] - together[1]).abs().max()) > 1e-3


@torch.inference_mode()
def test_local_scores_follow_the_documents_and_do_depend_on_the_others(listwise: QwenListwise) -> None:
    order = [4, 2, 0, 1, 3]
    (s, null, _), (shuffled, null_shuffled, _) = (listwise(requests(listwise, QUERIES[:1], [p])) for p in ([0, 1, 2, 3, 4], order))
    assert max(difference(shuffled, s[:, order]), difference(null_shuffled, null)) < 1e-4
    assert float((listwise(requests(listwise, QUERIES[:1], [[0, 1, 2]]))[0] - s[:, :3]).abs().max()) > 1e-3


@torch.inference_mode()
def test_what_a_document_is_pooled_from_does_not_see_its_index_token(listwise: QwenListwise) -> None:
    before = listwise(requests(listwise))
    rows = listwise.marks
    assert rows is not None
    kept = rows.clone()
    rows.data += 1
    after = listwise(requests(listwise))
    rows.data.copy_(kept)
    assert torch.equal(before[2], after[2])
    assert float((before[0] - after[0]).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["listwise", "pointwise"])
def test_a_shared_prefix_gives_what_repeated_ones_give_and_slices_change_nothing(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: QwenListwise | QwenPointwise = request.getfixturevalue(name)

    def made(queries: Sequence[Item], picks: Sequence[Sequence[int]], share: bool = True) -> list[np.ndarray]:
        scored = score(model, requests(model, queries, picks), chunk=2, share_prefix=share)
        return [np.concatenate([x.local, x.null, x.logit, x.finalists, x.final]) for x in scored]

    several = (QUERIES, [[0, 1, 2, 3, 4], [4, 3], [2, 0, 1]])
    together = made(*several)
    alone = [made([q], [p])[0] for q, p in zip(*several, strict=True)]
    assert max(np.abs(a - b).max() for a, b in zip(together, alone, strict=True)) < 1e-4
    assert max(np.abs(a - b).max() for a, b in zip(together, made(*several, share=False), strict=True)) < 1e-4
    assert np.abs(alone[0] - made(QUERIES[:1], [range(5)], share=False)[0]).max() < 1e-4
    monkeypatch.setattr(model, "slice", 3)
    assert max(np.abs(a - b).max() for a, b in zip(together, made(*several), strict=True)) < 1e-4


@torch.inference_mode()
def test_a_score_is_made_of_chunks_and_one_last_comparison(listwise: QwenListwise) -> None:
    (found,) = score(listwise, requests(listwise, QUERIES[:1], [range(5)]), chunk=2)
    r = levels(listwise, QUERIES[0], range(5))[:, 0].double().numpy()
    assert np.allclose(1 / (1 + np.exp(-found.logit)), r, atol=1e-4)
    assert found.finalists.tolist() == sorted(np.argsort(-r)[:2].tolist())
    for picks, s in ([0, 1], found.local[:2]), ([2, 3], found.local[2:4]), ([4], found.local[4:]), (found.finalists.tolist(), found.final):
        of_s, null, _ = listwise(requests(listwise, QUERIES[:1], [picks]))
        assert np.allclose(of_s[0], s, atol=1e-4)
        assert picks == found.finalists.tolist() or np.allclose(null, found.null[picks], atol=1e-4)
    assert sorted(arrange(found, Choice())) == list(range(5))
    with pytest.raises(TimeoutError, match="the time for reranking is over"):
        score(listwise, requests(listwise), chunk=2, until=0.0)


@torch.inference_mode()
@pytest.mark.parametrize("kind", MODELS)
def test_untrained_it_is_retrieval(backbone: Qwen3VL, kind: Callable[[Qwen3VL], QwenListwise | QwenPointwise]) -> None:
    model = kind(backbone).eval()
    if isinstance(model, QwenPointwise):
        model.yes_over_no.zero_()  # a random backbone's answer means nothing
    (found,) = score(model, requests(model, QUERIES[:1], [range(5)]), chunk=2)
    assert arrange(found, Choice()) == [0, 1, 2, 3, 4]
    assert found.finalists.tolist() == [0, 1]


def loss(model: QwenBlocks, batch: QwenBatch) -> Tensor:
    made = model(batch)
    if isinstance(made, Tensor):
        return rerank_losses.yes_no(made, batch.level)["loss"]
    s, null, judged = made
    return rerank_losses.all_of(s, null, judged, batch.level)["loss"]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("changed", [{}, {"gradient_checkpointing": True}, {"lora_rank": 0}])
def test_training_lowers_the_loss_and_reaches_what_is_trained(
    qwen_folder: Path, kind: Callable[[Qwen3VL], QwenBlocks], changed: dict[str, object]
) -> None:
    model = kind(opened(qwen_folder, **changed)).train()
    batch = requests(model, [QUERIES[i] for i in (0, 1, 2, 0)], [[0, 1, 2], [2, 3, 4], [4, 0, 1], [3, 2]])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any(lora.MARK in name for name in trained) == ("lora_rank" not in changed)
    assert not any("visual." in name for name in trained)
    assert all(p.dtype == torch.float32 for p in trained.values())
    optimizer = torch.optim.AdamW(trained.values(), lr=3e-3)
    seen = []
    for _ in range(5):
        optimizer.zero_grad()
        value = loss(model, batch)
        value.backward()
        assert {name for name, p in trained.items() if p.grad is None} == set()
        optimizer.step()
        seen.append(value.item())
    assert seen[-1] < seen[0]
    assert all(float(p.grad.abs().max()) > 0 for p in trained.values() if p.grad is not None)


def test_checkpointed_activations_give_the_same_gradients(qwen_folder: Path) -> None:
    found = []
    for frugal in (False, True):
        model = shaken(QwenListwise(opened(qwen_folder, gradient_checkpointing=frugal))).train()
        assert isinstance(model, QwenListwise)
        loss(model, requests(model)).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0])


class Sizes(TorchDispatchMode):
    """Shapes of all that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.seen |= {
            size for each in (made if isinstance(made, tuple | list) else (made,)) if isinstance(each, Tensor) for size in each.shape
        }
        return made


@torch.no_grad()
@pytest.mark.parametrize("name", ["listwise", "pointwise"])
def test_nothing_of_the_size_of_the_vocabulary_is_made(name: str, request: pytest.FixtureRequest) -> None:
    model: QwenBlocks = request.getfixturevalue(name)
    assert not hasattr(model.backbone.model, "lm_head")
    with Sizes() as sizes:
        model(requests(model))
    assert 32 in sizes.seen
    assert model.backbone.model.config.text_config.vocab_size not in sizes.seen


@torch.inference_mode()
def test_in_bf16_heads_stay_precise(qwen_folder: Path) -> None:
    model = shaken(QwenListwise(opened(qwen_folder, dtype="bf16", lora_rank=0)))
    whole = shaken(QwenListwise(opened(qwen_folder, lora_rank=0)))
    assert isinstance(model, QwenListwise)
    assert isinstance(whole, QwenListwise)
    assert features(model.backbone).dtype == torch.bfloat16
    made = model(requests(model))
    assert all(each.dtype == torch.float32 for each in made)
    assert difference(made[2], whole(requests(whole))[2]) < 0.3
    with torch.autocast("cpu", torch.bfloat16):
        assert all(each.dtype == torch.float32 for each in whole(requests(whole)))


def test_one_graph_serves_all_layers(listwise: QwenListwise) -> None:
    """As the GPU needs it: a layer's number must not make another graph of it."""
    counter = CompileCounter()
    torch._dynamo.reset()
    listwise.decode = torch.compile(decode, backend=counter, fullgraph=True)
    try:
        with torch.inference_mode():
            listwise(moved(requests(listwise, QUERIES[:1], [[0, 1]]), "cpu"))
    finally:
        listwise.decode = decode
        torch._dynamo.reset()
    assert counter.frame_count <= 4, "prefix, blocks, comparison"


@torch.inference_mode()
def test_flops_of_the_benchmark_are_those_that_torch_counts(qwen_folder: Path) -> None:
    model = QwenListwise(opened(qwen_folder, lora_rank=0))
    batch, config = requests(model, QUERIES[:1], [[0, 0, 0]]), model.backbone.model.config  # of one length: no padding
    ours = bench.flops(config, batch.query, batch.blocks, bench.Case(documents=3), image_tokens=4)
    text, lengths = config.text_config, (batch.query.last + 1, batch.blocks.last + 1)
    for name, length, once in (
        ("prefix", lengths[0], None),
        ("blocks", lengths[1], model.run(batch.query.tokens, batch.features, None)[1]),
    ):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.blocks(batch, slice(None), once) if once else model.run(batch.query.tokens, batch.features, None)
        unseen = (
            2 * int((length**2).sum()) * text.num_hidden_layers * text.num_attention_heads * text.head_dim
        )  # no causal half is known there
        assert ours[name] + unseen == pytest.approx(counter.get_total_flops(), rel=1e-3)
    assert ours["comparisons"] > 0
    assert bench.flops(config, batch.query, batch.blocks, bench.Case(documents=3, shared=False), image_tokens=4)["blocks"] > ours["blocks"]


def test_a_tiny_run_of_the_benchmark_measures_every_case(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    done = subprocess.run([sys.executable, "-m", bench.JOB, "--tiny", "--out", str(out)], capture_output=True, text=True, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["ok"]
    assert json.loads(out.read_text())["runs"] == said["runs"]
    assert [run["case"] for run in said["runs"]] == [case.name for case in bench.cases((3, 12), compiled=False)]
    assert all(run["ms"] > 0 and run["bound_ms"] > 0 for run in said["runs"])
    assert said["picture_bytes"] == 3 * 4 * 32 * 2, "the image tokens and two layers of DeepStack, in bf16"
    assert {figure["peer"].split(",")[0] for figure in said["figures"]} == {"listwise 3", "pointwise 3", "listwise 12", "pointwise 12"}


def test_the_benchmark_needs_neither_ray_nor_an_index_nor_tables() -> None:
    heavy = "{'ray', 'faiss', 'lance', 'lance_ray', 'pyarrow'}"
    code = f"import sys, {bench.JOB}; sys.exit(repr({heavy} & set(sys.modules)) if {heavy} & set(sys.modules) else 0)"
    subprocess.run([sys.executable, "-c", code], check=True)
