from typing import Any

import lance
import numpy as np
import pyarrow.parquet as pq
import pytest

from idem import folds, manifest, schema, storage
from index import candidates, run
from index.candidates import CandidatesConfig
from pipelines.items import open_items
from pipelines.table import ITEMS as DATASET
from train.embedder import Embedder


def made(root: str, **settings):
    figures = candidates.run(CandidatesConfig(root=root, **settings))
    folder = manifest.current(storage.Layout(root).candidates, kind="candidates")
    return figures, pq.read_table(storage.join(folder, candidates.NAME))


@pytest.fixture
def known(indexed):
    layout = storage.Layout(indexed)
    rows = open_items(layout.items).table([*candidates.COLUMNS, "role"]).to_pylist()
    fractions = Embedder.load(manifest.current(layout.embedder, kind="embedder")).fractions
    return {row["item_id"]: row | {"fold": folds.fold(row["family_id"], fractions)} for row in rows}


def may_be_found(item: dict[str, Any], fold: str) -> bool:
    """Of the items that are indexed: none that the embedder has learnt, none of another fold among those learnt from."""
    if fold == candidates.TEST:
        return item["id_split"] != "train"
    allowed = (fold,) if fold == candidates.LEARNT else folds.RERANKER_FOLDS
    return item["id_split"] == "train" and item["fold"] in allowed


def test_lists_stay_off_the_products_of_the_embedder_and_learning_within_its_fold(indexed, known):
    figures, table = made(indexed, k=5, test="id_split = 'dev_unseen'")
    assert table.schema.equals(schema.CANDIDATES)
    for row in table.to_pylist():
        query, found = known[row["query_id"]], [known[item_id] for item_id in row["item_ids"]]
        assert query["role"] == "photo"
        assert query["width"] > 0
        assert (query["fold"], query["id_split"]) == (row["fold"], "train") or (row["fold"], query["id_split"]) == ("test", "dev_unseen")
        assert all(may_be_found(item, row["fold"]) for item in found)
        assert {item["role"] for item in found} == {"catalog"}
        same = [[item[c] == query[c] for c in ("product_id", "family_id", "category")] for item in found]
        assert row["levels"] == [[*flags, True].index(True) for flags in same]
    asks = {i for i, r in known.items() if r["role"] == "photo" and r["width"]}
    expected = {i for i in asks if known[i]["id_split"] == "dev_unseen" or known[i]["fold"] != "embedder"}
    assert set(table["query_id"].to_pylist()) == expected
    assert sum(each["queries"] for each in figures.values() if isinstance(each, dict)) == len(expected)


def test_the_gallery_of_calibrate_is_as_large_as_asked_in_whole_families_its_own_first(indexed, known):
    def gallery(most: int) -> set[str]:
        _, table = made(indexed, k=1000, calibrate_products=most)
        lists = [row["item_ids"] for row in table.to_pylist() if row["fold"] == candidates.CHOSEN_ON]
        return {item_id for found in lists for item_id in found}

    def count(items: set[str]) -> int:
        return len({known[item_id]["product_id"] for item_id in items})

    every, few = gallery(0), gallery(1)
    own = {item_id for item_id in every if known[item_id]["fold"] == candidates.CHOSEN_ON}
    most = (count(own) + count(every)) // 2
    middle = gallery(most)
    assert few == own
    assert own < middle < every
    assert count(own) < count(middle) <= most
    whole = {known[item_id]["family_id"] for item_id in middle}
    assert middle == {item_id for item_id in every if known[item_id]["family_id"] in whole}


def test_lists_are_the_k_nearest_pictures_of_the_fold(indexed, known):
    layout = storage.Layout(indexed)
    embedder, items = Embedder.load(manifest.current(layout.embedder, kind="embedder")), open_items(layout.items)
    _, table = made(indexed, k=3)
    for row in table.to_pylist()[:10]:
        gallery = [i for i, r in known.items() if r["role"] == "catalog" and may_be_found(r, row["fold"])]
        cosine = embedder.encode(items.images(gallery), None) @ embedder.encode(items.images([row["query_id"]]), None)[0]
        np.testing.assert_allclose(row["scores"], np.sort(cosine)[::-1][:3], atol=1e-5)
        order = dict(zip(gallery, cosine, strict=True))
        np.testing.assert_allclose([order[item_id] for item_id in row["item_ids"]], row["scores"], atol=1e-5)


