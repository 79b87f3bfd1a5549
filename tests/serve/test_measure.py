"""Who asks and what counts, and a measurement of the real HTTP interface over a shop in this process."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient

from index.plan import choose_gallery
from serve import client as client_module
from serve import measure, measured
from serve.api import create_gateway
from serve.client import interview, require_release
from serve.measured import EvaluateConfig, Measured


class ShopItems:
    """What a measurement reads of pipelines.items.Items."""

    def __init__(self, shop):
        self.shop = shop
        self.rows = [
            {"item_id": hit.item_id, "product_id": hit.product_id, "family_id": "", "category": hit.category, "title": hit.title}
            for hit in shop.hits
        ]

    def table(self, columns, filter):
        if "nothing" in filter:
            return pa.Table.from_pylist(self.rows, schema=self.schema(columns)).slice(0, 0)
        return pa.Table.from_pylist(self.rows, schema=self.schema(columns))

    def schema(self, columns):
        return pa.schema([(name, pa.string()) for name in columns])

    def images(self, item_ids):
        return self.shop.images(item_ids)


@pytest.fixture
def exam(colour_shop):
    """The first picture of each product is the gallery, the second asks."""
    items = ShopItems(colour_shop)
    meta = pa.Table.from_pylist([row for row in items.rows if row["item_id"].endswith("/0")])
    return measure.prepare(items, meta, EvaluateConfig(root="r"))


@pytest.fixture
def client(backend):
    with TestClient(create_gateway(backend)) as made:
        yield made


def test_items_of_the_index_and_products_it_lacks_do_not_ask(exam, colour_shop):
    assert sorted(exam.queries["item_id"].to_pylist()) == sorted(h.item_id for h in colour_shop.hits if h.item_id.endswith("/1"))
    assert exam.counts.tolist() == [[1, 0, 4, 0]] * 5
    items = ShopItems(colour_shop)
    lacking = pa.Table.from_pylist(items.rows[:1])
    assert measure.prepare(items, lacking, EvaluateConfig(root="r")).queries["item_id"].to_pylist() == [items.rows[1]["item_id"]]
    with pytest.raises(ValueError, match=r"no item can ask: 0 items with a picture pass .*nothing.*; the index holds 1 items of 1"):
        measure.prepare(items, lacking, EvaluateConfig(root="r", queries="nothing"))


def test_whole_products_are_drawn_and_the_draw_does_not_depend_on_the_order():
    rows = [{"item_id": f"{p}{n}", "product_id": p} for p in "abcdef" for n in range(4)]
    drawn = measure.draw(pa.Table.from_pylist(rows), 10, seed=0)
    products = drawn["product_id"].to_pylist()
    assert len(products) == 8
    assert all(products.count(p) == 4 for p in set(products))
    assert set(measure.draw(pa.Table.from_pylist(rows[::-1]), 10, seed=0)["item_id"].to_pylist()) == set(drawn["item_id"].to_pylist())
    assert len(measure.draw(pa.Table.from_pylist(rows), 3, seed=0)) == 3
    assert len(measure.draw(pa.Table.from_pylist(rows), 99, seed=0)) == 24


def test_the_service_is_asked_both_ways_and_judged_by_the_gallery(client, exam, colour_shop, monkeypatch):
    monkeypatch.setattr(measure, "rows_of", only_gallery(measure.rows_of, exam))
    config = EvaluateConfig(root="r", timed=2, top_k=10)
    pictures = colour_shop.images(exam.queries["item_id"].to_pylist())
    rows, answers, degraded = measure.question(client, pictures, exam, config)
    assert [row.name for row in rows] == ["trained retrieval", "+ reranking"]
    assert rows[0].metrics["R@1"] == 1
    assert rows[1].metrics["R@1"] == 0  # this reranker turns the order round
    assert rows[0].recall[0] == 1
    assert rows[0].metrics["p99_ms"] >= rows[0].metrics["p50_ms"] > 0
    assert degraded == 0
    for answer in answers:
        assert answer.retrieved_levels[0] == 0
        assert sorted(answer.retrieved) == sorted(answer.reranked)
        assert len(answer.relevance) == len(answer.reranked)


def only_gallery(rows_of, exam):
    """The shop of these tests serves all its pictures; a real index holds none that ask."""

    def kept(_, answers):
        known = set(exam.known.ids)
        swap = [{**a, "results": [{**r, "item_id": r["item_id"].replace("/1", "/0")} for r in a["results"]]} for a in answers]
        assert all(r["item_id"] in known for a in swap for r in a["results"])
        return rows_of(exam, swap)

    return kept


def test_only_the_picture_is_sent(client, backend, exam, colour_shop):
    config = EvaluateConfig(root="r", depth=7, timed=1, concurrency=2)
    interview(client, colour_shop.images([h.item_id for h in colour_shop.hits]), config, rerank=True, what="ask")
    assert {query.text for query, _ in backend.asked} == {""}
    assert {asked["depth"] for _, asked in backend.asked} == {7}


def test_refusals_are_told_in_the_words_of_the_service(client, backend):
    require_release(client, "test-release", "http://here")
    with pytest.raises(ValueError, match="serves release test-release, the current one of this run is other"):
        require_release(client, "other", "http://here")
    with pytest.raises(ValueError, match="answered 422: not a picture"):
        interview(client, [b"no picture"], EvaluateConfig(root="r"), rerank=False, what="ask")


@pytest.mark.parametrize(("faults", "lacking"), [(client_module.AGAIN, 0), (client_module.AGAIN + 1, 1)])
def test_a_degraded_answer_is_asked_for_again_a_few_times(backend, colour_shop, monkeypatch, faults, lacking):
    monkeypatch.setattr(client_module, "WARM_UP", 0)
    left, whole = [faults], backend.search

    async def search(*arguments, **settings):
        left[0] -= 1
        answer = await whole(*arguments, **settings)
        return replace(answer, degraded=("rerank",)) if left[0] >= 0 else answer

    backend.search = search
    config = EvaluateConfig(root="r", timed=9, top_k=10)
    with TestClient(create_gateway(backend)) as made:
        answers, _ = interview(made, [colour_shop.pictures["red/0"]], config, rerank=True, what="ask")
    assert sum(bool(answer["degraded"]) for answer in answers) == lacking


def test_a_measurement_with_degraded_answers_is_told_and_made_anew(releases, monkeypatch, capsys):
    found = {"release": "tiny", "queries": "q", "gallery_items": 1, "gallery_products": 1, "query_products": 1, "timed": 1, "answers": []}
    made = [Measured(**found, rows=[measured.row("one", [np.array([0])], np.array([[1, 0, 0, 0]]), 10)], degraded=n) for n in (2, 0, 0)]
    monkeypatch.setattr(measure, "measure", lambda *_: made.pop(0))
    monkeypatch.setattr(measure, "require_release", lambda *_: settings)
    config, settings = EvaluateConfig(root=str(Path(releases).parent)), "one"
    first = measure.run(config)
    assert "2 of 0 answers lacked a part" in capsys.readouterr().err
    again = measure.run(config)
    assert "lacked" not in capsys.readouterr().err
    assert [run.get("skipped") for run in (first, again, measure.run(config))] == [None, None, True]
    settings = "two"
    assert measure.run(config).get("skipped") is None, "a service with other settings has to be asked"


def test_photos_of_split_train_do_not_ask_where_the_index_took_some_by_its_own_rule():
    rows = [
        {"item_id": f"{s}{i}", "product_id": "p", "role": "", "split": s, "id_split": "dev_unseen"} for s in ("train", "test") for i in "ab"
    ]
    rule = choose_gallery(pa.Table.from_pylist(rows), filter_was_given=False, per_product=1).rule
    plain = EvaluateConfig(root="r")
    assert measure.asking(plain, rule).queries == "id_split = 'dev_unseen' AND split != 'train'"
    assert measure.asking(plain, "rows with role catalog") == plain
    chosen = EvaluateConfig(root="r", queries="style = 'photo'")
    assert measure.asking(chosen, rule) == chosen


def test_an_answer_from_another_index_is_an_error(exam):
    with pytest.raises(ValueError, match="answered with 'stranger'"):
        measure.rows_of(exam, [{"release": "r", "results": [{"item_id": "stranger"}]}])


def test_a_baseline_searches_the_same_gallery(exam, colour_shop):
    titles = ["" for _ in exam.known.ids]
    row = measure.baseline(
        "colours", lambda i, t: colour_shop.encoder.encode(i, t or [""] * len(i)), "image", ShopItems(colour_shop), exam, titles, 10
    )
    assert row.metrics["R@1"] == 1
    assert row.metrics["queries"] == 5
    assert "p50_ms" not in row.metrics


def test_the_table_has_a_cell_for_every_column():
    made = measured.row("one", [np.array([1, 0])], np.array([[1, 1, 0, 0]]), 10, {"p50_ms": 12.3, "p99_ms": 45.6})
    assert made.recall == [0.0] + [1.0] * 9
    head, line = measured.table([made]).splitlines()
    assert head.split() == list(measured.COLUMNS)
    assert line.split() == ["one", "0.000", "1.000", "0.000", "0.500", "0.834", "0.000", "12", "46"]
