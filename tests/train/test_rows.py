"""Rows and their optimizer: against a loop over rows, in every tier; checkpoints that move; rounding that keeps small steps."""

import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from train.head.prototypes import HeadConfig, PrototypeHead, whole_head
from train.head.rows import BETAS, EPS, pseudo_random_rows, round_stochastically

U, D = 11, 6


def head(rank=0, world=1, rows=U, seed=0, folder=None, start=None, **config):
    return PrototypeHead(rows, D, HeadConfig(**config), rank=rank, world=world, seed=seed, folder=folder, start=start)


def train(made, steps=3, at=0, labels=(0, 3, 3, 7)):
    torch.manual_seed(at)
    for step in range(at, at + steps):
        h = F.normalize(torch.randn(len(labels), D), dim=1)
        made.loss(h, torch.tensor(labels), prefixes=(3, D), scale=8.0, margin=0.2, step=step).backward()
        made.update(0.05)
    return made


def rows_of(made):
    return made.store.fetch(torch.arange(made.store.n))


SPARSE = {"kind": "sparse", "neighbours": 1, "random": 1, "refresh": 1}  # what was looked up before is in no checkpoint


def test_the_optimizer_equals_a_loop_over_rows():
    fast, rows = head(**SPARSE), rows_of(head()).double()
    first, second, count = torch.zeros(U, D).double(), torch.zeros(U).double(), [0] * U
    torch.manual_seed(0)
    for step in range(6):
        h, y = F.normalize(torch.randn(3, D), dim=1), torch.randint(U, (3,))
        fast.loss(h, y, prefixes=(D,), scale=8.0, margin=0.2, step=step).backward()
        for fetched in fast.pending:
            for u, g in zip(fetched.ids.tolist(), fetched.leaf.grad.double(), strict=True):
                count[u] += 1
                first[u] = BETAS[0] * first[u] + (1 - BETAS[0]) * g
                second[u] = BETAS[1] * second[u] + (1 - BETAS[1]) * (g * g).mean()
                unbiased = first[u] / (1 - BETAS[0] ** count[u]), second[u] / (1 - BETAS[1] ** count[u])
                rows[u] -= 0.05 * unbiased[0] / (unbiased[1].sqrt() + EPS)
        fast.update(0.05)
    assert 0 < max(count) != min(count)
    torch.testing.assert_close(rows_of(fast).double(), rows, atol=1e-6, rtol=1e-5)
    assert fast.store.scalar("count", torch.arange(U)).tolist() == count


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_tier_gives_the_same_rows(tmp_path, dtype):
    tiers = [
        train(head(storage=storage, dtype=dtype, folder=tmp_path if storage == "file" else None, **SPARSE))
        for storage in ("device", "host", "file")
    ]
    for other in tiers[1:]:
        assert torch.equal(rows_of(tiers[0]), rows_of(other))
    assert (tmp_path / "weight-0.rows").stat().st_size == U * D * tiers[0].store.dtype.itemsize


def test_rows_in_a_file_need_a_folder():
    with pytest.raises(ValueError, match="needs a folder"):
        head(storage="file")


def test_what_nobody_touched_takes_no_disk(tmp_path):
    rows = 1_000_000
    made = PrototypeHead(rows, 64, HeadConfig(**SPARSE, storage="file", dtype="bfloat16"), folder=tmp_path, index=Few())
    made.loss(F.normalize(torch.randn(4, 64), dim=1), torch.tensor([5, 70_000, 5, 999_999]), prefixes=(64,), scale=8, margin=0).backward()
    made.update(0.1)
    assert (tmp_path / "weight-0.rows").stat().st_size == rows * 128
    assert sum(file.stat().st_blocks for file in tmp_path.iterdir()) * 512 < 1 << 20
    (name,) = made.save(tmp_path)
    assert (tmp_path / name).stat().st_size < 20_000
    touched = torch.tensor([5, 70_000, 999_999])
    whole = PrototypeHead(rows, 64, HeadConfig(dtype="bfloat16", storage="host"))
    whole.restore(tmp_path)
    assert torch.equal(whole.store.fetch(touched), made.store.fetch(touched))
    assert torch.equal(whole.store.fetch(touched - 1), pseudo_random_rows(touched - 1, 64, 0).bfloat16().float())


class Few:
    """An index that finds the next prototype."""

    def build(self, blocks, n):
        self.n = n

    def search(self, vectors, k):
        return torch.ones(len(vectors), k), torch.arange(len(vectors))[:, None].expand(-1, k)


def test_start_values_depend_on_seed_and_id_alone():
    ids = torch.randperm(5000)
    rows = pseudo_random_rows(ids, 32, 3)
    assert torch.equal(rows, pseudo_random_rows(torch.arange(5000), 32, 3)[ids])
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(5000))
    cosine = (rows @ rows.T).triu(1).flatten()
    cosine = cosine[cosine != 0]
    assert abs(float(cosine.mean())) < 1e-3
    assert float(cosine.std()) == pytest.approx(1 / math.sqrt(32), rel=0.01)
    assert float((rows * pseudo_random_rows(ids, 32, 4)).sum(1).abs().mean()) < 0.2


