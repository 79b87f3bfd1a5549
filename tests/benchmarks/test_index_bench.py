import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

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


def test_filters_in_small():
    settings = ["--parts", "filters", "--rows", "20000"]
    said = subprocess.run([sys.executable, "-m", "benchmarks.index", *settings], cwd=PROJECT, capture_output=True, text=True, timeout=120)
    told = json.loads(said.stdout.splitlines()[-1])
    assert told["ok"], said.stderr
    assert [figure["name"] for figure in told["figures"]][::2] == [f"filter of {share}, recall@10" for share in ("50.0%", "5.0%", "0.5%")]
    half, *few = [figure["value"] for figure in told["figures"][::2]]
    assert half > 0.5, "two vectors a centre are too hard for lists"
    assert min(few) > 0.99, "these are compared one by one"
