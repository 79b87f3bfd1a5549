import numpy as np
import pytest

from train import plan
from train.neighbours import nearest, neighbours

LABELS = np.array([2, 0, 1, 1, 0, 2, 2, 3])


def test_members_are_the_rows_of_each_label():
    members = plan.Members(LABELS)
    assert [sorted(members.draw(u, 2, np.random.default_rng(0)).tolist()) for u in range(4)][:2] == [[1, 4], [2, 3]]
    assert members.draw(3, 2, np.random.default_rng(0)).tolist() == [7, 7]  # one picture comes twice, augmented differently


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("similar", [0.0, 0.5, 1.0])
def test_a_step_is_the_same_for_every_worker_and_pairs_stay_together(world, similar):
    members = plan.Members(LABELS)
    near = np.array([[1, 2], [0, 2], [0, 1], [0, 1]])
    rows = plan.batch(members, seed=1, step=5, size=16, per_id=2, neighbours=near, similar=similar)
    assert np.array_equal(rows, plan.batch(members, seed=1, step=5, size=16, per_id=2, neighbours=near, similar=similar))
    assert not np.array_equal(rows, plan.batch(members, seed=1, step=6, size=16, per_id=2, neighbours=near, similar=similar))
    shares = [plan.share(rows, r, world, 2) for r in range(world)]
    assert sorted(np.concatenate(shares).tolist()) == sorted(rows.tolist())
    assert all((LABELS[s.reshape(-1, 2)][:, 0] == LABELS[s.reshape(-1, 2)][:, 1]).all() for s in shares)


def test_similar_ones_meet_in_a_batch():
    labels = np.repeat(np.arange(100), 2)
    near = np.stack([(np.arange(100) ^ 1)] * 3, 1)  # 0-1, 2-3, ... are each other's neighbours
    rows = plan.batch(plan.Members(labels), seed=0, step=0, size=40, neighbours=near, similar=1.0, group=2)
    ids = set(labels[rows].tolist())
    assert np.mean([u ^ 1 in ids for u in ids]) >= 0.8  # a pair drawn twice leaves room for uniform ones


def test_neighbours_leave_out_the_row_itself_also_among_duplicates():
    vectors = np.array([[1, 0], [1, 0], [0, 1], [0.8, 0.6]], np.float32)
    assert neighbours(vectors, 2).tolist() == [[1, 3], [0, 3], [3, 0], [0, 1]]
    scores, rows = nearest(vectors[:1], vectors, 10)
    assert rows.tolist() == [[0, 1, 3, 2]]
    assert scores[0, 0] == 1
