"""Telling wrong labels: against a loop that says what is meant, and on data where the wrong ones are known."""

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F

from tests.train.small import config, corpus, ignore, join, leave
from train import checkpoint, noise
from train.loop import Trainer


def purge(h, labels, live, total, count, *, nearest):
    return noise.spared(noise.judged(h, labels, labels, live, total, count, nearest=nearest), labels, live, len(count)) >= 0


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
    assert torch.equal(purge(h, labels, live, total, count, nearest=nearest), slowly(h, labels, live, 9, nearest))
    parts = noise.judged(h, labels, labels, live, total, count, nearest=nearest, gap=0.1, block=5)
    assert torch.equal(parts, noise.judged(h, labels, labels, live, total, count, nearest=nearest, gap=0.1))


def test_wrong_labels_go_and_right_ones_stay():
    h, labels, right = clusters()
    total, count = noise.sums(h, labels, torch.ones_like(right), 40)
    keep = purge(h, labels, torch.ones_like(right), total, count, nearest=3)
    assert keep[right].float().mean() > 0.98
    assert keep[~right].float().mean() < 0.2


def test_who_was_set_aside_is_judged_again_and_no_id_vanishes():
    h, labels, right = clusters(wrong=0.0)
    live = torch.arange(len(h)) % 6 != 0
    total, count = noise.sums(h, labels, live, 40)
    assert purge(h, labels, live, total, count, nearest=1).all()
    scattered = F.normalize(torch.randn(len(h), 32, generator=torch.Generator().manual_seed(2)), dim=1)
    total, count = noise.sums(scattered, labels, right, 40)
    keep = purge(scattered, labels, right, total, count, nearest=1)
    assert set(labels[keep].tolist()) == set(range(40))


def test_an_id_of_one_member_keeps_it():
    h = F.normalize(torch.eye(3), dim=1)
    labels, live = torch.arange(3), torch.ones(3, dtype=torch.bool)
    total, count = noise.sums(h, labels, live, 3)
    assert (noise.judged(h, labels, labels, live, total, count, nearest=1) < 0).all()
    assert purge(h, labels, live, total, count, nearest=1).all()


def taken_slowly(h, given, labels, live, ids, nearest, gap) -> list[int]:
    def cosine(i: int, u: int) -> float:
        members = [h[j] for j in range(len(h)) if labels[j] == u and live[j] and j != i]
        return float(F.normalize(torch.stack(members).sum(0), dim=0) @ h[i]) if members else float("-inf")

    out = []
    for i in range(len(h)):
        own, others = cosine(i, int(given[i])), sorted(((cosine(i, u), u) for u in range(ids) if u != given[i]), reverse=True)
        known = own > float("-inf") and sum(c > own for c, _ in others) < nearest
        out.append(int(given[i]) if known else others[0][1] if others[0][0] - others[1][0] >= gap else -1)
    return out


def test_moving_members_agrees_with_the_loop_also_for_those_that_moved_before():
    h, given, _ = clusters(ids=8, each=5, wrong=0.4)
    random = torch.Generator().manual_seed(3)
    labels = torch.where(torch.rand(len(h), generator=random) < 0.3, torch.randint(0, 8, given.shape, generator=random), given)
    live = torch.rand(len(h), generator=random) < 0.8
    total, count = noise.sums(h, labels, live, 8)
    found = noise.judged(h, given, labels, live, total, count, nearest=1, gap=0.3)
    assert found.tolist() == taken_slowly(h, given, labels, live, 8, 1, 0.3)
    assert len(set((found - given).tolist())) > 2  # kept, set aside and moved


def test_members_of_other_ids_come_to_their_own():
    h, labels, right = clusters()
    total, count = noise.sums(h, labels, torch.ones_like(right), 40)
    taken = noise.judged(h, labels, labels, torch.ones_like(right), total, count, nearest=3, gap=0.3)
    true = torch.arange(40).repeat_interleave(6)
    moved = (taken >= 0) & (taken != labels)
    assert moved.sum() > 0.6 * (~right).sum()
    assert (taken == true)[moved].float().mean() > 0.95


def test_an_id_whose_last_member_would_move_keeps_it_and_so_does_the_next():
    labels, live = torch.tensor([0, 1, 2]), torch.ones(3, dtype=torch.bool)
    assert noise.spared(torch.tensor([1, 2, -1]), labels, live, 3).tolist() == [0, 1, 2]
    assert (
        noise.spared(torch.tensor([-1, 0, 2, 1]), torch.tensor([0, 1, 2, 0]), torch.tensor([True, True, True, False]), 3).tolist()[2] == 2
    )


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
    trainer = Trainer(config(steps=160, lr=5e-3, warm_up=0.5, refresh=20, purge=0.12, purge_every=1), made, ignore)
    trainer.run()
    assert trainer.labelling.weights[1] == 0
    assert trainer.labelling.weights.sum() >= 18
    checkpoint.save(trainer, tmp_path)
    again = Trainer(config(steps=160, purge=0.12), made, ignore)
    checkpoint.restore(again, tmp_path)
    assert np.array_equal(again.labelling.weights, trainer.labelling.weights)
