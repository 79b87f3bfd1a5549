"""Telling wrong labels: against a loop that says what is meant, and on data where the wrong ones are known."""

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F

from tests.train.small import config, corpus, ignore, join, leave
from train import checkpoint, noise
from train.loop import Trainer


def judged(h, given, labels, live, ids, *, nearest, gap=0.0, block=0):
    total, count = noise.sums(h, labels, live, ids)
    aside, _ = noise.sums(h, given, ~(live & (labels == given)), ids)
    return noise.judged(h, given, labels, live, total, count, aside, nearest=nearest, gap=gap, block=block)


def purge(h, labels, live, *, nearest):
    ids = int(labels.max()) + 1
    return noise.spared(judged(h, labels, labels, live, ids, nearest=nearest), labels, ids) >= 0


def clusters(ids: int = 40, each: int = 6, wrong: float = 0.2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(ids, 32, generator=random), dim=1)
    true = torch.arange(ids).repeat_interleave(each)
    h = F.normalize(centres[true] + 0.1 * torch.randn(len(true), 32, generator=random), dim=1)
    labels = torch.where(torch.rand(len(true), generator=random) < wrong, torch.randint(0, ids, true.shape, generator=random), true)
    return h, labels, labels == true


def taken_slowly(h, given, labels, live, ids, nearest, gap) -> list[int]:
    def cosine(i: int, u: int) -> float:
        members = [h[j] for j in range(len(h)) if labels[j] == u and live[j] and j != i]
        if not members and live[i] and labels[i] == u:
            members = [h[j] for j in range(len(h)) if given[j] == u and not (live[j] and labels[j] == u)]
        return float(F.normalize(torch.stack(members).sum(0), dim=0) @ h[i]) if members else float("-inf")

    out = []
    for i in range(len(h)):
        own, others = cosine(i, int(given[i])), sorted(((cosine(i, u), u) for u in range(ids) if u != given[i]), reverse=True)
        known = own > float("-inf") and sum(c > own for c, _ in others) < nearest
        moves = gap > 0 and others[0][0] - max(others[1][0], own) >= gap
        out.append(int(given[i]) if known else others[0][1] if moves else -1)
    return out


@pytest.mark.parametrize("gap", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("nearest", [1, 3])
def test_the_blocks_agree_with_the_loop_also_for_those_that_moved_before(nearest, gap):
    h, given, _ = clusters(ids=8, each=5, wrong=0.4)
    random = torch.Generator().manual_seed(3)
    labels = torch.where(torch.rand(len(h), generator=random) < 0.3, torch.randint(0, 8, given.shape, generator=random), given)
    live = torch.rand(len(h), generator=random) < 0.6
    live[given == 2] = False
    live[(given == 2).nonzero()[0]] = True  # an ID with one live member, and one that never had any
    labels[given == 2] = 2
    found = judged(h, given, labels, live, 9, nearest=nearest, gap=gap)
    assert found.tolist() == taken_slowly(h, given, labels, live, 9, nearest, gap)
    assert torch.equal(found, judged(h, given, labels, live, 9, nearest=nearest, gap=gap, block=5))
    assert len(set((found - given).tolist())) > 2 or not gap  # kept, set aside and moved


def test_wrong_labels_go_and_right_ones_stay():
    h, labels, right = clusters()
    keep = purge(h, labels, torch.ones_like(right), nearest=3)
    assert keep[right].float().mean() > 0.98
    assert keep[~right].float().mean() < 0.2


def test_who_was_set_aside_is_judged_again_and_no_id_vanishes():
    h, labels, right = clusters(wrong=0.0)
    live = torch.arange(len(h)) % 6 != 0
    assert purge(h, labels, live, nearest=1).all()
    scattered = F.normalize(torch.randn(len(h), 32, generator=torch.Generator().manual_seed(2)), dim=1)
    keep = purge(scattered, labels, right, nearest=1)
    assert set(labels[keep].tolist()) == set(range(40))


def test_an_id_of_one_member_keeps_it():
    labels, live = torch.arange(3), torch.ones(3, dtype=torch.bool)
    assert (judged(torch.eye(3), labels, labels, live, 3, nearest=1) < 0).all()
    assert purge(torch.eye(3), labels, live, nearest=1).all()


def test_a_pair_does_not_change_places():
    """One of the two is nearer to a third ID than to the other, who is not: the same verdict every time, whoever counts now."""
    h = F.normalize(torch.tensor([[1.0, 0, 0], [0.6, 0.8, 0], [0, 1, 0], [0, 1, 0.1]]), dim=1)
    labels, live = torch.tensor([0, 0, 1, 1]), torch.ones(4, dtype=torch.bool)
    for _ in range(3):
        live = purge(h, labels, live, nearest=1)
        assert live.tolist() == [True, False, True, True]


def test_a_stranger_that_is_left_alone_goes_again():
    centres = F.normalize(torch.randn(6, 32, generator=torch.Generator().manual_seed(4)), dim=1)
    labels = torch.arange(6).repeat_interleave(4)
    h = F.normalize(centres[labels] + 0.05 * torch.randn(24, 32, generator=torch.Generator().manual_seed(5)), dim=1)
    h[0] = centres[3]
    live = labels > 0
    live[0] = True
    for _ in range(2):
        live = purge(h, labels, live, nearest=1)
    assert live.tolist() == [False] + 23 * [True]


def test_a_member_does_not_move_where_its_own_is_as_near_as_another():
    centres = F.normalize(torch.tensor([[1.0, 0.0, 0.0], [0.98, 0.2, 0.0], [0.0, 0.0, 1.0]]), dim=1)
    h = F.normalize(torch.cat([centres[[0, 0, 1, 1, 2, 2]], torch.tensor([[0.99, 0.12, 0.0]])]), dim=1)
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 0])
    assert judged(h, labels, labels, torch.ones(7, dtype=torch.bool), 3, nearest=1, gap=0.5)[6] == -1


