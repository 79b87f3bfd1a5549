"""The reader: always a full permutation, never an exception for bad input, and the order of the input tells nothing."""

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from idem import manifest
from idem.types import Document, Query
from train.backbones.compact import VOCABULARY, Compact, CompactConfig
from train.embedder import Embedder
from train.rerank_data import KINDS, Kind
from train.rerank_merge import Choice
from train.rerank_model import ListwiseReranker, Shape
from train.rerank_select import RETRIEVAL, Served
from train.reranker import IdentityReranker, Reranker, TokenCache, canonical

SERVED: dict[Kind, Served] = {kind: Served(choice=Choice(merge="isotonic")) for kind in KINDS}
TINY = CompactConfig(side=32, widths=(8, 8, 8, 8), dim=16, text_dim=16, text_layers=1)


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((40, 40)).save(out, "PNG")
    return out.getvalue()


def documents(count: int) -> list[Document]:
    scores = np.random.default_rng(9).uniform(0, 1, count).round(2)  # with ties
    return [Document(item_id=f"i{i}", text=f"a red cup {i}", image=picture(i), score=float(scores[i])) for i in range(count)]


def make(served: dict[Kind, Served] = SERVED, *, cache_bytes: int = 1 << 24) -> Reranker:
    torch.manual_seed(0)
    embedder = Embedder(Compact(TINY))
    tokens, channels = embedder.token_shape
    model = ListwiseReranker(Shape(tokens=tokens, channels=channels, vocabulary=VOCABULARY, width=32, heads=4, match=8, text_length=16))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return Reranker(model, embedder, served=served, chunk=10, cache_bytes=cache_bytes)


@pytest.fixture(scope="module")
def reranker() -> Reranker:
    return make()


def whole(order: Sequence[int], count: int) -> bool:
    return sorted(order) == list(range(count))


QUERIES = [Query(image=picture(100)), Query(text="red cup"), Query(image=picture(100), text="red cup"), Query(image=b"no picture")]


@pytest.mark.parametrize("count", [0, 1, 2, 10, 11, 23])
@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("mode", ["listwise", "pointwise"])
def test_a_full_permutation_whatever_is_asked(reranker: Reranker, count: int, query: Query, mode: str) -> None:
    ranking = reranker.rerank(query, documents(count), mode=mode)  # type: ignore[arg-type]
    assert whole(ranking.order, count)
    assert len(ranking.relevance) == len(ranking.null) == count
    assert all(0 <= r <= 1 for r in ranking.relevance)
    assert all(math.isfinite(margin) for margin in ranking.null)


def test_a_thousand_documents() -> None:
    ranking = make().rerank(QUERIES[0], documents(1000))
    assert whole(ranking.order, 1000)


@pytest.mark.parametrize("mode", ["listwise", "pointwise"])
def test_the_order_of_the_input_tells_nothing(reranker: Reranker, mode: str) -> None:
    shown = [*documents(23), *documents(3)]  # duplicates too
    shown.append(Document(item_id="i0", text="another", image=None, score=shown[0].score))
    told = reranker.rerank(QUERIES[2], shown, mode=mode)  # type: ignore[arg-type]
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(shown))
        again = reranker.rerank(QUERIES[2], [shown[i] for i in order], mode=mode)  # type: ignore[arg-type]
        assert [shown[order[i]] for i in again.order] == [shown[i] for i in told.order]
        np.testing.assert_array_equal(np.array(again.relevance)[np.argsort(order)], told.relevance)


def test_r_is_the_documents_own(reranker: Reranker) -> None:
    shown = documents(23)
    told = reranker.rerank(QUERIES[2], shown).relevance
    alone = [reranker.rerank(QUERIES[2], [d]).relevance[0] for d in shown]
    assert float(np.abs(np.array(told) - alone).max()) < 1e-4
    assert np.std(told) > 1e-3, "a constant r would pass"


def test_bad_documents_are_counted_and_kept() -> None:
    reranker = make()
    good = documents(4)
    bad = [
        Document(item_id="nothing", text="", image=None, score=0.5),
        Document(item_id="broken", text="cup", image=b"\x89PNG broken", score=0.4),
        Document(item_id="nan", text="cup", image=picture(3), score=math.nan),
        Document(item_id="surrogate", text="\ud800", image=None, score=math.inf),
        Document(item_id="long", text="x" * 100_000, image=None, score=-7.0),
    ]
    before = reranker.rerank(QUERIES[0], good)
    assert reranker.faults == 0
    ranking = reranker.rerank(QUERIES[0], [*good, *bad])
    assert whole(ranking.order, 9)
    assert reranker.faults == 3, "a picture that does not decode and two scores that are no numbers"
    assert float(np.abs(np.array(before.relevance) - ranking.relevance[:4]).max()) < 1e-4
    assert np.isfinite(ranking.relevance).all()
    reranker.rerank(Query(image=b"no picture"), good)
    assert reranker.faults == 4


