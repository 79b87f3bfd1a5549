"""Golden values computed by hand from the definitions in METHOD.md section 4."""

import math

import numpy as np
import pytest

from idem import metrics


def test_instance_hit_rate_divides_by_what_can_be_found():
    ranking = np.array([1, 0, 3, 3, 0])
    assert metrics.hit_rate_at(ranking, 1, relevant=2) == 0
    assert metrics.hit_rate_at(ranking, 5, relevant=2) == 0.5  # two relevant: only the first two ranks count
    assert metrics.hit_rate_at(ranking, 5, relevant=2, best=1) == 1


def test_ndcg_of_the_ideal_order_is_one_and_of_a_swap_is_known():
    counts = np.array([1, 1, 0, 5])
    assert metrics.ndcg_at(np.array([0, 1, 3, 3]), 10, counts) == pytest.approx(1)
    ideal = 7 + 3 / math.log2(3)
    assert metrics.ndcg_at(np.array([1, 0, 3]), 10, counts) == pytest.approx((3 + 7 / math.log2(3)) / ideal)
    assert metrics.ndcg_at(np.array([], int), 10, counts) == 0


def test_levels_prefer_the_closest_relation_and_empty_names_match_nothing():
    products, families, categories = np.array(["a", "b", "c", "d"]), np.array(["f", "f", "g", ""]), np.array(["x", "x", "x", ""])
    assert metrics.levels_of(("a", "f", "x"), products, families, categories).tolist() == [0, 1, 2, 3]
    assert metrics.levels_of(("z", "", ""), products, families, categories).tolist() == [3, 3, 3, 3]
    assert metrics.levels_of(("", "", ""), np.array(["", "a"]), families[:2], categories[:2]).tolist() == [3, 3]


def test_siblings_are_judged_among_the_family_alone():
    counts = np.array([1, 2, 3, 4])
    assert metrics.sibling_recall(np.array([3, 2, 0, 1]), counts) == 1
    assert metrics.sibling_recall(np.array([3, 1, 0]), counts) == 0
    assert metrics.sibling_recall(np.array([3, 3]), counts) == 0
    assert metrics.sibling_recall(np.array([0]), np.array([1, 0, 3, 4])) is None


def test_queries_without_a_relevant_product_are_dropped_and_counted():
    said = metrics.summarise([np.array([0, 3]), np.array([2, 3])], np.array([[1, 0, 0, 1], [0, 0, 1, 1]]))
    assert (said["queries"], said["dropped_no_relevant"], said["R@1"], said["mAP@R"]) == (1, 1, 1, 1)


def test_a_constant_score_can_be_calibrated_without_skill():
    happened = np.array([1.0, 0, 0, 1])
    constant = np.full(4, 0.5)
    assert metrics.expected_calibration_error(constant, happened) == 0
    assert metrics.brier_skill(constant, happened) == 0
    assert metrics.brier_skill(happened, happened) == 1
    assert metrics.expected_calibration_error(1 - happened, happened) == 1


def test_collapse_keeps_the_best_row_of_each_product():
    assert metrics.collapse(["a", "b", "a", "c", "b"]) == [0, 1, 3]