def test_members_of_other_ids_come_to_their_own():
    h, labels, right = clusters()
    taken = judged(h, labels, labels, torch.ones_like(right), 40, nearest=3, gap=0.3)
    true = torch.arange(40).repeat_interleave(6)
    moved = (taken >= 0) & (taken != labels)
    assert moved.sum() > 0.6 * (~right).sum()
    assert (taken == true)[moved].float().mean() > 0.95


def test_an_id_that_would_lose_all_keeps_what_it_was_given():
    def spared(taken, given):
        return noise.spared(torch.tensor(taken), torch.tensor(given), 3).tolist()

    assert spared([1, 2, -1], [0, 1, 2]) == [0, 1, 2]  # so does the next, and the next
    assert spared([-1, 0, 2, 1], [0, 1, 2, 0]) == [-1, 0, 2, 1]  # each has a member, if another's
    assert spared([-1, -1, 1, 2], [0, 0, 1, 2]) == [0, 0, 1, 2]


@pytest.mark.parametrize("seed", range(20))
def test_every_id_has_a_member_in_the_end(seed):
    random = torch.Generator().manual_seed(seed)
    given = torch.cat([torch.arange(12), torch.randint(0, 12, (20,), generator=random)])
    taken = torch.where(torch.rand(32, generator=random) < 0.5, torch.randint(-1, 12, (32,), generator=random), -1)
    kept = noise.spared(taken, given, 12)
    assert (torch.bincount(kept[kept >= 0], minlength=12) > 0).all()
    assert ((kept == taken) | (kept == given)).all()


def test_moving_without_purging_is_refused():
    with pytest.raises(ValueError, match=r"relabel = 0\.1 moves members that a purge would set aside, and purge is 0"):
        config(relabel=0.1)


def test_the_bound_is_a_share_and_at_most_some_hundreds():
    assert [noise.bound(0.12, rows) for rows in (2, 38, 2500, 10**9)] == [1, 5, 300, 300]


def _purged(rank: int, world: int, meet: str, out: str) -> None:
    join(rank, world, meet)
    trainer = Trainer(config(steps=6, purge=0.2), corpus(), ignore)
    np.save(f"{out}/{rank}-of-{world}.npy", noise.purged(trainer.encoder, trainer.labelling, 0.2, 0.05)[1])
    leave()


def test_every_worker_comes_to_the_same_members(tmp_path):
    for world in (1, 3):
        mp.spawn(_purged, args=(world, str(tmp_path / f"meet-{world}"), str(tmp_path)), nprocs=world)
    one, *several = (np.load(tmp_path / name) for name in ("0-of-1.npy", "0-of-3.npy", "1-of-3.npy", "2-of-3.npy"))
    assert 0 < one.sum() <= 18
    assert all(np.array_equal(one, other) for other in several)


def test_training_sets_wrong_labels_aside_and_a_checkpoint_knows_them(tmp_path):
    made = corpus(8)
    made.labels = made.labels.copy()
    made.labels[1] = 5  # a picture of product 0 among those of product 5
    trainer = Trainer(config(steps=100, warm_up=0.3, refresh=20, purge=0.12, purge_every=1), made, ignore)
    trainer.run()
    assert trainer.labelling.weights[1] == 0
    assert trainer.labelling.weights.sum() >= 21, "of 23 right ones"
    checkpoint.save(trainer, tmp_path)
    again = Trainer(config(steps=100, warm_up=0.3, purge=0.12), made, ignore)
    checkpoint.restore(again, tmp_path)
    assert np.array_equal(again.labelling.weights, trainer.labelling.weights)