def test_a_query_that_says_nothing_keeps_the_order_of_retrieval(reranker: Reranker) -> None:
    shown = documents(12)
    assert list(reranker.rerank(Query(image=b"no picture"), shown).order) == canonical(shown)


def test_retrieval_is_served_where_it_was_chosen() -> None:
    served: dict[Kind, Served] = {**SERVED, "image": Served(choice=RETRIEVAL)}
    shown = documents(23)
    assert list(make(served).rerank(QUERIES[0], shown).order) == canonical(shown)
    assert list(make(served).rerank(QUERIES[2], shown).order) != canonical(shown)


def test_an_unknown_mode_is_refused(reranker: Reranker) -> None:
    with pytest.raises(ValueError, match="unknown mode 'best'"):
        reranker.rerank(QUERIES[0], [], mode="best")  # type: ignore[arg-type]


def test_the_cache_changes_nothing_and_is_bounded() -> None:
    shown = documents(12)
    reranker, small = make(), make(cache_bytes=3000)
    first, second, third = reranker.rerank(QUERIES[0], shown), reranker.rerank(QUERIES[0], shown), small.rerank(QUERIES[0], shown)
    assert first == second == third
    assert len(reranker.cache) == 12
    assert 0 < small.cache.bytes <= 3000
    changed = Document(item_id="i0", text=shown[0].text, image=picture(77), score=shown[0].score)
    assert reranker.rerank(QUERIES[0], [changed]).relevance != reranker.rerank(QUERIES[0], shown[:1]).relevance


def test_the_cache_forgets_the_least_recently_used() -> None:
    cache = TokenCache(100)
    one, two, three = ((name, 0, 0) for name in "abc")
    cache.put(one, np.zeros(10, np.float32))
    cache.put(two, np.zeros(10, np.float32))
    assert cache.get(one)[0]
    cache.put(three, np.zeros(10, np.float32))
    assert [cache.get(key)[0] for key in (one, two, three)] == [True, False, True]
    cache.put(one, None)
    assert cache.bytes == 40


def embedder_artifact(folder: Path) -> manifest.Plan:
    torch.manual_seed(0)
    made = manifest.Plan(parent=str(folder / "embedder"), kind="embedder", config={"fractions": [0.7, 0.2, 0.1]}, inputs={})
    Path(made.folder).mkdir(parents=True)
    made.write(figures={}, files=Compact(TINY).save(Path(made.folder)))
    return made


def reranker_artifact(folder: Path, reranker: Reranker, config: dict[str, object]) -> manifest.Plan:
    made = manifest.Plan(parent=str(folder / "reranker"), kind="reranker", config={}, inputs={})
    Path(made.folder).mkdir(parents=True)
    save_file(reranker.model.state_dict(), Path(made.folder) / "model.safetensors")
    (Path(made.folder) / "config.json").write_text(json.dumps(config))
    made.write(figures={}, files=["config.json", "model.safetensors"])
    return made


def test_load_gives_what_was_saved_and_knows_its_embedder(tmp_path: Path) -> None:
    reranker, embedder = make(), embedder_artifact(tmp_path)
    served = {kind: SERVED[kind].model_dump() for kind in KINDS}
    said = {"identity": False, "embedder": embedder.id, "chunk": 10, "shape": reranker.model.shape.model_dump(), "served": served}
    made = reranker_artifact(tmp_path, reranker, said)
    loaded = Reranker.load(made.folder, embedder_path=embedder.folder)
    assert isinstance(loaded, Reranker)
    assert loaded.rerank(QUERIES[2], documents(12)) == reranker.rerank(QUERIES[2], documents(12))
    made = reranker_artifact(tmp_path / "other", reranker, {**said, "embedder": "another"})
    with pytest.raises(ValueError, match="reads with embedder another"):
        Reranker.load(made.folder, embedder_path=embedder.folder)
    made = reranker_artifact(tmp_path / "identity", reranker, {"identity": True, "embedder": embedder.id})
    identity = Reranker.load(made.folder, embedder_path=embedder.folder)
    assert isinstance(identity, IdentityReranker)
    assert (identity.identity, loaded.identity) == (True, False)


def test_the_identity_keeps_the_order_of_retrieval() -> None:
    shown = [*documents(5), Document(item_id="n", text="", image=None, score=math.nan)]
    ranking = IdentityReranker().rerank(QUERIES[0], shown)
    assert list(ranking.order) == canonical(shown)
    assert ranking.order[-1] == 5
    assert all(0 <= r <= 1 for r in ranking.relevance)
    assert IdentityReranker().rerank(QUERIES[0], []).order == ()
