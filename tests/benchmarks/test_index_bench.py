import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.index import compare
from benchmarks.tools import measuring
from benchmarks.tools.curves import Point, front, rate_at, recall_of

PROJECT = Path(__file__).parents[2]


def test_the_front_is_what_no_other_beats_in_both():
    points = [Point(0.9, 100), Point(0.8, 90), Point(0.95, 50), Point(0.7, 200), Point(0.95, 40)]
    assert front(points) == [Point(0.7, 200), Point(0.9, 100), Point(0.95, 50)]


def test_the_rate_at_a_recall_lies_between_its_neighbours_on_a_logarithmic_scale():
    points = [Point(0.9, 100), Point(1.0, 25)]
    assert rate_at(points, 0.95) == pytest.approx(50)
    assert rate_at(points, 0.5) == 100
    assert rate_at(points, 1.0) == pytest.approx(25)
    assert rate_at([Point(0.9, 100)], 0.95) == 0
    assert rate_at([], 0.95) == 0


def test_recall_is_the_share_that_is_found():
    assert recall_of(np.array([[1, 2], [3, -1]]), np.array([[2, 5], [3, 4]])) == 0.5


def told_by(folder: Path, *settings: str) -> dict[str, Any]:
    words = [sys.executable, "-m", "benchmarks.index", "--keep", str(folder), *settings]
    said = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, timeout=120)
    told = json.loads(said.stdout.splitlines()[-1])
    assert told["ok"], said.stderr
    return told


def test_filters_in_small(tmp_path: Path):
    told = told_by(tmp_path, "--parts", "filters", "--rows", "20000")
    assert [figure["name"] for figure in told["figures"]][::2] == [f"filter of {share}, recall@10" for share in ("50.0%", "5.0%", "0.5%")]
    half, *few = [figure["value"] for figure in told["figures"][::2]]
    assert half > 0.5, "two vectors a centre are too hard for lists"
    assert min(few) > 0.99, "these are compared one by one"


def test_search_in_small_without_peers(tmp_path: Path):
    told = told_by(
        tmp_path, "--parts", "search", "--sets", "synthetic", "--rows", "5000", "--queries", "100", "--factory", "IVF16,PQ64x4fs", "--peers"
    )
    names = [f"synthetic {store}, queries/s at 0.95" for store in ("fp16", "sq8")]
    assert [(figure["name"], figure["peer"]) for figure in told["figures"]] == list(zip(names, ("faiss fp16", "faiss sq8"), strict=True))
    assert all(figure["value"] > 0 and figure["peer_value"] > 0 for figure in told["figures"])
    assert (tmp_path / "search-synthetic.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_build_in_small(tmp_path: Path):
    told = told_by(tmp_path, "--parts", "build", "--builds", "5000", "--build-factory", "IVF16,PQ64x4fs,Refine(SQfp16)")
    assert [(figure["name"], figure["bar"]) for figure in told["figures"]] == [
        ("build of 0.005M, seconds", "<= 1.25"),
        ("build of 0.005M, peak MiB", "<= 1.0"),
    ]


def test_the_peer_is_the_fastest_of_those_that_are_as_small_and_reach_the_recall():
    rates = {"ours fp16": 100.0, "faiss fp16": 100.0, "ours sq8": 50.0, "faiss sq8": 80.0, "hnswlib": 900.0, "usearch i8": 90.0}
    sizes = {"ours fp16": 300.0, "faiss fp16": 299.0, "ours sq8": 170.0, "faiss sq8": 169.0, "hnswlib": 660.0, "usearch i8": 270.0}
    rates |= {"lancedb IVF_PQ": 0.0, "usearch f16": 40.0}
    sizes |= {"lancedb IVF_PQ": 70.0, "usearch f16": 300.0}
    figures = compare("set", rates, sizes)
    assert [(figure.peer, figure.holds) for figure in figures] == [("faiss fp16", True), ("usearch i8", True), ("faiss sq8", False)]


def test_a_verdict_is_written_down_whatever_kind_of_number_it_was_reached_with():
    figure = measuring.Figure(name="x", value=np.float64(2), peer="y", peer_value=np.float64(1))
    for judged in (measuring.at_least(figure, 0.9), measuring.at_most(figure, 0.9), measuring.same(figure, 3)):
        assert json.loads(json.dumps(asdict(judged)))["holds"] in (True, False)
