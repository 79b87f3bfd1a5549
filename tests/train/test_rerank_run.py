"""The job: candidates, items and an embedder in, an artifact out that the reader opens; the identity where there is too little."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from idem import manifest, schema
from idem.storage import Layout
from idem.types import Document, Query
from train import rerank_label, rerank_run
from train.backbones.compact import Compact, CompactConfig
from train.embedder import Embedder
from train.rerank_data import KINDS, text_tokens
from train.rerank_loop import RerankConfig
from train.reranker import IdentityReranker, Reranker

TINY = CompactConfig(side=32, widths=(8, 8, 8, 8), dim=16, text_dim=16, text_layers=1)
PRODUCTS, PHOTOS = 20, 3


def picture(product: int, photo: int) -> bytes:
    """Four coloured quarters, and noise."""
    quarters = np.random.default_rng(product).integers(0, 255, (2, 2, 3))
    pixels = np.kron(quarters, np.ones((16, 16, 1))) + np.random.default_rng([product, photo]).normal(0, 25, (32, 32, 3))
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


class FakeItems:
    """What is needed of pipelines.items.Items."""

    id = "items"

    def __init__(self) -> None:
        self.rows = {
            f"p{p}-{i}": {
                "product_id": f"p{p}",
                "family_id": f"f{p // 2}",
                "title": "" if i else f"cup {p}",
                "image": picture(p, i) if (p, i) != (0, 1) else b"broken",
            }
            for p in range(PRODUCTS)
            for i in range(PHOTOS)
        }

    def take(self, item_ids: Sequence[str], columns: Sequence[str]) -> pa.Table:
        return pa.table({c: [self.rows[i][c] for i in item_ids] for c in columns})


def candidates(queries: int) -> pa.Table:
    """The first half of the products is fold rerank; catalogue pictures are the gallery; the cosine is noise."""
    random = np.random.default_rng(0)
    rows = []
    for p in range(PRODUCTS):
        fold = range(PRODUCTS // 2) if p < PRODUCTS // 2 else range(PRODUCTS // 2, PRODUCTS)
        for i in range(1, PHOTOS):
            shown = random.permutation(list(fold)).tolist()
            scores = np.sort(random.uniform(0, 1, len(shown)))[::-1].tolist()
            levels = [0 if q == p else 1 if q // 2 == p // 2 else 3 for q in shown]
            name = "rerank" if p < PRODUCTS // 2 else "calibrate"
            rows.append({"query_id": f"p{p}-{i}", "fold": name, "item_ids": [f"p{q}-0" for q in shown], "scores": scores, "levels": levels})
    return pa.Table.from_pylist(rows[:queries], schema=schema.CANDIDATES)


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    for module in (rerank_run, rerank_label):
        monkeypatch.setattr(module, "open_items", lambda uri: FakeItems())
    layout = Layout(str(tmp_path))
    torch.manual_seed(0)
    made = manifest.Plan(parent=layout.embedder, kind="embedder", config={"fractions": [0.7, 0.2, 0.1]}, inputs={})
    Path(made.folder).mkdir(parents=True)
    made.write(figures={}, files=Compact(TINY).save(Path(made.folder)))
    return layout


def offer(layout: Layout, table: pa.Table, **other: str) -> None:
    embedder = manifest.read(manifest.current(layout.embedder, kind="embedder"), kind="embedder").id
    inputs = {"items": FakeItems.id, "embedder": embedder, **other}
    made = manifest.Plan(parent=layout.candidates, kind="candidates", config={"rows": len(table), "fields": "image"}, inputs=inputs)
    Path(made.folder).mkdir(parents=True)
    pq.write_table(table, Path(made.folder) / "candidates.parquet")
    made.write(figures={}, files=["candidates.parquet"])


def config(layout: Layout, **changed: object) -> RerankConfig:
    small = {"steps": 40, "patience": 99, "minutes": 5, "width": 16, "layers": 1, "heads": 2, "match": 8, "chunk": 5, "least_queries": 5}
    return RerankConfig.model_validate({"root": layout.root, **small, **changed})


def load(layout: Layout) -> Reranker | IdentityReranker:
    folder = manifest.current(layout.reranker, kind="reranker")
    return Reranker.load(folder, embedder_path=manifest.current(layout.embedder, kind="embedder"))


def test_too_few_candidates_give_the_identity_and_say_why(layout: Layout) -> None:
    offer(layout, candidates(24))
    figures = rerank_run.run(config(layout))
    assert figures["identity"]
    assert "'calibrate' has 4 queries" in figures["reason"]
    assert isinstance(load(layout), IdentityReranker)
    assert rerank_run.run(config(layout))["skipped"]


def test_an_empty_table_gives_the_identity(layout: Layout) -> None:
    offer(layout, candidates(0))
    assert rerank_run.run(config(layout))["identity"]


def test_candidates_of_before_there_were_texts_are_read(layout: Layout) -> None:
    offer(layout, candidates(24).drop_columns(["text"]))
    assert "'calibrate' has 4 queries" in rerank_run.run(config(layout))["reason"]


def test_texts_are_gathered_beside_the_items(layout: Layout) -> None:
    rows = candidates(40).to_pylist()
    asked = [{**rows[0], "query_id": "q1", "text": "a warm red"}, {**rows[-1], "query_id": "q2", "text": "a cold blue"}]
    embedder, told = Embedder(Compact(TINY)), pa.Table.from_pylist([*rows, *asked], schema=schema.CANDIDATES)
    pool, folds = rerank_run.gather(told, FakeItems(), embedder, embedder, config(layout), fields="image")  # type: ignore[arg-type]
    for name, text in (("rerank", "a warm red"), ("calibrate", "a cold blue")):
        lists, row = folds[name], folds[name].queries[-1]
        assert not pool.pictured[row]
        assert lists.told[-1]
        tokens = text_tokens(embedder, [text], 48)[0].tolist()
        assert pool.texts[row].tolist() == tokens + [0] * (len(pool.texts[row]) - len(tokens))
        documents = FakeItems().take(told["item_ids"].to_pylist()[40 + (name == "calibrate")], ["image"])["image"].to_pylist()
        expected = embedder.encode(documents, None) @ embedder.encode(None, [text])[0]
        np.testing.assert_allclose(lists.cosines[KINDS.index("text"), -1, : len(expected)], expected, atol=1e-5)
    named = pa.Table.from_pylist([*rows, {**asked[0], "query_id": "p0-0"}], schema=schema.CANDIDATES)
    with pytest.raises(ValueError, match="1 text queries are called as items are, p0-0 for one"):
        rerank_run.gather(named, FakeItems(), embedder, embedder, config(layout), fields="image")  # type: ignore[arg-type]


def test_too_many_tokens_for_memory_are_refused(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    table = candidates(100)
    embedder = Embedder(Compact(TINY))
    monkeypatch.setattr(Embedder, "token_shape", (36, 1_000_000))
    with pytest.raises(ValueError, match=r"rerank\.tokens_mb allows 2,048"):
        rerank_run.gather(table, FakeItems(), embedder, embedder, config(layout), fields="image")  # type: ignore[arg-type]


def test_a_query_with_two_lists_is_refused(layout: Layout) -> None:
    table = pa.concat_tables([candidates(100), candidates(1)])
    with pytest.raises(ValueError, match="name 1 queries twice"):
        rerank_run.gather(table, FakeItems(), *[Embedder(Compact(TINY))] * 2, config(layout), fields="image")  # type: ignore[arg-type]


def test_what_is_gathered_is_what_the_items_hold(layout: Layout) -> None:
    pool, folds = rerank_run.gather(candidates(100), FakeItems(), *[Embedder(Compact(TINY))] * 2, config(layout), fields="image")  # type: ignore[arg-type]
    assert len(pool.pictured) == PRODUCTS * PHOTOS
    assert (~pool.pictured).sum() == 1, "the broken picture is set aside, the run goes on"
    assert {name: len(made) for name, made in folds.items()} == {"rerank": 20, "calibrate": 20}
    assert not set(folds["rerank"].documents.flatten()) & set(folds["calibrate"].documents.flatten())
    assert (pool.texts.any(1)).sum() == PRODUCTS


@pytest.mark.parametrize("fields", ["image", "both"])
def test_documents_are_encoded_as_the_index_has_them(layout: Layout, fields: str) -> None:
    items, embedder = FakeItems(), Embedder(Compact(TINY))
    for item_id, row in items.rows.items():
        row["title"] = f"seen {item_id}"
    ids = ["p0-0", "p0-1", "p1-0"]  # the second has a broken picture
    _, known = rerank_run._read(ids, items, embedder, embedder, config(layout), fields)  # type: ignore[arg-type]
    titles = [f"seen {item_id}" for item_id in ids]
    pictures = [picture(0, 0), None, picture(1, 0)]
    texts = titles if fields == "both" else ["", titles[1], ""]
    np.testing.assert_allclose(known.indexed, embedder.encode(pictures, texts), atol=1e-5)
    np.testing.assert_allclose(known.both, embedder.encode(pictures, titles), atol=1e-5)
    np.testing.assert_allclose(known.text, embedder.encode(None, titles), atol=1e-5)


@pytest.mark.parametrize("kind", ["embedder", "items"])
def test_candidates_of_another_embedder_or_other_items_are_refused(layout: Layout, kind: str) -> None:
    offer(layout, candidates(24), **{kind: "another"})
    with pytest.raises(ValueError, match=rf"with {kind} another, the current one is .*index\.candidates again"):
        rerank_run.run(config(layout))


@pytest.mark.ray
def test_two_workers_train_what_the_reader_opens(layout: Layout, ray_session: None) -> None:
    offer(layout, candidates(100))
    figures = rerank_run.run(config(layout))
    assert not figures["identity"]
    assert figures["steps"] == 40
    assert {"served", "queries", "retrieval", "chosen"} <= set(figures["image"])
    folder = Path(manifest.current(layout.reranker, kind="reranker"))
    curves = json.loads((folder / "curves.json").read_text())
    assert all({"step", "seconds"} <= set(row) for row in curves)
    assert min(row["calibrate_loss"] for row in curves if "calibrate_loss" in row) < curves[0]["calibrate_loss"]
    assert not (folder.parent / "checkpoints" / folder.name).exists()
    shown = [Document(item_id=f"d{p}", text="", image=picture(p, 0), score=p / 10) for p in range(7)]
    reranker = load(layout)
    assert isinstance(reranker, Reranker)
    assert sorted(reranker.rerank(Query(image=picture(3, 1)), shown).order) == list(range(7))
    assert rerank_run.run(config(layout))["skipped"]

    told = rerank_label.run(rerank_label.LabelConfig(root=layout.root, judge=str(folder), sure=0.6))
    assert told["pairs"] == sum(map(len, candidates(100)["item_ids"].to_pylist()))
    assert 0 < told["disagreed"] < told["sure"] <= told["pairs"]
    assert rerank_label.run(rerank_label.LabelConfig(root=layout.root, judge=str(folder), sure=0.6))["skipped"]
    again = rerank_run.run(config(layout, judgements=told["file"], least_queries=2))
    assert "skipped" not in again
    assert not again["identity"]


def test_a_file_of_judgements_that_is_not_there_is_named(layout: Layout) -> None:
    offer(layout, candidates(100))
    with pytest.raises(ValueError, match=r"no file of judgements at nowhere\.parquet"):
        rerank_run.run(config(layout, judgements="nowhere.parquet"))
