"""Neighbours of prototypes: the index of cells against the exact search, the exact search against numpy, lists between rebuilds."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from train.head import candidates
from train.head.masks import Duplicates
from train.head.prototypes import HeadConfig, PrototypeHead
from train.neighbours import nearest


def built(index, rows):
    index.build(candidates.normalised(lambda ids: rows[ids], len(rows), torch.device("cpu")), len(rows))
    return index


def test_exact_search_equals_numpy(monkeypatch):
    monkeypatch.setattr(candidates, "BLOCK", 64)
    torch.manual_seed(0)
    rows = F.normalize(torch.randn(500, 12), dim=1)
    cosine, found = built(candidates.ExactIndex(), 3 * rows).search(rows[:50], 7)
    scores, wanted = nearest(rows[:50].numpy(), rows.numpy(), 7)
    np.testing.assert_allclose(cosine.numpy(), scores, atol=1e-6)
    assert (found.numpy() == wanted).mean() > 0.99  # equal but for rounding of the cosines


def test_exact_search_says_where_there_is_nothing_more():
    cosine, found = built(candidates.ExactIndex(), torch.eye(3)).search(torch.eye(3), 5)
    assert torch.isinf(cosine[:, 3:]).all()
    assert found.shape == (3, 5)


def test_cells_find_most_of_what_the_exact_search_finds():
    torch.manual_seed(0)
    rows = F.normalize(torch.randn(20_000 // 20, 32).repeat_interleave(20, 0) + 0.6 * torch.randn(20_000, 32), dim=1)
    exact, cells = (built(index, rows) for index in (candidates.ExactIndex(), candidates.CellIndex()))
    asked = rows[::100]
    (_, wanted), (cosine, found) = exact.search(asked, 17), cells.search(asked, 17)
    assert float((found[:, 0] == wanted[:, 0]).float().mean()) > 0.98
    recall = np.mean([len(set(a[1:].tolist()) & set(b.tolist())) / 16 for a, b in zip(wanted, found, strict=True)])
    assert recall > 0.7, recall
    torch.testing.assert_close(cosine[:, 0], torch.ones(200), atol=0.02, rtol=0)


@pytest.mark.parametrize("n", [60, 50_001])
def test_the_head_takes_the_index_that_suits_its_rows(n):
    index = candidates.suitable(n, torch.device("cpu"))
    assert isinstance(index, candidates.CellIndex if n > candidates.EXACT_ROWS else candidates.ExactIndex)


class Counting(candidates.ExactIndex):
    def __init__(self):
        self.builds, self.asked = 0, 0

    def build(self, blocks, n):
        self.builds += 1
        super().build(blocks, n)

    def search(self, vectors, k):
        self.asked += len(vectors)
        return super().search(vectors, k)


def test_the_index_is_rebuilt_on_schedule_and_lists_are_kept_between():
    index = Counting()
    head = PrototypeHead(30, 6, HeadConfig(kind="sparse", neighbours=2, random=0, refresh=3), index=index)
    h = F.normalize(torch.randn(4, 6), dim=1)
    counts = []
    for step in range(7):
        head.loss(h, torch.tensor([1, 2, 2, 9]), prefixes=(6,), scale=8.0, margin=0.1, step=step).backward()
        head.update(0.1)
        counts.append((index.builds, index.asked))
    assert counts == [(1, 3), (1, 3), (1, 3), (2, 6), (2, 6), (2, 6), (3, 9)]
    head.start_from(torch.randn(30, 6))
    head.near(np.arange(2), 3)
    assert (index.builds, index.asked) == (4, 11)


class Blind:
    """An index that finds the vector itself, one other, and then nothing; for id 0 nothing at all."""

    def build(self, blocks, n):
        self.n = n

    def search(self, vectors, k):
        found = torch.tensor([[1, 4] + [0] * (k - 2)] * len(vectors))
        cosine = torch.full((len(vectors), k), float("-inf"))
        cosine[1:, :2] = 1.0
        return cosine, found


def test_near_fills_up_what_the_index_does_not_find():
    head = PrototypeHead(6, 4, HeadConfig(), index=Blind())
    assert head.near(np.array([0, 1]), 3).tolist() == [[1, 1, 1], [4, 4, 4]]


def test_near_is_bounded_by_the_others_and_leaves_the_label_out():
    head = PrototypeHead(5, 4, HeadConfig())
    found = head.near(np.arange(5), 12)
    assert [sorted(row) for row in found.tolist()] == [[u for u in range(5) if u != y] for y in range(5)]
    cosine = (head.whole() @ head.whole().T).numpy()
    assert (np.diff(np.take_along_axis(cosine, found, 1), axis=1) <= 1e-6).all()


def test_a_random_share_is_the_same_for_a_step_and_ignores_the_number_of_rows():
    drawn = candidates.random_share(10**9, 50, seed=1, step=2)
    assert np.array_equal(drawn, candidates.random_share(10**9, 50, seed=1, step=2))
    assert not np.array_equal(drawn, candidates.random_share(10**9, 50, seed=1, step=3))
    assert candidates.random_share(7, 50, seed=1, step=2).tolist() == list(range(7))


@pytest.mark.parametrize("pairs", [[[0, 9]], [[-1, 2]], [[3, 3]], [1, 2, 3]])
def test_duplicates_that_cannot_be_are_named(pairs):
    with pytest.raises(ValueError, match="duplicates are"):
        Duplicates(np.array(pairs), 9, torch.device("cpu"))


def test_duplicates_are_marked_both_ways():
    duplicates = Duplicates(np.array([[0, 3], [3, 7], [0, 3]]), 9, torch.device("cpu"))
    labels, columns = torch.tensor([3, 0, 5, 7]), torch.tensor([0, 2, 3, 7])
    out = torch.zeros(4, 4, dtype=torch.bool)
    duplicates.mark(out, labels, columns)
    assert out.tolist() == [[True, False, False, True], [False, False, True, False], [False] * 4, [False, False, True, False]]


def test_the_head_needs_neither_ray_nor_lance_nor_faiss_until_it_indexes():
    said = "import sys, train.head.prototypes; print([m for m in ('ray', 'lance', 'pyarrow', 'faiss', 'psutil') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
