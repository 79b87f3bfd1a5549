"""The yardstick on a few tiny pictures: an embedder that sees the mean colour, and figures worked out by hand."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from idem.qrels import read_qrels
from idem.types import Ranking
from index.release import Release
from index.searcher import make_index
from serve import evaluate, ranking, reranking, retrieval, tables
from serve.encoding import encode_rows
from train.embedder import Embedder, HistogramEmbedder

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
    found = find(shop[0], queries, query_fields="text", judged=read_qrels(qrels))
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
    for asked, a, b in zip(exact.asked, exact.rankings, flat.rankings, strict=True):
        np.testing.assert_allclose(exact.vectors[a] @ asked, exact.vectors[b] @ asked, atol=1e-6)
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


def test_rankings_are_cut_at_the_depth(shop, monkeypatch):
    whole = find(*shop)
    monkeypatch.setattr(ranking, "DEPTH", 2)
    cut = find(*shop, search=retrieval.search_with("Flat", ""))
    assert [rows.tolist() for rows in cut.rankings] == [rows[:2].tolist() for rows in whole.rankings]


def test_precision_recall_and_f1_of_r_are_those_worked_out_by_hand():
    rankings = [
        Ranking(order=(0, 1, 2), relevance=(0.9, 0.5, 0.1), null=(0.0,) * 3),
        Ranking(order=(0, 1), relevance=(0.4, 0.2), null=(0.0,) * 2),
    ]
    said = reranking.instances(rankings, [np.array([0, 1, 3]), np.array([0, 3])])
    assert (said["precision"], said["recall"], said["F1"]) == (0.5, 0.5, 0.5)
    assert (said["candidates"], said["same"]) == (5, 2)
    nothing = reranking.instances(rankings[1:], [np.array([3, 3])])
    assert (nothing["precision"], nothing["recall"], nothing["F1"]) == (None, None, None)


def test_the_reranker_is_timed_at_the_sizes_that_the_gallery_reaches(tmp_path, monkeypatch):
    monkeypatch.setattr(reranking, "TIMED", 2)
    names = [f"p{n:02d}" for n in range(60)]
    photos = write(
        tmp_path / "many.parquet", image_id=names, product_id=names, title=names, image=[picture((4 * n, 9, 9)) for n in range(60)]
    )
    sizes = []

    class Counts:
        def rerank(self, query, documents, *, mode):
            sizes.append(len(documents))
            return Knows("").rerank(query, documents, mode=mode)

    asked = evaluate.ask(task(), found := find(photos, photos), {q: found.rankings[q] for q in range(5)}, depth=100)
    said = reranking.speeds(Counts(), found.gallery, asked, "listwise")
    assert list(said) == ["8", "50"]
    assert sizes == [8] * 3 + [50] * 3
    assert all(figures["queries"] == 2 and figures["p99_ms"] >= figures["p50_ms"] > 0 for figures in said.values())


def test_an_index_is_built_once_and_then_timed(shop, monkeypatch):
    built = []
    monkeypatch.setattr(retrieval, "make_index", lambda *a, **k: built.append(1) or make_index(*a, **k))
    search = retrieval.search_with("Flat", "")
    found = find(*shop, search=search)
    assert retrieval.time_search(found, mean_colour, "image", search)["queries"] == 3
    assert len(built) == 1


@pytest.fixture
def real(releases, colour_shop, tmp_path):
    """The command line of a real release over a gallery of its pictures, asked with darker ones."""
    known = {name: [getattr(hit, name) for hit in colour_shop.hits] for name in ("product_id", "family_id", "category", "title")}
    ids = [hit.item_id for hit in colour_shop.hits]
    gallery = write(tmp_path / "g.parquet", image_id=ids, image=colour_shop.images(ids), **known)
    darker = [picture(tuple(max(c - 6, 0) for c in colour)) for colour in colour_shop.colours.values()]
    queries = write(
        tmp_path / "q.parquet",
        image_id=[f"asked/{name}" for name in colour_shop.colours],
        product_id=list(colour_shop.colours),
        image=darker,
    )
    return ["--release", releases, "--gallery", gallery, "--queries", queries]


def run_main(capsys, *arguments):
    code = evaluate.main(arguments)
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (code, said["ok"]) == (0, True), said
    return said


def right_at_once(encode, real, *, titles):
    """R@1 by one cosine after the other."""
    gallery, queries = (pq.read_table(real[at]).to_pylist() for at in (3, 5))
    vectors = [encode([row["image"]], [row["title"]] if titles else None)[0] for row in gallery]
    asked = [encode([row["image"]], None)[0] for row in queries]
    nearest = [max(range(len(vectors)), key=lambda i: float(vectors[i] @ one)) for one in asked]
    return np.mean([gallery[i]["product_id"] == row["product_id"] for i, row in zip(nearest, queries, strict=True)])


def test_a_release_is_evaluated_exactly_and_by_its_index(real, releases, capsys):
    exact = run_main(capsys, *real)
    embedder = Embedder.load(Release.open(releases).embedder)
    assert exact["R@1"] == right_at_once(embedder.encode, real, titles=True)
    assert (exact["queries"], exact["gallery_rows"], exact["gallery_products"], exact["R@10"]) == (5, 10, 5, 1)
    assert (exact["release"], exact["embedder"], exact["search"], exact["gallery_fields"]) == ("tiny", "release", "exact", "both")
    assert exact["set_aside"] == {"gallery": {}, "queries": {}}
    indexed = run_main(capsys, *real, "--index")
    assert indexed["search"] == "Flat"
    assert indexed["retrieval_latency"]["queries"] == 4
    figures = ("R@1", "R@5", "nDCG@10", "mAP@R", "queries")
    assert [indexed[name] for name in figures] == [exact[name] for name in figures]


def test_baselines_are_other_embedders_over_the_same_gallery(real, releases, capsys):
    untrained = Embedder.load(Release.open(releases).embedder, weights="untrained")
    for name, encode, titles in (("histogram", HistogramEmbedder().encode, False), ("untrained", untrained.encode, True)):
        said = run_main(capsys, *real, "--embedder", name)
        assert said["embedder"] == name
        assert said["R@1"] == right_at_once(encode, real, titles=titles)


def test_the_gallery_can_be_filtered_and_thinned(real, capsys):
    assert run_main(capsys, *real, "--gallery-filter", "image_id LIKE '%/0' AND product_id != 'red'")["gallery_rows"] == 4
    thin = run_main(capsys, *real, "--gallery-per-product", "1")
    assert (thin["gallery_rows"], thin["queries"]) == (5, 5)


def test_a_real_reranker_is_judged(real, identity_releases, capsys):
    said = run_main(capsys, *real, "--rerank", "listwise")
    assert said["rerank"] == "listwise"
    assert said["retrieval"]["queries"] == said["reranking_alone"]["queries"] == 5
    assert (said["instances"]["candidates"], said["instances"]["same"]) == (25, 5)
    assert said["rerank_latency_at"] == {}  # five products alone


def test_a_release_without_a_trained_reranker_keeps_the_order_of_retrieval(real, identity_releases, capsys):
    plain = run_main(capsys, real[0], identity_releases, *real[2:])
    said = run_main(capsys, real[0], identity_releases, *real[2:], "--rerank", "listwise")
    assert said["reranker"] == "identity"
    assert "calibration" not in said  # a cosine is no probability
    assert [said[name] for name in ("R@1", "nDCG@10")] == [plain[name] for name in ("R@1", "nDCG@10")]
