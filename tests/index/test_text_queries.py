import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from idem import folds, manifest, storage
from index import candidates, run, text_queries
from index.candidate_lists import IRRELEVANT
from index.candidates import CandidatesConfig
from index.text_queries import TextQueries
from pipelines.items import open_items
from train.embedder import Embedder

FRACTIONS = (0.4, 0.3, 0.3)


def family(fold: str, number: int = 0) -> str:
    """The name of a family of that fold."""
    names = (f"f{i}" for i in range(10_000))
    return [next(name for name in names if folds.fold(name, FRACTIONS) == fold) for _ in range(number + 1)][-1]


def table(**fold_of: str) -> pa.Table:
    """One item of each product; "held" is a product of another split than train, whatever fold its family would be of."""
    return pa.table(
        {
            "product_id": list(fold_of),
            "family_id": [family(fold if fold != "held" else "rerank") for fold in fold_of.values()],
            "id_split": ["dev_unseen" if fold == "held" else "train" for fold in fold_of.values()],
        }
    )


def asking(*judged: str) -> TextQueries:
    levels = [dict.fromkeys(products.split(), 1) for products in judged]
    names = [f"q{i}" for i in range(len(judged))]
    return TextQueries(ids=names, texts=[f"text {name}" for name in names], levels=levels)


def test_a_text_is_asked_in_one_fold_and_none_that_touches_what_is_held_is_learnt_from():
    items = table(e="embedder", r="rerank", c="calibrate", h="held")
    made = text_queries.dealt(asking("e", "r", "c", "h", "e r", "r c", "c h", "r h", "gone", "gone r"), items, FRACTIONS)
    assert {fold: list(each.ids) for fold, each in made.items()} == {
        "rerank": ["q1", "q4", "q9"],
        "calibrate": ["q2", "q5"],
        "test": ["q3", "q6", "q7"],
    }
    assert made["rerank"].texts == ["text q1", "text q4", "text q9"]
    assert made["test"].answered_by({"h"}).ids == ["q3", "q6", "q7"]
    assert made["test"].answered_by({"c"}).ids == ["q6"]


@pytest.fixture
def files(indexed, tmp_path):
    """A text for every product, and one that nobody finds anything for; the product itself is grade 3, another of its family 1."""
    rows = open_items(storage.Layout(indexed).items).table(["product_id", "family_id"]).to_pylist()
    products = {row["product_id"]: row["family_id"] for row in rows}
    said, judged = [{"query_id": "nothing", "query": "nothing"}], []
    for product, of in products.items():
        said.append({"query_id": f"say {product}", "query": f"a {product}"})
        judged.append({"query_id": f"say {product}", "product_id": product, "grade": 3})
        judged += [{"query_id": f"say {product}", "product_id": p, "grade": 1} for p, f in products.items() if f == of and p != product]
    paths = {"texts": str(tmp_path / "texts.parquet"), "qrels": str(tmp_path / "qrels.parquet")}
    pq.write_table(pa.Table.from_pylist(said), paths["texts"])
    pq.write_table(pa.Table.from_pylist(judged), paths["qrels"])
    return paths


def test_texts_are_asked_beside_pictures_and_judged_by_their_grades(indexed, files):
    layout = storage.Layout(indexed)
    items = open_items(layout.items).table(["item_id", "product_id", "family_id", "id_split"]).to_pylist()
    of = {row["item_id"]: row for row in items}
    family_of = {row["product_id"]: row for row in items}
    plain = candidates.run(CandidatesConfig(root=indexed, test="id_split = 'dev_unseen'"))
    figures = candidates.run(CandidatesConfig(root=indexed, test="id_split = 'dev_unseen'", **files))
    assert figures["candidates"] != plain["candidates"]
    made = pq.read_table(f"{manifest.current(layout.candidates, kind='candidates')}/{candidates.NAME}").to_pylist()
    fractions = Embedder.load(manifest.current(layout.embedder, kind="embedder")).fractions
    texts = [row for row in made if row["text"] is not None]
    assert {row["fold"] for row in texts} == {"rerank", "calibrate", "test"}
    for row in texts:
        asked = family_of[row["query_id"].removeprefix("say ")]
        assert row["text"] == f"a {asked['product_id']}"
        held = any(row["id_split"] != "train" for row in items if row["family_id"] == asked["family_id"])
        assert row["fold"] == ("test" if held else folds.fold(asked["family_id"], fractions))
        found = [of[item_id] for item_id in row["item_ids"]]
        expected = [
            0 if f["product_id"] == asked["product_id"] else 2 if f["family_id"] == asked["family_id"] else IRRELEVANT for f in found
        ]
        assert row["levels"] == expected
        assert row["scores"] == sorted(row["scores"], reverse=True)
    for fold in ("rerank", "calibrate", "test"):
        assert figures[fold]["texts"] == sum(row["fold"] == fold for row in texts)
        assert figures[fold]["texts_left_out"] == 0
        assert figures[fold]["queries"] == plain[fold]["queries"]


def test_a_text_for_which_the_gallery_has_nothing_is_left_out_and_counted(indexed, files):
    run.run(run.IndexConfig(root=indexed, fields="image", gallery="role = 'catalog' AND category != 'c1'"))
    figures = candidates.run(CandidatesConfig(root=indexed, test="id_split = 'dev_unseen'", **files))
    layout = storage.Layout(indexed)
    made = pq.read_table(f"{manifest.current(layout.candidates, kind='candidates')}/{candidates.NAME}").to_pylist()
    items = open_items(layout.items).table(["product_id", "family_id", "category", "id_split"]).to_pylist()
    fractions = Embedder.load(manifest.current(layout.embedder, kind="embedder")).fractions
    asked = {row["query_id"] for row in made if row["text"] is not None}
    left_out = 0
    for product in {row["product_id"]: row for row in items}.values():
        of = [row for row in items if row["family_id"] == product["family_id"]]
        held = any(row["id_split"] != "train" for row in of)
        fold = "test" if held else folds.fold(product["family_id"], fractions)
        may = [row for row in of if row["category"] != "c1" and (row["id_split"] != "train") == held]
        answered = bool(may) and fold in figures
        assert (f"say {product['product_id']}" in asked) == answered
        left_out += fold in figures and not may
    assert 0 < left_out == sum(figures[fold]["texts_left_out"] for fold in ("rerank", "calibrate", "test"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"qrels": ""}, "text queries need both"),
        ({"texts": "nowhere.parquet"}, "there is no such file"),
        ({"texts": "qrels"}, "lacks query"),
    ],
)
def test_what_is_wrong_with_texts_is_told(indexed, files, changes, said):
    changed = {name: files.get(value, value) for name, value in changes.items()}
    with pytest.raises(ValueError, match=said):
        candidates.run(CandidatesConfig(root=indexed, **{**files, **changed}))


def test_judgements_of_other_queries_are_told(indexed, files, tmp_path):
    pq.write_table(pa.table({"query_id": ["else"], "product_id": ["a"], "grade": [3]}), tmp_path / "else.parquet")
    with pytest.raises(ValueError, match="finds nothing relevant"):
        candidates.run(CandidatesConfig(root=indexed, texts=files["texts"], qrels=str(tmp_path / "else.parquet")))