def test_a_list_holds_k_products_each_by_its_best_row(indexed, known):
    run.run(run.IndexConfig(root=indexed, fields="image", gallery="role = 'photo' AND item_id NOT LIKE '%-1'"))
    layout = storage.Layout(indexed)
    embedder, items = Embedder.load(manifest.current(layout.embedder, kind="embedder")), open_items(layout.items)
    _, table = made(indexed, k=6)
    assert table.num_rows
    for row in table.to_pylist():
        gallery = [i for i, r in known.items() if r["role"] == "photo" and i[-1] in "23" and may_be_found(r, row["fold"])]
        cosine = embedder.encode(items.images(gallery), None) @ embedder.encode(items.images([row["query_id"]]), None)[0]
        best = {}
        for item_id, score in zip(gallery, cosine.tolist(), strict=True):
            best[known[item_id]["product_id"]] = max(score, best.get(known[item_id]["product_id"], -1))
        assert len({known[item_id]["product_id"] for item_id in row["item_ids"]}) == len(row["item_ids"]) == min(6, len(best))
        np.testing.assert_allclose(row["scores"], sorted(best.values(), reverse=True)[:6], atol=1e-5)


def test_a_filter_says_what_is_asked_with(indexed):
    _, everything = made(indexed)
    _, table = made(indexed, queries="item_id LIKE '%-2'")
    expected = {i for i in everything["query_id"].to_pylist() if i.endswith("-2")}
    assert expected
    assert set(table["query_id"].to_pylist()) == expected
    with pytest.raises(ValueError, match="nonsense"):
        made(indexed, queries="nonsense = 1")


def test_photos_of_the_split_that_is_indexed_do_not_ask(root, without_ray):
    """All are photos, the last of each product of split test, the others of split train, of which two are indexed."""
    folder = storage.Layout(root).items
    dataset = lance.dataset(storage.join(folder, DATASET))
    dataset.update({"role": "'photo'", "split": "'train'"})
    dataset.update({"split": "'test'"}, where="item_id LIKE '%-3'")
    assert run.run(run.IndexConfig(root=root, fields="image", per_product=2))["rule"] == candidates.SPLIT_RULE
    _, found = made(root)
    asked = found["query_id"].to_pylist()
    assert asked
    assert {item_id[-1] for item_id in asked} == {"3"}
    _, found = made(root, queries="split = 'train'")
    assert {item_id[-1] for item_id in found["query_id"].to_pylist()} == {"2"}, "the caller's filter is the only one"


def test_a_second_run_is_skipped_and_another_k_is_not(indexed):
    made(indexed, k=5)
    assert made(indexed, k=5)[0]["skipped"]
    assert "skipped" not in made(indexed, k=6)[0]
    assert "skipped" not in made(indexed, k=5, queries="item_id LIKE '%-2'")[0]


def test_a_fold_with_too_little_says_so_and_is_empty(indexed, items_again):
    items_again(8)
    run.run(run.IndexConfig(root=indexed, fields="image"))
    figures, table = made(indexed)
    empty = [fold for fold in folds.RERANKER_FOLDS if "empty" in figures[fold]]
    assert candidates.LEARNT in empty
    assert "products in the gallery, at least 4" in figures[candidates.LEARNT]["empty"]
    assert not set(table["fold"].to_pylist()) & set(empty)


def test_an_index_of_everything_leaves_nothing_to_ask_with(indexed):
    run.run(run.IndexConfig(root=indexed, gallery="true"))
    figures, table = made(indexed)
    assert table.num_rows == 0
    assert figures["rerank"]["empty"] == "no picture beside those in the gallery may ask"


def test_a_filter_that_keeps_nothing_says_so(indexed):
    figures, table = made(indexed, queries="item_id = 'none'")
    assert table.num_rows == 0
    assert figures["rerank"]["empty"] == "no picture beside those in the gallery may ask"
