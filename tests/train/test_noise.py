"""Telling wrong labels: against a loop that says what is meant, and on data where the wrong ones are known."""

import pytest
import torch
import torch.nn.functional as F

from train import noise


def clusters(ids: int = 40, each: int = 6, wrong: float = 0.2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(ids, 32, generator=random), dim=1)
    true = torch.arange(ids).repeat_interleave(each)
    h = F.normalize(centres[true] + 0.1 * torch.randn(len(true), 32, generator=random), dim=1)
    labels = torch.where(torch.rand(len(true), generator=random) < wrong, torch.randint(0, ids, true.shape, generator=random), true)
    return h, labels, labels == true


def slowly(h: torch.Tensor, labels: torch.Tensor, live: torch.Tensor, ids: int, nearest: int) -> torch.Tensor:
    def centroid(u: int, without: int) -> torch.Tensor | None:
        members = [h[i] for i in range(len(h)) if labels[i] == u and live[i] and i != without]
        return F.normalize(torch.stack(members).sum(0), dim=0) if members else None

    keep = []
    for i in range(len(h)):
        own = centroid(int(labels[i]), without=i)
        others = [centroid(u, without=-1) for u in range(ids) if u != labels[i]]
        keep.append(own is not None and sum(float(c @ h[i]) > float(own @ h[i]) for c in others if c is not None) < nearest)
    said = torch.tensor(keep)
    for u in range(ids):
        if not said[labels == u].any():
            said[labels == u] = live[labels == u]
    return said


@pytest.mark.parametrize("nearest", [1, 3])
def test_the_blocks_agree_with_the_loop(nearest):
    h, labels, _ = clusters(ids=8, each=4, wrong=0.4)
    live = torch.rand(len(h), generator=torch.Generator().manual_seed(1)) < 0.8
    total, count = noise.sums(h, labels, live, 9)  # the last ID has no member
    assert torch.equal(noise.purge(h, labels, live, total, count, nearest=nearest), slowly(h, labels, live, 9, nearest))
    parts = noise.credible(h, labels, live, total, count, nearest=nearest, block=5)
    assert torch.equal(parts, noise.credible(h, labels, live, total, count, nearest=nearest))


def test_wrong_labels_go_and_right_ones_stay():
    h, labels, right = clusters()
    total, count = noise.sums(h, labels, torch.ones_like(right), 40)
    keep = noise.purge(h, labels, torch.ones_like(right), total, count, nearest=3)
    assert keep[right].float().mean() > 0.98
    assert keep[~right].float().mean() < 0.2


def test_who_was_set_aside_is_judged_again_and_no_id_vanishes():
    h, labels, right = clusters(wrong=0.0)
    live = torch.arange(len(h)) % 6 != 0
    total, count = noise.sums(h, labels, live, 40)
    assert noise.purge(h, labels, live, total, count, nearest=1).all()
    scattered = F.normalize(torch.randn(len(h), 32, generator=torch.Generator().manual_seed(2)), dim=1)
    total, count = noise.sums(scattered, labels, right, 40)
    keep = noise.purge(scattered, labels, right, total, count, nearest=1)
    assert set(labels[keep].tolist()) == set(range(40))


def test_an_id_of_one_member_keeps_it():
    h = F.normalize(torch.eye(3), dim=1)
    labels, live = torch.arange(3), torch.ones(3, dtype=torch.bool)
    total, count = noise.sums(h, labels, live, 3)
    assert not noise.credible(h, labels, live, total, count, nearest=1).any()
    assert noise.purge(h, labels, live, total, count, nearest=1).all()


def test_the_bound_is_a_share_and_at_most_some_hundreds():
    assert [noise.bound(0.12, rows) for rows in (2, 38, 2500, 10**9)] == [1, 5, 300, 300]
