"""The report stands alone, shows what was drawn rather than what looks good, and says what the numbers are."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from index.release import Release
from serve import measured, plots, report, stages
from serve.measured import Answered, Measured
from serve.stages import Noted, StageTime


def answer(number, before, after):
    """One query whose product stands at place `before`, then `after` (0: not found)."""
    levels = [[0 if place == wanted else 3 for place in range(1, 9)] for wanted in (before, after)]
    ids = [f"item<{place}>" for place in range(8)]
    return Answered(
        item_id=f"q{number}",
        product_id=f"p{number}",
        title="a mug",
        retrieved=ids,
        retrieved_levels=levels[0],
        reranked=ids,
        reranked_levels=levels[1],
        relevance=[0.5] * 7 + [None],
    )


ANSWERS = [answer(n, 3, 1) for n in range(9)] + [answer(n, 1, 0) for n in range(9, 12)] + [answer(n, 2, 2) for n in range(12, 40)]


class Pictures:
    def images(self, item_ids):
        stream = io.BytesIO()
        Image.new("RGB", (300, 200), "teal").save(stream, "PNG")
        return [stream.getvalue() if item_id.startswith("item") else b"broken" for item_id in item_ids]


@pytest.fixture
def result():
    rows = [
        measured.row(name, [np.array(a.reranked_levels) for a in ANSWERS], np.array([[1, 0, 0, 7]] * len(ANSWERS)), 10)
        for name in ("colour histogram", "untrained embedder", "trained retrieval", "+ reranking")
    ]
    known = {"release": "r", "queries": "id_split = 'dev_unseen'", "gallery_items": 8, "gallery_products": 8, "query_products": 40}
    return Measured(**known, timed=40, degraded=0, rows=rows, answers=ANSWERS)


def test_verdicts_compare_the_place_of_the_product():
    assert [report.verdict(answer(0, *places)) for places in ((2, 1), (1, 2), (1, 1), (0, 0), (0, 8), (8, 0))] == [
        "won",
        "lost",
        "unchanged",
        "unchanged",
        "won",
        "lost",
    ]


def test_queries_are_drawn_by_the_seed_from_each_kind_and_all_are_counted():
    drawn, counts = report.draw(ANSWERS, seed=3)
    assert counts == {"won": 9, "lost": 3, "unchanged": 28}
    assert [name for name, _ in drawn] == ["won"] * 4 + ["lost"] * 3 + ["unchanged"] * 4
    assert drawn == report.draw(ANSWERS, seed=3)[0]
    assert drawn != report.draw(ANSWERS, seed=4)[0]


def test_the_page_is_one_file_and_escapes_what_it_shows(result, tmp_path):
    (tmp_path / "curves.json").write_text(
        '[{"step": 0, "seconds": 0, "loss": 2.0, "stage": "warm-up"}, {"step": 9, "seconds": 4, "held_R@1": 0.5}]'
    )
    release = Release(name="r", id="i", items="", items_version=1, embedder=str(tmp_path), reranker=None, index="")
    noted = Noted(stages=[StageTime(job="a", title="Train", seconds=1, skipped=True, made_in=90)], peak_mb=2048, memory="PSS")
    page = report.page(result, release, Pictures(), noted, made="today", seed=0)
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "item<0>" not in page
    assert "item&lt;0&gt;" in page
    assert page.count("<figure>") == 2  # recall and one training curve: there is no reranker
    assert "unchanged, skipped; made in 90.0 s" in page
    assert "2.00 GiB" in page
    assert page.count('class="query"') == 11
    assert "place 3 → place 1" in page


def test_answers_that_lacked_a_part_are_told(result):
    assert "lacked a part" not in report.summary(result)
    assert "7 of 80 answers lacked a part" in report.summary(result.model_copy(update={"degraded": 7}))


def test_a_picture_that_does_not_decode_is_shown_grey():
    assert report.thumbnail(b"broken") == report.thumbnail(None)
    assert report.thumbnail(None).startswith("data:image/jpeg;base64,")


@pytest.mark.parametrize("curve", [[], [{"step": 1, "seconds": 1.0, "loss": 3.0, "calibrate_loss": 2.0, "calibrate_right": 0.4}]])
def test_training_curves_are_drawn_from_whatever_was_noted(curve):
    svg = plots.training(curve).decode()
    assert svg.startswith("<?xml")
    assert ("held back" in svg) == bool(curve)


def test_stage_times_survive_a_run_that_skips(tmp_path):
    first = Noted(stages=[StageTime(job="train.run", title="Train", seconds=93.0)], peak_mb=1, memory="PSS")
    stages.save(str(tmp_path), first)
    again = StageTime(
        job="train.run", title="Train", seconds=2.0, skipped=True, made_in=stages.since(stages.load(str(tmp_path)), "train.run")
    )
    assert again.made_in == 93.0
    assert stages.since(Noted(stages=[again], peak_mb=1, memory="PSS"), "train.run") == 93.0
    assert stages.since(None, "train.run") is None
    assert "unchanged, skipped (made in 93.0 s)" in stages.table(Noted(stages=[again], peak_mb=2048, memory="PSS"))
    assert stages.load(str(tmp_path / "elsewhere")) is None