def test_rounding_keeps_steps_that_are_too_small_for_bfloat16():
    generator = torch.Generator().manual_seed(0)
    x = torch.full((1000, 8), 1.0, dtype=torch.bfloat16)
    for _ in range(50):
        x = round_stochastically(x.float() + 1e-4, torch.bfloat16, generator)
    assert float(x.float().mean()) == pytest.approx(1.005, abs=3e-4)
    assert torch.equal(torch.full((4,), 1.0).to(torch.bfloat16) + 1e-4, torch.full((4,), 1.0).to(torch.bfloat16))
    odd = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0])
    assert str(round_stochastically(odd, torch.bfloat16, generator).tolist()) == str(odd.tolist())


def test_losses_of_one_step_add_up_to_the_big_batch():
    torch.manual_seed(1)
    h, y = F.normalize(torch.randn(8, D), dim=1), torch.randint(U, (8,))
    kept = {"prefixes": (3, D), "scale": 8.0, "margin": 0.2}
    big, small = head(), head()
    big.loss(h, y, **kept).backward()
    for part in range(4):
        (small.loss(h[part::4], y[part::4], **kept) / 4).backward()
    big.update(0.05)
    small.update(0.05)
    torch.testing.assert_close(rows_of(small), rows_of(big), atol=1e-5, rtol=1e-5)


def test_a_skipped_step_moves_nothing():
    made = head()
    before = rows_of(made)
    made.loss(F.normalize(torch.randn(2, D), dim=1), torch.tensor([0, 1]), prefixes=(D,), scale=8.0, margin=0.2, step=1).backward()
    made.discard()
    made.update(0.05)
    made.loss(F.normalize(torch.randn(2, D), dim=1), torch.tensor([0, 1]), prefixes=(D,), scale=8.0, margin=0.2, step=1).backward()
    made.loss(F.normalize(torch.randn(2, D), dim=1), torch.tensor([0, 1]), prefixes=(D,), scale=8.0, margin=0.2, step=2)
    made.update(0.05)  # step 1 was never finished, step 2 has no gradient
    assert torch.equal(rows_of(made), before)


def test_stale_rows_are_those_not_touched_for_a_while():
    made = head(**SPARSE)
    assert made.stale_share(0, 5) == 0
    train(made, steps=10)
    touched = int((made.store.slot > 0).sum())
    assert made.stale_share(9, 20) == 0  # the head is younger
    assert made.stale_share(9, 9) == pytest.approx(1 - touched / U)
    assert made.stale_share(100, 50) == 1
    assert train(head(), steps=10).stale_share(9, 5) == 0


# --- Checkpoints


def split(whole, world, folder):
    """The files that `world` workers would have written of the whole head."""
    folder.mkdir()
    with tempfile.TemporaryDirectory() as all_in_one:
        whole.save(Path(all_in_one))
        for rank in range(world):
            part = PrototypeHead(whole.rows, D, whole.config, rank=rank, world=world, seed=whole.seed)
            part.restore(Path(all_in_one))
            part.save(folder)
    return folder


@pytest.mark.parametrize("config", [SPARSE, {"kind": "full"}, {**SPARSE, "dtype": "bfloat16", "subcentres": 3}], ids=str)
def test_two_workers_to_one_to_three_keep_every_bit(tmp_path, config):
    before = train(head(**config))
    one = head(**config)
    one.restore(split(before, 2, tmp_path / "two"))
    again = head(**config)
    again.restore(split(one, 3, tmp_path / "three"))
    assert torch.equal(rows_of(again), rows_of(before))
    assert again.born == before.born
    known, wanted = whole_head(tmp_path / "three"), whole_head(tmp_path / "two")
    assert known.keys() == wanted.keys() == {"weight", "rows", "moment", "second", "count", "last", "wins"}
    assert all(torch.equal(known[k], wanted[k]) for k in known)
    torch.testing.assert_close(F.normalize(known["weight"].float(), dim=1), before.whole())
    for made in (again, before):
        train(made, at=3)
    assert torch.equal(rows_of(again), rows_of(before))  # the optimizer goes on as if nothing had been


def test_prototypes_added_removed_merged_and_split(tmp_path):
    before = train(head(**SPARSE))
    old, folder = rows_of(before), split(before, 2, tmp_path / "two")
    mapping = np.array([3, -1, 10, 7, 7, 0, -1])  # 3, 10, 7 and 0 live on, 7 in two; the others are gone
    parts = [PrototypeHead(7, D, HeadConfig(**SPARSE), rank=r, world=3, seed=5) for r in range(3)]
    for part in parts:
        part.restore(folder, mapping)
    new = torch.cat([rows_of(part) for part in parts])
    kept = mapping >= 0
    assert torch.equal(new[kept], old[mapping[kept]])
    assert torch.equal(new[~kept], pseudo_random_rows(torch.tensor([1, 6]), D, 5))
    counts = torch.cat([part.store.scalar("count", torch.arange(part.store.n)) for part in parts])
    assert torch.equal(counts[kept], before.store.scalar("count", torch.from_numpy(mapping[kept])))
    assert counts[~kept].tolist() == [0, 0]


