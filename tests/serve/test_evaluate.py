"""The yardstick on a few tiny pictures: an embedder that sees the mean colour, and figures worked out by hand."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from idem.types import Ranking
from serve import evaluate, ranking, reranking, retrieval, tables
from serve.encoding import encode_rows
from train.embedder import HistogramEmbedder

RED, GREEN, BLUE, PINK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 0, 90)


def picture(colour):
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(stream, "PNG")
    return stream.getvalue()


def mean_colour(images, texts=None):
    """The colour of the picture, or of the text where there is none; what evaluate needs of an embedder."""
    named = {"red": RED, "green": GREEN, "blue": BLUE}
    texts = texts if texts is not None else [""] * len(images)
    images = images if images is not None else [None] * len(texts)
    colours = [
        np.asarray(Image.open(io.BytesIO(image))).reshape(-1, 3).mean(0) if image else np.array(named[text])
        for image, text in zip(images, texts, strict=True)
    ]
    vectors = np.array(colours, np.float32) + 1
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write(path, **columns):
    pq.write_table(pa.table(columns), path)
    return str(path)


@pytest.fixture
def shop(tmp_path):
    """Gallery red, pink (one family), green, blue; queries: a red photo, a pink one, one of red that looks green."""
    gallery = write(
        tmp_path / "gallery.parquet",
        image_id=["g1", "g2", "g3", "g4"],
        product_id=["red", "pink", "green", "blue"],
        family_id=["warm", "warm", "cold", "cold"],
        category=["c"] * 4,
        title=["red", "pink", "green", "blue"],
        image=[picture(c) for c in (RED, PINK, GREEN, BLUE)],
    )
    queries = write(
        tmp_path / "queries.parquet",
        image_id=["q1", "q2", "q3", "q4"],
        product_id=["red", "pink", "red", "nowhere"],
        family_id=["warm", "warm", "warm", "unknown"],
        category=["c", "c", "c", "d"],
        title=["", "", "green", ""],
        style=["photo", "photo", "sketch", "sketch"],
        image=[picture(c) for c in (RED, PINK, GREEN, BLUE)],
    )
    return gallery, queries


def find(gallery, queries, **changed):
    settings = {"encode": mean_colour, "gallery_fields": "image", "query_fields": "image", **changed}
    return retrieval.find(tables.read(gallery), tables.read(queries, need_product="judged" not in changed), **settings)


def test_metrics_of_four_queries_are_those_worked_out_by_hand(shop):
    found = find(*shop)
    assert [found.gallery.products[rows].tolist()[:2] for rows in found.rankings] == [
        ["red", "pink"],
        ["pink", "red"],
        ["green", "pink"],  # of the others pink is the brightest
        ["blue", "pink"],
    ]
    assert found.counts.tolist() == [[1, 1, 2, 0]] * 3 + [[0, 0, 0, 4]]
    levels = [found.level(q, rows) for q, rows in enumerate(found.rankings)]
    figures = evaluate.metrics.summarise(levels, found.counts)
    assert (figures["queries"], figures["dropped_no_relevant"]) == (3, 1)
    assert figures["R@1"] == pytest.approx(2 / 3, abs=1e-4)
    assert figures["I-HR@1"] == pytest.approx(2 / 3, abs=1e-4)
    assert figures["sibling_R@1"] == pytest.approx(2 / 3, abs=1e-4)  # the third query meets pink before red
    assert retrieval.per_style(found.queries.styles, levels, found.counts)["photo"]["R@1"] == 1


def test_the_own_picture_never_answers(shop):
    gallery, _ = shop
    found = find(gallery, gallery)
    for q, rows in enumerate(found.rankings):
        assert found.queries.ids[q] not in found.gallery.ids[rows]
    assert found.counts.tolist() == [[0, 1, 2, 0]] * 4  # each product had one picture: only the sibling is left to find


def test_a_title_is_read_only_when_it_is_asked_for(shop):
    gallery, queries = shop
    seen = []

    def spy(images, texts):
        seen.append(texts)
        return mean_colour(images, [""] * len(images) if images is not None else texts)

    find(gallery, queries, encode=spy)
    assert seen == [None, None]
    by_text = retrieval.find(tables.read(gallery), tables.read(queries), encode=spy, gallery_fields="image", query_fields="text")
    assert by_text.queries.ids.tolist() == ["q3"]
    assert by_text.set_aside["queries"] == {"text_empty": 3}


def test_qrels_judge_texts_and_what_is_not_listed_is_irrelevant(shop, tmp_path):
    queries = write(tmp_path / "t.parquet", query_id=["t1", "t2"], query=["red", "blue"])
    qrels = write(tmp_path / "qrels.parquet", query_id=["t1", "t1"], product_id=["red", "pink"], grade=[3, 2])
    found = find(shop[0], queries, query_fields="text", judged=tables.read_qrels(qrels))
    assert [found.level(q, rows).tolist()[:2] for q, rows in enumerate(found.rankings)] == [[0, 1], [3, 3]]
    assert found.counts.tolist() == [[1, 1, 0, 2], [0, 0, 0, 4]]


def test_pictures_that_do_not_decode_are_counted_and_left_out(shop, tmp_path):
    bad = write(
        tmp_path / "bad.parquet",
        image_id=["b1", "b2", "b3", "b4"],
        product_id=["red"] * 4,
        image=[b"no picture", None, b"\x89PNG\r\n\x1a\nbroken", picture(RED)],
    )
    found = find(shop[0], bad)
    assert found.queries.ids.tolist() == ["b4"]
    assert sum(found.set_aside["queries"].values()) == 3
    assert found.set_aside["queries"]["image_missing"] == 1
    with pytest.raises(ValueError, match=r"none of the 2 rows .* can be embedded by image: 2 image_missing"):
        encode_rows(mean_colour, tables.read(bad).keep(np.array([1, 1])), "image", "queries")


def test_an_index_that_is_exact_finds_what_exact_search_finds(shop):
    exact, flat = find(*shop), find(*shop, search=retrieval.search_with("Flat", ""))
    for a, b in zip(exact.rankings, flat.rankings, strict=True):
        np.testing.assert_allclose(exact.vectors[a] @ exact.asked[0], exact.vectors[b] @ exact.asked[0], atol=1e-6)
    with pytest.raises(ValueError, match="cannot build factory 'Nonsense' for 4 vectors"):
        find(*shop, search=retrieval.search_with("Nonsense", ""))


class Knows:
    """A reranker that is sure of the product it is told of: r is .9 for it, .2 for others."""

    def __init__(self, best, *, shaky=False):
        self.best, self.shaky = best, shaky

    def rerank(self, query, documents, *, mode):
        right = [document.text == self.best for document in documents]
        order = tuple(range(len(documents))) if self.shaky else tuple(np.argsort(np.logical_not(right), kind="stable").tolist())
        r = tuple(0.9 if x else 0.2 for x in right)
        return Ranking(order=order, relevance=r, null=r)


def task(**changed):
    return evaluate.Task(release="r", gallery="g", queries="q", rerank="listwise", **changed)


def test_reranking_orders_the_first_candidates_and_no_others(shop):
    found = find(*shop)
    rankings, said = evaluate.rerank(task(depth=2), found, Knows("red"))
    names = [found.gallery.products[rows].tolist() for rows in rankings]
    assert names[1][:2] == ["red", "pink"]  # red was second
    assert names[2][:2] == ["green", "pink"]  # red lies beyond the depth
    assert all(sorted(a) == sorted(b) for a, b in zip(rankings, found.rankings, strict=True))
    assert said["reranking_alone"]["R@1"] == pytest.approx(1 / 3, abs=1e-4)
    assert said["rerank_latency"]["depth"] == 2
    assert evaluate.rerank(task(), found, Knows("red"))[1]["flip_rate"] == 0


def test_a_reranker_that_follows_the_order_it_is_shown_flips(shop):
    _, said = evaluate.rerank(task(), find(*shop), Knows("red", shaky=True))
    assert said["flip_rate"] > 0


def test_calibration_takes_products_away_and_r_must_then_be_low(shop, monkeypatch):
    monkeypatch.setattr(reranking, "is_absent", lambda query_id: query_id == "q1")
    _, said = evaluate.rerank(task(), find(*shop), Knows("red"))
    calibration = said["calibration"]
    # q2 and q3: red stands first, r = .9, right once; q1 without red: pink first, r = .2, wrong
    assert (calibration["queries"], calibration["removed"]) == (3, 1)
    assert calibration["base_rate"] == pytest.approx(1 / 3, abs=1e-4)
    assert calibration["ECE"] == pytest.approx((2 * abs(0.5 - 0.9) + 0.2) / 3, abs=1e-4)


def test_shuffled_candidates_are_told_in_the_original_order(shop):
    found = find(*shop)
    asked = evaluate.ask(task(), found, {0: found.rankings[0]})
    plain, _ = reranking.rerank_all(Knows("red"), found.gallery, asked, "listwise")
    shuffled, _ = reranking.rerank_all(Knows("red"), found.gallery, asked, "listwise", shuffle=3)
    assert plain[0].relevance == shuffled[0].relevance
    assert plain[0].order[0] == shuffled[0].order[0]


def test_the_colour_histogram_reads_pictures(shop):
    found = find(*shop, encode=HistogramEmbedder().encode)
    assert found.gallery.products[found.rankings[0][0]] == "red"


def test_the_command_line_says_what_is_wrong_and_ends_with_json(shop, tmp_path, capsys):
    arguments = ["--release", str(tmp_path / "none"), "--gallery", shop[0], "--queries", shop[1]]
    assert evaluate.main(arguments) == 2
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["job"], said["ok"]) == ("serve.evaluate", False)
    with pytest.raises(SystemExit):
        evaluate.main([*arguments, "--rerank", "sometimes"])


def test_rankings_are_cut_at_the_published_depth():
    assert ranking.DEPTH >= 100