def test_new_prototypes_keep_what_they_were_started_from(tmp_path):
    folder = split(train(head(**SPARSE)), 1, tmp_path / "one")
    made = head(rows=U + 1, **SPARSE)
    centroids = F.normalize(torch.randn(U + 1, D), dim=1)
    made.start_from(centroids)
    made.restore(folder, np.append(np.arange(U), -1))
    assert torch.equal(made.store.fetch(torch.tensor([U]))[0], centroids[U])


@pytest.mark.parametrize(
    ("mapping", "said"),
    [
        (None, "11 prototypes, this run 12"),
        (np.arange(11), r"each of 12 prototypes, found shape \(11,\)"),
        (np.arange(12), r"\[11\]; allowed are -1 \(new\) and 0..10"),
    ],
)
def test_a_mapping_that_does_not_fit_is_named(tmp_path, mapping, said):
    folder = split(head(), 1, tmp_path / "one")
    with pytest.raises(ValueError, match=said):
        head(rows=12).restore(folder, mapping)


def test_missing_mixed_and_foreign_files_are_named(tmp_path):
    folder = split(train(head()), 3, tmp_path / "three")
    (folder / "head-1-of-3.safetensors").rename(tmp_path / "kept")
    with pytest.raises(ValueError, match=r"workers \['0 of 3', '2 of 3'\]"):
        whole_head(folder)
    (tmp_path / "kept").rename(folder / "head-1-of-3.safetensors")
    train(head()).save(folder)
    with pytest.raises(ValueError, match="every worker of one run"):
        head().restore(folder)
    (folder / "head-0-of-1.safetensors").unlink()
    save_file({"weight": torch.ones(2, 2)}, folder / "head-0-of-3.safetensors")
    with pytest.raises(ValueError, match="not a file of a prototype head"):
        head().restore(folder)
    with pytest.raises(ValueError, match=r"holds those of workers \[\]"):
        head().restore(tmp_path)


def test_other_dimensions_and_other_times_are_refused(tmp_path):
    folder = split(train(head()), 2, tmp_path / "two")
    with pytest.raises(ValueError, match="subcentres"):
        head(subcentres=2).restore(folder)
    later = train(head(seed=9))
    later.rank, later.world = 1, 2
    later.save(folder)
    with pytest.raises(ValueError, match="two minds"):
        head().restore(folder)


def test_a_given_start_rule_is_asked_and_its_rows_are_not_stored(tmp_path):
    def ones(ids):
        return F.normalize(1.0 + ids[:, None] * torch.arange(D), dim=1)

    made = train(head(start=ones, **SPARSE))
    made.save(tmp_path)
    again = head(start=ones, **SPARSE)
    again.restore(tmp_path)
    assert torch.equal(rows_of(again), rows_of(made))
    untouched = (made.store.slot == 0).nonzero()[:, 0]
    assert len(untouched)
    torch.testing.assert_close(rows_of(again)[untouched], ones(untouched))
    with pytest.raises(ValueError, match="a start rule that it does not know"):
        whole_head(tmp_path)


def test_the_files_are_plain_safetensors(tmp_path):
    made = train(head(**SPARSE))
    (name,) = made.save(tmp_path)
    read = load_file(tmp_path / name)
    assert torch.equal(read["weight"], rows_of(made)[read["ids"]])
    header = (tmp_path / name).read_bytes()
    said = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]
    assert json.loads(said["head"])["rows"] == U


# --- Starting


def test_centroids_start_the_rows_and_further_sub_centres_stand_apart():
    centroids = F.normalize(torch.randn(U, D), dim=1)
    centroids[4] = 0
    made = train(head(subcentres=2))
    made.start_from(centroids)
    rows = rows_of(made).view(U, 2, D)
    others = torch.arange(U) != 4
    assert torch.equal(rows[others, 0], centroids[others])
    cosine = (rows[others, 0] * rows[others, 1]).sum(1)
    assert 0.5 < float(cosine.min()) < float(cosine.max()) < 0.999
    assert rows[4].norm(dim=1).tolist() == pytest.approx([1, 1])
    assert int(made.store.scalar("count", torch.arange(2 * U)).sum()) == 0
    with pytest.raises(ValueError, match=r"11 prototypes of 6 dimensions, the centroids are \(3, 6\)"):
        made.start_from(centroids[:3])


def test_the_dominant_sub_centre_is_the_one_that_won_most():
    made = head(subcentres=2)
    rows = rows_of(made).view(U, 2, D)
    h = F.normalize(torch.stack([rows[0, 1], rows[0, 1], rows[0, 0], rows[5, 0]]), dim=1)
    made.loss(h, torch.tensor([0, 0, 0, 5]), prefixes=(D, 3), scale=8.0, margin=0.0).backward()
    made.update(0.0)
    assert made.store.scalar("wins", torch.arange(2 * U)).view(U, 2)[[0, 5]].tolist() == [[1, 2], [1, 0]]
    torch.testing.assert_close(made.whole()[[0, 5]], F.normalize(torch.stack([rows[0, 1], rows[5, 0]]), dim=1))
